"""How a value that is not accepted is refused: file, key, value, and what would be accepted."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from sts.checks import NotAccepted
from sts.pipeline.config.base import NAME_ACCEPTED

ModelT = TypeVar("ModelT", bound=BaseModel)


class ConfigError(ValueError):
    """A value that is not accepted: which file, key and value, and what would be accepted."""

    def __init__(self, file: str | Path, key: str, value: Any, accepted: str):
        text = f"{file}: {key}: {value!r} is not accepted. Accepted: {accepted}"
        super().__init__(text + _near(key, value, accepted))
        self.key, self.value, self.accepted = key, value, accepted


def _near(key: str, value: Any, accepted: str) -> str:
    """A question, if what was written is nearly a name among those that are accepted."""
    is_of_keys, is_of_values = (accepted.startswith(begin) for begin in ("the keys ", "one of "))
    if not (is_of_keys or (is_of_values and isinstance(value, str))):
        return ""
    word = key.rpartition(".")[2] if is_of_keys else value
    near = get_close_matches(word, re.findall(r"[\w./-]+", accepted), n=1)
    return f". Did you mean {near[0]}?" if near else ""


def parsed(model: type[ModelT], content: Any, file: str | Path, ablation: str = "") -> ModelT:
    """`content` as a `model`, checked by pydantic.

    Args:
        model: The block that `content` is to be.
        content: A mapping, as it was read.
        file: Names the file in an error.
        ablation: The entry that `content` is of, which then begins the keys in an error.

    Raises:
        ConfigError: The first problem.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"] if str(part) not in _TAGS)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, NotAccepted):  # VTC.keep, or stages.x.init: the key goes on after the dot
        key = f"{key}.{cause.name.partition('.')[2]}".strip(".")
        value, accepted = cause.value, cause.accepted
    else:
        value, accepted = problem["input"], _accepted(model, problem)
    if ablation:  # which names its stages without `stages`
        key = f"{ablation}.{key.removeprefix('stages.')}"
    raise ConfigError(file, key, value, accepted)


# what pydantic puts into a key that nobody wrote
_TAGS = ("", "[key]", "[rate]", "[rates]", "[share]", "[shares]")
_LIMITS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
_WORDS = {  # by pydantic's type of the problem
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "too_short": "at least one",
    "invalid_key": "text for every key",
    "string_pattern_mismatch": NAME_ACCEPTED,  # names are the only text that has a pattern
}


def _accepted(model: type[BaseModel], problem: Mapping) -> str:
    """What a key takes, in words."""
    kind, loc, context = problem["type"], problem["loc"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"the keys {', '.join(_fields(_place(model, loc[:-1])[0]))}"
    type_, field = _place(model, loc)
    if kind == "missing":
        return f"a value: {field.description}"
    if kind == "literal_error":
        return f"one of {context['expected']}"
    marks = field.metadata if field else []
    limits = [(op, getattr(mark, op)) for mark in marks for op in _LIMITS if hasattr(mark, op)]
    if kind.startswith(("greater", "less")):
        word = "a whole number" if type_ is int else "a number"
        limits = limits or context.items()  # which a union has in its members
    else:
        word = _WORDS.get(kind, problem["msg"])
    text = f"{word} {' and '.join(f'{_LIMITS[op]} {limit}' for op, limit in limits)}".strip()
    return f"{text} ({field.description})" if field and field.description else text


def _place(model: type[BaseModel], loc: tuple) -> tuple[Any, Any]:
    """The type of what lies at a key, and the last field on the way there."""
    type_, field = model, None
    for part in loc:
        if get_origin(type_) is dict:  # `part` is a name of the user's
            type_ = get_args(type_)[1]
        elif part in _fields(type_):
            field = _fields(type_)[part]
            type_ = field.annotation
    return type_, field


def _fields(block: Any) -> dict[str, Any]:
    """The keys of a block; none of another type."""
    fields = getattr(block, "model_fields", {})
    return {field.alias or name: field for name, field in fields.items()}
