"""STS for its own sake: in other people's loops, trainers and wrappers."""

import copy
import dataclasses
import json
import math
import os
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from trainers import USUAL, VISUAL, tiny, trainer_for
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from sts import LDS, VTC, SparseCallback, sparsify, unsparsify
from sts.lds import DEPTHS, Depth
from sts.scheme import SCHEME, Scheme
from sts.vtc import KINDS, Outputs
from sts.vtc.sampling import uniform

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GLOSSARY = DOCS / "glossary.md"
PAPER = LDS("sts", rate=0.6, epsilon=0.5)
MEASURED = LDS("block_influence", rate=0.5, ema=0.5)
HALF = LDS("layerdrop", rate=0.5, draw="fixed_count")  # two of four layers, another two each step


@pytest.mark.slow
def test_import_needs_torch_and_transformers_alone():
    code = """
import sys
for name in ("snakemake", "mlflow", "dvc", "lm_eval", "datasets", "matplotlib", "pydantic"):
    sys.modules[name] = None  # importing it now fails
from sts import LDS, VTC, SparseCallback, sparsify, unsparsify
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The mini scale's own LLaVA, not yet aligned, as a user would load it."""
    from sts.pipeline.files import write_json_atomic
    from sts.pipeline.train.model import SHIPPED, build

    folder = tmp_path_factory.mktemp("llava")
    parts = {part: str(ROOT / SHIPPED / part) for part in ("vision", "language", "processor")}
    write_json_atomic(folder / "manifest.json", parts)
    model, processor = build(folder / "manifest.json", seed=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


FAMILIES = ["mini", "idefics3", "llava_next", "qwen2_5_vl"]  # of data/backbones
EXAMPLES = [(name, family) for name in ("own_loop", "trainer") for family in FAMILIES]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), [*EXAMPLES, ("accelerate_loop", "mini")])
def test_examples_train_every_shipped_model(
    name, family, model_folder, tmp_path, monkeypatch, capsys
):
    example = ROOT / "examples" / f"{name}.py"
    text = example.read_text()
    assert len(text.splitlines()) < 40
    assert "STS_VTC, STS_LDS" in text  # the values of row `sts`
    model = model_folder if family == "mini" else ROOT / "data/backbones" / family
    monkeypatch.setattr(sys, "argv", [name, str(model), str(tmp_path)])
    runpy.run_module(f"examples.{name}", run_name="__main__")
    printed = capsys.readouterr().out
    keys = {"own_loop": "'keep_ratio': ", "trainer": "'sts_keep_ratio': '"}
    kept = re.findall(keys.get(name, keys["own_loop"]) + r"(0\.\d+)", printed)
    assert len(kept) > 3 and all(0.4 < float(ratio) < 0.6 for ratio in kept)
    assert "nan" not in printed
    if name == "trainer":
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert AutoProcessor.from_pretrained(tmp_path).image_token
        assert all(p.isfinite().all() for p in plain.parameters())


@pytest.mark.slow
def test_an_example_runs_by_its_command(model_folder):
    command = [sys.executable, "-m", "examples.own_loop", str(model_folder)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'keep_ratio': 0.5" in done.stdout


@pytest.mark.parametrize(
    ("vtc", "lds"),
    [
        (VTC("random", keep=0.25), None),
        (None, HALF),
        pytest.param(None, LDS("random_ltd", rate=0.5), marks=pytest.mark.slow),  # as random
    ],
)
def test_the_first_loss_of_dpo_is_log_2(vtc, lds, model_folder, tmp_path):
    """With PEFT policy and reference are the same weights then, and have the same sparsity."""
    trainer = dpo(model_folder, tmp_path, SparseCallback(None, vtc, lds))
    trainer.train()
    first, second = (float(row["loss"]) for row in trainer.state.log_history if "loss" in row)
    assert first == pytest.approx(math.log(2), abs=1e-4) != second


def test_a_reference_beside_adapters_is_refused_as_it_is_dense(model_folder, tmp_path):
    reference = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    callback = SparseCallback(None, VISUAL)
    trainer = dpo(model_folder, tmp_path, callback, ref_model=reference)
    with pytest.raises(ValueError, match="reference forwards of a step=0: expected 1 of the train"):
        trainer.train()


def dpo(model_folder, folder, callback, **more) -> DPOTrainer:
    ask = {"type": "text", "text": "what color is the circle?"}
    rows = [
        {
            "images": [Image.new("RGB", (64, 64), color)],
            "prompt": [{"role": "user", "content": [{"type": "image"}, ask]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": color}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "grey"}]}],
        }
        for color in ("red", "blue")
    ]
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    settings = {"max_length": None, "bf16": False, "gradient_checkpointing": False}
    settings |= {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    return DPOTrainer(
        model,
        args=DPOConfig(str(folder), **USUAL | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(model_folder),
        peft_config=LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)"),
        callbacks=[callback],
        **more,
    )


def test_every_place_that_the_glossary_names_is_there():
    rows = [line.split(" | ") for line in GLOSSARY.read_text().splitlines() if line[:2] == "| "]
    assert all(len(cells) == 3 for cells in rows) and len(rows) > 50
    for *_, where in rows:
        places = [
            *re.findall(r"`([\w/]+/[\w./]*)`", where),
            *re.findall(r"\]\(([\w.]+)[#)]", where),
        ]
        missing = [place for place in places if not any((f / place).exists() for f in (ROOT, DOCS))]
        assert not missing and (places or where == "where |"), where


def test_context_manager_gives_the_model_back_even_after_an_error():
    model, batch = tiny()
    before = model(**batch).loss
    with pytest.raises(ZeroDivisionError), sparsify(model, VISUAL) as scheme:
        scheme.begin_step(0)
        assert model(**batch).logits is None
        raise ZeroDivisionError
    assert torch.equal(model(**batch).loss, before)
    assert SCHEME not in vars(model)
    with sparsify(model, VISUAL) as scheme:
        scheme.begin_step(0)
        model(**batch)
        unsparsify(model)
    assert torch.equal(model(**batch).loss, before)


def callback_in(trainer: Trainer) -> SparseCallback:
    callbacks = trainer.callback_handler.callbacks
    (callback,) = [c for c in callbacks if isinstance(c, SparseCallback)]
    return callback


def scheme_of(trainer: Trainer) -> Scheme:
    return callback_in(trainer).scheme


class Steps(TrainerCallback):
    """What the scheme says at the end of each optimizer step."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.result = scheme, []

    def on_step_end(self, *args, **kwargs) -> None:
        self.result.append(self.scheme.metrics() | {"off": self.scheme.skipped})


def steps_of(trainer: Trainer) -> list[dict]:
    steps = Steps(scheme_of(trainer))
    trainer.add_callback(steps)
    trainer.train()
    return steps.result


def resumed_like_the_whole(folder: Path, lds: LDS, vtc: VTC = VISUAL) -> Trainer:
    uninterrupted = trainer_for(folder / "whole", lds, vtc)
    uninterrupted.train()
    again = trainer_for(folder / "again", lds, vtc)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    for (name, expected), result in zip(
        uninterrupted.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(result, expected), name
    assert SCHEME not in vars(uninterrupted.model)  # given back at the end
    return uninterrupted


@pytest.mark.parametrize(
    "lds",
    [
        MEASURED,
        PAPER,
        LDS("layerskip", rate=0.9, schedule="rising_linear"),
        pytest.param(LDS("random_ltd", rate=0.5), marks=pytest.mark.slow),  # as layerskip
        LDS("dropbp", rate=0.5),
    ],
    ids=lambda lds: lds.policy,
)
def test_a_resumed_trainer_goes_on_as_if_it_had_not_stopped(lds, tmp_path):
    uninterrupted = resumed_like_the_whole(tmp_path, lds)
    logged = [row for row in uninterrupted.state.log_history if "sts_keep_ratio" in row]
    assert len(logged) == 6 and {row["sts_keep_ratio"] for row in logged} == {0.25}


class Scaling(nn.Module):
    """A VTC kind with weights of its own."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, tokens, keep, *, grid):
        outputs = uniform(tokens, keep, grid=grid)
        return Outputs(outputs.positions, outputs.apply, outputs.apply(tokens) * self.scale)


def test_a_resumed_trainer_goes_on_with_the_weights_of_a_kind(monkeypatch, tmp_path):
    monkeypatch.setitem(KINDS, "scaling", Scaling)
    resumed_like_the_whole(tmp_path, PAPER, VTC("scaling", keep=0.25))


def test_in_a_trainer_the_stage_is_as_long_as_its_training(tmp_path):
    trainer = trainer_for(tmp_path, PAPER, max_steps=8, save_strategy="no")
    ran = [0] * 4
    for index, layer in enumerate(trainer.model.model.text_model.layers):
        layer.register_forward_pre_hook(lambda *_, i=index: ran.__setitem__(i, ran[i] + 1))
    result = steps_of(trainer)
    assert len(result) == 8
    for step, metrics in enumerate(result):
        t = step / 8
        expected = [0.6 * (1 - t) ** 2 * (1 + 0.5 * (2 * i - 3) / 3) for i in range(4)]
        assert metrics["asked"] == pytest.approx(expected)
        assert metrics["layers_run"] == 4 - len(metrics["off"])
        assert metrics["skipped"] == [float(i in metrics["off"]) for i in range(4)]
    assert [8 - n for n in ran] == [sum(i in one["off"] for one in result) for i in range(4)]
    assert sum(ran) < 8 * 4
    logged = [row["sts_layers_run"] for row in trainer.state.log_history if "loss" in row]
    assert logged == [one["layers_run"] for one in result]


def test_in_a_trainer_the_clock_may_go_by_epochs(tmp_path):
    # 9 batches an epoch are 5 steps, the last a half
    lds = LDS("layerdrop", rate=0.6, schedule="falling_quadratic", clock="epochs")
    settings = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    result = steps_of(trainer_for(tmp_path, lds, save_strategy="no", **settings))
    by_formula = [one["asked"][0] for one in result]
    assert by_formula == pytest.approx([0.6 * (1 - step // 5 / 3) ** 2 for step in range(15)])


def test_a_trainer_accumulates_under_one_decision(tmp_path):
    trainer = trainer_for(tmp_path, HALF, gradient_accumulation_steps=3)
    scheme, seen = scheme_of(trainer), []
    layers = trainer.model.model.text_model.layers
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, i=index: seen.append((scheme.step, i)))
    trainer.train()
    for step in range(6):
        ran = [i for at, i in seen if at == step]
        assert len(ran) == 3 * len(set(ran)) and len(set(ran)) == 2


def test_a_trainer_shows_gradients_to_a_policy_that_looks_at_them(tmp_path, monkeypatch):
    looked = []

    def of_gradients(layer):
        looked.append(all(p.grad is not None for p in layer.parameters()))
        return torch.tensor([float(len(looked)), 1.0])

    depth = Depth(lambda layers, lds, measured: [1.0] * layers, "1", of_gradients=of_gradients)
    monkeypatch.setitem(DEPTHS, "gradient", depth)
    trainer = trainer_for(
        tmp_path, LDS("layerdrop", rate=0.5, depth="gradient", draw="fixed_count")
    )
    trainer.train()  # without after_backward the second step would be an error
    assert looked == [True] * 2 * 6  # of the two layers that ran, in each of six steps


@pytest.mark.parametrize(
    ("order", "task"),
    [("sparsify first", "CAUSAL_LM"), ("peft first", None), ("sparsify the wrapped", "CAUSAL_LM")],
)
def test_lora_on_top(order, task):
    model, batch = tiny()
    lora = LoraConfig(r=4, task_type=task, target_modules=r".*language_model.*(q_proj|v_proj)")
    reference = copy.deepcopy(model)
    if order == "sparsify first":
        scheme = sparsify(model, VISUAL, HALF)
        wrapped = get_peft_model(model, lora)
    else:
        wrapped = get_peft_model(model, lora)
        scheme = sparsify(wrapped if "wrapped" in order else wrapped.get_base_model(), VISUAL, HALF)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    wrapped.train()
    for step in range(4):
        scheme.begin_step(step)
        wrapped(**batch).loss.backward()
        assert scheme.metrics()["layers_run"] == 2 and scheme.metrics()["keep_ratio"] == 0.25
        for name, parameter in wrapped.named_parameters():
            trained = "lora_" in name and not any(f"layers.{i}." in name for i in scheme.skipped)
            assert (parameter.grad is not None) == trained, name
        optimizer.step()
        optimizer.zero_grad()
    unsparsify(wrapped)
    merged = wrapped.eval().merge_and_unload()
    assert list(merged.state_dict()) == list(reference.state_dict())
    assert not torch.equal(merged(**batch).logits, reference.eval()(**batch).logits)


@pytest.mark.parametrize(
    ("compiled", "vtc", "lds"),
    [
        ("layers", VISUAL, HALF),
        ("layers", VTC("cls_topk", keep=0.25), HALF),
        ("layers", VISUAL, LDS("random_ltd", rate=0.5)),
        ("layers", VISUAL, LDS("dropbp", rate=0.5)),
        ("whole", VISUAL, HALF),
    ],
)
@pytest.mark.slow
def test_compiled_models_train_alike(compiled, vtc, lds):
    """A whole model compiles in pieces (the scheme breaks the graph), so compile its layers."""

    def gradients(compiled: str | None) -> list[list[float]]:
        torch.compiler.reset()
        model, batch = tiny()
        scheme, result = sparsify(model, vtc, lds, seed=2), []
        runner = torch.compile(model, backend="aot_eager") if compiled == "whole" else model
        layers = model.model.language_model.layers
        if compiled == "layers":
            for layer in (*layers, *model.model.vision_tower.encoder.layers):
                layer.compile(backend="aot_eager")
        for step in range(3):
            scheme.begin_step(step)
            runner(**batch).loss.backward()
            result.append([p.grad is None or p.grad.norm().item() for p in layers.parameters()])
            model.zero_grad()
        return result

    for step, (result, expected) in enumerate(
        zip(gradients(compiled), gradients(None), strict=True)
    ):
        assert result == pytest.approx(expected, rel=1e-4), step


def test_a_pickled_model_keeps_its_scheme():
    model, batch = tiny()
    sparsify(model, VISUAL, HALF).begin_step(2)
    twin = pickle.loads(pickle.dumps(model))  # as torch.save(model) does
    assert torch.equal(twin(**batch).loss, model(**batch).loss)
    unsparsify(twin)
    assert SCHEME not in vars(twin) and SCHEME in vars(model)


def numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("unit", ["layer", "backward"])
def test_the_log_counts_the_tokens_and_flops_that_were_computed(unit, tmp_path):
    """By the Trainer's rule, 6 FLOPs a weight and token; 4 of them in the backward."""
    lds = dataclasses.replace(HALF, unit=unit)
    trainer = trainer_for(tmp_path, lds, max_steps=2, save_steps=2, gradient_accumulation_steps=2)
    callback = callback_in(trainer)
    callback.peak_flops = 1e9
    decisions = []

    class Note(TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            decisions.append(callback.scheme.decision.off)

    trainer.add_callback(Note())
    model, samples = trainer.model, 8
    layers = model.model.text_model.layers
    full, text = len(trainer.train_dataset[0]["input_ids"]), 4
    tokens = text + (full - text) // 4  # VISUAL
    trainer.train()
    outside = model.num_parameters(exclude_embeddings=True) - sum(map(numel, layers))
    expected = 6 * samples * full * outside
    for off in decisions:
        for index, layer in enumerate(layers):
            left = [numel(getattr(layer, x[:-9].replace("attention", "self_attn")))
                    for i, x in off if i == index and unit == "backward"]  # fmt: skip
            runs = unit == "backward" or (index, "rows") not in off
            expected += samples // 2 * tokens * (6 * numel(layer) * runs - 4 * sum(left))
    assert all(decisions) and trainer.state.total_flos == pytest.approx(expected)
    saved = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    assert saved["total_flos"] == pytest.approx(expected)
    *steps, last = trainer.state.log_history
    assert last["total_flos"] == pytest.approx(expected)
    assert all(row["sts_tokens_per_s"] > 0 and row["sts_mfu"] > 0 for row in steps)
    shares = [row["sts_mfu"] / row["sts_tokens_per_s"] for row in steps]  # the time cancels
    assert sum(shares) * 1e9 * samples // 2 * tokens == pytest.approx(expected, rel=1e-6)
