"""What a job follows of the code: the files whose formulas its result depends on.

Folders are the rule. A job follows the file that does its work and all of this package that it
imports, directly or not, except `LOOKS_ON`: what only says values, or looks on. So a training,
whose story is train.py, follows the library, data/ and train/. Of VTC and LDS it follows the files
of the kind and the parts that it uses, and nothing where they don't act: an idle scheme trains as
none does.

Standard library and names alone, so that the workflow can ask in any environment.
"""

import ast
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from sts import lds, vtc
from sts.pipeline.config import CODE, Config, StageConfig, config_hash
from sts.pipeline.run.provenance import fingerprint, parsed
from sts.pipeline.tasks import registry as benchmarks

STORY = CODE / "pipeline/train/train.py"
ARCHITECTURES = CODE / "architectures"
JOINED = ARCHITECTURES / "llava.py"  # of the model that is joined of parts
ROOMS = {  # what is followed where it acts alone
    "vtc": (CODE / "compression.py", CODE / "vtc"),
    "lds": (CODE / "lds",),
    "samples": (CODE / "pipeline/train/subset.py",),
}
LOOKS_ON = tuple(
    CODE / name
    for name in (
        "pipeline/config",  # values, which a job follows as values
        "pipeline/plan.py",  # who trains what
        "pipeline/tasks",  # of these an evaluation follows the files of its benchmarks
        "pipeline/cost",  # what it costs; the timing follows the files whose numbers it writes
        "pipeline/run",  # where it runs, how far it is
        "pipeline/files.py",  # how files are read and written
        "pipeline/train/held_out.py",  # what is measured between two steps
        "pipeline/train/fetch.py",  # how a model gets here, which its manifest names
        "settings.py",  # values
        "checks.py",  # errors
        "architectures/_refused.py",  # errors
        "realised.py",  # counts of what was done
    )
)


class PlanError(RuntimeError):
    """A job is not the one that was planned."""


def training(stage: StageConfig, family: str = "joined") -> list[Path]:
    """The source files that a training of a stage follows. family: that of the model; a `whole`
    checkpoint may be of any architecture."""
    files: set[Path | None] = {STORY, JOINED}
    idle: tuple[Path, ...] = ROOMS["samples"] if stage.samples == 1 else ()
    if family == "whole":
        files |= set(ARCHITECTURES.glob("*.py"))
    if stage.compresses:
        files.add(vtc.source_of(stage.vtc.kind))
    else:
        idle += ROOMS["vtc"]
    if stage.skips:
        files |= {lds.source_of(name) for name in (stage.lds.depth, stage.lds.unit)}
    else:
        idle += ROOMS["lds"]
    return imported(files - {None}, idle)


def of_training(config: Config, stage: str) -> list[str]:
    """Hashes of the values and of the code that a training of a stage follows."""
    block = config.stage(stage)
    return [config_hash(block.identity()), code(*training(block, config.model.family))]


def of_evaluation(config: Config) -> list[str]:
    """The same of an evaluation, which follows the files of its benchmarks too."""
    story = imported([CODE / "pipeline/evaluate/evaluate.py"])
    tasks = benchmarks.sources(config.evaluate.benchmarks)
    return [config_hash(config.evaluate), code(*story, *tasks)]


def check_plan(planned: Sequence[str], here: Sequence[str]) -> None:
    """Raise PlanError if what a call of the workflow has planned by is not what is here: of what
    was edited since, the result would stand under the name of what was not."""
    for what, before, now in zip(("configuration", "code"), planned, here, strict=False):
        if before != now:
            raise PlanError(
                f"the {what} that this job follows has changed since the call began ({before} "
                f"then, {now} now). Nothing was computed: give the same command again"
            )


def imported(files: Iterable[Path], idle: Iterable[Path] = ()) -> list[Path]:
    """The files and all of this package that they import, directly or not, but for `LOOKS_ON` and
    the files and folders `idle`. Imports that serve type checking alone don't count."""
    left_out = (*LOOKS_ON, *idle)
    followed: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in followed and not _is_in(file, left_out):
            followed.add(file)
            waiting += imports(file)
    return sorted(followed)


@cache
def _is_in(file: Path, rooms: tuple[Path, ...]) -> bool:
    return any(map(file.is_relative_to, rooms))


@cache
def imports(file: Path) -> tuple[Path, ...]:
    """The files of this package that a file of it names in its imports, inside functions too; of a
    package that holds templates, these."""
    if file.suffix != ".py":
        return ()
    templates = file.parent.glob("*.jinja") if file.name == "__init__.py" else ()
    names = _names(parsed(file.read_bytes(), str(file)))
    return (*filter(None, map(_file_of, names)), *templates)


def _names(node: ast.AST) -> Iterator[str]:
    """Names of modules, and of what may be one in a package."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _names(child)


def _file_of(name: str) -> Path | None:
    """The file of a module of this package; None for any other name."""
    package, _, inner = name.partition(".")
    if package != CODE.name or not inner:
        return None
    path = CODE.joinpath(*inner.split("."))
    return next(filter(Path.is_file, (path.with_suffix(".py"), path / "__init__.py")), None)


@cache
def code(*files: Path) -> str:
    """What these files compute (provenance.fingerprint), read once a process."""
    return fingerprint(*files)
