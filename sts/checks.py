"""How a value that is not accepted is refused: by name, with the value and what is accepted."""


class NotAccepted(ValueError):
    """A value that is not accepted; `name`, `value` and `accepted` for whoever words it anew."""

    def __init__(self, name: str, value: object, accepted: str):
        super().__init__(f"{name}={value!r}: expected {accepted}")
        self.name, self.value, self.accepted = name, value, accepted


def expect(ok: bool, name: str, value: object, accepted: str) -> None:
    """Raise a ValueError (NotAccepted) that names the argument, its value and what is accepted."""
    if not ok:
        raise NotAccepted(name, value, accepted)
