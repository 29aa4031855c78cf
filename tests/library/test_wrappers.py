"""STS under what other libraries make of a model, in any order that their documentation shows: the
layers that they call are counted from outside, and the loss is the one of a plain loop.
"""

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import compare_versions
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from processors import tiny_processor
from tiny import LAYERS
from torch.nn import functional as F
from trainers import USUAL, VISUAL, samples, tiny, trainer_of
from transformers import Trainer, TrainingArguments, default_data_collator
from trl import (
    DistillationConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    RLOOConfig,
    SFTConfig,
    SFTTrainer,
)

from sts import LDS, VTC, SparseCallback, sparsify, unsparsify
from sts.scheme import SCHEME

is_older = partial(compare_versions, "transformers", "<")
HALF = LDS("layerdrop", rate=0.5, draw="fixed_count")  # two of four layers, another two each step


class Calls:
    """How many tokens each decoder layer saw, call by call."""

    def __init__(self, model) -> None:
        self.seen: list[tuple[int, int]] = []
        layers = model.get_decoder().layers
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._record(index))

    def _record(self, index):
        return lambda module, args: self.seen.append((index, args[0].shape[1]))

    def are_sparse(self, steps: int) -> bool:
        """Two of the layers in each step, on 8 tokens: 4 visual ones of 16, and 4 of text."""
        return len(self.seen) == 2 * steps and {tokens for _, tokens in self.seen} == {8}


def in_a_loop(model, batch, steps=4, scheme=None):
    """Losses of the plain loop that the Trainers below should have."""
    scheme = scheme or sparsify(model, VISUAL, HALF, total_steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        scheme.begin_step(step)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


LOOP = {  # as in_a_loop
    "max_steps": 4,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "remove_unused_columns": False,
}


def losses_of(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


SFT = {
    "bf16": False,
    "gradient_checkpointing": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


def sft(model, batch, folder, callbacks=(), **more):
    """TRL's, which replaces the model's forward by one with a loss of its own."""
    return SFTTrainer(
        model,
        SFTConfig(str(folder), **USUAL | LOOP | SFT | more),
        data_collator=default_data_collator,
        train_dataset=Dataset.from_list(
            [{k: v.tolist() for k, v in sample.items()} for sample in samples(batch)]
        ).with_format("torch"),
        processing_class=tiny_processor().tokenizer,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("order", ["callback first", "callback without a model", "callback last"])
def test_trl(order, tmp_path):
    model, batch = tiny("smolvlm")
    expected = in_a_loop(copy.deepcopy(model), batch)
    calls = Calls(model)
    if order == "callback first":
        trainer = sft(model, batch, tmp_path, [SparseCallback(model, VISUAL, HALF)])
    elif order == "callback without a model":
        trainer = sft(model, batch, tmp_path, [SparseCallback(None, VISUAL, HALF)])
    else:
        trainer = sft(model, batch, tmp_path)
        trainer.add_callback(SparseCallback(trainer.model, VISUAL, HALF))
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-3)
    assert calls.are_sparse(4)
    ran = [row["sts_layers_run"] for row in trainer.state.log_history if "loss" in row]
    assert [float(x) for x in ran] == [2.0] * 4
    assert SCHEME not in vars(model)


def test_trl_on_top_of_lora(tmp_path):
    model, batch = tiny("smolvlm")
    calls = Calls(model)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=r".*text_model.*(q_proj|v_proj)")
    trainer = sft(get_peft_model(model, lora), batch, tmp_path)
    trainer.add_callback(SparseCallback(None, VISUAL, HALF))
    trainer.train()
    assert calls.are_sparse(4)


def test_lds_alone_with_soft_prompts():
    """They reach the model as inputs_embeds, and its labels are longer than the batch's."""
    model, batch = tiny("llava")
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=24)
    wrapped = get_peft_model(model, prompts).train()
    text = {k: v for k, v in batch.items() if k != "pixel_values"}
    text["input_ids"] = text["input_ids"].clamp(max=20)  # no placeholders
    expected = wrapped(**text).loss
    with sparsify(wrapped) as scheme:
        scheme.begin_step(0)
        assert wrapped(**text).loss.item() == pytest.approx(expected.item())
    scheme = sparsify(wrapped, lds=HALF)
    scheme.begin_step(0)
    wrapped(**text).loss.backward()
    assert scheme.metrics()["layers_run"] == 2 and scheme.metrics()["tokens"] == 23
    assert wrapped.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


def test_prefix_tuning_takes_layers_out_and_refuses_what_shortens_or_splits():
    """A cache with the prefixes goes in, and a mask that covers them."""
    model, batch = tiny("llava")
    prefixes = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=4, num_attention_heads=1,
        token_dim=8,
    )  # fmt: skip
    wrapped = get_peft_model(model, prefixes).train()
    expected = wrapped(**batch).loss
    with sparsify(wrapped) as scheme:
        scheme.begin_step(0)
        assert wrapped(**batch).loss.item() == pytest.approx(expected.item())
    with sparsify(wrapped, lds=HALF) as scheme:
        scheme.begin_step(0)
        wrapped(**batch).loss.backward()
        assert scheme.metrics()["layers_run"] == 2
    for vtc, lds, refusal in (
        (VISUAL, None, r"past_key_values of the length=3.*prefix tuning"),
        (
            None,
            LDS("layerdrop", rate=0.5, unit="samples"),
            r"past_key_values='a cache'.*unit 'samples'.*LoRA",
        ),
    ):
        scheme = sparsify(wrapped, vtc, lds)
        scheme.begin_step(0)
        with pytest.raises(ValueError, match=refusal):
            wrapped(**batch)
        unsparsify(wrapped)


def test_vtc_finds_the_placeholders_of_inputs_embeds():
    model, batch = tiny("llava")
    scheme = sparsify(model, VISUAL)
    scheme.begin_step(0)
    expected = model(**batch).loss
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    scheme.begin_step(0)
    assert model(inputs_embeds=embeds, **batch).loss == expected
    assert scheme.metrics()["keep_ratio"] == 0.25


@pytest.mark.parametrize("first", ["sparsify", "accelerate"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(first, precision):
    if precision == "bf16" and is_older("5.19"):
        pytest.skip("transformers' own SmolVLM fails in autocast")
    model, batch = tiny("smolvlm")
    AcceleratorState._reset_state(True)  # other tests leave theirs behind
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    calls = Calls(model)
    if first == "sparsify":
        scheme = sparsify(model, VISUAL, HALF)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if first == "accelerate":
        scheme = sparsify(accelerator.unwrap_model(prepared, keep_fp32_wrapper=True), VISUAL, HALF)
    for step in range(2):
        scheme.begin_step(step)
        for _ in range(2):
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                assert loss.dtype == torch.float32
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        assert scheme.metrics()["layers_run"] == 2
    assert calls.are_sparse(4)
    unsparsify(accelerator.unwrap_model(prepared))
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("first", ["sparsify", "liger"])
def test_liger(first, monkeypatch):
    """Its forward computes the loss from hidden states, in kernels of its own."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("liger_kernel", reason="not in the lock: pip install liger-kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llava

    model, batch = tiny("llava")
    expected = in_a_loop(copy.deepcopy(model), batch)
    calls = Calls(model)
    kernels = {"rms_norm": False, "swiglu": False, "rope": False, "layer_norm": False}
    if first == "sparsify":
        scheme = sparsify(model, VISUAL, HALF, total_steps=4)
        apply_liger_kernel_to_llava(model=model, fused_linear_cross_entropy=True, **kernels)
    else:
        apply_liger_kernel_to_llava(model=model, fused_linear_cross_entropy=True, **kernels)
        scheme = sparsify(model, VISUAL, HALF, total_steps=4)
    losses = in_a_loop(model, batch, scheme=scheme)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert calls.are_sparse(4)


# ---- a Trainer -----------------------------------------------------------------------------------


plain = partial(trainer_of, **LOOP)


def test_a_trainer_has_the_losses_of_a_loop(tmp_path):
    model, batch = tiny("smolvlm")
    expected = in_a_loop(copy.deepcopy(model), batch)
    calls = Calls(model)
    trainer = plain(model, batch, tmp_path, [SparseCallback(model, VISUAL, HALF)])
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-4)
    assert calls.are_sparse(4)


def test_label_smoothing(tmp_path):
    """No labels reach the forward: the Trainer smooths the logits of all tokens."""
    model, batch = tiny("smolvlm")
    calls, reference = Calls(model), copy.deepcopy(model)
    smooth = {"label_smoothing_factor": 0.2, "max_steps": 1}
    trainer = plain(model, batch, tmp_path, [SparseCallback(model, VISUAL, HALF)], **smooth)
    result = losses_of(trainer)
    assert calls.are_sparse(1)
    scheme = sparsify(reference, VISUAL, HALF, total_steps=1)
    scheme.begin_step(0)
    labels = batch.pop("labels")
    scores = reference(**batch).logits.log_softmax(-1)
    where = labels != -100  # the Trainer of transformers 5.23 does not shift them for such a class
    picked = -scores[where].gather(1, labels[where][:, None]).mean()
    assert result == pytest.approx([0.8 * picked.item() - 0.2 * scores[where].mean().item()])


def test_a_second_train_is_sparse_too(tmp_path):
    model, batch = tiny("smolvlm")
    calls = Calls(model)
    trainer = plain(model, batch, tmp_path, [SparseCallback(model, VISUAL, HALF)])
    trainer.train()
    trainer.train()
    assert calls.are_sparse(8)


def test_model_init_makes_the_model_that_is_sparse(tmp_path):
    """Another one for each train(), as in a search for hyperparameters; the first breaks off."""
    made, batch = [], tiny("smolvlm")[1]

    def init():
        made.append(tiny("smolvlm")[0])
        made[-1].calls = Calls(made[-1])
        if len(made) == 2:  # of the first train(), as a Trainer makes one at once
            made[-1].lm_head.register_forward_pre_hook(interrupt)
        return made[-1]

    trainer = Trainer(
        None,
        TrainingArguments(str(tmp_path), **USUAL | LOOP),
        default_data_collator,
        train_dataset=samples(batch),
        model_init=init,
        callbacks=[SparseCallback(None, VISUAL, HALF)],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for _ in range(2):
        trainer.train()
        assert trainer.model.calls.are_sparse(4)
    assert len(made) == 4 and not any(SCHEME in vars(model) for model in made)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("lds", [HALF, LDS("block_influence", rate=0.5)])
def test_a_trainer_that_broke_off_begins_anew(lds, tmp_path):
    model, batch = tiny("smolvlm")
    weights, losses = copy.deepcopy(model.state_dict()), []
    trainer = plain(model, batch, tmp_path, [SparseCallback(model, VISUAL, lds)])
    for breaks in (lambda *_: None, interrupt):
        model.load_state_dict(weights)
        handle = trainer.model.lm_head.register_forward_pre_hook(breaks)
        if breaks is interrupt:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        handle.remove()
        losses.append(losses_of(trainer)[-4:])
    assert losses[0] == losses[1]


def test_a_trainer_that_looks_for_a_batch_size_goes_on_after_running_out_of_memory(tmp_path):
    model, batch = tiny("smolvlm")
    sizes = []

    def run_out(module, args, kwargs):
        sizes.append(len(kwargs["pixel_values"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model.model.vision_model.register_forward_pre_hook(run_out, with_kwargs=True)
    callbacks = [SparseCallback(model, VISUAL, HALF)]
    trainer = plain(model, batch, tmp_path, callbacks, auto_find_batch_size=True)
    trainer.train()
    assert sizes == [2, 1, 1, 1, 1] and trainer.state.global_step == 4


def test_a_stream_has_no_epochs_for_the_clock(tmp_path):
    model, batch = tiny("smolvlm")
    lds = LDS("sts", rate=0.5, epsilon=1, clock="epochs")
    stream = IterableDataset.from_generator(lambda: iter(samples(batch)))
    arguments = TrainingArguments(str(tmp_path), **USUAL | LOOP)
    callbacks = [SparseCallback(model, VISUAL, lds)]
    trainer = Trainer(model, arguments, train_dataset=stream, callbacks=callbacks)
    with pytest.raises(ValueError, match=r"LDS.clock='epochs': expected 'steps'.*no length"):
        trainer.train()


@pytest.mark.parametrize("unit", ["layer", "backward"])
def test_a_static_graph_of_ddp_is_refused_where_steps_train_other_parameters(unit, tmp_path):
    model, batch = tiny("smolvlm")
    callbacks = [SparseCallback(model, None, LDS("layerdrop", rate=0.5, unit=unit))]
    with pytest.raises(ValueError, match=r"ddp_static_graph=True: expected False with LDS unit"):
        plain(model, batch, tmp_path, callbacks, ddp_static_graph=True)
    with_samples = [SparseCallback(None, VISUAL, LDS("layerskip", rate=0.5))]
    plain(tiny("smolvlm")[0], batch, tmp_path, with_samples, ddp_static_graph=True)


# ---- losses that compare two forwards ------------------------------------------------------------


ALIGNED = {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "num_generations": 2}
RANDOM = VTC("random", keep=0.25)
LORA = LoraConfig(r=4, target_modules=r".*text_model.*q_proj")
COMPARED = [  # configuration, with adapters, VTC, LDS, what is refused
    (DPOConfig, {}, True, RANDOM, HALF, None),
    (DPOConfig, {}, False, None, None, None),
    (DPOConfig, {}, False, RANDOM, None, "model of DPOConfig='Idefics3|SmolVLM.*PEFT adapters"),
    (DPOConfig, {"precompute_ref_log_probs": True}, True, None, HALF, "precompute_ref_log_probs"),
    (KTOConfig, {}, False, None, HALF, "model of KTOConfig"),
    (KTOConfig, {}, True, RANDOM, HALF, None),
    (GRPOConfig, ALIGNED, False, RANDOM, HALF, None),
    (GRPOConfig, ALIGNED | {"beta": 0.1}, False, VISUAL, None, "model of GRPOConfig"),
    (GRPOConfig, ALIGNED | {"beta": 0.1}, True, VISUAL, HALF, None),
    (GRPOConfig, ALIGNED | {"beta": 0.1}, True, RANDOM, HALF, "VTC.kind='random'.*GRPOConfig"),
    (GRPOConfig, ALIGNED | {"num_iterations": 2}, True, VISUAL, HALF, "divides gradient_acc"),
    (RLOOConfig, ALIGNED | {"beta": 0.0}, False, VISUAL, HALF, None),
    (RLOOConfig, ALIGNED | {"beta": 0.0}, False, RANDOM, HALF, "VTC.kind='random'.*RLOOConfig"),
    (DistillationConfig, {}, False, VISUAL, None, "arguments='DistillationConfig'.*teacher"),
    (SFTConfig, {}, False, RANDOM, HALF, None),
]


@pytest.mark.parametrize(("config", "values", "adapters", "vtc", "lds", "refused"), COMPARED)
def test_a_loss_that_compares_with_another_sparsity_is_refused(
    config, values, adapters, vtc, lds, refused, tmp_path
):
    model, _ = tiny("smolvlm")
    model = get_peft_model(model, LORA) if adapters else model
    args = config(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **values)
    callback = SparseCallback(model, vtc, lds)
    with pytest.raises(ValueError, match=refused) if refused else nullcontext():
        callback.on_init_end(args, None, None, model=model)


def test_a_callback_on_another_model_is_an_error(tmp_path):
    model, batch = tiny("smolvlm")
    other = tiny("smolvlm")[0]
    trainer = plain(model, batch, tmp_path, [SparseCallback(other, VISUAL, HALF)])
    with pytest.raises(ValueError, match="this Trainer does not train"):
        trainer.train()


def test_a_trainer_that_restores_callbacks_goes_on_as_if_it_had_not_stopped(tmp_path):
    lds = LDS("block_influence", rate=0.5, ema=0.5)
    keys = {"save_strategy": "steps", "save_steps": 2}

    def trained(folder: Path, **resume):
        model, batch = tiny("smolvlm")
        restore = {"restore_callback_states_from_checkpoint": bool(resume)}
        callbacks = [SparseCallback(model, VISUAL, lds, seed=5)]
        trainer = plain(model, batch, folder, callbacks, **keys, **restore)
        trainer.train(**resume)
        assert SCHEME not in vars(trainer.model)
        return trainer.model.state_dict()

    uninterrupted = trained(tmp_path / "whole")
    again = trained(tmp_path / "again", resume_from_checkpoint=tmp_path / "whole/checkpoint-2")
    assert all(torch.equal(again[name], value) for name, value in uninterrupted.items())


# ---- a step that is not sparse -------------------------------------------------------------------


def test_a_step_without_a_sparse_forward_is_an_error_or_a_warning(caplog):
    model, batch = tiny("smolvlm")
    for setting in ((VISUAL, None), (None, HALF)):
        scheme = sparsify(model, *setting)
        scheme.begin_step(0)
        copy.deepcopy(model).train()(**batch).loss.backward()  # another one is trained
        with pytest.raises(RuntimeError, match=r"no forward of step 0 was sparse.*dense_step"):
            scheme.begin_step(1)
        scheme.begin_step(2)
        with pytest.raises(RuntimeError, match="no forward of step 2 was sparse"):
            scheme.after_backward()
        unsparsify(model)
    with pytest.raises(RuntimeError, match="no forward of step 0"), sparsify(model, VISUAL) as one:
        one.begin_step(0)
        model.eval()(**batch)
    scheme = sparsify(model.train(), VISUAL, dense_step="warn")
    scheme.begin_step(0)
    scheme.begin_step(1)
    assert "no forward of step 0 was sparse" in caplog.text
    unsparsify(model)
    idle = sparsify(model)
    idle.begin_step(0)
    idle.begin_step(1)  # asked for nothing


def test_what_replaces_the_forward_later_is_sparse_all_the_same():
    model, batch = tiny("smolvlm")
    labels = batch.pop("labels")
    scheme = sparsify(model, VISUAL, HALF)

    def forward(**inputs):
        hidden = model.model(**inputs).last_hidden_state
        logits = model.lm_head(hidden)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    model.forward = forward
    calls = Calls(model)
    scheme.begin_step(0)
    loss = model(**batch)
    del model.forward
    assert calls.are_sparse(1) and scheme.metrics()["layers_run"] == 2
    scheme.begin_step(0)
    torch.testing.assert_close(model(**batch, labels=labels).loss, loss)


def test_metrics_count_what_was_called_and_nothing_else():
    model, batch = tiny("smolvlm")
    scheme = sparsify(model, VISUAL, HALF)
    scheme.begin_step(0)
    assert scheme.metrics()["tokens"] == scheme.metrics()["visual_tokens"] == 0
    decoder = model.get_decoder()
    layers = list(decoder.layers)
    decoder.forward = lambda inputs_embeds, **_: (inputs_embeds,)  # calls no layer
    with pytest.raises(RuntimeError, match=r"did not call its layers \[.*LDS could not skip"):
        model(**batch)
    del decoder.forward
    assert list(decoder.layers) == layers and len(layers) == LAYERS
    model(**batch).loss.backward()
    assert scheme.metrics()["layers_run"] == 2


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_hook_that_encodes_the_images_and_takes_the_ids_away(name, lora):
    """As ms-swift's does, on whatever wraps the model; the scheme comes after it."""
    outcomes = []
    for hooked in (False, True):
        model, batch = tiny(name)
        wrapped = get_peft_model(model, LoraConfig(target_modules=["v_proj"])) if lora else model

        def encode(module, args, kwargs, model=model):
            kwargs = dict(kwargs)
            ids, pixels = kwargs.pop("input_ids"), kwargs.pop("pixel_values")
            sizes = [kwargs.pop("image_grid_thw")] if "image_grid_thw" in kwargs else []
            images = model.model.get_image_features(pixels, *sizes).pooler_output
            embeddings = model.get_input_embeddings()(ids)
            places = (ids == model.config.image_token_id)[..., None].expand_as(embeddings)
            return args, kwargs | {
                "inputs_embeds": embeddings.masked_scatter(places, torch.cat([*images]))
            }

        if hooked:
            wrapped.register_forward_pre_hook(encode, with_kwargs=True)
        if name == "qwen2_5_vl":  # as ms-swift's collator does
            batch["position_ids"], _ = model.model.get_rope_index(
                batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"]
            )
        with sparsify(wrapped, VISUAL, HALF, seed=1) as scheme:
            scheme.begin_step(0)
            wrapped(**batch).loss.backward()
            outcomes.append((scheme.metrics(), [p.grad for p in model.parameters()]))
    (metrics, gradients), (of_hooked, hooked_gradients) = outcomes
    assert of_hooked == metrics and metrics["keep_ratio"] < 0.5
    torch.testing.assert_close(hooked_gradients, gradients)
