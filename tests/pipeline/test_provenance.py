"""Hashes follow what counts and nothing else; facts are collected in and outside a checkout."""

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sts.pipeline.files import (
    SpoiltError,
    read_json,
    sha256_file,
    sha256_json,
    write_json_atomic,
)
from sts.pipeline.run import provenance

ROOT = Path(__file__).parents[2]
CODE = """
def area(radius):
    return 3.14 * radius**2  # of a circle
"""
SAME = '''"""A module."""
# a comment


def area(
    radius,
):
    """Area of a circle."""
    "another string that does nothing"
    return (3.140 *
            radius ** 2)
'''


def print_of(tmp_path, code: str) -> str:
    file = tmp_path / "code.py"
    file.write_text(code, encoding="utf-8")
    return provenance.fingerprint(file)


def test_fingerprint_ignores_comments_docstrings_and_formatting(tmp_path):
    assert print_of(tmp_path, CODE) == print_of(tmp_path, SAME)


@pytest.mark.parametrize(
    "edit",
    [
        ("3.14", "3.1415"),
        ("radius**2", "radius**3"),
        ("def area", "def surface"),
        ("return ", "return -"),
        ("(radius)", "(radius=1)"),
    ],
)
def test_fingerprint_follows_formulas_and_names(tmp_path, edit):
    changed = CODE.replace(*edit)
    assert changed != CODE
    assert print_of(tmp_path, CODE) != print_of(tmp_path, changed)


def test_fingerprint_keeps_strings_that_are_used(tmp_path):
    assert print_of(tmp_path, 'kind = "a"\n') != print_of(tmp_path, 'kind = "b"\n')


def test_a_body_of_only_a_docstring_equals_pass(tmp_path):
    assert print_of(tmp_path, 'class A(Exception):\n    "doc"\n') == print_of(
        tmp_path, "class A(Exception):\n    pass\n"
    )


def test_fingerprint_tells_all_kinds_of_code_apart(tmp_path):
    lines = (
        "x = 1", "x = 1.0", "x = True", "x = '1'", "x = b'1'", "x = None", "x = ...", "x = y",
        "x = []", "x = ()", "x = [[]]", "x = [None]", "x = ['']", "x = f''", "x = f'{y}'",
        "x = f'{y!r}'", "x = f'{y:z}'", "x = f'{y:{z}}'", "x = {}", "x = {**y}", "x = {None: y}",
        "x = lambda: y", "x = lambda *, a: y", "x = lambda *, a=None: y", "x = 'é'", "x: y",
        "x += 1", "del x", "x()", "x.y = 1", "async def x(): pass",
        "def x(): pass", "def x(): return", "def x(): return None", "def x(y, /): pass",
        "def x(y): pass", "def x(*, y): pass", "def x(*y): pass", "def x(y) -> z: pass",
    )  # fmt: skip
    prints = [print_of(tmp_path, line + "\n") for line in lines]
    assert len(set(prints)) == len(lines)


def test_fingerprint_of_this_text_is_the_same_wherever_it_is_taken(tmp_path):
    """Found with Python 3.11, 3.12 and 3.13. Another value would train every run anew."""
    code = """
class A(list): pass
def shown(x: float, width: int = 8, *, unit: "str" = u"°C", **rest) -> str:
    text = f"{x:>{width}.{2}}" f"{unit!r}" + f'{"a" if rest else ""}'
    return text if x is not None and x != -1.5e300 else b"\\xff" * 3
"""
    assert print_of(tmp_path, code) == "b5e58d3a51eb34be"


def test_fingerprint_ignores_what_other_versions_of_python_put_into_the_tree(tmp_path, monkeypatch):
    code = "class A: pass\ndef f(x: int = 1) -> str: return f'{x:{x}}' f'{x:}' u'a'\n"
    before, parse = print_of(tmp_path, code), ast.parse

    def of_another_version(*args, **kwargs):
        tree = parse(*args, **kwargs)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                node._fields = ("type_params", *(f for f in node._fields if f != "type_params"))
                node.type_params = []  # of 3.12
            if isinstance(node, ast.JoinedStr):
                node.values.append(ast.Constant(""))  # of 3.12.1
            node._fields = (*node._fields, "news")
            node.news = None  # of who knows
        return tree

    monkeypatch.setattr(ast, "parse", of_another_version)
    assert print_of(tmp_path, code) == before


def other_pythons() -> list[str]:
    """Interpreters of other versions on this machine: those on PATH, and pyenv's."""
    places = [*map(Path, os.get_exec_path()), *Path.home().glob(".pyenv/versions/*/bin")]
    pythons = {}
    for minor in {11, 12, 13} - {sys.version_info.minor}:
        for file in (place / f"python3.{minor}" for place in places):
            if file.exists() and subprocess.run([file, "-V"], capture_output=True).returncode == 0:
                pythons[minor] = str(file)
    return sorted(pythons.values())


@pytest.mark.parametrize("python", other_pythons())
def test_another_python_has_the_same_fingerprints(python):
    files = sorted(map(str, Path(provenance.__file__).parent.rglob("*.py")))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import provenance\n"
        "for file in sys.argv[2:]: print(provenance.fingerprint(file))"
    )
    there = subprocess.run(
        [python, "-I", "-B", "-c", code, str(Path(provenance.__file__).parent), *files],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert there.stdout.split() == [provenance.fingerprint(file) for file in files]


STEP = """
import math
RATE = 0.5
def _size(x): return x + 1
def step(x):
    from math import pi
    return RATE * _size(x) * math.exp(pi)
"""
OTHER = "def _size(x): return x + 2\ndef other(x): return _size(x)\n"


def print_of_files(folder: Path, **files: str) -> str:
    """Fingerprint of Python files, name -> text."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.py" for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return provenance.fingerprint(*paths)


@pytest.mark.parametrize(
    "files",
    [
        {"b": OTHER, "a": STEP},
        {"renamed": STEP, "b": OTHER},
        {"a": STEP.replace("RATE = 0.5", "from x.y import RATE"), "b": OTHER, "c": "RATE = 0.5\n"},
        {"a": STEP.replace("RATE = 0.5", ""), "b": f"RATE = 0.5\n{OTHER}"},
        {"a": STEP.replace("import math", "from numpy import lib as math"), "b": OTHER},
        {"a": STEP.replace("    from math import pi\n", ""), "b": f"from math import pi\n{OTHER}"},
        {"a": f"{STEP}\nif TYPE_CHECKING:\n    from x import y\n__all__ = ['step']\n", "b": OTHER},
        {"a": STEP.replace("RATE = 0.5", "") + "RATE = 0.5\n", "b": OTHER},
        {"a": STEP, "b": OTHER, "copy": "RATE = 0.5\n"},
    ],
    ids=["order of files", "renamed file", "moved and imported", "moved", "import path",
         "import in a function", "for types", "place in the file", "defined twice"],
)  # fmt: skip
def test_where_a_definition_stands_and_what_is_imported_does_not_count(tmp_path, files):
    before = print_of_files(tmp_path / "before", a=STEP, b=OTHER)
    assert print_of_files(tmp_path / "after", **files) == before


@pytest.mark.parametrize(
    "files",
    [
        {"a": STEP.replace("0.5", "0.6"), "b": OTHER},
        {"a": STEP, "b": OTHER.replace("x + 2", "x + 3")},
        {"a": STEP, "b": f"{OTHER}NEW = 1\n"},
        {"a": STEP},
        {"a": f"{STEP}step(1)\n", "b": OTHER},
        {"a": f"{STEP}RATE += 1\n", "b": OTHER},
        # `step` now takes the `_size` of the file that it moved to
        {"a": STEP[: STEP.index("def step")], "b": OTHER + STEP[STEP.index("def step") :]},
    ],
    ids=[
        "constant",
        "formula",
        "one more",
        "one less",
        "call",
        "changed later",
        "another's helper",
    ],
)
def test_what_a_definition_computes_counts(tmp_path, files):
    before = print_of_files(tmp_path / "before", a=STEP, b=OTHER)
    assert print_of_files(tmp_path / "after", **files) != before


def test_a_helper_that_moves_along_is_no_other(tmp_path):
    before = print_of_files(tmp_path / "before", a=STEP, b=OTHER)
    assert print_of_files(tmp_path / "after", b=OTHER, c=STEP, a="import sts.c\n") == before


@pytest.mark.parametrize(
    ("first", "second"), [("x = 1", "x = 2"), ("x = 1", "x += 1"), ("x()", "y()")]
)
def test_the_order_counts_of_statements_that_bind_the_same_name_or_none(tmp_path, first, second):
    prints = {
        print_of(tmp_path, f"{one}\nz = 0\n{other}\n")
        for one, other in ((first, second), (second, first))
    }
    assert len(prints) == 2


def test_other_files_count_byte_by_byte(tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.yaml"
    first.write_text(CODE)
    second.write_text("task: x  # version 1\n")
    both = provenance.fingerprint(first, second)
    assert both == provenance.fingerprint(second, first)
    second.write_text("task: x  # version 2\n")
    assert both != provenance.fingerprint(first, second)


def test_fingerprint_names_the_file_that_is_not_python(tmp_path):
    with pytest.raises(SyntaxError) as caught:
        print_of(tmp_path, "def (")
    assert caught.value.filename.endswith("code.py")


def test_missing_packages_are_those_that_a_module_cannot_be_loaded_without(tmp_path):
    folder = tmp_path / "mine"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.py").write_text(
        "import json, no_such.part as part\nimport pytest\nimport mine.inner\n"
        "from . import nothing\nfrom .nowhere import nothing\n"
        "def f():\n    import needed_now_and_then\n"
    )
    (folder / "inner/b.py").write_text("from other_that_is_not.here import x\nfrom mine import a\n")
    assert provenance.missing_packages(folder) == ["no_such", "other_that_is_not"]
    assert provenance.missing_packages() == []  # of the package itself


def test_json_is_written_the_same_and_whole(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_json_atomic(path, {"b": 1, "a": [1.5, None]})
    first = path.read_bytes()
    write_json_atomic(path, {"a": [1.5, None], "b": 1})
    assert path.read_bytes() == first
    assert first.endswith(b"}\n")
    assert read_json(path) == {"a": [1.5, None], "b": 1}
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("place", range(0, 120, 7))
def test_json_in_which_a_bit_is_flipped_is_refused_or_says_the_same(tmp_path, place):
    path, value = tmp_path / "eval.json", {"score": 0.51, "n": [1, {"of": "sts"}]}
    write_json_atomic(path, value)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 4
    path.write_bytes(content)
    try:
        found = read_json(path)
    except SpoiltError as error:
        assert "Delete it and run snakemake again" in str(error)
    else:
        assert value.items() <= found.items()


KILLED = """
import os, signal
from sts.pipeline.files import write_json_atomic
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_json_atomic("x.json", 1)
"""


def test_what_a_killed_write_left_goes_with_the_next_and_a_living_one_is_let_be(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    died = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment)
    assert died.returncode == -9
    [left] = tmp_path.iterdir()
    living = tmp_path / f".x.json.{os.getppid()}.part"
    living.touch()
    write_json_atomic(tmp_path / "x.json", 2)
    assert left.suffix == ".part"
    assert set(tmp_path.iterdir()) == {living, tmp_path / "x.json"}


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "x.json"
    write_json_atomic(path, 1)
    with pytest.raises((ValueError, TypeError)):
        write_json_atomic(path, value)
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == "1\n"


def test_hashes_are_sha256(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(file) == of_abc
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert sha256_json([1, 2]) != sha256_json([2, 1])


def test_collect_is_json_and_says_what_ran(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-m", "sts", "reap"])
    facts = provenance.collect(config_hash="abc")
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["config_hash"], facts["command"]) == ("abc", "python3 -m sts reap")
    assert "pytest" in facts["packages"]
    assert facts["hardware"]["cores"] >= 1 and facts["hardware"]["cpu"]
    assert facts["hardware"]["memory_gib"] > 0


@pytest.fixture
def checkout(tmp_path):
    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True)

    (tmp_path / "results").mkdir()
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "results" / "table.csv").write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    return tmp_path


def test_git_knows_commit_and_edits(checkout):
    clean = provenance.git(checkout)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (checkout / "results" / "table.csv").write_text("2\n")
    assert provenance.git(checkout) == clean  # results are what a run makes
    (checkout / "code.py").write_text("x = 2\n")
    edited = provenance.git(checkout)
    assert edited["dirty"] is True
    assert edited["commit"] == clean["commit"]
    (checkout / "code.py").write_text("x = 3\n")
    assert provenance.git(checkout)["diff_sha256"] != edited["diff_sha256"]


def test_outside_a_checkout_and_without_git_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    outside = provenance.git(tmp_path)
    assert (outside["commit"], outside["dirty"]) == (None, None)
    assert "not a git repository" in outside["note"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git" in provenance.git(tmp_path)["note"]
