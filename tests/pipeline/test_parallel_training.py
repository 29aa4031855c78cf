"""Several processes of one training: the steps of one, shards, going on by other processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from asking import picture
from cases import turns
from configs import short as config
from filelock import FileLock
from transformers import LlavaForConditionalGeneration

from sts.pipeline.config import MINI, deep_merge, load_yaml, validate
from sts.pipeline.cost.history import read_history
from sts.pipeline.data.prepare import prepare
from sts.pipeline.run import device
from sts.pipeline.train.job import Job
from sts.pipeline.train.train import train

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
HALF = {"policy": "layerdrop", "rate": 0.5, "draw": "fixed_count"}  # three of the layers

# Trains a stage as the pipeline does, and dies before a step if one is named
WORKER = """
import logging, os, signal, sys
from pathlib import Path
from sts.pipeline.train import train
from sts.pipeline.train.job import Job
from sts.pipeline.config import Config
from sts.pipeline.run import device

taken, left = train.optimizer_step, int(sys.argv[6])

def step(*args):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return taken(*args)

train.optimizer_step = step
device.bf16_is_native = lambda: True
logging.basicConfig(level=logging.INFO)
config = Config.model_validate_json(sys.argv[1])
data, init, out = map(Path, sys.argv[3:6])
train.train(Job(config, "dense", 0, sys.argv[2], [data], init, out))
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("STS_TRACKING", "off")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


@pytest.fixture
def several(tmp_path, prepared):
    """several(settings, stage, init, name, after) -> the manifest of a training of as many
    processes as it says (of one: this one), or None if all are killed before step `after`.
    several.start begins it alone: the process that starts them all."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def out_of(name, stage):
        return tmp_path / name / "runs" / "dense" / "seed0" / f"{stage}.json"

    processes = []

    def start(settings, stage, init, name, after=-1, data=prepared):
        number, out = settings.stage(stage).processes, out_of(name, stage)
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
        arguments = [settings.model_dump_json(by_alias=True), stage, data, init, out, after]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", *torchrun, script, *map(str, arguments)],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
        return processes[-1]

    def call(settings, stage, init, name, after=-1, data=prepared):
        if settings.stage(stage).processes == 1:
            return train(Job(settings, "dense", 0, stage, [data], init, out_of(name, stage)))
        process = start(settings, stage, init, name, after, data)
        _, errors = process.communicate(timeout=300)
        assert (process.returncode == 0) == (after < 0), errors[-3000:]
        return json.loads(out_of(name, stage).read_text()) if after < 0 else None

    call.start = start
    yield call
    for process in processes:
        process.terminate()  # and the processes that it started
        process.wait()


@pytest.fixture
def aligned(tmp_path, backbone, prepared):
    out = tmp_path / "results" / "runs" / "dense" / "seed0" / "align.json"
    train(Job(config(), "dense", 0, "align", [prepared], backbone, out))
    return out


def weights(manifest: dict) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(manifest["weights"]).state_dict()


def same_steps(first: dict, second: dict) -> None:
    for a, b in zip(*(read_history(run["weights"]) for run in (first, second)), strict=True):
        assert a["skipped"] == b["skipped"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_take_the_same_steps_as_one(parallel, aligned, several):
    """Also with skipped layers, whose gradients no process sends, and what is saved is a plain
    checkpoint. What both count of the same micro-batches is the same."""
    both = {"lds": HALF, "vtc": {"kind": "uniform", "keep": 0.5}, "cross_entropy": "chunked"}
    pieces = {"batch_size": 2, "gradient_accumulation_steps": 2}
    alone = several(config(**both, **pieces), "instruct", aligned, "one")
    split = config(**both, batch_size=2, processes=2, parallel=parallel)
    result = several(split, "instruct", aligned, "two")
    same_steps(alone, result)
    for a, b in zip(alone["held_out"], result["held_out"], strict=True):
        assert (a["step"], a["loss"]) == (b["step"], pytest.approx(b["loss"], rel=1e-3))
        assert a["skills"] == pytest.approx(b["skills"], rel=1e-2)
    for a, b in zip(*(read_history(run["weights"]) for run in (alone, result)), strict=True):
        counted = ("tokens", "answer_tokens", "patches", "pairs", "visual_tokens", "work")
        assert {name: a[name] for name in counted} == {name: b[name] for name in counted}
        assert b["flops"] == pytest.approx(a["flops"], rel=0.01)
        assert b["flops_dense"] == pytest.approx(a["flops_dense"], rel=0.01)
    for (name, a), (other, b) in zip(weights(alone).items(), weights(result).items(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_two_processes_with_bf16_weights_take_the_steps_of_one(aligned, several, monkeypatch):
    """Every micro-batch's gradients are sent, and add up in float32; a skipped layer has none."""
    monkeypatch.setattr(device, "bf16_is_native", lambda: True)
    half = {"lds": HALF, "precision": "bf16", "weights": "bf16", "steps": 2, "batch_size": 2}
    four = config(**half, gradient_accumulation_steps=4)
    alone = several(four, "instruct", aligned, "one")
    split = config(**half, processes=2, gradient_accumulation_steps=2)
    result = several(split, "instruct", aligned, "two")
    for a, b in zip(*(read_history(run["weights"]) for run in (alone, result)), strict=True):
        assert a["skipped"] == b["skipped"]
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


@pytest.fixture
def some_without_an_image(tmp_path) -> Path:
    """Manifest of eight conversations about an image and four without, of other lengths."""
    rows = []
    for number in range(12):
        answer = " ".join(["red"] * (number + 1))
        image = {"image": f"{number}.png"} if number < 8 else {}
        mark = "<image>\n" if image else ""
        rows.append({"id": str(number), **image, "conversations": turns(f"{mark}is it?", answer)})
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "own.json").write_text(json.dumps(rows))
    own = {"own": {"json": str(tmp_path / "own.json"), "images": str(tmp_path)}}
    merged = validate(deep_merge(load_yaml(MINI), {"data": {"custom": own}}), "test")
    prepare(merged, "own", tmp_path / "own" / "manifest.json")
    return tmp_path / "own" / "manifest.json"


@pytest.mark.parametrize(("global_batch", "parallel"), [(6, "ddp"), (4, "fsdp2")])
def test_processes_of_which_one_sees_no_image_take_the_steps_of_one(
    parallel, global_batch, aligned, several, some_without_an_image
):
    """Of four, one step is of text alone; of six, one process of a step would have text alone."""
    own = {"data": some_without_an_image}
    few = {"steps": 3, "trains": ["projector", "language_model"]}
    alone = several(config(**few, batch_size=global_batch), "instruct", aligned, "one", **own)
    images = [row["images"] for row in read_history(alone["weights"])]
    assert sum(images) == 8 or global_batch == 6
    assert (0 in images) == (global_batch == 4)
    half = {"batch_size": global_batch // 2, "processes": 2, "parallel": parallel}
    split = several(config(**few, **half), "instruct", aligned, "two", **own)
    same_steps(alone, split)


def test_shards_that_are_killed_go_on_to_the_same_weights(aligned, several):
    adapters = {"trains": ["projector", "lora"], "lora": {"rank": 2, "dropout": 0.5}}
    settings = config(batch_size=2, processes=2, parallel="fsdp2", lds=HALF, **adapters)
    straight = several(settings, "instruct", aligned, "straight")
    several(settings, "instruct", aligned, "killed", after=3)
    again = several(settings, "instruct", aligned, "killed")
    assert again["weights_sha256"] == straight["weights_sha256"]


def test_another_number_of_processes_goes_on_with_a_training(tmp_path, aligned, several):
    two = config(batch_size=2, processes=2, parallel="fsdp2", lds=HALF)
    several(two, "instruct", aligned, "moved", after=3)
    [folder] = (tmp_path / "moved" / "weights").glob("*/")
    begun = read_history(folder)[:2]
    one = config(batch_size=4, parallel="fsdp2", lds=HALF)
    moved = several(one, "instruct", aligned, "moved")
    assert read_history(moved["weights"])[:2] == begun, "it went on, and did not begin again"
    same_steps(several(one, "instruct", aligned, "stayed"), moved)


def test_all_processes_wait_for_another_training_of_the_key_and_take_its_weights(
    tmp_path, aligned, prepared, several
):
    """As after a kill -9 of torchrun alone: its processes live on and train to the end."""
    settings = config(batch_size=2, processes=2, parallel="fsdp2", lds=HALF)
    made = several(settings, "instruct", aligned, "first")
    other = tmp_path / "second" / "weights" / made["key"]
    other.parent.mkdir(parents=True)
    with FileLock(other.with_suffix(".lock")):
        process = several.start(settings, "instruct", aligned, "second")
        for line in process.stderr:
            if "another training makes" in line:
                break
        else:
            raise AssertionError("it did not wait")
        shutil.copytree(made["weights"], other)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert errors.count("is finished: reused") == 2, "one of each process"
    again = json.loads((tmp_path / "second/runs/dense/seed0/instruct.json").read_text())
    assert again["weights_sha256"] == made["weights_sha256"]
