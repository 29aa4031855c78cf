"""What a value may be, and how one that is not accepted is refused: name, value, what is accepted.

`Names`, `Interval`, `Layers` and `Flag` say what a setting accepts: `accepts(value)` checks it,
`str()` words it and `schema()` is its JSON schema.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


class NotAccepted(ValueError):
    """A value that is not accepted; `name`, `value` and `accepted` for whoever words it anew."""

    def __init__(self, name: str, value: object, accepted: str):
        super().__init__(f"{name}={value!r}: expected {accepted}")
        self.name, self.value, self.accepted = name, value, accepted


def expect(ok: bool, name: str, value: object, accepted: str) -> None:
    """Raise a ValueError (NotAccepted) that names the argument, its value and what is accepted."""
    if not ok:
        raise NotAccepted(name, value, accepted)


def is_number(value: object, kind: Any = int | float) -> bool:
    """Whether a value is a number of this type; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class Names:
    """One of the names of a table, also of those that are entered later."""

    table: Collection[str]

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and value in self.table

    def __str__(self) -> str:
        return f"one of {', '.join(self.table)}"

    def schema(self) -> dict[str, Any]:
        return {"enum": [*self.table]}


@dataclass(frozen=True)
class Interval:
    """A number from `low` to `high`; `excluded` are the ends that are not accepted."""

    low: float
    high: float
    excluded: tuple[float, ...] = ()

    def accepts(self, value: object) -> bool:
        is_within = is_number(value) and self.low <= value <= self.high
        return is_within and value not in self.excluded

    def __str__(self) -> str:
        left = "(" if self.low in self.excluded else "["
        right = ")" if self.high in self.excluded else "]"
        return f"a number in {left}{self.low}, {self.high}{right}"

    def schema(self) -> dict[str, Any]:
        low = "exclusiveMinimum" if self.low in self.excluded else "minimum"
        high = "exclusiveMaximum" if self.high in self.excluded else "maximum"
        return {"type": "number", low: self.low, high: self.high}


class Layers:
    """A number of decoder layers."""

    def accepts(self, value: object) -> bool:
        return is_number(value, int) and value >= 0

    def __str__(self) -> str:
        return "0 or more layers"

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": 0}


class Flag:
    """Yes or no."""

    def accepts(self, value: object) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}
