"""DVC around the workflow: repro, push, pull on a clone, metrics, as docs/dvc.md says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT, environment, make_project

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
FILES = ("Makefile", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore")


def shell(folder: Path, command: str) -> str:
    """Output of a command in `folder`, with this environment as the project's .venv."""
    identity = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")}  # fmt: skip
    env = environment(
        **identity, MAKEFLAGS=f"BIN={BIN}", PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
        DVC_NO_ANALYTICS="1",
    )  # fmt: skip
    done = subprocess.run(
        command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def fake_environment(folder: Path) -> None:
    (folder / ".venv").mkdir()
    for name in ("requirements.lock", "requirements.hashes"):
        (folder / name).touch()
    (folder / ".venv/made-from-lock").touch()


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A repository whose mini scale was made by `dvc repro`, committed and pushed."""
    folder = make_project(tmp_path_factory.mktemp("dvc") / "project")
    for name in FILES:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    backbone = folder / "data/backbones/mini/config.json"
    backbone.parent.mkdir(parents=True, exist_ok=True)
    backbone.write_text("{}")
    with (folder / "sts/pipeline/evaluate/evaluate.py").open(
        "a"
    ) as file:  # scores, so that there are metrics
        file.write(
            "\ndef evaluate(config, ablation, seed, run, data, out):\n"
            "    write(out, {'benchmarks': {'colour': {'score': 0.9}}})\n"
        )
    with (folder / "sts/pipeline/report/tables.py").open(
        "a"
    ) as file:  # a table that can be plotted
        file.write(
            "\nwrite_one = write\n"
            "def write(path, value):\n"
            "    write_one(path, value)\n"
            "    if path.endswith('csv'):\n"
            "        Path(path).write_text('average,time_ratio\\n0.8,1.0\\n0.7,0.625\\n')\n"
        )
    fake_environment(folder)
    shell(folder, "git init -q && git add . && git commit -qm start")
    shell(
        folder, "dvc repro reproduce@mini && git add dvc.lock && git commit -qm results && dvc push"
    )
    return folder


def test_the_bytes_are_not_in_git_and_the_lock_names_them(published):
    tracked = shell(published, "git ls-files").split()
    assert not [name for name in tracked if name.startswith(("results", "data/mini"))]
    lock = (published / "dvc.lock").read_text()
    assert "path: results/mini" in lock and "path: data/mini" in lock


def test_a_second_repro_does_nothing(published):
    assert "up to date" in shell(published, "dvc repro reproduce@mini")


def test_repro_after_an_edit_does_not_delete_what_is_there(published):
    made = (published / "done.txt").read_text().count("instruct.json")
    tables = published / "sts/pipeline/report/tables.py"
    before = tables.read_text()
    tables.write_text(before + "\nDIGITS = 3\n")
    try:
        shell(published, "dvc repro reproduce@mini")
    finally:
        tables.write_text(before)
    assert (published / "done.txt").read_text().count("instruct.json") == made


def test_a_clone_pulls_touches_and_has_nothing_to_do(published):
    clone = published.parent / "clone"
    shell(published.parent, f"git clone -q {published} {clone}")
    shell(clone, "dvc pull prepare@mini reproduce@mini")
    assert (clone / "results/mini/tables/main.md").exists()
    shell(clone, "snakemake --cores all --touch")
    assert "Nothing to be done" in shell(clone, "snakemake --cores all")


def test_metrics_and_their_difference(published):
    shown = json.loads(shell(published, "dvc metrics show --json 2>/dev/null"))
    assert "results/mini/runs/sts/seed0/eval.json" in json.dumps(shown)
    file = published / "results/mini/runs/sts/seed0/eval.json"
    before = file.read_text()
    file.write_text(before.replace("0.9", "0.8"))
    try:
        difference = json.loads(shell(published, "dvc metrics diff HEAD --json 2>/dev/null"))
    finally:
        file.write_text(before)
    change = difference["results/mini/runs/sts/seed0/eval.json"]["benchmarks.colour.score"]
    assert (change["old"], change["new"]) == (0.9, 0.8)


def test_plots_hold_the_table_and_the_figures(published):
    shell(published, "dvc plots show")
    page = (published / "dvc_plots/index.html").read_text()
    assert "0.625" in page and "figures_pareto.svg" in page
