"""The house: who may import whom, and how large a function or a file may be."""

import ast
from pathlib import Path

import pytest

from sts.pipeline.run.follows import imports

ROOT = Path(__file__).parents[1]
MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_FILE = 60, 450
# A room is a file or a folder. It imports those before it, on no line of a function either.
ROOMS = [
    *("checks", "draws", "modules", "architectures", "schedule", "vtc", "sequence", "lds"),
    *("settings", "loss", "compression", "realised", "hooks", "scheme", "comparison", "callback"),
    "hosts",
    *(f"pipeline.{name}" for name in ("files", "tasks", "config", "command", "run", "data")),
    "pipeline.cost",
    *(f"pipeline.{name}" for name in ("train", "evaluate", "plan", "measure", "search")),
    *(f"pipeline.{name}" for name in ("report", "verify")),
    *("pipeline.look", "mini", "__main__"),
]
FILES = sorted((ROOT / "sts").rglob("*.py"))


def room_of(file: Path) -> str | None:
    """The room that a file of the package lies in; None for the package's faces."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    rooms = [room for room in ROOMS if f"{module}.".startswith(f"sts.{room}.")]
    return max(rooms, key=len, default=None)


def test_every_file_lies_in_a_room():
    faces = {ROOT / "sts/__init__.py", ROOT / "sts/pipeline/__init__.py"}
    assert {file for file in FILES if room_of(file) is None} == faces


def test_a_room_imports_only_rooms_before_it():
    upwards = []
    for file in FILES:
        if (room := room_of(file)) is None:
            continue
        for other in filter(room_of, imports(file)):
            if ROOMS.index(room_of(other)) > ROOMS.index(room):
                upwards.append(f"{file.relative_to(ROOT)} imports {other.relative_to(ROOT)}")
    assert FILES and not upwards


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
