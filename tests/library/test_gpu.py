"""The scheme on a GPU computes what it computes on a CPU, and holds no memory for what is left out.

Nothing here runs without a GPU; nothing of the scheme needs one.
"""

import pytest
import torch
from by_hand import assert_same, backward
from cases import ALIKE, CLASS_TOKEN, EVERY, FOUR
from tiny import CASES, LAYERS
from trainers import trainer_for

from sts import LDS, VTC, sparsify
from sts.lds import UNITS
from sts.vtc import KINDS, wants

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def on_gpu(batch: dict) -> dict:
    return {name: value.cuda() for name, value in batch.items()}


EACH = [*((kind, "layer") for kind in KINDS if kind != "none"), *(("none", unit) for unit in UNITS)]


@EVERY
@pytest.mark.parametrize(("kind", "unit"), EACH)
def test_a_sparse_step_is_that_of_the_cpu(name, kind, unit):
    if "scores" in wants(kind) and name not in CLASS_TOKEN:
        pytest.skip("its vision tower has no class token")
    batch, model = CASES[name].batch(FOUR), CASES[name].build()
    vtc = VTC(kind, keep=1.0 if kind == "none" else 0.5)
    lds = LDS("layerdrop", rate=0.5, draw="fixed_count", unit=unit)
    with sparsify(model, vtc, lds) as scheme:
        scheme.begin_step(3)
        expected, counted = backward(model, batch), scheme.metrics()
        model.cuda()
        scheme.begin_step(3)
        loss, gradients = backward(model, on_gpu(batch))
        assert scheme.metrics() == counted
    result = loss.cpu(), {name: gradient.cpu() for name, gradient in gradients.items()}
    assert_same(result, expected)


def wide_llava():
    """LLaVA whose decoder holds nearly all that a step keeps for backward, bf16, on the GPU."""
    model = CASES["llava"].build(torch.bfloat16)
    text = model.config.text_config.to_dict() | {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
    }  # fmt: skip
    config = type(model.config)(
        vision_config=model.config.vision_config, text_config=text,
        image_token_id=model.config.image_token_id,
    )  # fmt: skip
    return type(model)(config).to("cuda", torch.bfloat16).train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("unit", UNITS)
def test_what_is_left_out_is_not_held(unit, checkpointing):
    model, batch = wide_llava(), on_gpu(CASES["llava"].batch(ALIKE * 64))
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    if checkpointing:
        model.gradient_checkpointing_enable()
    peaks = {}
    for rate in (0.0, 0.5):
        lds = LDS("layerdrop", rate=rate, draw="fixed_count", unit=unit)
        with sparsify(model, lds=lds) as scheme:
            for step in range(2):  # the first one also makes workspaces
                scheme.begin_step(step)
                torch.cuda.reset_peak_memory_stats()
                loss = model(**batch).loss
                peaks[rate] = torch.cuda.max_memory_allocated()
                loss.backward()
                model.zero_grad()
        assert loss.isfinite()
    if not checkpointing:
        assert peaks[0.5] < peaks[0.0]
    elif unit == "layer":
        assert peaks[0.5] <= peaks[0.0]


@pytest.mark.parametrize("unit", UNITS)
def test_a_trainer_in_bf16_with_checkpointing(unit, tmp_path):
    lds = LDS("layerdrop", rate=0.5, draw="fixed_count", unit=unit)
    trainer = trainer_for(
        tmp_path, lds, max_steps=20, per_device_train_batch_size=4, learning_rate=3e-3,
        save_strategy="no", use_cpu=False, bf16=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "sts_layers_run" in row]
    assert next(trainer.model.parameters()).is_cuda
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert {row["sts_keep_ratio"] for row in rows} == {0.25}
    forward = LAYERS if unit == "backward" else LAYERS / 2
    assert all(abs(row["sts_layers_run"] - forward) < 1 for row in rows)
