"""The house: who may import whom, and how large a function or a file may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_FILE = 60, 450
# A room is a file or a folder. It imports those before it, on no line of a function either.
ROOMS = [
    *("checks", "draws", "modules", "architectures", "schedule", "vtc", "sequence", "lds"),
    *("settings", "loss", "compression", "realised", "hooks", "scheme", "callback"),
    *(f"pipeline.{name}" for name in ("files", "tasks", "config", "run", "data", "cost")),
    *(f"pipeline.{name}" for name in ("train", "evaluate", "plan", "measure", "report")),
    *("mini", "__main__"),
]
FILES = sorted((ROOT / "sts").rglob("*.py"))


def room_of(module: str) -> str | None:
    """The room that a module of the package lies in; None for the package's faces and others."""
    rooms = [r for r in ROOMS if module == f"sts.{r}" or module.startswith(f"sts.{r}.")]
    return max(rooms, key=len, default=None)


def imported_modules(node: ast.AST) -> Iterator[str]:
    """Names of modules that a file imports, inside functions too, but not for type checks alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imported_modules(child)


def test_every_file_lies_in_a_room():
    faces = {"sts", "sts.pipeline"}
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES]
    named = [module.removesuffix(".__init__") for module in modules]
    assert {module for module in named if room_of(module) is None} == faces


def test_a_room_imports_only_rooms_before_it():
    upwards = []
    for file in FILES:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if (room := room_of(module)) is None:
            continue
        for name in imported_modules(ast.parse(file.read_bytes())):
            other = room_of(name)
            if other and ROOMS.index(other) > ROOMS.index(room):
                upwards.append(f"{module} imports {name}")
    assert not upwards


@pytest.mark.parametrize("folder", ["sts", "workflow", "recipes"])
def test_no_function_and_no_file_is_too_long_to_be_read_at_once(folder):
    too_long = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MOST_LINES_OF_A_FILE:
            too_long.append(f"{file.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    too_long.append(f"{file.relative_to(ROOT)}:{node.name}: {lines} lines")
    assert not too_long
