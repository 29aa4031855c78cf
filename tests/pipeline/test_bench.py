"""The timing of variants, side by side."""

import copy
import json
import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from statistics import fmean

import pytest
from configs import two_stages
from tiny import CASES

from sts import LDS, sparsify
from sts.pipeline.config import REPEATS, Config, dump
from sts.pipeline.files import read_json
from sts.pipeline.measure import parts
from sts.pipeline.measure.bench import bench, load_variants
from sts.pipeline.measure.timing import in_turn, typical_steps
from sts.pipeline.run.cluster import launch
from sts.pipeline.train.job import Job
from sts.settings import VTC

ROOT = Path(__file__).parents[2]
POINTS = 2
# skips 3 of 6 layers, then none
SKIPPING = {"policy": "layerdrop", "rate": 0.5, "draw": "fixed_count", "dense_tail": 0.5}


def config(align: dict | None = None, instruct: dict | None = None, points: int = POINTS) -> Config:
    few = {"steps": 10, "batch_size": 8, "max_length": 256}
    timing = {"points": points, "warmup": 1}
    return two_stages(few | (align or {}), few | (instruct or {}), bench=timing)


@pytest.fixture(scope="module")
def one_core():
    """Timing takes all cores it may use, and threads that wait for a busy one take minutes."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def result(tmp_path_factory, backbone, prepared, one_core) -> dict:
    variants = {
        "dense": config(),
        "vtc": config(align={"vtc": {"kind": "avgpool2d", "keep": 0.25}}),
        "lds": config(instruct={"lds": SKIPPING}),
        "short": config(instruct={"steps": 5}),
    }
    out = tmp_path_factory.mktemp("bench") / "main.json"
    result = bench(variants, [prepared], dict.fromkeys(variants, backbone), out)
    assert read_json(out) == result
    return result


def test_every_variant_takes_its_turn_at_every_place(result):
    variants = result["variants"].values()
    for stage in ("align", "instruct"):
        orders = [variant[stage]["order"] for variant in variants]
        turns = sorted(turn for order in orders for point in order for turn in point)
        assert turns == list(range(len(variants) * POINTS * REPEATS))
        for point in range(POINTS):
            firsts = [min(order[point][r] for order in orders) for r in range(REPEATS)]
            leaders = {
                id
                for id, order in enumerate(orders)
                for r in range(REPEATS)
                if order[point][r] == firsts[r]
            }
            assert len(leaders) == REPEATS


def test_the_time_of_a_stage_is_its_steps_times_the_mean_step(result):
    for variant in result["variants"].values():
        for stage in ("align", "instruct"):
            timed = variant[stage]
            assert len(timed["step_s"]) == POINTS
            assert all(seconds > 0 for seconds in timed["step_s"])
            mean = sum(timed["step_s"]) / POINTS
            assert timed["stage_s"] == pytest.approx(timed["steps"] * mean)
        total = variant["align"]["stage_s"] + variant["instruct"]["stage_s"]
        assert variant["time_s"] == pytest.approx(total)


def test_flops_are_those_of_the_steps_that_were_timed(result):
    dense, vtc, lds, short = (result["variants"][id] for id in ("dense", "vtc", "lds", "short"))
    assert vtc["flops"]["align"] < 0.8 * dense["flops"]["align"]
    assert vtc["flops"]["instruct"] == dense["flops"]["instruct"]
    assert lds["instruct"]["layers_run"] == [3, 6]
    assert lds["flops"]["align"] == dense["flops"]["align"]
    assert dense["flops"]["instruct"] * 0.5 < lds["flops"]["instruct"] < dense["flops"]["instruct"]
    assert short["flops"]["instruct"] == pytest.approx(dense["flops"]["instruct"] / 2)


def test_every_point_has_the_seconds_of_each_part(result):
    for variant in result["variants"].values():
        for stage in ("align", "instruct"):
            parts = variant[stage]["parts_s"]
            assert set(parts) == {"input", "tower", "forward", "backward", "optimizer"}
            assert all(len(times) == POINTS and min(times) > 0 for times in parts.values())


def test_laps_split_a_step_into_its_parts(tmp_path, backbone, prepared, monkeypatch):
    """With a clock that counts its readings, two micro-batches are two laps of each part of them;
    afterwards the model has the hooks that it had."""
    job = Job(
        config(align={"batch_size": 4, "gradient_accumulation_steps": 2}),
        "dense", 0, "align", [prepared], backbone, tmp_path / "runs/dense/seed0/align.json",
    )  # fmt: skip
    variant = load_variants({"dense": job})["dense"]
    variant.take(0, 0)  # transformers hangs hooks of its own on a model at the first forward
    ticks = count()
    monkeypatch.setattr(parts, "_now", lambda: next(ticks))
    hooks = [len(m._forward_hooks) for m in variant.training.plain.modules()]
    taken = variant.take_parts(0, 0)
    # input: two forwards; forward: before and after the tower and between it and the projector
    assert taken == {"input": 2, "tower": 4, "forward": 6, "backward": 2, "optimizer": 1}
    assert [len(m._forward_hooks) for m in variant.training.plain.modules()] == hooks
    assert "backward" not in vars(variant.training.accelerator)


def test_the_result_says_what_it_was_measured_on(result):
    assert result["threads"] == 1  # of the one core that the test may use
    assert result["device"]
    assert {"command", "commit", "warmup", "repeats"} <= set(result)


def test_the_result_says_which_steps_were_timed(result):
    for variant in result["variants"].values():
        for stage in ("align", "instruct"):
            timed = variant[stage]
            assert [step * POINTS // timed["steps"] for step in timed["step"]] == [0, 1]
    assert result["variants"]["dense"]["instruct"]["step"] == [2, 7]


def test_a_stage_is_timed_on_its_own_data(tmp_path, backbone, prepared, one_core):
    extra = tmp_path / "extra"  # it has no split for align
    shutil.copytree(Path(prepared).parent, extra)
    manifest = read_json(extra / "manifest.json")
    manifest |= {"dataset": "nlvr", "splits": {"instruct": manifest["splits"]["instruct"]}}
    (extra / "manifest.json").write_text(json.dumps(manifest))
    data = [prepared, extra / "manifest.json"]
    variants = {"more": config(instruct={"data": ["scenes", "nlvr"]}, points=1)}
    result = bench(variants, data, dict.fromkeys(variants, backbone), tmp_path / "bench.json")
    assert result["variants"]["more"]["time_s"] > 0
    with pytest.raises(ValueError, match="no manifest of nlvr among scenes"):
        bench(variants, [prepared], dict.fromkeys(variants, backbone), tmp_path / "bench.json")


def test_variants_must_agree_on_the_points(tmp_path, backbone, prepared):
    variants = {"a": config(), "b": config(points=3)}
    with pytest.raises(ValueError, match="must be the same in a, b"):
        bench(variants, [prepared], dict.fromkeys(variants, backbone), tmp_path / "out.json")


@pytest.mark.slow
def test_a_timing_runs_as_its_stages_are_trained(tmp_path, backbone, prepared, monkeypatch):
    """One stage by two processes that have half of the model each, the other by one, each with a
    call as the workflow makes it; both count what a training by one process does."""
    monkeypatch.setenv("STS_TRACKING", "off")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    shards = {"processes": 2, "parallel": "fsdp2", "gradient_checkpointing": True}
    pieces = {"batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    lds = {"lds": SKIPPING}
    alone = {"dense": config(instruct=pieces), "lds": config(instruct=pieces | lds)}
    pair = shards | {"batch_size": 4}
    shared = {"dense": config(instruct=pair), "lds": config(instruct=pair | lds)}
    files = [tmp_path / f"{name}.yaml" for name in shared]
    for file in files:
        file.write_text(dump(shared[file.stem]))
    out = tmp_path / "results" / "bench" / "main.json"
    options = ["--configs", *files, "--init", backbone, "--data", prepared, "--out", out]
    for stage in shared["dense"].stages.values():
        command = [*launch(stage).split(), "bench", *map(str, options)]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=300)
    result = read_json(out)["variants"]
    one = bench(alone, [prepared], dict.fromkeys(alone, backbone), tmp_path / "one.json")
    for name, variant in result.items():
        assert variant["flops"] == pytest.approx(one["variants"][name]["flops"], rel=0.02)
        assert {*variant} == {"align", "instruct", "time_s", "flops"}
    assert result["lds"]["instruct"]["layers_run"] == [3, 6]
    orders = [result[name]["instruct"]["order"][0] for name in ("dense", "lds")]
    assert sorted(place for order in orders for place in order) == list(range(2 * REPEATS)), (
        "in turn"
    )


def test_a_timing_by_another_number_of_processes_is_refused(tmp_path, backbone, prepared):
    variants = {"pair": config(align={"processes": 2}, instruct={"processes": 2})}
    with pytest.raises(ValueError, match="processes=1: expected 2: torchrun --nproc-per-node N"):
        bench(variants, [prepared], {"pair": backbone}, tmp_path / "bench.json")


# ---- which steps are timed --------------------------------------------------------------------

STEPS, CHOSEN, LAYERS = 96, 8, 4
FALLING = {
    "layer": LDS("sts", rate=0.6, epsilon=0.5),
    "constant": LDS("layerdrop", rate=0.5),
    "backward": LDS("dropbp", rate=0.5, schedule="falling_linear"),
    "samples": LDS("sts", rate=0.6, epsilon=0.5, unit="samples"),
    "tokens": LDS("random_ltd", rate=0.5, schedule="falling_cosine"),
}


@pytest.fixture(scope="module")
def llava():
    return CASES["llava"].build()


def left_out(scheme, step: int) -> float:
    """Layers that a step leaves out: drawn or, where each micro-batch draws, in the mean."""
    scheme.decide(step)
    if scheme.lds.unit in ("samples", "tokens"):
        return sum(scheme.decision.chances)
    return len(scheme.decision.off) / (2 if scheme.lds.unit == "backward" else 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FALLING)
def test_the_timed_steps_leave_out_what_the_whole_stage_does(llava, name, seed):
    with sparsify(llava, lds=FALLING[name], total_steps=STEPS, seed=seed) as scheme:
        chosen = typical_steps(scheme, STEPS, CHOSEN)
        every = [left_out(scheme, step) for step in range(STEPS)]
    assert [step * CHOSEN // STEPS for step in chosen] == list(range(CHOSEN))  # one in each part
    assert abs(fmean(every[step] for step in chosen) - fmean(every)) <= 0.5 / CHOSEN + 1e-9
    assert max(every) > 0


@pytest.mark.parametrize(
    ("steps", "points", "middles"),
    [(96, 8, [6, 18, 30, 42, 54, 66, 78, 90]), (10, 2, [2, 7]), (3, 1, [1]), (2, 4, [0, 0, 1, 1])],
)
@pytest.mark.parametrize("vtc", [VTC(), VTC("uniform", keep=0.25, schedule="falling_linear")])
def test_where_no_layer_is_skipped_the_middles_are_timed(llava, vtc, steps, points, middles):
    with sparsify(llava, vtc, total_steps=steps) as scheme:
        assert typical_steps(scheme, steps, points) == middles


def test_choosing_steps_changes_no_measurement(llava):
    lds = LDS("block_influence", rate=0.4)
    with sparsify(llava, lds=lds, total_steps=STEPS) as scheme:
        before = copy.deepcopy(scheme.skipper.measured.state_dict())
        typical_steps(scheme, STEPS, CHOSEN)
        assert scheme.skipper.measured.state_dict() == before


def test_every_round_begins_with_another_variant():
    steps = []
    taken = in_turn("test", ["a", "b", "c"], 2, 1, 2, lambda *step: steps.append(step) or step)
    assert "".join(variant for variant, _, _ in steps) == "cababcbcaabcbcacab"
    assert [repeat for _, _, repeat in steps[::3]] == [-1, 0, 1] * 2
    assert [point for _, point, _ in steps[::9]] == [0, 1]
    assert taken["a"] == [
        [(0, ("a", 0, 0)), (5, ("a", 0, 1))], [(8, ("a", 1, 0)), (10, ("a", 1, 1))]
    ]  # fmt: skip
