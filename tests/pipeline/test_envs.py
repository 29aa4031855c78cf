"""One lock: pip, conda and the package's own requirements agree."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement

from sts.pipeline.config import CODE
from sts.pipeline.files import read_json, write_json_atomic
from sts.pipeline.run import follows

ROOT = Path(__file__).resolve().parents[2]
LOCK = [
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if not line.startswith("#")
]
PINS = {Requirement(line).name.lower().replace("_", "-"): line for line in LOCK}


def version(name: str) -> str:
    return PINS[name].partition("==")[2]


def test_the_lock_pins_every_package_exactly():
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*", line) for line in LOCK), LOCK
    assert len(PINS) == len(LOCK)


def test_every_package_but_torch_is_installed_by_hash():
    text = (ROOT / "requirements.hashes").read_text()
    pins = re.findall(
        r"^([\w.-]+==\S+)(?: ; .*)? \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", text, re.M
    )
    names = {pin.lower().replace("_", "-").replace(".", "-") for pin in pins}
    expected = {pin.lower().replace("_", "-").replace(".", "-") for pin in LOCK}
    torch = {name for name in expected if name.startswith("torch==")}
    assert names == expected - torch and len(torch) == 1, "run `make lock`"


def test_the_conda_environment_is_the_lock():
    environment = yaml.safe_load((ROOT / "envs/sts.yaml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["channels"] == ["conda-forge"]  # conda asks the internet for any other name
    assert conda == ["python=3.11", "pip"]
    assert pip["pip"] == LOCK, "run `make envs/sts.yaml`"


def test_make_writes_the_conda_environment_from_the_lock(tmp_path):
    (tmp_path / "envs").mkdir()
    for name in ("Makefile", "envs/sts.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "requirements.lock").write_text("# a remark\nabc==1.0\nxyz==2.1\n")
    subprocess.run(["make", "-s", "envs/sts.yaml"], cwd=tmp_path, check=True)
    environment = yaml.safe_load((tmp_path / "envs/sts.yaml").read_text())
    assert environment == {
        "channels": ["conda-forge"],
        "dependencies": ["python=3.11", "pip", {"pip": ["abc==1.0", "xyz==2.1"]}],
    }


def test_there_is_one_environment_and_every_rule_that_runs_a_verb_uses_it():
    assert [file.name for file in (ROOT / "envs").iterdir()] == ["sts.yaml"]
    for file in (ROOT / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"^rule ", file.read_text(), flags=re.MULTILINE)[1:]:
            assert ("shell:" in rule) == ('"../../envs/sts.yaml"' in rule), rule


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}


def asked_for(*extras: str) -> dict[str, Requirement]:
    """What the package and these extras ask for, by name."""
    needs = [Requirement(text) for extra in ("", *extras) for text in ASKED[extra]]
    return {need.name.lower().replace("_", "-"): need for need in needs}


def test_the_lock_meets_what_the_package_asks_for():
    needs = asked_for("pipeline", "dev")
    del needs["pre-commit"]  # a habit of who likes it; nothing here imports it
    for name, need in needs.items():
        assert need.specifier.contains(version(name)), need


FLOORS = {  # folders -> the extras whose packages their files may import
    ("sts/[!_]*.py", "sts/vtc/*.py", "sts/lds/*.py", "sts/architectures/*.py"): (),
    ("sts/**/*.py", "recipes/**/*.py"): ("pipeline",),
    ("tests/**/*.py", "examples/*.py", "workflow/*.py"): ("pipeline", "dev"),
}
IF_THERE = {
    "deepspeed",
    "liger_kernel",
    "axolotl",
    "lightning",
    "llamafactory",
    "swift",
}  # their users have them; not in the lock


def imports(file: Path) -> set[str]:
    """Names of the modules that a file imports anywhere."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module)
    return {name.partition(".")[0] for name in modules}


def test_what_a_floor_imports_is_what_its_extra_asks_for():
    packages = metadata.packages_distributions()
    own = {"sts", "recipes", "workflow", *(file.stem for file in (ROOT / "tests").glob("*.py"))}
    for patterns, extras in FLOORS.items():
        names = set().union(*(imports(file) for glob in patterns for file in ROOT.glob(glob)))
        for name in names - sys.stdlib_module_names - own - IF_THERE:
            names = {package.lower().replace("_", "-") for package in packages[name]}
            assert names & asked_for(*extras).keys(), f"{patterns} import {name}: of {names}"


def test_no_floor_knows_a_higher_one():
    """The library stands alone, and the pipeline without the mini scale."""
    pipeline, mini = CODE / "pipeline", CODE / "mini"
    for file in CODE.rglob("*.py"):
        if file.is_relative_to(mini) or file == CODE / "__main__.py":
            continue
        higher = (mini,) if file.is_relative_to(pipeline) else (pipeline, mini)
        for other in follows.imports(file):
            assert not any(map(other.is_relative_to, higher)), f"{file} imports {other}"


@pytest.mark.slow
def test_a_wheel_holds_the_whole_package_and_works_where_it_is_installed(tmp_path):
    """Built with what it asks for, from files without git; installed into a new environment."""
    source, made, new = tmp_path / "source", tmp_path / "made", tmp_path / "new"
    shutil.copytree(ROOT / "sts", source / "sts", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests/__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    def call(*words, ok=True):
        done = subprocess.run([*map(str, words)], cwd=tmp_path, capture_output=True, text=True,
                              env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)})  # fmt: skip
        assert (done.returncode == 0) is ok, done.stderr
        return done.stdout + done.stderr

    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", made, source)
    (wheel,) = made.glob("*.whl")
    assert wheel.name == "sparse_training_scheme-0.1.0.dev0-py3-none-any.whl"
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [file for file in (source / "sts").rglob("*") if file.is_file()]
    assert packed == {str(file.relative_to(source)) for file in files}
    assert "sts/py.typed" in packed
    call(sys.executable, "-m", "venv", new)
    call(new / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert "sparse-training-scheme[pipeline]" in call(new / "bin/sts", "config", ok=False)
    (site,) = new.glob("lib/*/site-packages")
    (site / "lock.pth").write_text(
        sysconfig.get_path("purelib")
    )  # the lock's packages, as they are
    assert (
        call(new / "bin/python", "-c", "import sts; print(sts.__version__, sts.sparsify)")[:10]
        == "0.1.0.dev0"
    )
    assert "Usage: " in call(new / "bin/sts", "--help")
    output = call(new / "bin/sts", "config", ok=False)
    assert output.count("\n") == 1 and "this folder is not the project's repository" in output


def test_the_tests_run_on_the_lock():
    for name in ("torch", "transformers", "snakemake", "lm-eval", "mlflow"):
        assert metadata.version(name).partition("+")[0] == version(name), name


def test_the_lock_is_closed():
    """Everything a pinned package needs is pinned too, so that pip has nothing to choose."""
    for name in PINS.keys() - {"torch"}:  # which has CUDA parts in some builds, and pins them
        for text in metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                needed = need.name.lower().replace("_", "-").replace(".", "-")
                names = {pin.replace(".", "-") for pin in PINS}
                assert needed in names or needed == "pip", f"{name} needs {text}"


@pytest.mark.parametrize("version", ["3.8.10", "3.10.13", "3.14.0", None])
def test_make_refuses_a_python_that_will_not_do_and_says_so(version, tmp_path):
    """None: there is no such program."""
    python = tmp_path / "python"
    if version:
        given = tuple(map(int, version.split(".")))
        python.write_text(
            f'#!{sys.executable}\nimport sys\nif sys.argv[1] == "-V":\n'
            f'    sys.exit(print("Python {version}"))\n'
            f"sys.version_info = {given}\nexec(sys.argv[2])\n"
        )
        python.chmod(0o755)
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    for name in ("requirements.lock", "requirements.hashes"):
        (tmp_path / name).touch()
    done = subprocess.run(
        ["make", "test", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    problem = f"{python} is Python {version}" if version else f"{python} was not found"
    output, *more = done.stderr.splitlines()
    assert output == f"{problem}; Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.11"
    assert len(more) == 1 and more[0].startswith("make")  # that it stops
    assert not (tmp_path / ".venv").exists()


def test_make_alone_explains_every_target():
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(targets.split()) == set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    output = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True)
    explained = re.findall(r"\bmake ([\w-]+)", output.stdout)
    assert sorted([*explained, "help"]) == sorted(targets.split())


LITTERING = """
import os, subprocess, sys, tempfile
from pathlib import Path
import huggingface_hub.constants, matplotlib, platformdirs

def test_that_litters(tmp_path, tmp_path_factory):
    command = [sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"]
    of_a_child = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    for folder in (
        tmp_path, tmp_path_factory.mktemp("shared"), tempfile.mkdtemp(), of_a_child,
        matplotlib.get_cachedir(), matplotlib.get_configdir(), huggingface_hub.constants.HF_HOME,
        platformdirs.user_cache_dir("snakemake"), os.environ["DVC_SITE_CACHE_DIR"],
    ):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "file").touch()
    assert "{}" == "passes"
"""


@pytest.mark.parametrize(("outcome", "left"), [("passes", 0), ("fails", 2)])
def test_the_tests_leave_nothing_behind_but_the_folders_of_one_that_failed(outcome, left, tmp_path):
    home, temporary, project = (tmp_path / name for name in ("home", "temporary", "project"))
    for folder in (home, temporary, project / "tests"):
        folder.mkdir(parents=True)
    for name in ("pyproject.toml", "tests/conftest.py"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    (project / "tests/test_it.py").write_text(LITTERING.replace("{}", outcome))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"], cwd=project, capture_output=True, text=True,
        env={"HOME": str(home), "TMPDIR": str(temporary), "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert (done.returncode == 0) is (left == 0), done.stdout
    files = {f.resolve() for place in (home, temporary) for f in place.rglob("*") if f.is_file()}
    assert len(files) == left, files


def test_the_python_of_the_tests_is_supported():
    assert (3, 11) <= sys.version_info < (3, 14)


@pytest.mark.parametrize(
    ("home", "given", "used"),
    [("/proc", {}, "{}/.snakemake/cache"), (".", {}, ""), ("/proc", {"XDG_CACHE_HOME": "."}, ".")],
)
def test_make_needs_no_home_folder_to_write_in(home, given, used, tmp_path):
    show = 'include Makefile\nshow:\n\t@echo "$$XDG_CACHE_HOME"\n'
    (tmp_path / "show.mk").write_text(show)
    shutil.copy(ROOT / "Makefile", tmp_path)
    variables = {"PATH": os.environ["PATH"], "HOME": home, **given}
    shown = subprocess.run(
        ["make", "-sf", "show.mk", "show"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert (shown.stdout.strip(), shown.stderr) == (used.format(tmp_path), "")


@pytest.mark.parametrize(("given", "folder"), [([], "mini"), (["INTO=one_seed"], "one_seed")])
def test_make_reference_keeps_small_files_under_the_name_asked_for(given, folder, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    small = ["tables/main.md", "bench/main.json", "figures/loss.svg", "configs/dense.yaml",
             "runs/dense/seed0/eval.json", "runs/dense/seed0/eval/provenance.json",
             "runs/dense/seed0/a_stage.json", "tokens.json"]  # fmt: skip
    large = ["samples/colour.jsonl", "eval/key/mlflow.json"]
    large = [f"runs/dense/seed0/{name}" for name in large] + ["weights/k/model.safetensors"]
    for name in [*small, *large]:
        file = tmp_path / "results/mini" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    facts = tmp_path / "results/mini/runs/dense/seed0/eval/provenance.json"
    write_json_atomic(facts, {"git": None, "host": "mine", "python": "3"})
    subprocess.run(["make", "-s", "reference", *given], cwd=tmp_path, check=True)
    kept = tmp_path / "results/reference"
    assert read_json(next(kept.rglob("provenance.json"))) == {"git": None, "python": "3"}
    names = {str(file.relative_to(kept)) for file in kept.rglob("*") if file.is_file()}
    assert names == {f"{folder}/{name}" for name in small}
