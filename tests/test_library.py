"""STS for its own sake: in other people's loops, trainers and wrappers."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CASES
from transformers import Trainer, TrainingArguments, default_data_collator

from sts import LDS, VTC, SparseCallback, sparsify, unsparsify

ROOT = Path(__file__).parent.parent
VISUAL, NEED = VTC(kind="avgpool2d", keep=0.25), LDS(policy="need", rate=0.5, ema=0.5)
ROWS = [["big", 5, 6, 7, 8], ["big", 9, 10, 11, 12]]


def tiny(name="llava"):
    model, batch = CASES[name].build(torch.float32), CASES[name].batch(ROWS)
    batch["pixel_values"] = batch["pixel_values"].float()
    return model, batch


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
    from sts.backbone import SHIPPED, build_llava
    from sts.provenance import write_json_atomic

    folder = tmp_path_factory.mktemp("llava")
    parts = {part: str(ROOT / SHIPPED / part) for part in ("vision", "language", "processor")}
    write_json_atomic(folder / "manifest.json", parts)
    model, processor = build_llava(folder / "manifest.json", seed=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["own_loop", "trainer"])
def test_examples_run(name, model_folder, tmp_path):
    example = ROOT / "examples" / f"{name}.py"
    assert len(example.read_text().splitlines()) < 35
    done = subprocess.run(
        [sys.executable, str(example), str(model_folder), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "keep_ratio': 0.25" in done.stdout or "sts_keep_ratio': '0.25'" in done.stdout


def test_context_manager_gives_the_model_back_even_after_an_error():
    model, batch = tiny()
    before = model(**batch).loss
    with pytest.raises(ZeroDivisionError), sparsify(model, VISUAL) as scheme:
        scheme.begin_step(0)
        assert model(**batch).logits is None
        raise ZeroDivisionError
    assert torch.equal(model(**batch).loss, before)
    assert "forward" not in vars(model)


def trainer_for(folder: Path, lds: LDS, **settings) -> Trainer:
    model, batch = tiny("smolvlm")  # a Trainer of transformers 5.23 can't resume a LLaVA: it looks
    # for the weights under other names than it saved them under
    samples = [{name: value[i] for name, value in batch.items()} for i in (0, 1)] * 9
    callback = SparseCallback(model, VISUAL, lds, seed=5)
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_steps=3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return Trainer(
        model, arguments, default_data_collator, train_dataset=samples, callbacks=[callback]
    )


@pytest.mark.parametrize("lds", [NEED, LDS(policy="linear", rate=0.5, schedule="linear")])
def test_a_resumed_trainer_goes_on_as_if_it_had_not_stopped(lds, tmp_path):
    whole = trainer_for(tmp_path / "whole", lds)
    whole.train()
    again = trainer_for(tmp_path / "again", lds)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, expected), found in zip(
        whole.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name
    logged = [row for row in whole.state.log_history if "sts_keep_ratio" in row]
    assert len(logged) == 6 and {row["sts_keep_ratio"] for row in logged} == {0.25}
    assert "forward" not in vars(whole.model)  # given back at the end


def test_a_trainer_accumulates_under_one_decision(tmp_path):
    trainer = trainer_for(tmp_path, LDS(policy="uniform", rate=0.5), gradient_accumulation_steps=3)
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, SparseCallback)]
    scheme, seen = callback.scheme, []
    layers = trainer.model.model.text_model.layers
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, i=index: seen.append((scheme.step, i)))
    trainer.train()
    for step in range(6):
        ran = [i for at, i in seen if at == step]
        assert len(ran) == 3 * len(set(ran)) and len(set(ran)) == 3


@pytest.mark.parametrize("first", ["sparsify", "peft"])
def test_lora_on_top(first):
    model, batch = tiny()
    lora = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)")
    reference = copy.deepcopy(model)
    if first == "sparsify":
        scheme = sparsify(model, VISUAL, LDS(policy="uniform", rate=0.5))
        wrapped = get_peft_model(model, lora)
    else:
        wrapped = get_peft_model(model, lora)
        scheme = sparsify(wrapped.get_base_model(), VISUAL, LDS(policy="uniform", rate=0.5))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    wrapped.train()
    for step in range(4):
        scheme.begin_step(step)
        wrapped(**batch).loss.backward()
        for name, parameter in wrapped.named_parameters():
            trained = "lora_" in name and not any(f"layers.{i}." in name for i in scheme.skipped)
            assert (parameter.grad is not None) == trained, name
        optimizer.step()
        optimizer.zero_grad()
    unsparsify(wrapped.get_base_model())
    merged = wrapped.eval().merge_and_unload()
    assert list(merged.state_dict()) == list(reference.state_dict())
    assert not torch.equal(merged(**batch).logits, reference.eval()(**batch).logits)
    with pytest.raises(ValueError, match="not a wrapper around it"):
        sparsify(get_peft_model(tiny()[0], lora))


@pytest.mark.parametrize("compiled", ["layers", "whole"])
def test_compiled_models_train_alike(compiled):
    """A whole model compiles in pieces (the scheme breaks the graph), so compile its layers."""

    def losses(compiled: str | None) -> list[float]:
        model, batch = tiny()
        scheme, found = sparsify(model, VISUAL, LDS(policy="uniform", rate=0.5)), []
        runner = torch.compile(model, backend="aot_eager") if compiled == "whole" else model
        if compiled == "layers":
            for layer in model.model.language_model.layers:
                layer.compile(backend="aot_eager")
        for step in range(3):
            scheme.begin_step(step)
            loss = runner(**batch).loss
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
            model.zero_grad()
            found.append(loss.item())
        return found

    assert losses(compiled) == pytest.approx(losses(None), rel=1e-4)


def test_a_pickled_model_keeps_its_scheme():
    model, batch = tiny()
    sparsify(model, VISUAL, LDS(policy="uniform", rate=0.5)).begin_step(2)
    twin = pickle.loads(pickle.dumps(model))  # as torch.save(model) does
    assert torch.equal(twin(**batch).loss, model(**batch).loss)
    unsparsify(twin)
    assert "forward" not in vars(twin) and "forward" in vars(model)
