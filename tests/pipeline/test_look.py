"""The verbs that look: targets, runs, compare, clean; and a call that names what there is not."""

import fcntl
from pathlib import Path

import pytest
import yaml
from project import SMOKE, make_project, run

from sts.__main__ import main
from sts.pipeline.config import load_ablations, load_scale, resolve
from sts.pipeline.files import write_json_atomic
from sts.pipeline.plan import load_plan

ROOT = Path(__file__).parents[2]
ABLATIONS = str(ROOT / "workflow/ablations.yaml")


def write_run(id: str, seed: int, key: str, score: float) -> None:
    """An evaluated run whose weights are of 1000 bytes."""
    folder, weights = Path(f"results/mini/runs/{id}/seed{seed}"), Path("results/mini/weights", key)
    manifest = {"ablation": id, "seed": seed, "stage": "instruct", "final_loss": 1 - score}
    write_json_atomic(folder / "instruct.json", manifest | {"weights": str(weights)})
    benchmarks = {"colour": {"score": score}, "text": {"score": score - 0.2}}
    write_json_atomic(folder / "eval.json", {"benchmarks": benchmarks})
    weights.mkdir(parents=True, exist_ok=True)
    (weights / "model.safetensors").write_bytes(bytes(1000))


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """dense and vtc with two seeds each, and what no manifest names."""
    scale, table = load_scale(ROOT / "workflow/config/mini.yaml"), load_ablations(ABLATIONS)
    monkeypatch.chdir(tmp_path)
    for id, score in (("dense", 0.8), ("vtc", 0.6)):
        config = resolve(scale, table[id]).model_dump(by_alias=True)
        file = Path(f"results/mini/configs/{id}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(config))
        for seed in (0, 1):
            write_run(id, seed, f"{id}{seed}", score + seed / 10)
    timing = {"variants": {"dense": {"time_s": 8.0}, "vtc": {"time_s": 6.0}}}
    write_json_atomic(Path("results/mini/bench/main.json"), timing)
    unnamed = Path("results/mini/weights/old")
    unnamed.mkdir()
    (unnamed / "model.safetensors").touch()
    Path("results/mini/weights/old.lock").touch()
    Path("results/mini/tokens").mkdir()
    Path("results/mini/tokens/a.arrow").touch()
    return Path("results/mini")


def test_runs_are_listed_with_size_and_tables(results, capsys):
    assert main(["runs", "--ablations", ABLATIONS]) == 0
    header, first, *_, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "finished", "size", "age", "tables"]
    assert first.startswith("dense/seed0  instruct, eval  1 kB  0 min  main, ")
    assert total.startswith("4 runs, 4 kB")


def test_two_ablations_are_compared_by_what_differs(results, capsys):
    assert main(["compare", "dense", "vtc"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["dense", "vtc"]
    assert ["stages.align.vtc.kind", "none", "random"] in lines
    assert ["average", "75", "55"] in lines  # (80 + 60 + 90 + 70) / 4, (60 + 40 + 70 + 50) / 4
    assert ["loss", "of", "instruct", "0.15", "0.35"] in lines
    assert ["seconds", "(table", "main)", "8", "6"] in lines
    assert not [line for line in lines if line[0] == "stages.align.steps"]  # is the same


def test_one_run_is_compared_with_another(results, capsys):
    assert main(["compare", "vtc/seed0", "vtc/seed1"]) == 0
    assert ["average", "50", "60"] in map(str.split, capsys.readouterr().out.splitlines())
    assert main(["compare", "dense", "vtcs"]) == 2
    assert "Did you mean vtc?" in capsys.readouterr().err


def test_clean_asks_and_deletes_only_what_no_manifest_names(results, capsys, monkeypatch):
    monkeypatch.setattr("typer.confirm", lambda text: False)
    assert main(["clean"]) == 1
    assert (results / "weights/old").exists()
    assert main(["clean", "--yes"]) == 0
    left = sorted(file.name for file in (results / "weights").iterdir())
    assert left == ["dense0", "dense1", "vtc0", "vtc1"]
    assert not list((results / "tokens").iterdir())
    assert main(["clean", "--yes"]) == 0
    assert capsys.readouterr().out.endswith("Nothing to delete.\n")


def test_clean_does_nothing_beside_a_call(results, capsys):
    Path(".snakemake").mkdir()
    with open(".snakemake/alive", "w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        assert main(["clean", "--yes"]) == 2
    assert (results / "weights/old").exists()


def test_without_runs_each_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["runs", "--ablations", ABLATIONS], ["compare", "dense", "vtc"], ["summary"]):
        assert main(words) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_every_target_is_described():
    plan = load_plan(ROOT / SMOKE, ABLATIONS)
    assert {"all", "table_main", "fig_loss", "evidence", "data"} <= plan.targets().keys()
    assert all(target.description for target in plan.targets().values())


BAD = """
dense: {groups: [main, trial], label: Dense}
bad:
  groups: [trial]
  label: Bad
  overrides: {align: {vtc: {kind: unifrom}}}
"""


def test_a_refused_row_stops_only_who_asks_for_its_tables(tmp_path, monkeypatch, capsys):
    project = make_project(tmp_path / "project", BAD)
    run(project, SMOKE, "-n")
    assert "bad.align.vtc.kind: 'unifrom'" in run(project, SMOKE, "-n", "table_trial", ok=False)
    run(project, SMOKE, "-n", "ablations", ok=False)  # it isn't left out without a word
    monkeypatch.chdir(project)
    assert main(["targets", "--configfile", SMOKE]) == 0
    assert "table: dense (one is refused)" in capsys.readouterr().out


def test_a_target_that_there_is_not_is_refused_with_the_nearest(tmp_path):
    output = run(make_project(tmp_path / "project"), SMOKE, "-n", "tabel_main", ok=False)
    assert "Did you mean table_main?" in output


def test_a_dry_run_says_that_a_call_is_at_work(tmp_path):
    project = make_project(tmp_path / "project")
    (project / ".snakemake").mkdir()
    with open(project / ".snakemake/alive", "w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        assert "Another call is at work" in run(project, SMOKE, "-n")
    assert "Another call" not in run(project, SMOKE, "-n")
