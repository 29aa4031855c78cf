"""One stage of one run: what moves, what resumes, what is reused, what is written."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from sts import train as training
from sts.config import Config, StageConfig
from sts.train import lr_factor, my_pieces, read_history, train

STEPS = 4
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("STS_TRACKING", "off")


@pytest.fixture(autouse=True)
def importable_by_other_processes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


def config(**stage) -> Config:
    """Both stages with a few small steps; `stage` overrides values of both."""
    few = {"steps": STEPS, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 2, "max_length": 256}
    block = StageConfig(**{**few, **stage})
    return Config(scale="tiny", align=block, instruct=block)


@pytest.fixture
def run(tmp_path, backbone, prepared):
    """run(config, stage="align", ...) -> manifest, in a results folder of the test's own."""

    def call(config, stage="align", ablation="dense", seed=0, results="results", init=backbone):
        out = tmp_path / results / "runs" / ablation / f"seed{seed}" / f"{stage}.json"
        return train(config, ablation, seed, stage, [prepared], init, out) | {"out": out}

    return call


@pytest.fixture
def aligned(run):
    """Path of a finished align stage's manifest."""
    return run(config())["out"]


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(folder).state_dict()


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run):
    first, again, other = (
        run(config(), results=folder, seed=seed) for folder, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["weights_sha256"] == again["weights_sha256"]
    assert first["weights_sha256"] != other["weights_sha256"]


def test_align_moves_the_projector_and_nothing_else(run, backbone):
    start, _ = training.load("align", backbone, seed=0)
    changed = moved(start.state_dict(), tensors(run(config())["weights"]))
    assert changed
    assert all("multi_modal_projector" in name for name in changed)


def test_instruct_moves_the_language_model_and_projector_but_not_the_vision_tower(run, aligned):
    start = tensors(json.loads(aligned.read_text())["weights"])
    changed = moved(start, tensors(run(config(), "instruct", init=aligned)["weights"]))
    assert any("multi_modal_projector" in name for name in changed)
    assert any("language_model.layers.3" in name for name in changed)
    assert any("lm_head" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_a_layer_that_a_step_skips_is_not_moved_by_it(run, aligned):
    """One step with decay: AdamW would shrink a layer whose gradient were zero and not None."""
    lds = {"policy": "uniform", "rate": 0.5}
    result = run(config(steps=1, lds=lds, weight_decay=0.1), "instruct", init=aligned)
    [row] = read_history(result["weights"])
    start = tensors(json.loads(aligned.read_text())["weights"])
    changed = moved(start, tensors(result["weights"]))
    touched = {int(name.split("layers.")[1].split(".")[0]) for name in changed if "layers." in name}
    assert len(row["skipped"]) == 2
    assert touched == set(range(6)) - set(row["skipped"])


def test_accumulation_is_the_same_step_as_one_large_batch(run, aligned):
    whole = run(config(batch_size=8, steps=2), "instruct", results="a", init=aligned)
    parts = run(
        config(batch_size=2, gradient_accumulation_steps=4, steps=2), "instruct", results="b", init=aligned
    )
    for one, other in zip(*(read_history(r["weights"]) for r in (whole, parts)), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["samples"] == other["samples"] == 8


def test_finished_weights_are_reused_at_once_also_by_another_ablation(run, monkeypatch):
    first = run(config())

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "fit", never)
    same = run(config(), ablation="lds")
    assert same["weights"] == first["weights"]
    assert {**same, "ablation": "dense", "out": None} == {**first, "out": None}


def test_what_the_weights_depend_on_changes_the_key(backbone, prepared):
    def key(seed=0, **stage):
        return training.stage_key(config(**stage).align, "align", seed, [prepared], backbone)

    assert key() == key(checkpoint_every=1)
    assert len({key(), key(seed=1), key(lr=2e-2), key(vtc={"kind": "random", "keep": 0.5})}) == 4


def test_the_manifest_is_the_same_bytes_for_the_same_training(run):
    first, again = (run(config(), results=folder)["out"] for folder in ("a", "b"))
    assert first.read_text().replace("/a/", "/b/") == again.read_text()


@pytest.mark.parametrize("policy", ["uniform", "need"])
def test_killed_after_a_checkpoint_it_resumes_to_the_same_weights(
    tmp_path, backbone, prepared, run, policy
):
    settings = config(steps=8, lds={"policy": policy, "rate": 0.4}, vtc={
        "kind": "random", "keep": 0.5, "schedule": "linear"})  # fmt: skip
    straight = run(settings, results="straight")
    folder = _killed_once(tmp_path / "killed", backbone, prepared, settings)
    seen = (folder / "history.jsonl").read_text().splitlines()
    assert 2 <= len(seen) < 8
    assert not (folder / "done.json").exists()
    resumed = run(settings, results="killed")
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert [row["step"] for row in read_history(folder)] == list(range(8))
    assert [r["loss"] for r in read_history(folder)] == [
        r["loss"] for r in read_history(straight["weights"])
    ]
    assert not (folder / "state").exists()


def _killed_once(results: Path, backbone: Path, prepared: Path, settings: Config) -> Path:
    """Train in a process of its own, slowly, and kill -9 it after its first checkpoint."""
    script = textwrap.dedent("""
        import sys, time
        from sts import train
        from sts.config import Config
        taken = train.optimizer_step
        def slow(*args):
            time.sleep(0.3)
            return taken(*args)
        train.optimizer_step = slow
        config = Config.model_validate_json(sys.argv[1])
        train.train(config, "dense", 0, "align", [sys.argv[2]], sys.argv[3], sys.argv[4])
    """)
    out = results / "runs" / "dense" / "seed0" / "align.json"
    arguments = [settings.model_dump_json(by_alias=True), prepared, backbone, out]
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)])
    deadline = time.monotonic() + 120
    while not (found := list(results.glob("weights/*/state/checkpoint.pt"))):
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return found[0].parents[1]


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(run, monkeypatch):
    """The second checkpoint finds no room: /dev/full answers as a full disk does."""
    save, saves = torch.save, []

    def on_a_full_disk(state, file):
        saves.append(state["step"])
        if len(saves) == 1:
            return save(state, file)
        with open("/dev/full", "wb", buffering=0) as full:
            return save(state, full)

    monkeypatch.setattr(torch, "save", on_a_full_disk)
    with pytest.raises(OSError, match=r"checkpoint before step 4 was not written.*disk full"):
        run(config(steps=6))
    monkeypatch.undo()
    monkeypatch.setenv("STS_TRACKING", "off")
    resumed, straight = run(config(steps=6)), run(config(steps=6), results="straight")
    assert saves == [2, 4]
    assert resumed["weights_sha256"] == straight["weights_sha256"]


def test_two_trainings_of_one_key_do_not_write_over_each_other(tmp_path):
    folder = tmp_path / "key"
    script = (
        "import sys, time, pathlib; from sts.train import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('in', flush=True); time.sleep(1)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, folder], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "in\n"
    began = time.monotonic()
    with training.locked(folder):
        waited = time.monotonic() - began
    assert holder.wait() == 0
    assert waited > 0.5


def test_a_loss_that_is_not_finite_stops_with_step_and_causes(run):
    with pytest.raises(FloatingPointError, match=r"align step \d: loss .*align\.lr 1e\+30"):
        run(config(lr=1e30, max_grad_norm=1e30))


def test_the_checkpoint_loads_for_anyone_and_generates(run):
    folder = run(config())["weights"]
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8).permute(1, 2, 0).numpy()
    inputs = processor(images=image, text="user: <image>\nwhat? assistant:", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    assert type(model).forward is LlavaForConditionalGeneration.forward


def test_sparse_training_logs_what_it_kept_and_ran(run, aligned):
    vtc = {"kind": "avgpool2d", "keep": 0.25, "anneal": 0.5}
    lds = {"policy": "uniform", "rate": 0.5, "schedule": "linear"}
    result = run(config(vtc=vtc, lds=lds), "instruct", init=aligned)
    dense = run(config(), "instruct", init=aligned)
    rows = read_history(result["weights"])
    assert [row["keep_ratio"] for row in rows] == [0.25, 0.25, 1.0, 1.0]
    assert [row["visual_tokens"] for row in rows] == [4, 4, 16, 16]
    assert [row["layers_run"] for row in rows] == [6 - len(row["skipped"]) for row in rows]
    assert rows[0]["layers_run"] == 6 > rows[-1]["layers_run"]
    assert result["realised"]["keep_ratio"] == pytest.approx(0.625)
    assert sum(result["realised"]["skipped_per_layer"]) == sum(len(r["skipped"]) for r in rows)
    assert result["flops"] < result["flops_dense"] == pytest.approx(dense["flops"])
    assert dense["flops"] == dense["flops_dense"]


def test_precision_and_recomputation_are_taken_from_the_configuration(run, aligned):
    plain = run(config(steps=1), "instruct", init=aligned)
    again = run(config(steps=1, gradient_checkpointing=True), "instruct", init=aligned)
    half = run(config(steps=1, precision="bf16"), "instruct", init=aligned)
    [a], [b], [c] = (read_history(result["weights"]) for result in (plain, again, half))
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert c["loss"] != a["loss"]
    assert c["loss"] == pytest.approx(a["loss"], rel=0.02)
    saved = tensors(half["weights"])
    assert {t.dtype for t in saved.values() if t.is_floating_point()} == {torch.float32}


def test_the_learning_rate_rises_then_falls_to_nearly_nothing():
    factors = [lr_factor(step, 100, 0.03) for step in range(100)]
    assert factors[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    assert lr_factor(0, 1, 0.0) == 1


class Processes:
    def __init__(self, rank, world):
        self.process_index, self.num_processes = rank, world


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("world", [1, 2])
def test_processes_share_every_batch_in_micro_batches_of_the_same_number(size, world):
    shares = [my_pieces(list(range(size)), 4, Processes(rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert all(piece for share in shares for piece in share)
    taken = [index for share in shares for piece in share for index in piece]
    assert set(taken) == set(range(size))
    assert len(taken) == size + (-size % world)


def test_another_number_of_processes_than_configured_is_refused(run):
    with pytest.raises(ValueError, match="processes: the configuration says 2"):
        run(config(processes=2))


@pytest.mark.slow
def test_every_step_reaches_mlflow_also_of_reused_weights(tmp_path, run, monkeypatch):
    import mlflow

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("STS_TRACKING", "on")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    run(config(), ablation="dense"), run(config(), ablation="lds")
    client = mlflow.MlflowClient(store)
    found = client.search_runs([client.get_experiment_by_name("sts").experiment_id])
    tags = {(r.data.tags["ablation"], r.data.tags["reused"], r.info.status) for r in found}
    assert tags == {("dense", "False", "FINISHED"), ("lds", "True", "FINISHED")}
    for tracked in found:
        for metric in ("loss", "lr", "flops", "visual_tokens", "layers_run", "tokens_per_s"):
            steps = [m.step for m in client.get_metric_history(tracked.info.run_id, metric)]
            assert steps == list(range(STEPS)), metric


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path, backbone, prepared, run, aligned):
    """Also with skipped layers, whose gradients no process sends."""
    lds = {"policy": "uniform", "rate": 0.5}
    alone = run(config(lds=lds, batch_size=4), "instruct", init=aligned)
    settings = config(lds=lds, batch_size=2, processes=2)
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\nfrom sts.config import Config\nfrom sts.train import train\n"
        "train(Config.model_validate_json(sys.argv[1]), 'dense', 0, 'instruct', "
        "[sys.argv[2]], sys.argv[3], sys.argv[4])\n"
    )
    out = tmp_path / "two" / "runs" / "dense" / "seed0" / "instruct.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script]
    arguments = [settings.model_dump_json(by_alias=True), prepared, aligned, out]
    subprocess.run([*launch, *map(str, arguments)], check=True, timeout=300)
    result = json.loads(out.read_text())
    pairs = zip(*(read_history(r["weights"]) for r in (alone, result)), strict=True)
    for one, other in pairs:
        assert one["skipped"] == other["skipped"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
