"""What the blocks of a configuration are made of: strict types, names, and where files lie."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any
from unicodedata import category

from annotated_types import Ge, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
)

from sts.checks import expect
from sts.settings import LDS, VTC

CODE = Path(__file__).resolve().parents[2]
MINI = CODE.parent / "workflow" / "config" / "mini.yaml"
SETS = (CODE / "mini" / "sets", CODE / "pipeline" / "data" / "sets")  # folders of data sets
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
NAME_ACCEPTED = "lower case letters, digits and _, a letter first, at most 64"


def up_to(most: int) -> Any:
    """A whole number of at least 1. What is above `most` is a slip of unit or of digits."""
    return Annotated[int, Ge(1), Le(most)]


def line(text: str, name: str = "") -> str:
    """The text. Raises NotAccepted, with `name`, for what is no line of printable characters."""
    is_line = bool(text.strip()) and not {"Cc", "Cs", "Zl", "Zp"} & {*map(category, text)}
    expect(is_line, name, text, "a line of text, without control characters")
    return text


def _distinct(items: list) -> list:
    expect(len({*items}) == len(items), "", items, "each once")
    return items


Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Line = Annotated[str, AfterValidator(line)]
Distinct = AfterValidator(_distinct)  # of a list
Share = Annotated[float, Ge(0), Le(1)]
Count = up_to(10**8)
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]  # what NumPy takes


class Block(BaseModel):
    """A mapping with known keys and strict types."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def _settings(kind: type) -> Any:
    """VTC or LDS of the library as a block of a configuration: a mapping with its settings."""
    names = [setting.name for setting in fields(kind)]
    keys = f"the keys {', '.join(names)}"

    def parse(value: Any) -> Any:
        if isinstance(value, kind):
            return value
        expect(isinstance(value, Mapping), kind.__name__, value, f"a mapping with {keys}")
        for key in value:
            expect(key in names, f"{kind.__name__}.{key}", value[key], keys)
        return kind(**value)

    return Annotated[kind, PlainValidator(parse), PlainSerializer(asdict)]


VTCSettings, LDSSettings = _settings(VTC), _settings(LDS)


def datasets() -> dict[str, Path]:
    """Name -> file of every data set of the package: what is in `SETS` and doesn't begin with _."""
    return {file.stem: file for folder in SETS for file in sorted(folder.glob("[!_]*.py"))}


def deep_merge(base: Mapping, delta: Mapping) -> dict:
    """`base` with the values of `delta`: mappings merge key by key, all else is replaced."""
    merged = dict(base)
    for key, value in delta.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = deep_merge(merged[key], value) if both else value
    return merged
