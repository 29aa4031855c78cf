"""The loss is the model's own, whatever its forward does after the head, and logits are computed
before targets alone only where that is the same loss.
"""

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from by_hand import CLOSE, KEEP, assert_same, backward, by_hand, pooled
from tiny import CASES, LAYERS, SQUARE, case, flat, sliding, vit
from torch.nn import functional as F
from zoo import ZOO

from sts import LDS, VTC, sparsify, unsparsify

ROWS = [[3, "big", 5, "small", 6, 7, 8], [9, 10, 11, 12], ["small", 14, 15, 16]]
PALIGEMMA_2 = case(
    "PaliGemma",
    vit(hf.SiglipVisionConfig, projection_dim=24),
    sliding(hf.Gemma2Config, final_logit_softcapping=0.5, query_pre_attn_scalar=8),
    SQUARE,
    flat(3, 16, 16),
    CASES["paligemma"].of_ids,
    projection_dim=24,
)
MOE = ("qwen3_vl_moe", "glm4v_moe", "qwen3_5_moe", "ernie4_5_vl_moe", "qwen3_omni_moe_thinker")


def logits_computed(model, batch, **more):
    """How many tokens the head saw in a forward of the scheme; the second, as it is asked first."""
    seen = []
    model(**batch, **more)
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:-1]))
    model(**batch, **more)
    handle.remove()
    return seen[0].numel()


def test_softcapped_logits():
    model, batch = PALIGEMMA_2.build(), PALIGEMMA_2.batch(ROWS)
    expected = backward(model, batch)
    sparsify(model).begin_step(0)
    assert_same(backward(model, batch), expected)
    assert logits_computed(model, batch) == 6
    unsparsify(model)
    expected = by_hand(model, PALIGEMMA_2, ROWS, batch, pooled)
    sparsify(model, VTC("avgpool2d", keep=KEEP)).begin_step(0)
    assert_same(backward(model, batch), expected)


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("answers_alone", [False, True])
def test_labels_shortened_with_logits_to_keep(one_row, answers_alone, monkeypatch):
    """As ms-swift does: to the last tokens, or in one row to the targets with one before."""
    if not answers_alone:
        monkeypatch.setattr("sts.hooks.needs_only_answers", lambda *_: False)
    rows = ROWS[:1] if one_row else ROWS
    model, batch = CASES["llava"].build(), CASES["llava"].batch(rows)
    if one_row:
        is_target = batch["labels"][0] != -100
        keep = F.pad(is_target[1:], (0, 1), value=True)
        labels = F.pad(batch["labels"][:, is_target], (1, 0), value=-100)
    else:
        keep = (
            batch["labels"].shape[1] - (batch["labels"] != -100).int().argmax(-1).min().item() + 1
        )
        labels = batch["labels"][:, -keep:]
    short = batch | {"labels": labels, "logits_to_keep": keep}
    assert_same(backward(model, short), backward(model, batch))
    with sparsify(model, VTC("avgpool2d", keep=KEEP)) as scheme:
        scheme.begin_step(0)
        assert_same(backward(model, short), backward(model, batch))
        assert scheme.metrics()["keep_ratio"] < 1
        short["labels"] = labels[:, 1:]
        with pytest.raises(ValueError, match=r"labels\.shape"):
            model(**short)


def routed(name):
    """A mixture of experts that balances them, which its own forward sees in the mask."""
    model = ZOO[name].build()
    model.config.get_text_config().output_router_logits = True
    model.config.get_text_config().router_aux_loss_coef = 0.5
    if hasattr(model, "router_aux_loss_coef"):
        model.router_aux_loss_coef = 0.5
    return model


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("side", ["right", "left"])
def test_experts_are_balanced_as_in_the_model_itself(name, side):
    model, batch = routed(name), ZOO[name].batch(ROWS, side)
    plain, _ = backward(ZOO[name].build(), batch)
    expected = backward(model, batch)
    assert expected[0] > plain + 0.1
    scheme = sparsify(model)
    scheme.begin_step(0)
    assert_same(backward(model, batch), expected)
    assert scheme.metrics()["answer_tokens"] == 2


@pytest.mark.parametrize("name", MOE)
def test_experts_are_balanced_over_the_tokens_and_layers_that_are_left(name):
    """Mixtral's formula, by hand, of what the routers that ran said; one row, so no padding."""
    rows = [[3, "big", 5, 6, 7]]
    model, batch = routed(name), ZOO[name].batch(rows)
    scheme = sparsify(model, VTC("avgpool2d", keep=KEEP), LDS("layerdrop", rate=0.5), seed=1)
    scheme.begin_step(0)
    output = model(**batch)
    said = output.router_logits
    runs = LAYERS - len(scheme.skipped)
    tokens = int(scheme.metrics()["tokens"])
    assert 0 < len(said) <= runs and {len(x) for x in said} == {tokens}
    shares = torch.cat([x.float().softmax(-1) for x in said])
    experts = shares.shape[-1]
    chosen = F.one_hot(shares.topk(2, dim=-1).indices, experts).double().mean(0)
    balance = (chosen * shares.mean(0)).sum() * experts
    scheme.begin_step(0)
    alone = model(**batch, output_router_logits=False).loss
    torch.testing.assert_close(output.loss - alone, 0.5 * balance.to(alone), **CLOSE)


def test_experts_over_some_tokens_of_a_layer_are_refused():
    model, batch = routed("qwen3_vl_moe"), ZOO["qwen3_vl_moe"].batch(ROWS)
    sparsify(model, lds=LDS("random_ltd", rate=0.5)).begin_step(0)
    with pytest.raises(ValueError, match=r"output_router_logits=True.*unit 'tokens'"):
        model(**batch)
    unsparsify(model)
    sparsify(model, VTC("uniform", keep=KEEP)).begin_step(0)
    del batch["labels"]
    with pytest.raises(ValueError, match=r"output_router_logits=True.*over shortened sequences"):
        model(**batch)


class Smooth(hf.LlavaForConditionalGeneration):
    """A subclass whose loss looks at every token's logits, by very little."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = output.loss + 1e-4 * output.logits.float().logsumexp(-1).square().mean()
        return output


class ByRow(hf.LlavaForConditionalGeneration):
    """A subclass whose loss is a mean over rows of their means."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        each = [
            F.cross_entropy(scores[:-1].float(), targets[1:])
            for scores, targets in zip(output.logits, labels, strict=True)
        ]
        output.loss = torch.stack(each).mean()
        return output


def last_token_twice(logits, labels, vocab_size, **kwargs):
    """A loss function of one's own, which knows no shift_labels."""
    scores, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    losses = F.cross_entropy(scores, targets, reduction="none")
    return losses.sum() / (targets != -100).sum() + losses[-1]


@pytest.mark.parametrize("kind", [Smooth, ByRow])
def test_a_subclass_that_changes_its_loss_trains_with_it(kind):
    model, batch = CASES["llava"].build(), CASES["llava"].batch(ROWS)
    batch["labels"][2, 18:] = batch["input_ids"][2, 18:]  # unlike numbers of targets
    model.__class__ = kind
    expected = backward(model, batch)
    scheme = sparsify(model)
    scheme.begin_step(0)
    assert_same(backward(model, batch), expected)
    assert scheme.metrics()["answer_tokens"] == batch["labels"].shape[1]  # it sees all
    unsparsify(model)
    scheme = sparsify(model, VTC("avgpool2d", keep=KEEP), LDS("layerdrop", rate=0.5))
    scheme.begin_step(0)
    model(**batch).loss.backward()
    assert scheme.metrics()["keep_ratio"] == 0.25


def test_a_loss_function_of_ones_own():
    model, batch = CASES["llava"].build(), CASES["llava"].batch([["big", 5, 6, 7]])
    model.loss_function = last_token_twice
    expected = backward(model, batch)
    sparsify(model).begin_step(0)
    assert_same(backward(model, batch), expected)


def test_a_forward_of_ones_own_gets_all_logits_as_its_loss_may_change():
    """A coefficient that warms up: the probe of the first step would see no difference."""

    class Mine(hf.LlavaForConditionalGeneration):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.loss = output.loss + coefficient * output.logits.float().logsumexp(-1).mean()
            return output

    model, batch, coefficient = CASES["llava"].build(), CASES["llava"].batch(ROWS), 0.0
    begin = sparsify(model).begin_step
    begin(0)
    assert logits_computed(model, batch) == logits_computed(model, batch, num_items_in_batch=7) == 6
    model.__class__ = Mine
    assert logits_computed(model, batch) == batch["labels"].numel()
    coefficient = 0.5
    result = backward(model, batch)
    unsparsify(model)
    assert_same(result, backward(model, batch))


def test_what_accelerate_wraps_still_sees_answers_alone():
    AcceleratorState._reset_state(True)
    model, batch = CASES["llava"].build(torch.float32), CASES["llava"].batch(ROWS)
    batch["pixel_values"] = batch["pixel_values"].float()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    sparsify(prepared).begin_step(0)
    assert logits_computed(prepared, batch) == 6
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision_too_the_answers_alone(dtype):
    model, batch = CASES["llava"].build(dtype), CASES["llava"].batch(ROWS)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    sparsify(model).begin_step(0)
    assert logits_computed(model, batch) == 6
