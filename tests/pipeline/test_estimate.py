"""The estimate before anything is trained."""

import json
import os
import re
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest
from configs import RECIPE
from tiny import CASES, LAYERS

from sts import LDS, sparsify
from sts.__main__ import main
from sts.lds.decision import decide, expected_work
from sts.pipeline.config import Config, StageConfig, load_ablations, load_scale
from sts.pipeline.cost.machines import Machine
from sts.pipeline.measure import forecast as estimate
from sts.pipeline.measure import speed
from sts.pipeline.measure.stage_cost import START_SECONDS, StageCost, model_config, timing_memory
from sts.pipeline.plan import Plan, load_plan

ROOT = Path(__file__).parents[2]
SMOKE, PAPER, SMALL, ABLATIONS = (
    ROOT / "workflow" / name
    for name in ("config/smoke.yaml", "config/paper.yaml", "config/small.yaml", "ablations.yaml")
)
BOTH = ["projector", "language_model"]
DENSE = load_ablations(ABLATIONS)["dense"]


def config(model: dict | None = None, **stages: dict) -> Config:
    few = RECIPE | {"steps": 10, "batch_size": 2, "split": "instruct", "trains": BOTH}
    return Config(
        scale="tiny",
        model=model or {},
        stages={name: StageConfig(**few | values) for name, values in stages.items()},
    )


@pytest.fixture
def no_timing(monkeypatch):
    """A GFLOP/s in every stage."""

    def speed(configs, *_):
        names = [name for config in configs for name in config.stages]
        return dict.fromkeys(names, 1e9), "a test"

    monkeypatch.setattr(estimate, "calibrate", speed)


@pytest.fixture(scope="module")
def smoke() -> dict:
    return estimate.estimate(SMOKE, ABLATIONS)


def test_the_estimate_is_whole_and_positive(smoke, capsys):
    runs, flops = smoke["flops"]["runs"], smoke["flops"]["total"]
    assert set(runs) == set(load_plan(SMOKE, ABLATIONS).members("main"))
    assert 0 < flops <= sum(sum(stages.values()) for stages in runs.values())
    assert smoke["seconds"]["total"] == pytest.approx(
        sum(value for name, value in smoke["seconds"].items() if name != "total")
    )
    assert all(value > 0 for value in smoke["disk_bytes"].values())
    estimate.show(smoke, estimate.Console(width=100))
    text = capsys.readouterr().out
    assert "Estimates." in text
    assert f"{sum(smoke['jobs'].values())}: " in text


def test_flops_follow_what_a_run_leaves_out(smoke):
    runs = smoke["flops"]["runs"]
    assert runs["vtc"]["align"] < runs["dense"]["align"]
    assert runs["lds"]["instruct"] < runs["dense"]["instruct"]
    assert runs["sts"] == {"align": runs["vtc"]["align"], "instruct": runs["lds"]["instruct"]}


EXPECTED = {
    "layer": LDS("sts", rate=0.6, epsilon=0.5),
    "layer, fixed count": LDS("layerdrop", rate=0.3, draw="fixed_count", protect_last=1),
    "backward": LDS("dropbp", rate=0.5, schedule="rising_linear"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_expected_work_is_the_mean_of_many_decisions(name):
    lds, layers, draws = EXPECTED[name], 8, 4000
    for t in (0.0, 0.5):
        drawn = [decide(lds, layers, t, seed=1, step=step) for step in range(draws)]
        shares = ("attention_backward", "mlp_backward") if name == "backward" else ("rows",)
        for layer, expected in enumerate(expected_work(lds, layers, t)):
            for share in shares:
                mean = 1 - fmean((layer, share) in decision.off for decision in drawn)
                assert mean == pytest.approx(expected.get(share, 1.0), abs=0.03)


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_expected_work_is_the_mean_of_what_was_realised(unit):
    """Of the units that each micro-batch draws anew: many forwards of a real model."""
    draws = {"draw": "fixed_count"} if unit == "tokens" else {}
    lds = LDS("layerdrop", rate=0.5, depth="linear", unit=unit, **draws)
    batch = CASES["llava"].batch([["big", 5, 6, 7]] * 6)
    share = {"samples": "rows", "tokens": "tokens"}[unit]
    llava = CASES["llava"].build()
    with sparsify(llava, lds=lds, seed=2) as scheme:
        seen = []
        for step in range(60):
            scheme.begin_step(step)
            llava(**batch)
            seen.append([work.get(share, 1.0) for work in scheme.metrics()["work"]])
    expected = [work.get(share, 1.0) for work in expected_work(lds, LAYERS, 0.0)]
    means = [fmean(layer) for layer in zip(*seen, strict=True)]
    assert means == pytest.approx(expected, abs=0.08)


def test_flops_of_a_stage_are_the_mean_over_what_it_skips():
    """The paper's schedule: a third of alpha over the stage, of the decoder's layers."""
    scale = config(
        lean={"lds": LDS("sts", rate=0.6, epsilon=0.5)},
        third={"lds": LDS("layerdrop", rate=0.2)},
        dense={},
    )
    skipped, alike, dense = (StageCost(scale, stage).flops for stage in scale.stages)
    assert skipped == pytest.approx(alike, rel=1e-3)
    assert skipped < dense


def test_json_is_what_is_returned(capsys, no_timing):
    total = estimate.estimate(SMOKE, ABLATIONS, as_json=True)
    assert json.loads(capsys.readouterr().out) == total


def test_a_large_pretrained_model_is_estimated_without_a_download(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    total = estimate.estimate(PAPER, ABLATIONS)
    assert "matrix product" in total["speed"]["source"]
    dense = total["flops"]["runs"]["dense"]
    # 6 FLOPs a weight and token: 6.7e9 weights, 128 samples of 576 + 250 tokens, 5198 steps; one
    # more forward pass for recomputation makes 8
    assert dense["instruct"] == pytest.approx(8 * 6.7e9 * 128 * 826 * 5198, rel=0.15)


def test_a_model_of_unknown_size_is_named():
    unknown = {"backbone": "pretrained", "vision": "no/such-vision", "language": "no/such-language"}
    with pytest.raises(ValueError, match="no/such-vision: its sizes are not known here"):
        model_config(config(model=unknown, only={}).model)


@pytest.mark.slow
def test_stages_are_those_of_the_configurations(no_timing):
    """Three stages here, one there, with adapters; a training that two share counts once."""
    align = {"trains": ["projector"], "split": "align"}
    adapted = {"trains": ["projector", "lora"]}
    configs = {
        "long": config(align=align, middle={}, last=adapted),
        "short": config(align=align, last=adapted),
        "only": config(extra={"trains": ["vision_tower"]}),
    }
    main_table = {id: DENSE.model_copy(update={"id": id}) for id in configs}
    total = estimate.forecast(Plan(configs, main_table))
    seeds = len(configs["long"].seeds)
    assert total["jobs"] | {"train": 5 * seeds, "share": 1 * seeds} == total["jobs"]
    runs = total["flops"]["runs"]
    assert {id: [*stages] for id, stages in runs.items()} == {
        id: [*config.stages] for id, config in configs.items()
    }
    assert runs["short"]["last"] == runs["long"]["last"]
    shared = runs["short"]["align"]
    every = sum(sum(stages.values()) for stages in runs.values())
    assert total["flops"]["total"] == pytest.approx(seeds * (every - shared))


def test_speed_is_measured_with_what_a_stage_trains():
    scale = config(last={"trains": ["projector", "lora"], "lr": 1e-3})
    rates, source = speed.calibrate([scale])
    assert rates["last"] > 0 and "just now" in source


@cache
def costs(gpu: str, gpus: int = 8, price: float | None = None, scale: Path = PAPER) -> dict:
    return estimate.forecast(load_plan(scale, ABLATIONS), Machine(gpu, gpus, price))


def test_gpus_that_are_not_here_take_the_hours_that_were_published():
    """LLaVA-1.5-7B took 3.5 h and 10 h on 8 A100 of 40 GB (LLaVA's README)."""
    total = costs("a100-40", price=2)
    hours = {stage: each / 8 for stage, each in total["gpu_hours"]["runs"]["dense"].items()}
    assert hours == {
        "align": pytest.approx(3.5, rel=0.2), "instruct": pytest.approx(10, rel=0.2)
    }  # fmt: skip
    assert total["memory_bytes"]["of_a_process"] == 40e9
    stages = [text.partition(":")[0] for text in total["lacking"]]
    assert stages == ["stages.align", "stages.instruct"], "the longest batches, no evaluation"
    assert all("a smaller batch_size with more" in text for text in total["lacking"])
    assert not costs("a100")["lacking"]
    spent = total["gpu_hours"]
    assert spent["price"] == 2 * spent["total"]
    assert spent["total"] > sum(spent["runs"]["dense"].values()) + spent["runs"]["sts"]["instruct"]
    faster = costs("h100")
    assert faster["seconds"]["total"] < total["seconds"]["total"]
    assert "price" not in faster["gpu_hours"]


@pytest.mark.slow
def test_the_small_scale_is_an_evening_on_one_gpu():
    """At 35 % of the peak; small matrices may reach a third of that, which an evening has too."""
    total = costs("rtx4090", 1, scale=SMALL)
    assert not total["lacking"]
    assert 1 < total["seconds"]["total"] / 3600 < 2.5
    assert total["speed"]["trainings_at_once"] == 1


@pytest.mark.parametrize(
    ("column", "scale", "gpu", "gpus"),
    [(1, PAPER, "a100-40", 8), (2, PAPER, "h100", 8), (3, SMALL, "rtx4090", 1)],
)
def test_the_page_of_the_papers_scale_says_what_the_estimate_says(column, scale, gpu, gpus):
    """Each number of its table, to the digits that are shown there."""
    total = costs(gpu, gpus, scale=scale)
    runs, disk, seconds = total["gpu_hours"]["runs"], total["disk_bytes"], total["seconds"]
    expected = [
        *runs["dense"].values(),
        *runs["sts"].values(),
        *(seconds[name] / 3600 for name in ("training", "evaluation")),
        *(total["memory_bytes"][f"of_{job}"] / 1e9 for job in ("a_training", "an_evaluation")),
        *(disk[name] / 1e9 for name in ("data", "benchmarks", "models", "weights", "checkpoints")),
    ]
    page = (ROOT / "docs/paper-scale.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ")][1:6]  # without the head
    cells = [line.split("|")[1 + column] for line in lines]
    numbers = [number for cell in cells for number in re.findall(r"[\d.]+", cell)]
    places = [len(number.partition(".")[2]) for number in numbers]
    assert numbers == [f"{value:.{n}f}" for value, n in zip(expected, places, strict=True)]


def test_fewer_gpus_than_processes_take_longer_with_the_same_batch():
    """The trainer refuses another number of processes than configured: so which were taken is said,
    and with what accumulation the step stays as it was."""
    wide, narrow = costs("a100"), costs("a100", 4)
    assert not wide["respread"]
    assert len(narrow["respread"]) == 3 and "evaluate.processes: 8 " in narrow["respread"][2]
    for stage, batch in (("align", 256), ("instruct", 128)):
        (text,) = (line for line in narrow["respread"] if line.startswith(f"stages.{stage}: "))
        assert "8 processes do not run on 4 GPUs" in text
        assert "processes: 4 and gradient_accumulation_steps: 2" in text
        assert f"the global batch of {batch};" in text
    assert narrow["flops"] == wide["flops"]
    assert narrow["gpu_hours"]["runs"] == wide["gpu_hours"]["runs"]
    started = START_SECONDS * narrow["jobs"]["train"]
    times = [total["seconds"]["training"] - started for total in (wide, narrow)]
    assert times[1] == pytest.approx(2 * times[0])
    memory = [total["memory_bytes"]["of_a_training"] for total in (wide, narrow)]
    assert memory[1] > memory[0], "a shard is larger"


def test_gpus_of_which_some_stay_idle_and_those_that_are_none(capsys):
    """Eight micro-batches are no whole number for each of three."""
    assert main(["estimate", "--gpu", "h100", "--gpus", "3", "--configfile", str(PAPER)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Fewer GPUs: stages.align: 8 processes do not run on 3" in text
    assert text.count("processes: 2 and gradient_accumulation_steps: 4") == 2
    assert main(["estimate", "--gpu", "h100", "--gpus", "0"]) == 2
    assert "--gpus: 0 is not accepted" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--gpus", "--price"])
def test_gpus_of_no_kind_are_refused(flag, capsys):
    assert main(["estimate", flag, "4"]) == 2
    assert "together with --gpu, one of a100-40" in capsys.readouterr().err


@pytest.mark.parametrize("pieces", [(8, 1), (8, 3), (6, 2), (1, 5)])
@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 4, 5, 8, 16])
def test_a_stage_on_fewer_gpus_takes_the_same_step(pieces, gpus):
    processes, accumulation = pieces
    split = {"processes": processes, "gradient_accumulation_steps": accumulation}
    block = config(only=split).stage("only")
    fewer = speed.on_fewer(block, gpus)
    assert fewer.global_batch == block.global_batch and fewer.batch_size == block.batch_size
    assert fewer.identity() == block.identity()
    assert fewer.processes <= (gpus or processes)
    if not gpus or gpus >= processes:
        assert fewer == block


def test_processes_on_a_cpu_share_its_cores():
    cores = len(os.sched_getaffinity(0))
    many = config(only={"processes": cores + 3}).stage("only")
    assert speed.at_once(many, gpus=0) == cores
    assert speed.at_once(many, gpus=8) == cores + 3
    threads = many.model_copy(update={"threads": 2 * cores})
    assert speed.at_once(threads, gpus=0) == 1


@pytest.mark.slow
def test_what_does_not_fit_on_gpus_is_said_with_the_keys_that_help(tmp_path, capsys):
    scale = tmp_path / "scale.yaml"
    scale.write_text(PAPER.read_text().replace("parallel: fsdp2", "parallel: ddp"))
    assert main(["estimate", "--configfile", str(scale), "--gpu", "h100"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Does not fit: stages.instruct: a process needs about 156 GB" in text
    assert "and has 80 GB. What helps: parallel: fsdp2" in text


def test_the_disk_of_sets_that_are_fetched_and_of_those_that_are_there(tmp_path, capsys):
    """About 101 GB of files; while it is unpacked the largest archive of a set is there twice."""
    fetched = costs("h100")["disk_bytes"]["data"]
    assert fetched == pytest.approx(101e9 + (27.4 + 21.8) * 1e9, rel=0.01)
    folders = f"data:\n  folders: {{llava_mix665k: {tmp_path}}}\n"
    scale = tmp_path / "scale.yaml"
    scale.write_text(PAPER.read_text().replace("data:\n", folders, 1))
    assert main(["estimate", "--configfile", str(scale), "--gpu", "h100", "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["disk_bytes"]["data"]
    assert left == pytest.approx(27.6e9 + 27.4e9, rel=0.01)


def test_the_disk_of_benchmarks_and_models_that_are_fetched():
    """Vicuna's 13.5 GB in 16 bits and CLIP's 1.2 GB in 32; the Parquet files of the splits."""
    disk = costs("h100")["disk_bytes"]
    assert disk["models"] == pytest.approx(14.7e9, rel=0.01)
    assert disk["benchmarks"] > 40e9


def test_a_timing_holds_every_model_that_its_variants_train_otherwise():
    few = {"trains": ["projector", "lora"]}
    scale = config(last={}, deep={"trains": ["projector"]})
    other = config(last=few, deep={"trains": ["projector"]})
    costs = [StageCost(each, stage, True) for each in (scale, other) for stage in each.stages]
    last, deep = timing_memory(costs)
    assert {need[0].stage: bool(need[1]["others"]) for need in (last, deep)} == {
        "last": True, "deep": False
    }  # fmt: skip
    alone = StageCost(scale, "last", True).memory
    assert sum(dict((c.stage, m) for c, m in (last, deep))["last"].values()) > sum(alone.values())


def test_answers_take_the_longer_the_slower_weights_are_read():
    cost = StageCost(load_scale(PAPER), "instruct", True)
    fast, slow = (cost.evaluation_seconds(1e14, bandwidth) for bandwidth in (1e12, 5e11))
    weights, questions = cost.evaluation_memory["weights"], 80_000
    batches = questions * (576 + 250) / cost.config.evaluate.batch_tokens
    assert slow - fast == pytest.approx(16 * batches * weights / 1e12 / 8, rel=0.2)


def test_a_disk_that_is_too_small_is_said_with_what_helps():
    disk = {"data": 150e9, "weights": 170e9}
    assert estimate.full(disk, free=320e9) == ""
    text = estimate.full(disk, free=77e9)
    assert "about 320 GB are needed (data 150 GB, weights 170 GB), and 77 GB are free" in text
    assert "data.folders" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12600, "3.5 h"), (1814400, "21 days")]
)
def test_durations_are_said_in_fitting_units(seconds, text):
    assert estimate.duration(seconds) == text
