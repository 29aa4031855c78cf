"""What a result depends on: the values of a configuration, without those that do nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pydantic import BaseModel

from sts.pipeline.files import sha256_json

ALWAYS = object()


@dataclass(frozen=True)
class Neutral:
    """Marks a key by the value at which it does nothing.

    There it is left out of the identity, so that a new key retrains nothing. A default that changes
    from it does. ALWAYS: no result depends on the key.
    """

    value: Any


def identity(part: Any) -> Any:
    """What a result depends on of a part of a configuration: its values without neutral ones."""
    if isinstance(part, Mapping):
        return {key: identity(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [identity(item) for item in part]
    if isinstance(part, float) and part.is_integer():
        return int(part)  # 1.0 is the same value as 1
    if isinstance(part, BaseModel):
        marks = {
            name: [mark.value for mark in field.metadata if isinstance(mark, Neutral)]
            for name, field in type(part).model_fields.items()
        }
    elif is_dataclass(part):  # VTC or LDS
        marks = {
            setting.name: [value for key, value in setting.metadata.items() if key == "neutral"]
            for setting in fields(part)
        }
    else:
        return part
    return {
        name: identity(getattr(part, name))
        for name, neutral in marks.items()
        if ALWAYS not in neutral and getattr(part, name) not in neutral
    }


def config_hash(*parts: BaseModel | Mapping | list | str) -> str:
    """16 hex digits of what the given parts of a configuration say, neutral values left out."""
    return sha256_json([identity(part) for part in parts])[:16]
