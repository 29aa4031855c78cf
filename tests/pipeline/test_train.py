"""One stage of one run: what moves, what resumes, what is reused, what is written."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from configs import short as config
from datasets import Dataset
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.loss.loss_utils import ForCausalLMLoss

from sts import lds, vtc
from sts.lds import DEPTHS, POLICIES, source_of
from sts.pipeline.config import Config
from sts.pipeline.cost import memory
from sts.pipeline.cost.history import read_history
from sts.pipeline.data.collator import split_files
from sts.pipeline.data.conversation import render
from sts.pipeline.files import SpoiltError, read_json, sha256_file, write_json_atomic
from sts.pipeline.run import device, follows
from sts.pipeline.train import checkpoint, chunked_loss, step
from sts.pipeline.train import train as training
from sts.pipeline.train.feed import leave_sigterm, my_pieces
from sts.pipeline.train.job import Job
from sts.pipeline.train.masters import with_masters
from sts.pipeline.train.step import lr_factor
from sts.pipeline.train.subset import load_data
from sts.pipeline.train.train import train

STEPS, LAYERS = 4, 6
HALF = {"policy": "layerdrop", "rate": 0.5, "draw": "fixed_count"}  # three of the layers
ROOT = Path(__file__).parents[2]
CODE = follows.CODE


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("STS_TRACKING", "off")


@pytest.fixture(autouse=True)
def importable_by_other_processes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


@pytest.fixture
def run(tmp_path, backbone, prepared):
    """run(config, stage="align", ...) -> manifest, in a results folder of the test's own."""

    def call(config, stage="align", ablation="dense", seed=0, results="results", init=backbone):
        out = tmp_path / results / "runs" / ablation / f"seed{seed}" / f"{stage}.json"
        return train(Job(config, ablation, seed, stage, [prepared], init, out)) | {"out": out}

    return call


@pytest.fixture
def aligned(run):
    """Path of a finished align stage's manifest."""
    return run(config())["out"]


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(folder).state_dict()


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_same_seed_gives_the_same_weights_and_manifest_and_another_seed_others(run):
    first, again, other = (
        run(config(), results=folder, seed=seed) for folder, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    one, two = (read_json(run["out"]) for run in (first, again))
    assert one | {"weights": one["weights"].replace("/a/", "/b/")} == two
    assert first["weights_sha256"] != other["weights_sha256"]


PARTS = {
    "vision_tower": "vision_tower",
    "projector": "multi_modal_projector",
    "language_model": "language_model",
}


@pytest.mark.parametrize(
    "trains",
    [
        ["projector"],
        ["vision_tower"],
        ["language_model"],
        ["projector", "language_model"],
        ["projector", "lora"],
    ],
    ids="+".join,
)
def test_a_stage_moves_the_parts_that_it_says(run, backbone, trains):
    """Adapters are merged: what is saved is a plain checkpoint whose decoder has moved."""
    lora = {"lora": {"rank": 2, "alpha": 4.0}, "lds": HALF} if "lora" in trains else {}
    settings = config(trains=trains, **lora)
    start, _ = training.load(Job(settings, "dense", 0, "instruct", [], backbone, Path()))
    start, result = start.state_dict(), run(settings, "instruct")
    end = tensors(result["weights"])
    assert end.keys() == start.keys()
    changed = moved(start, end)
    touched = {part for part, name in PARTS.items() if any(name in moving for moving in changed)}
    assert touched == {"language_model" if part == "lora" else part for part in trains}
    assert any("lm_head" in name for name in changed) == ("language_model" in trains)
    if "lora" in trains:
        assert not [name for name in changed if "norm" in name or "embed" in name]
    assert 0 < result["flops"] <= result["flops_dense"]


def test_each_part_has_the_learning_rate_that_it_was_given(run, aligned):
    """One step from equal weights: without decay, Adam's first step is the learning rate."""
    start = tensors(json.loads(aligned.read_text())["weights"])
    rates = {"projector": 1e-3, "language_model": 1e-5}
    settings = config(steps=1, lr=rates, trains=[*rates])
    end = tensors(run(settings, "instruct", init=aligned)["weights"])
    for part, rate in rates.items():
        moves = [(end[n] - start[n]).abs().max().item() for n in start if PARTS[part] in n]
        assert max(moves) == pytest.approx(rate, rel=0.05), part


@pytest.fixture
def stopped(run, monkeypatch):
    """stopped(settings, after=..., **of_run): a training that ends after so many checkpoints."""

    def call(settings, after=1, then=lambda *arguments: None, **of_run):
        save, left = training.save_state, after

        def counted(*arguments):
            nonlocal left
            save(*arguments)
            left -= 1
            if left == 0:
                then(*arguments)
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, "save_state", counted)
            run(settings, **of_run)

    return call


RESUMED = {
    "adapters": {"trains": ["projector", "lora"], "lora": {"rank": 2, "dropout": 0.5}},
    "measured": {"lds": {"policy": "block_influence", "rate": 0.4}},
    "in epochs, by samples": {
        "vtc": {"kind": "random", "keep": 0.5},
        "lds": {"policy": "sts", "rate": 0.6, "epsilon": 0.5, "unit": "samples", "rescale": True,
                "clock": "epochs"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_after_a_checkpoint_it_resumes_to_the_same_weights(run, stopped, name):
    settings = config(**RESUMED[name])
    straight = run(settings, results="straight")
    stopped(settings, results="stopped")
    assert run(settings, results="stopped")["weights_sha256"] == straight["weights_sha256"]


def looks_on(file):
    return any(map(file.is_relative_to, follows.LOOKS_ON))


FOLLOWED = {
    "dense": {},
    "vtc": {"vtc": {"kind": "random", "keep": 0.5}},
    "text": {"vtc": {"kind": "text_guided", "keep": 0.5}},
    "lds": {"lds": {"policy": "sts", "rate": 0.6, "epsilon": 0.5}},
    "measured": {"lds": {"policy": "block_influence", "rate": 0.4}},
    "tokens": {"lds": {"policy": "random_ltd", "rate": 0.5}},
    "lora": {"trains": ["projector", "lora"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "text", "measured", "tokens", "lora"])
def test_all_code_that_a_training_runs_is_followed(run, name):
    """Every function of the package that a training calls lies in a file that its key follows, but
    for the observers, and for the rooms of VTC and LDS where these are idle."""
    settings, called = config(**FOLLOWED[name], steps=3), set()
    # it returns None, so that it is called once a function and not once a line
    sys.settrace(lambda frame, event, _: called.add(frame.f_code.co_filename))
    try:
        run(settings)
    finally:
        sys.settrace(None)
    stage = settings.stages["align"]
    idle = {"vtc": not stage.compresses, "lds": not stage.skips, "samples": stage.samples == 1}
    rooms = [room for part, closed in idle.items() if closed for room in follows.ROOMS[part]]
    ours = {Path(file) for file in called if Path(file).is_relative_to(follows.CODE)}
    missed = {file for file in ours - set(follows.training(stage)) if not looks_on(file)}
    assert not [file for file in missed if not any(file.is_relative_to(room) for room in rooms)]
    assert {CODE / "pipeline/train/step.py", CODE / "scheme.py"} < ours


@pytest.mark.slow
def test_all_that_a_training_imports_is_followed_or_a_file_of_another_choice():
    code = (
        "import sts.pipeline.train.train, sys\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('sts.')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    files = {Path(file) for file in loaded.stdout.split()}
    every = {
        "vtc": {"kind": "random", "keep": 0.5},
        "lds": {"policy": "sts", "rate": 0.6, "epsilon": 0.5},
    }
    followed = set(follows.training(config(**every).stages["align"]))
    other = {"__init__.py", "subset.py"}  # packages; what this doesn't use
    sources = filter(None, map(source_of, {*DEPTHS, *POLICIES, *lds.UNITS}))
    other |= {file.name for file in sources} - {"parts.py", "units.py"}
    families = {CODE / "architectures" / f"{name}.py" for name in ("others", "tiles")}
    missed = {file for file in files - followed - families if file.name not in other}
    assert files and not [file for file in missed if not looks_on(file)]


def test_a_training_follows_the_rooms_that_act_and_the_file_of_its_kind():
    def rooms(**stage) -> set[str]:
        files = {file.name for file in follows.training(config(**stage).stages["align"])}
        assert {"train.py", "step.py", "sequence.py", "scheme.py", "llava.py"} < files
        assert not files & {"history.py", "tracking.py", "scenes.py", "config.py", "tiles.py"}
        return files & {
            "compression.py",
            "sampling.py",
            "text.py",
            "decision.py",
            "block_influence.py",
        }

    assert rooms() == set()
    assert rooms(**FOLLOWED["vtc"]) == {"compression.py", "sampling.py"}
    assert rooms(**FOLLOWED["text"]) == {"compression.py", "text.py"}
    assert rooms(**FOLLOWED["lds"]) == {"decision.py"}
    assert rooms(**FOLLOWED["measured"]) == {"decision.py", "block_influence.py"}


def test_a_layer_that_a_step_skips_is_not_moved_by_it(run, aligned):
    """One step with decay: AdamW would shrink a layer whose gradient were zero and not None."""
    result = run(config(steps=1, lds=HALF, weight_decay=0.1), "instruct", init=aligned)
    [row] = read_history(result["weights"])
    skipped = {layer for layer, share in enumerate(row["skipped"]) if share}
    start = tensors(json.loads(aligned.read_text())["weights"])
    changed = moved(start, tensors(result["weights"]))
    touched = {int(name.split("layers.")[1].split(".")[0]) for name in changed if "layers." in name}
    assert row["asked"] == [0.5] * LAYERS
    assert [row["skipped"][layer] for layer in sorted(skipped)] == [1.0] * 3
    assert touched == set(range(LAYERS)) - skipped


WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU, by the function of this project that asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation in WAITS:
            files = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
            near = [(f, n) for f, n in files if f.is_relative_to(CODE) or "transformers" in f.parts]
            self.of.update(name for file, name in near[-1:] if file.is_relative_to(CODE))
        return operation(*arguments, **(keywords or {}))


# Of two micro-batches
OF_VTC = {"__call__": 2, "_images": 2, "_grids_of": 2, "run_lengths": 4, "_check_outputs": 4}


@pytest.mark.parametrize(
    ("sparse", "more"),
    [
        ({}, {}),
        ({"lds": {"policy": "sts", "rate": 0.5, "epsilon": 1}}, {}),
        ({"vtc": {"kind": "random", "keep": 0.5}}, OF_VTC),
    ],
)
def test_a_step_waits_for_the_device_for_its_targets_and_its_norm(run, sparse, more, monkeypatch):
    """Counts and loss come by `tolist`, once each, which is no operation of torch's here. The first
    step, which looks what the loss is, may wait more."""
    take, steps = training.optimizer_step, []

    def watched(*arguments):
        steps.append(Waits())
        with steps[-1]:
            return take(*arguments)

    monkeypatch.setattr(training, "optimizer_step", watched)
    run(config(**sparse, gradient_accumulation_steps=2, batch_size=2))
    assert len(steps) == STEPS
    assert all(s.of == {"before_targets": 2, "optimizer_step": 1} | more for s in steps[1:])


def test_accumulation_is_the_same_step_as_one_large_batch(run, aligned):
    whole = run(config(batch_size=8, steps=2), "instruct", results="a", init=aligned)
    parts = run(
        config(batch_size=2, gradient_accumulation_steps=4, steps=2),
        "instruct",
        results="b",
        init=aligned,
    )
    for a, b in zip(*(read_history(r["weights"]) for r in (whole, parts)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["samples"] == b["samples"] == 8


def test_finished_weights_are_reused_at_once_also_by_another_ablation(run, monkeypatch):
    first = run(config())

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "fit", never)
    same = run(config(), ablation="lds")
    assert same["weights"] == first["weights"]
    assert {**same, "ablation": "dense", "out": None} == {**first, "out": None}


def test_states_that_a_kill_after_the_last_step_left_go_when_the_weights_are_reused(run):
    state = Path(run(config())["weights"]) / "state" / "00000002"
    state.mkdir(parents=True)
    run(config())
    assert not state.parent.exists()


def test_what_the_weights_depend_on_changes_the_key(backbone, prepared):
    def key(seed=0, **stage):
        return Job(config(**stage), "dense", seed, "align", [prepared], backbone, Path()).key

    assert key() == key(checkpoint_every=1)
    assert len({key(), key(seed=1), key(lr=2e-2), key(vtc={"kind": "random", "keep": 0.5})}) == 4


@pytest.mark.slow
def test_killed_after_a_checkpoint_it_resumes_to_the_same_weights(
    tmp_path, backbone, prepared, run
):
    settings = config(
        steps=8,
        lds={"policy": "sts", "rate": 0.6, "epsilon": 0.5},
        vtc={"kind": "random", "keep": 0.5, "schedule": "rising_linear"},
    )
    straight = run(settings, results="straight")
    folder, status = _stopped_once(tmp_path / "killed", backbone, prepared, settings)
    assert status == -signal.SIGKILL
    assert 2 <= len(read_history(folder)) < 8
    assert not (folder / "done.json").exists()
    resumed = run(settings, results="killed")
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    of_machine = {"seconds": 0, "peak_mem_mb": 0}
    rows, others = (
        [row | of_machine for row in read_history(weights)]
        for weights in (folder, straight["weights"])
    )
    assert rows == others
    assert [row["step"] for row in rows] == list(range(8))
    assert not (folder / "state").exists()


def test_the_papers_skipping_falls_to_zero_and_is_what_was_realised(run, aligned):
    lds = {"policy": "sts", "rate": 0.6, "epsilon": 0.5}
    result = run(config(steps=20, lds=lds), "instruct", init=aligned)
    rows = read_history(result["weights"])
    for row in rows:
        fallen = 0.6 * (1 - row["step"] / 20) ** 2
        depth = [1 + 0.5 * (2 * layer - 5) / 5 for layer in range(LAYERS)]
        assert row["asked"] == pytest.approx([fallen * share for share in depth])
        assert set(row["skipped"]) <= {0, 1}
        run_shares = [layer.get("rows", 1) for layer in row["work"]]
        assert run_shares == [1 - share for share in row["skipped"]]
        assert row["layers_run"] == LAYERS - sum(row["skipped"])
    asked = [sum(row["asked"]) for row in rows]
    assert asked == sorted(asked, reverse=True)
    assert asked[-1] < 0.01 < asked[0] == pytest.approx(0.6 * LAYERS)
    done = [sum(row["skipped"]) for row in rows]
    assert sum(done[:10]) > 0 == done[-1]
    per_layer = [sum(row["skipped"][layer] for row in rows) for layer in range(LAYERS)]
    assert result["realised"]["skipped_per_layer"] == per_layer


class Learned(torch.nn.Module):
    """A kind with a weight of its own: every second token, scaled."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(dim))

    def forward(self, tokens: torch.Tensor, keep: float) -> vtc.Outputs:
        every = round(1 / keep)
        positions = torch.arange(0, tokens.shape[1], every).expand(len(tokens), -1)
        return vtc.Outputs(positions, lambda x: x[:, ::every], tokens[:, ::every] * self.scale)


def test_a_kind_with_weights_is_trained_resumes_and_is_not_in_the_checkpoint(
    run, stopped, monkeypatch
):
    monkeypatch.setitem(vtc.KINDS, "learned", Learned)
    settings = config(steps=6, vtc={"kind": "learned", "keep": 0.5})
    scales, saved, unsparsify = [], [], training.unsparsify

    def watching(model):
        scale = dict(model.named_parameters()).get("visual_token_compressor.scale")
        scales.append(None if scale is None else scale.detach())
        unsparsify(model)

    def keep(_folder, _history, model, optimizer, *_rest):
        saved.extend(checkpoint.tensors(model, optimizer)["model"])

    monkeypatch.setattr(training, "unsparsify", watching)
    straight = run(settings, results="a")
    assert not torch.equal(scales[0], torch.ones_like(scales[0]))
    assert read_history(straight["weights"])[0]["keep_ratio"] == 0.5
    dense = run(config(), results="b")
    assert tensors(straight["weights"]).keys() == tensors(dense["weights"]).keys()
    [file] = Path(straight["weights"]).glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        assert not [name for name in opened.keys() if "compressor" in name]  # noqa: SIM118
    stopped(settings, after=2, then=keep, results="c")
    assert "visual_token_compressor.scale" in saved
    assert run(settings, results="c")["weights_sha256"] == straight["weights_sha256"]
    assert torch.equal(scales[-1], scales[0])


def _stopped_once(
    results: Path,
    backbone: Path,
    prepared: Path,
    settings: Config,
    number: int = signal.SIGKILL,
    sign: str = "state/*/process-0.sha256",
) -> tuple[Path, int]:
    """Train in a process of its own, slowly, and send it a signal when the file `sign` of the
    training is there and not empty: by default kill -9 after its first checkpoint. The folder of
    the weights, and how the process ended."""
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from sts.pipeline.train import train
        from sts.pipeline.train.job import Job
        from sts.pipeline.config import Config
        taken = train.optimizer_step
        def slow(*args):
            time.sleep(0.3)
            return taken(*args)
        train.optimizer_step = slow
        config = Config.model_validate_json(sys.argv[1])
        data, init, out = map(Path, sys.argv[2:5])
        train.train(Job(config, "dense", 0, "align", [data], init, out))
    """)
    out = results / "runs" / "dense" / "seed0" / "align.json"
    arguments = [settings.model_dump_json(by_alias=True), prepared, backbone, out]
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)])
    deadline = time.monotonic() + 120
    while not any(file.stat().st_size for file in results.glob(f"weights/*/{sign}")):
        assert process.poll() is None, "ended before it was stopped"
        assert time.monotonic() < deadline, f"no {sign}"
        time.sleep(0.02)
    os.kill(process.pid, number)
    [folder] = results.glob("weights/*/")
    return folder, process.wait(timeout=120)


def test_sigterm_is_answered_with_a_checkpoint_and_no_step_is_taken_twice(
    tmp_path, backbone, prepared, run, caplog
):
    """As a scheduler sends it: long before the next regular checkpoint."""
    settings = config(steps=8, checkpoint_every=100)
    straight = run(settings, results="straight")
    folder, status = _stopped_once(
        tmp_path / "stopped", backbone, prepared, settings, signal.SIGTERM, "history.jsonl"
    )
    taken = len(read_history(folder))
    assert status == 143
    assert 1 <= taken < 8
    caplog.set_level("INFO")
    resumed = run(settings, results="stopped")
    assert f"going on from step {taken}: " in caplog.text
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert [row["step"] for row in read_history(folder)] == list(range(8))


def test_sigterm_to_a_process_that_loads_data_does_not_end_the_training():
    """A scheduler sends it to all processes. A dead loader would raise before the checkpoint."""
    loader = torch.utils.data.DataLoader(
        range(40), batch_size=None, num_workers=1, worker_init_fn=leave_sigterm
    )
    batches = iter(loader)
    taken = [next(batches)]
    [process] = multiprocessing.active_children()
    os.kill(process.pid, signal.SIGTERM)
    assert [int(number) for number in [*taken, *batches]] == list(range(40))


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(run, monkeypatch):
    """The second checkpoint finds no room: a file may have 1000 bytes."""
    save, saves = training.save_state, []

    def on_a_full_disk(*arguments):
        saves.append(arguments[-1])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            return save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(training, "save_state", on_a_full_disk)
    with pytest.raises(OSError, match=r"checkpoint before step 4 was not written.*disk full"):
        run(config(steps=6))
    monkeypatch.undo()
    monkeypatch.setenv("STS_TRACKING", "off")
    resumed, straight = run(config(steps=6)), run(config(steps=6), results="straight")
    assert saves == [2, 4]
    assert resumed["weights_sha256"] == straight["weights_sha256"]


@pytest.mark.parametrize(
    "part",
    [
        "history.jsonl",
        *(
            pytest.param(file, marks=pytest.mark.slow)
            for file in ("shard-*.safetensors", "process-0.pt")
        ),
    ],
)
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(run, stopped, caplog, part):
    def spoil(folder, *_):
        [file] = (folder / "state" / "00000004").glob(part)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)

    stopped(config(steps=6), after=2, then=spoil)
    resumed = run(config(steps=6))
    assert "00000004: broken, the checkpoint before it is taken" in caplog.text
    straight = run(config(steps=6), results="straight")
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert not (Path(resumed["weights"]) / "state").exists()


def test_no_file_of_a_checkpoint_runs_code(run, stopped, tmp_path):
    """torch's own format is read by pickle, which runs what a file says."""
    sign = tmp_path / "ran"

    def plant(folder, *_):
        attack = f"cposix\nsystem\n(S'touch {sign}'\ntR.".encode()
        pickle.loads(attack)
        assert sign.exists(), "what is planted would run"
        sign.unlink()
        state = folder / "state" / "00000002"
        for name in (".metadata", "__0_0.distcp", "process-0.pt"):
            (state / name).write_bytes(attack)
        lines = (f"{sha256_file(file)}  {file.name}\n" for file in state.glob("[!p]*"))
        lines = (*lines, f"{sha256_file(state / 'process-0.pt')}  process-0.pt\n")
        (state / "process-0.sha256").write_text("".join(lines))

    stopped(config(), then=plant)
    with pytest.raises(pickle.UnpicklingError):
        run(config())
    assert not sign.exists()


SPOILS = {
    "flipped": lambda file: file.write_bytes(flipped(file.read_bytes())),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": Path.unlink,
}


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", "flipped"),
        ("config.json", "gone"),
        ("history.jsonl", "truncated"),
        ("done.json", "empty"),
    ],
)
def test_spoilt_finished_weights_are_trained_again_and_no_reader_takes_them(
    run, aligned, caplog, monkeypatch, name, how
):
    first = json.loads(aligned.read_text())
    folder = Path(first["weights"])
    SPOILS[how](folder / name)
    with pytest.raises(SpoiltError) as error:
        run(config(), "instruct", init=aligned)
    assert f"{folder / name}: " in str(error.value)
    assert f"Delete {aligned} and run snakemake again" in str(error.value)
    again = run(config())
    assert f"{folder / name}: " in caplog.text
    assert again["weights_sha256"] == first["weights_sha256"]
    monkeypatch.setattr(training, "fit", None)
    assert run(config())["weights_sha256"] == first["weights_sha256"]


def test_other_weights_than_the_manifest_names_are_refused(run, aligned):
    other = run(config(), seed=1, results="other")
    first = json.loads(aligned.read_text())
    shutil.rmtree(first["weights"])
    shutil.copytree(other["weights"], first["weights"])
    with pytest.raises(SpoiltError, match=r"other weights than .*align.json names"):
        run(config(), "instruct", init=aligned)


def test_spoilt_tokens_are_made_again_and_spoilt_data_are_refused(run, tmp_path, prepared):
    first = run(config())
    [tokens] = (tmp_path / "results/tokens").glob("*.arrow")
    SPOILS["flipped"](tokens)
    again = run(config(checkpoint_every=4), seed=1)
    assert again["weights_sha256"] == run(config(), seed=1, results="other")["weights_sha256"]
    assert first["weights_sha256"] != again["weights_sha256"]
    copy = shutil.copytree(prepared.parent, tmp_path / "copy") / "manifest.json"
    SPOILS["flipped"](copy.parent / "align.arrow")
    with pytest.raises(SpoiltError, match=r"align.arrow: other bytes .* Delete .*manifest.json"):
        split_files([copy], "align")


def test_what_does_not_fit_stops_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_here", lambda processes: 0.8e9)
    run(config())
    monkeypatch.setattr(memory, "memory_here", lambda processes: 0.6e9)
    with pytest.raises(MemoryError, match=r"stages.align: a process needs about .* GB"):
        run(config(), results="none")
    assert not list((tmp_path / "none").rglob("history.jsonl"))


@pytest.mark.slow
def test_two_trainings_of_one_key_do_not_write_over_each_other(tmp_path):
    folder = tmp_path / "key"
    script = (
        "import sys, time, pathlib; from sts.pipeline.train.checkpoint import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('in', flush=True); time.sleep(1)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, folder], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "in\n"
    began = time.monotonic()
    with checkpoint.locked(folder):
        waited = time.monotonic() - began
    assert holder.wait() == 0
    assert waited > 0.5


def test_a_loss_that_is_not_finite_stops_with_step_and_causes(run):
    scale = config()
    block = scale.stage("align").model_copy(update={"lr": 1e30, "max_grad_norm": 1e30})  # unchecked
    with pytest.raises(FloatingPointError, match=r"align step \d: loss .*align\.lr 1e\+30"):
        run(scale.model_copy(update={"stages": {"align": block}}))


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
    vtc = {"kind": "avgpool2d", "keep": 0.25, "dense_tail": 0.5}
    lds = {**HALF, "schedule": "rising_linear"}
    result = run(config(vtc=vtc, lds=lds), "instruct", init=aligned)
    dense = run(config(), "instruct", init=aligned)
    rows = read_history(result["weights"])
    assert [row["keep_ratio"] for row in rows] == [0.25, 0.25, 1.0, 1.0]
    assert [row["visual_tokens"] for row in rows] == [4, 4, 16, 16]
    assert [row["layers_run"] for row in rows] == [LAYERS - sum(r["skipped"]) for r in rows]
    assert rows[0]["layers_run"] == LAYERS > rows[-1]["layers_run"]
    assert result["realised"]["keep_ratio"] == pytest.approx(0.625)
    skipped = sum(sum(row["skipped"]) for row in rows)
    assert sum(result["realised"]["skipped_per_layer"]) == skipped > 0
    assert result["flops"] < result["flops_dense"] == pytest.approx(dense["flops"])
    assert dense["flops"] == dense["flops_dense"]


UNITS = {
    "samples": ({"policy": "layerskip", "rate": 0.9, "draw": "fixed_count"}, {"rows"}),
    "tokens": ({"policy": "random_ltd", "rate": 0.5}, {"tokens"}),
    "backward": ({"policy": "dropbp", "rate": 0.5}, {"attention_backward", "mlp_backward"}),
}


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_logs_the_work_that_its_flops_come_from(run, aligned, unit):
    lds, shares = UNITS[unit]
    result = run(config(lds=lds, steps=2), "instruct", init=aligned)
    rows = read_history(result["weights"])
    for row in rows:
        left_out = [1 - sum(of.get(s, 1) for s in shares) / len(shares) for of in row["work"]]
        assert row["skipped"] == pytest.approx(left_out)
    assert {share for row in rows for of_layer in row["work"] for share in of_layer} == shares
    assert result["flops"] == pytest.approx(sum(row["flops"] for row in rows))
    assert result["flops"] < 0.95 * result["flops_dense"]


def test_precision_and_recomputation_are_taken_from_the_configuration(run, aligned, monkeypatch):
    monkeypatch.setattr(device, "bf16_is_native", lambda: True)
    plain = run(config(steps=1), "instruct", init=aligned)
    again = run(config(steps=1, gradient_checkpointing=True), "instruct", init=aligned)
    half = run(config(steps=1, precision="bf16"), "instruct", init=aligned)
    [a], [b], [c] = (read_history(result["weights"]) for result in (plain, again, half))
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert c["loss"] != a["loss"]
    assert c["loss"] == pytest.approx(a["loss"], rel=0.02)
    saved = tensors(half["weights"])
    assert {t.dtype for t in saved.values() if t.is_floating_point()} == {torch.float32}


BF16 = {"precision": "bf16", "weights": "bf16"}


def test_bf16_weights_are_stepped_on_as_masters_by_hand(run, aligned, monkeypatch):
    """Against AdamW written out, on the gradients that each backward left in bf16."""
    monkeypatch.setattr(device, "bf16_is_native", lambda: True)
    names, start, gradients, collect = {}, {}, {}, step.collect_gradients

    def named(model):
        names.update((parameter, name) for name, parameter in model.named_parameters())
        return with_masters(model)

    def watched(pairs):
        for parameter, master in pairs:
            assert parameter.dtype == torch.bfloat16
            start.setdefault(names[parameter], master.clone())
            if parameter.grad is not None:
                before = gradients.get(names[parameter], 0)
                gradients[names[parameter]] = before + parameter.grad.double()
        collect(pairs)

    monkeypatch.setattr(step, "with_masters", named)
    monkeypatch.setattr(step, "collect_gradients", watched)
    settings = config(steps=1, lds=HALF, weight_decay=0.1, gradient_accumulation_steps=2, **BF16)
    result = run(settings, "instruct", init=aligned)
    end, before = tensors(result["weights"]), tensors(json.loads(aligned.read_text())["weights"])
    [row] = read_history(result["weights"])
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert 0 < len(gradients) < len(start)
    for name, weight in start.items():
        assert torch.equal(weight, before[name])
        expected = weight.double()
        if name in gradients:  # else LDS has left it out: not moved, nor decayed
            clipped = gradients[name] * min(1.0, 1 / (norm + 1e-6))
            decay = 0.1 if weight.ndim == 2 and "embed_tokens" not in name else 0.0
            expected = expected * (1 - row["lr"] * decay)
            expected = expected - row["lr"] * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(end[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(end[n], before[n]) for n in end.keys() - start.keys())  # frozen


def test_bf16_weights_resume_from_their_masters(run, stopped, monkeypatch):
    monkeypatch.setattr(device, "bf16_is_native", lambda: True)
    straight = run(config(**BF16), results="straight")
    stopped(config(**BF16), results="stopped")
    again = run(config(**BF16), results="stopped")
    assert again["weights_sha256"] == straight["weights_sha256"]


@pytest.mark.parametrize(
    "more", [{"precision": "fp32"}, {"parallel": "fsdp2"}, {"trains": ["lora"]}]
)
def test_bf16_weights_are_refused_where_they_make_no_sense(more):
    with pytest.raises(ValueError, match=r"weights.*'bf16'.*expected fp32, or precision: bf16"):
        config(**BF16 | more)


@pytest.mark.parametrize("keywords", ["labels", "shift_labels", "num_items_in_batch"])
def test_the_loss_in_chunks_is_that_of_the_whole_logits(keywords):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 500, dtype=torch.float64)
    hidden = torch.randn(3, 40, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 500, (3, 40), generator=generator)
    labels[0, :9] = -100
    more = {"shift_labels": labels, "num_items_in_batch": torch.tensor(17)}
    more = {key: value for key, value in more.items() if key == keywords}
    whole = ForCausalLMLoss(head(hidden), labels, 500, **more)
    chunked = chunked_loss.chunked_loss(hidden, head, labels, **more)
    torch.testing.assert_close(chunked, whole.float())  # transformers' has float32 logits
    leaves = (hidden, head.weight, head.bias)
    pairs = zip(*(torch.autograd.grad(loss, leaves) for loss in (chunked, whole)), strict=True)
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_with_its_loss_in_chunks_takes_the_same_steps(run, aligned, monkeypatch, precision):
    monkeypatch.setattr(device, "bf16_is_native", lambda: True)
    rows, calls = [], {"whole": Counter(), "chunked": Counter()}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls[kind][function.__name__] += torch.is_grad_enabled()
            return function(*args, **(kwargs or {}))

    for kind in calls:
        settings = config(steps=2, precision=precision, cross_entropy=kind)
        with Watch():
            rows.append(read_history(run(settings, "instruct", init=aligned)["weights"]))
    assert calls["whole"]["linear_cross_entropy"] == 0
    assert calls["chunked"]["linear_cross_entropy"] == 1 + 2  # the probe, and the steps
    # FLOPs are counted of the model as it was
    assert calls["whole"]["cross_entropy"] - calls["chunked"]["cross_entropy"] == 2
    for whole, chunked in zip(*rows, strict=True):
        rounding = 1e-5 if precision == "fp32" else 8e-3
        assert chunked["loss"] == pytest.approx(whole["loss"], rel=rounding)
        assert chunked["grad_norm"] == pytest.approx(whole["grad_norm"], rel=4 * rounding)


def test_a_loss_in_chunks_is_refused_where_logits_are_more_than_a_linear_layer(aligned):
    model = LlavaForConditionalGeneration.from_pretrained(read_json(aligned)["weights"])
    whole = model.loss_function
    model.loss_function = lambda logits, **kwargs: whole(logits=3 * logits, **kwargs)
    with pytest.raises(ValueError, match=r"cross_entropy.*Llava.*expected whole for a model"):
        chunked_loss.chunk_loss(model)


def test_bf16_is_fp32_on_a_processor_without_it_and_has_a_key_of_its_own(
    run, aligned, monkeypatch, caplog, backbone, prepared
):
    half = config(steps=1, precision="bf16")
    keys = []
    for native in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=native: has)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        keys.append(Job(half, "dense", 0, "align", [prepared], backbone, Path()).key)
    assert keys[0] != keys[1]
    plain = run(config(steps=1), "instruct", init=aligned)
    assert "precision" not in caplog.text
    instead = run(half, "instruct", init=aligned)
    assert "instruct.precision: bf16 is slow on this processor: fp32 instead" in caplog.text
    assert (plain["precision"], instead["precision"]) == ("fp32", "fp32")
    assert plain["weights_sha256"] == instead["weights_sha256"]
    assert plain["key"] != instead["key"]


def test_the_learning_rate_rises_then_falls_to_nearly_nothing():
    factors = [lr_factor(step, 100, 3) for step in range(100)]
    assert factors[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    assert lr_factor(0, 1, 0) == 1


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


SPARSE = {
    "vtc": {"kind": "random", "keep": 0.5},
    "lds": {"policy": "sts", "rate": 0.6, "epsilon": 0.5},
}


def test_the_held_out_loss_is_that_of_the_checkpoint_on_each_validation_row(run, aligned, prepared):
    manifest = run(config(**SPARSE), "instruct", init=aligned)
    model = LlavaForConditionalGeneration.from_pretrained(manifest["weights"])
    processor = AutoProcessor.from_pretrained(manifest["weights"])
    (file,) = split_files([prepared], "validation")
    of_skill = {}
    for row in Dataset.from_file(str(file)):
        _, question, _, answer = (text for turn in row["conversations"] for text in turn.values())
        chat = [("user", question), ("assistant", answer)]
        texts = [render(processor, chat[:1], ask=True), render(processor, chat)]
        asked, whole = (processor(row["image"], text, return_tensors="pt") for text in texts)
        labels = whole["input_ids"].clone()
        labels[:, : asked["input_ids"].shape[1]] = -100
        with torch.no_grad():
            loss = model(**whole, labels=labels).loss.item()
        answers = (labels != -100).sum().item()
        of_skill.setdefault(row["id"].split("/")[0], []).append((loss * answers, answers))
    sums = {skill: tuple(map(sum, zip(*rows, strict=True))) for skill, rows in of_skill.items()}
    end = manifest["held_out"][-1]
    assert end["step"] == STEPS and len(sums) == 8
    assert end["skills"] == pytest.approx({s: loss / n for s, (loss, n) in sums.items()}, rel=1e-4)
    loss, answers = map(sum, zip(*sums.values(), strict=True))
    assert end["loss"] == pytest.approx(loss / answers, rel=1e-4)


def test_measuring_the_held_out_loss_changes_no_step(run, aligned):
    watched, alone = (
        run(config(validations=times, **SPARSE), "instruct", results=str(times), init=aligned)
        for times in (3, 0)
    )
    assert [row["step"] for row in watched["held_out"]] == [2, 3, 4] and "held_out" not in alone
    assert watched["weights_sha256"] == alone["weights_sha256"] and watched["key"] == alone["key"]
    timed = ("seconds", "peak_mem_mb")
    for a, b in zip(*(read_history(each["weights"]) for each in (watched, alone)), strict=True):
        assert {k: a[k] for k in a if k not in timed} == {k: b[k] for k in b if k not in timed}


@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_training_has_measured_the_held_out_loss_at_the_same_steps(
    run, aligned, stopped, monkeypatch, after
):
    settings = config(steps=6, validations=6)
    straight = run(settings, "instruct", results="straight", init=aligned)

    def one_more_step(folder, *_):  # which is lost
        (file,) = Path(folder).glob("held_out.jsonl")
        last = file.read_text().splitlines()[-1]
        step = 2 * after + 1
        lost = json.dumps(json.loads(last) | {"step": step, "loss": 99.0})
        file.write_text(file.read_text() + lost + "\n")

    stopped(settings, after, one_more_step, stage="instruct", results="stopped", init=aligned)
    assert (
        run(settings, "instruct", results="stopped", init=aligned)["held_out"]
        == (straight["held_out"])
    )


def test_no_held_out_loss_of_captions_or_without_a_validation_split(
    run, aligned, prepared, tmp_path
):
    assert "held_out" not in read_json(aligned)
    manifest = read_json(prepared)
    del manifest["splits"]["validation"]
    without = shutil.copytree(prepared.parent, tmp_path / "data") / prepared.name
    write_json_atomic(without, manifest)
    out = tmp_path / "other/runs/dense/seed0/instruct.json"
    job = Job(config(), "dense", 0, "instruct", [without], aligned, out)
    assert "held_out" not in train(job)


def test_a_share_of_the_samples_is_drawn_by_seed_whatever_else_the_stage_does(run, prepared):
    def seen(seed=0, **stage) -> set[int]:
        job = Job(config(samples=0.25, **stage), "x", seed, "align", [prepared], backbone, out)
        samples, order = load_data(job, processor)
        assert len(samples) == 6 and len(samples.lengths) == len(samples.has_image) == 6
        rows = samples.samples["row"].to_pylist()
        trained = [*order(0), *order(1)]  # a pass: 4 and 2
        assert sorted(trained) == [*range(6)]
        return {rows[index] for index in trained}

    whole = run(config())
    backbone, out = whole["out"], whole["out"]
    processor = AutoProcessor.from_pretrained(whole["weights"])
    drawn = seen()
    assert drawn == seen(**SPARSE) == seen(lr=0.5) and drawn < set(range(24))
    assert drawn != seen(seed=1)
    assert run(config(samples=0.25))["weights_sha256"] != whole["weights_sha256"]


def test_only_who_takes_a_share_of_the_samples_follows_how_it_is_drawn():
    files = [follows.training(config(samples=share).stages["align"]) for share in (1.0, 0.5)]
    assert [follows.ROOMS["samples"][0] in each for each in files] == [False, True]
