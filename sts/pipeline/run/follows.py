"""What a job follows of the code: the files whose formulas its result depends on.

A training follows all that its story (train.py) imports, directly or not, and the file of each VTC
kind and LDS part that it uses. Left out are the observers, which only look on or whose effect
stands in the configuration's values, and the rooms of VTC and LDS where these don't act: an idle
scheme trains as no scheme does. Standard library and names alone, so that the workflow can ask in
any environment.
"""

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from sts import lds, vtc
from sts.pipeline.config import CODE, StageConfig
from sts.pipeline.run.provenance import fingerprint

STORY = CODE / "pipeline" / "train/train.py"
ARCHITECTURES = CODE / "architectures"
JOINED = ARCHITECTURES / "llava.py"  # of the model that is joined of parts
LOOKS_ON = [
    *(CODE / "pipeline" / room for room in ("config", "cost", "run", "tasks", "files.py")),
    *(CODE / name for name in ("checks.py", "settings.py", "realised.py")),
    ARCHITECTURES / "_refused.py",
]


def looks_on(file: Path) -> bool:
    """Whether a file only looks on, or its effect stands in the configuration's values."""
    return any(file.is_relative_to(room) for room in LOOKS_ON)


ROOMS = {"vtc": (CODE / "compression.py", CODE / "vtc"), "lds": (CODE / "lds",)}


def training(stage: StageConfig, family: str = "joined") -> list[Path]:
    """The source files that a training of this stage follows; family: of the model. A whole
    checkpoint may be of any architecture."""
    files: set[Path | None] = {STORY, JOINED}
    if family == "whole":
        files |= set(ARCHITECTURES.glob("*.py"))
    if stage.compresses:
        files.add(vtc.source_of(stage.vtc.kind))
    if stage.skips:
        files |= {lds.source_of(name) for name in (stage.lds.depth, stage.lds.unit)}
    acts = {"vtc": stage.compresses, "lds": stage.skips}
    closed = [room for name, rooms in ROOMS.items() if not acts[name] for room in rooms]
    return _without(files - {None}, closed)


def _without(files: set[Path], closed: list[Path]) -> list[Path]:
    """The files and what they import, without observers and the rooms that are closed."""

    def left_out(file: Path) -> bool:
        return looks_on(file) or any(file.is_relative_to(room) for room in closed)

    return imported(files, left_out)


def imported(files: Iterable[Path], left_out: Callable[[Path], bool] = looks_on) -> list[Path]:
    """The files and all of this package that they import, directly or not, but for those that are
    left out. Imports that serve type checking alone don't count."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in found and not left_out(file):
            found.add(file)
            waiting += imports(file)
    return sorted(found)


@cache
def imports(file: Path) -> tuple[Path, ...]:
    """The files of this package that a file of it names in its imports, inside functions too; of a
    package that holds templates, these."""
    if file.suffix != ".py":
        return ()
    templates = file.parent.glob("*.jinja") if file.name == "__init__.py" else ()
    tree = ast.parse(file.read_bytes(), filename=str(file))
    named = (path for name in _names(tree) if (path := _file_of(name)))
    return (*named, *templates)


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
    return next(
        (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None
    )


@cache
def code(*files: Path) -> str:
    """What these files compute (provenance.fingerprint), read once a process."""
    return fingerprint(*files)
