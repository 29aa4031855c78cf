"""What a value may be, and how another is refused: by name, value and what is accepted."""

from collections.abc import Callable, Collection
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
class Rule:
    """What a setting accepts: the check of a value, words for it, and its JSON schema."""

    accepts: Callable[[object], bool]
    text: Callable[[], str]
    schema: Callable[[], dict[str, Any]]

    def __str__(self) -> str:
        return self.text()


def one_of(table: Collection[str]) -> Rule:
    """One of the names of a table, also of those that are entered later."""
    return Rule(
        lambda value: isinstance(value, str) and value in table,
        lambda: f"one of {', '.join(table)}",
        lambda: {"enum": [*table]},
    )


def interval(low: float, high: float, excluded: tuple[float, ...] = ()) -> Rule:
    """A number from `low` to `high`; `excluded` are the ends that are not accepted."""
    left, least = ("(", "exclusiveMinimum") if low in excluded else ("[", "minimum")
    right, most = (")", "exclusiveMaximum") if high in excluded else ("]", "maximum")
    return Rule(
        lambda value: is_number(value) and low <= value <= high and value not in excluded,
        lambda: f"a number in {left}{low}, {high}{right}",
        lambda: {"type": "number", least: low, most: high},
    )


LAYERS = Rule(
    lambda value: is_number(value, int) and value >= 0,
    lambda: "0 or more layers",
    lambda: {"type": "integer", "minimum": 0},
)
FLAG = Rule(
    lambda value: isinstance(value, bool), lambda: "true or false", lambda: {"type": "boolean"}
)
