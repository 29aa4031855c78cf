"""The search: what it tries, at which cost, and that a killed one goes on with the same trials."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from configs import short
from project import ROOT, make_project, planned, run

from sts.pipeline.config import (
    ConfigError,
    check_study,
    dump,
    load_ablations,
    load_scale,
    load_search,
    nested,
)
from sts.pipeline.files import read_json, write_json_atomic
from sts.pipeline.measure.stage_cost import stage_costs
from sts.pipeline.search import Search

ABLATIONS = """
dense: {label: Dense}
sts: {label: STS, overrides: {instruct: {lds: {policy: sts, rate: 0.25, epsilon: 1}}}}
"""
SEARCH = """
trials: {tiny: 3}
flops: 0.8
studies:
  sts:
    ablation: sts
    space:
      instruct.lds: [{unit: layer}, {unit: samples}]
      instruct.lds.rate: {low: 0.1, high: 0.5}
      instruct.lr: {low: 1.0e-3, high: 1.0e-1, log: true}
"""


def write(folder: Path, search: str = SEARCH) -> dict[str, Path]:
    files = {"ablations": ABLATIONS, "settings": search, "config": dump(short())}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: folder / f"{name}.yaml" for name in files}


@pytest.fixture
def untested(prepared, tmp_path) -> Path:
    """Prepared data without the rows of any benchmark."""
    folder = shutil.copytree(prepared.parent, tmp_path / "data")
    manifest = read_json(folder / "manifest.json")
    wanted = {"align", "instruct", "validation"}
    for split in manifest["splits"].keys() - wanted:
        (folder / manifest["splits"][split]["file"]).unlink()
    return folder / "manifest.json"


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_same_trials_and_reads_no_test_split(
    untested, backbone, tmp_path
):
    config = short()
    alone = config.model_copy(update={"stages": {"instruct": config.stages["instruct"]}})
    files = write(tmp_path)
    files["config"].write_text(dump(alone))

    def start(results: str) -> subprocess.Popen:
        options = {**files, "study": "sts", "data": untested, "init": backbone}
        options["out"] = tmp_path / results / "search/sts.json"
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "sts", "search", *words]
        env = os.environ | {"STS_TRACKING": "off", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)

    assert start("whole").wait(timeout=500) == 0
    whole = tmp_path / "whole/search/sts.json"
    result = read_json(whole)
    assert [trial["number"] for trial in result["trials"]] == [0, 1, 2]
    own = {"instruct.lds": {"unit": "layer"}, "instruct.lds.rate": 0.25, "instruct.lr": 0.01}
    assert result["trials"][0]["values"] == own
    assert {trial["state"] for trial in result["trials"]} == {"complete"}

    killed = start("killed")
    while len([*tmp_path.glob("killed/weights/*/history.jsonl")]) < 2:  # the second takes steps
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/search/sts.json").exists()
    first = tmp_path / "killed/runs/search_sts_000/seed0/instruct.json"
    before = first.stat().st_mtime_ns
    assert start("killed").wait(timeout=500) == 0
    assert (tmp_path / "killed/search/sts.json").read_bytes() == whole.read_bytes()
    assert first.stat().st_mtime_ns == before, "a finished trial is not made again"
    for trial in result["trials"]:
        runs = [
            tmp_path / x / f"runs/search_sts_{trial['number']:03d}" for x in ("whole", "killed")
        ]
        ends = [read_json(run / "seed0/instruct.json") for run in runs]
        assert ends[0]["weights_sha256"] == ends[1]["weights_sha256"]
        assert ends[0]["held_out"][-1]["loss"] == trial["loss"]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """study(losses) -> a Search whose trials have these held-out losses, at eight points each, in
    the place of a training."""
    monkeypatch.chdir(ROOT)
    files = write(tmp_path, SEARCH.replace("tiny: 3", "tiny: 8"))
    scale = load_scale(files["config"])
    for name in ("data", "init"):
        splits = {"align": {}, "instruct": {}, "validation": {}}
        write_json_atomic(
            tmp_path / f"{name}.json", {"sha256": name, "dataset": "scenes", "splits": splits}
        )
    search = Search(
        scale, load_ablations(files["ablations"])["sts"], load_search(files["settings"]), "sts",
        [tmp_path / "data.json"], tmp_path / "init.json", tmp_path / "results/search/sts.json",
    )  # fmt: skip

    def make(losses):
        told = []

        def losses_of(job):
            number = int(job.ablation.rpartition("_")[2])
            if job.stage == "instruct":
                for point in range(8):
                    told.append((number, point))
                    yield losses[number] + 1 - point / 8

        monkeypatch.setattr("sts.pipeline.search.losses_of", losses_of)
        return search, told

    return make


@pytest.mark.slow  # by the many small writes of sqlite
def test_a_trial_above_the_median_is_ended_in_its_second_half(study):
    search, told = study([1, 1, 1, 1, 5, 0.5, 5, 1])
    result = search.run()
    states = [trial["state"] for trial in result["trials"]]
    assert states == ["complete"] * 4 + ["pruned", "complete", "pruned", "complete"]
    assert result["best"] == 5 and result["trials"][5]["loss"] == pytest.approx(0.625)
    assert [point for number, point in told if number == 4] == [0, 1, 2, 3]
    page = search.out.with_suffix(".md").read_text()
    assert "| 5 | 0.6250 |" in page and "instruct:" in page


def test_every_trial_costs_the_same_whatever_its_knobs(study):
    search, _ = study([])
    whole = sum(cost.flops for cost in stage_costs(search.scale, False).values())
    for rate in (0.1, 0.5):
        config = search.config_of({"instruct.lds.rate": rate})
        flops = sum(cost.flops for cost in stage_costs(config, False).values())
        # of a few steps: one step more or less is all that rounding can do
        assert flops / whole == pytest.approx(0.8, abs=0.2)
        assert config.stages["instruct"].lds.rate == rate
    long = search.scale.model_dump(by_alias=True)
    for block in long["stages"].values():
        block["steps"] = 4000
    longer = replace(search, scale=type(search.scale).model_validate(long))
    costs = [
        sum(cost.flops for cost in stage_costs(config, False).values())
        for config in (longer.scale, longer.config_of({"instruct.lds.rate": 0.5}))
    ]
    assert costs[1] / costs[0] == pytest.approx(0.8, rel=1e-3)


@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_when_the_search_was_killed(study, tmp_path):
    """A kill at any point of drawing a trial leaves the values that it would have had."""
    search, _ = study([1.0] * 8)
    expected = [trial["values"] for trial in search.run()["trials"]]
    assert len({json.dumps(values) for values in expected}) == 8
    search.out.unlink()
    (store,) = search.out.parent.glob("*.db")
    store.unlink()

    class Killed(BaseException):
        pass

    for after in (1, 2, 7):  # knobs drawn before the next kill
        count = 0
        suggest = optuna.trial.Trial.suggest_float

        def dying(*args, suggest=suggest, after=after, **kwargs):
            nonlocal count
            count += 1
            if count == after:
                raise Killed
            return suggest(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optuna.trial.Trial, "suggest_float", dying)
            try:
                search.run()
            except Killed:
                continue
    assert [trial["values"] for trial in search.run()["trials"]] == expected


WRONG = {
    "flops: 0": ("flops: 0.8", "flops: 0", "flops: 0 is not accepted"),
    "an upper end below the lower": ("high: 0.5", "high: 0.05", "high: 0.05 is not accepted"),
    "one choice": ("[{unit: layer}, {unit: samples}]", "[1]", "is not accepted"),
    "log from 0": ("low: 1.0e-3", "low: 0.0", "above 0 where log is true"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_search_names_file_key_and_value(tmp_path, case):
    before, after, message = WRONG[case]
    file = write(tmp_path, SEARCH.replace(before, after))["settings"]
    with pytest.raises(ConfigError, match=r"settings\.yaml: ") as error:
        load_search(file)
    assert message in str(error.value)


def test_a_search_that_does_not_go_with_its_scale_is_refused(tmp_path):
    files = write(tmp_path)
    ablations, scale = load_ablations(files["ablations"]), load_scale(files["config"])

    def refused(before: str, after: str) -> str:
        search = load_search(write(tmp_path, SEARCH.replace(before, after))["settings"])
        with pytest.raises(ConfigError) as error:
            check_study(search, "sts", "search.yaml", ablations, scale)
        return str(error.value)

    assert "trials: {'large': 3} is not accepted" in refused("tiny", "large")
    assert "ablation: 'stt'" in refused("ablation: sts", "ablation: stt")
    assert "'instruct.lds.ratio' is not accepted" in refused("lds.rate", "lds.ratio")


def test_of_two_values_for_one_place_the_later_counts():
    values = {"a.b": {"x": 1, "y": 2}, "a.b.y": 3, "c": 4}
    assert nested(values) == {"a": {"b": {"x": 1, "y": 3}}, "c": 4}


def test_the_search_of_the_project_goes_with_its_scales():
    search = load_search(ROOT / "workflow/config/search.yaml")
    ablations = load_ablations(ROOT / "workflow/ablations.yaml")
    assert {"sts", "dense"} <= search.studies.keys()
    for name in search.trials:
        scale = load_scale(ROOT / f"workflow/config/{name}.yaml")
        for study in search.studies:
            check_study(search, study, "search.yaml", ablations, scale)


@pytest.mark.slow
def test_the_target_makes_every_study_where_the_scale_has_trials(tmp_path):
    project = make_project(tmp_path / "project")
    jobs = planned(project, "search")
    assert jobs["study"] == 2 and not jobs.keys() & {"train", "evaluate", "table"}
    output = run(project, "workflow/config/paper.yaml", "-n", "search", ok=False)
    assert "workflow/config/search.yaml: trials: " in output and "paper -> trials" in output
    assert planned(project, "-k", "all"), "who does not ask for it is not stopped"
