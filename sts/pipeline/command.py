"""A verb of the command line: options that take several values, and how a value is refused."""

from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from sts.pipeline.config import ConfigError


class Verb(TyperCommand):
    """A command whose options take several values after one name: `--data A B`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Repeat the name before each value, as typer wants it: `--data A --data B`."""
        lists = {name for param in self.params if param.multiple for name in param.opts}
        words, name = [], ""
        for word in args:
            if word.startswith("--"):
                name = word if word in lists else ""
                words += [] if name else [word]
            else:
                words += [name, word] if name else [word]
        return super().parse_args(ctx, words)


def option(help: str, metavar: str | None = None, *names: str) -> Any:
    """What the help says of an option; `names`: instead of its parameter's."""
    return typer.Option(*names, help=help, metavar=metavar)


def refuse(option: str, value: Any, accepted: str) -> NoReturn:
    """End the verb with a line that names a value of the command line that is not accepted."""
    raise ConfigError("command line", f"--{option}", value, accepted)
