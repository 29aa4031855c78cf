"""Head and cross-entropy in chunks of tokens by torch's `linear_cross_entropy`, so that the logits
of a micro-batch are never whole."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy
from transformers import PreTrainedModel

from sts.architectures import architecture_of, head_of
from sts.checks import expect
from sts.draws import keyed_torch_generator
from sts.loss import PROBE_LABELS, FixedOutput
from sts.modules import replaced
from sts.settings import IGNORE_INDEX

TOLERANCE = 1e-3  # relative, of the probe's loss


def chunk_loss(model: PreTrainedModel) -> Callable[[bool], None]:
    """Have the model compute its loss in chunks, wherever gradients are wanted: its head gives the
    hidden states on, and its loss function has the head's weight.

    Chunks compute in the dtype of autocast or of the weight, and their gradients in float32; the
    loss that is logged has that dtype too.

    Args:
        model: Before its processes share it; its logits, without gradients, stay as they are.

    Returns:
        Switches it off (False) and on.

    Raises:
        ValueError: Its logits are not those of a linear layer alone.
    """
    head, whole, logits_of = head_of(model), model.loss_function, head_of(model).forward
    accepted = "whole for a model whose logits are not those of a linear layer alone"
    name = type(model).__name__
    expect(type(head) is nn.Linear, "cross_entropy", f"chunked, {name}", accepted)

    switch = {"is_on": True}

    def acts() -> bool:
        return switch["is_on"] and torch.is_grad_enabled()

    def pass_on(hidden: Tensor) -> Tensor:
        return hidden if acts() else logits_of(hidden)

    def loss_of(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: object) -> Tensor:
        if acts():
            return chunked_loss(logits, head, labels, **kwargs)
        return whole(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)

    is_real = not head.weight.is_meta  # else the first process finds out
    with torch.no_grad():
        expected = _probe(model) if is_real else None
    head.forward, model.loss_function = pass_on, loss_of
    with torch.enable_grad():
        is_same = not is_real or torch.isclose(_probe(model), expected, rtol=TOLERANCE)
    expect(bool(is_same), "cross_entropy", f"chunked, {name}", accepted)
    return partial(switch.__setitem__, "is_on")


def chunked_loss(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **_: object,
) -> Tensor:
    """Cross-entropy of the tokens after hidden states, as transformers' `ForCausalLMLoss` has it of
    their logits.

    Args:
        hidden: [batch, tokens, dim].
        head: Makes logits of it.
        labels: [batch, tokens], each compared with the token before.
        num_items_in_batch: What the sum is divided by; default: the number of targets.
        shift_labels: [batch, tokens], compared with the token itself, instead of `labels`.

    Returns:
        The mean, float32.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    targets, device = shift_labels.flatten(), hidden.device.type
    is_autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_autocast else head.weight.dtype
    total = linear_cross_entropy(
        hidden.flatten(0, -2).to(dtype),
        head.weight.to(dtype),
        targets,
        linear_bias=None if head.bias is None else head.bias.to(dtype),
        reduction="sum",
        ignore_index=IGNORE_INDEX,
        options=LinearCrossEntropyOptions(),
    )
    number = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    return total.float() / number


def _probe(model: PreTrainedModel) -> Tensor:
    """The model's loss of small random hidden states."""
    weight, architecture = head_of(model).weight, architecture_of(model)
    labels = torch.tensor(PROBE_LABELS, device=weight.device)
    shape = (*labels.shape, model.config.get_text_config().hidden_size)
    hidden = torch.randn(shape, generator=keyed_torch_generator("chunked loss"))
    path = architecture.base or architecture.language_model
    with replaced(model, path, FixedOutput(hidden.to(weight))):
        output = model(
            input_ids=labels.clamp(min=1),
            attention_mask=torch.ones_like(labels),
            labels=labels,
            return_dict=True,
        )
    return output.loss.detach()
