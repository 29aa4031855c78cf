"""A verb of the command line: options that take several values, how a value is refused, and how an
error ends it."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

import sts
from sts.pipeline.config import ConfigError

RESULTS = Path("results/mini")
MINI = Path("workflow/config/mini.yaml")
ABLATIONS = Path("workflow/ablations.yaml")
ELSEWHERE = "(this folder is not the project's repository: the verb finds its files there)"
INTERRUPTED = 130  # exit status of what Ctrl-C has ended


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


def _version(is_wanted: bool) -> None:
    if is_wanted:
        print(sts.__version__)
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="of this package")
]
Results = Annotated[Path, option("folder of a scale's results", "FOLDER")]
Scales = Annotated[list[Path], option("a scale; of several, a later one overrides", "FILE ...")]
Table = Annotated[Path, option("table of ablations", "FILE")]
Beside = Annotated[list[str], option("more pairs to compare", "ID:ID ...")]


def pairs_of(beside: list[str]) -> list[tuple[str, str]]:
    """The pairs of methods that an option Beside names."""
    return [(id, base) for id, _, base in (pair.partition(":") for pair in beside)]


def refuse(option: str, value: Any, accepted: str) -> NoReturn:
    """End the verb with a line that names a value of the command line that is not accepted."""
    raise ConfigError("command line", f"--{option}", value, accepted)


def say(error: BaseException, states: tuple[type[Exception], ...]) -> int:
    """Say in one line on stderr what has ended a verb; raises what is no fault of a user's again.

    Args:
        error: What was raised.
        states: Errors that say which file is not as it should be, and what to do.

    Returns:
        The exit status: 2 for what was asked, 1 for what is there.
    """
    _tell_torchrun(error)
    if isinstance(error, KeyboardInterrupt):
        print("Stopped; the same command goes on.", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, ConfigError):
        print(error, *(() if MINI.exists() else (ELSEWHERE,)), file=sys.stderr)
        return 2
    if isinstance(error, typer.TyperException):
        print(*error.format_message().split(), "(--help tells more)", file=sys.stderr)
        return 2
    is_ours = isinstance(error, FileNotFoundError) and error.errno is None  # it says what to do
    if is_ours or isinstance(error, states):
        print(error if is_ours else f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    raise error


def _tell_torchrun(error: BaseException) -> None:
    """Have torchrun, if it started this process, end its output with the traceback of the first
    process that failed: its own words at the end hide every traceback above them."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ and isinstance(error, Exception):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
