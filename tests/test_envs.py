"""One lock: pip, conda and the package's own requirements agree."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
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


def test_the_conda_environment_is_the_lock():
    environment = yaml.safe_load((ROOT / "envs/sts.yaml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    assert conda == ["python=3.11", "pip"]
    assert pip["pip"] == LOCK, "run `make envs/sts.yaml`"


def test_there_is_one_environment_and_every_rule_that_runs_a_verb_uses_it():
    assert [file.name for file in (ROOT / "envs").iterdir()] == ["sts.yaml"]
    for file in (ROOT / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"^rule ", file.read_text(), flags=re.MULTILINE)[1:]:
            assert ("shell:" in rule) == ('"../../envs/sts.yaml"' in rule), rule


def test_the_lock_meets_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["pipeline"]:
        need = Requirement(text)
        assert need.specifier.contains(version(need.name.lower().replace("_", "-"))), text


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
                known = {pin.replace(".", "-") for pin in PINS}
                assert needed in known or needed == "pip", f"{name} needs {text}"


def test_make_refuses_an_old_python_and_says_so(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.8.10" && exit 0\nexit 1\n')
    old.chmod(0o755)
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    (tmp_path / "requirements.lock").touch()
    done = subprocess.run(
        ["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "Python 3.8.10; 3.11 or later is needed" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_python_of_the_tests_is_supported():
    assert sys.version_info >= (3, 11)
