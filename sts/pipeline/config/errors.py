"""How a value that is not accepted is refused: file, key, value, and what would be accepted."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from sts.checks import NotAccepted
from sts.pipeline.config.base import NAME_ACCEPTED

ModelT = TypeVar("ModelT", bound=BaseModel)


class ConfigError(ValueError):
    """A value that is not accepted: which file, key and value, and what would be accepted."""

    def __init__(self, file: str | Path, key: str, value: Any, accepted: str):
        super().__init__(f"{file}: {key}: {value!r} is not accepted. Accepted: {accepted}")
        self.file, self.key, self.value, self.accepted = str(file), key, value, accepted


def parsed(model: type[ModelT], content: Any, file: str | Path, ablation: str = "") -> ModelT:
    """Pydantic's check of `content`.

    Args:
        model: What `content` is to be.
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
    if isinstance(cause, NotAccepted):  # VTC.keep: of the library's settings, or stages.x.init
        inner = cause.name.partition(".")[2]
        key, value, accepted = f"{key}.{inner}".strip("."), cause.value, cause.accepted
    else:
        value, accepted = problem["input"], _accepted(model, problem)
    raise ConfigError(file, key_in_file(ablation, key), value, accepted)


_TAGS = ("", "[key]", "[rate]", "[rates]")  # what pydantic puts into a key that nobody wrote


def key_in_file(ablation: str, key: str) -> str:
    """A key as it stands in the file: an ablation names its stages without `stages`."""
    return f"{ablation}.{key.removeprefix('stages.')}" if ablation else key


def _accepted(model: type[BaseModel], problem: Mapping) -> str:
    """What a field takes, in words."""
    *parents, last = problem["loc"] or ("",)
    owner, field = model, None
    for part in (*parents, last):
        fields = {f.alias or name: f for name, f in getattr(owner, "model_fields", {}).items()}
        if problem["type"] == "extra_forbidden" and part == last:
            return f"the keys {', '.join(fields)}"
        if get_origin(owner) is dict:  # `part` is a name of the user's
            owner = get_args(owner)[1]
            continue
        field = fields.get(part, field)
        owner = field.annotation if field else owner
    if problem["type"] == "missing":
        return f"a value: {field.description}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] in _SHAPES:
        return _SHAPES[problem["type"]] + (f" ({field.description})" if field else "")
    if problem["type"] == "literal_error":
        return f"one of {problem['ctx']['expected']}"
    bounds = [_bound(item) for item in field.metadata] if field else []
    if problem["type"] in ("greater_than", "less_than") and not any(bounds):  # in a union
        return f"a number {_bound(SimpleNamespace(**problem['ctx']))}"
    kind = _KINDS.get(owner if isinstance(owner, type) else None)
    kind = kind or _PARSED.get(problem["type"])
    text = " ".join([kind, " and ".join(filter(None, bounds))]).strip() if kind else problem["msg"]
    return f"{text} ({field.description})" if field and field.description else text


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PARSED = {"int_type": _KINDS[int], "float_type": _KINDS[float], "bool_type": _KINDS[bool]}
_SHAPES = {
    "list_type": "a list",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "too_short": "at least one",
    "string_pattern_mismatch": NAME_ACCEPTED,  # names are the only text that has a pattern
}


def _bound(item: Any) -> str:
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    bounds = (f"{word} {getattr(item, op)}" for op, word in words.items() if hasattr(item, op))
    return next(bounds, "")
