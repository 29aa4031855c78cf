"""Logits before the targets only, if the model's own forward has the same loss then.

A forward in training computes logits of every token, but its loss reads only those right before a
target. Nothing here computes a loss: the model's own forward gets the hidden states before the
targets as a batch of one row. A probe decides once whether its loss is the same, and is believed
where forward and loss are code of libraries: one's own may add a term of all logits later.
"""

import logging
import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sts.architectures import head_of
from sts.checks import expect
from sts.draws import keyed_torch_generator
from sts.modules import replaced
from sts.settings import IGNORE_INDEX

log = logging.getLogger(__name__)

# Labels of the probe's batch, [2, 6]: its rows have different numbers of targets
PROBE_LABELS = ((-100, 1, -100, -100, 1, -100), (-100, -100, 2, 3, 1, 2))
# whose losses never change
LIBRARIES = {"transformers", "torch", "accelerate", "liger_kernel", "sts"}
EXPECTED_OUTPUTS = {"loss", "logits", "aux_loss"}  # a forward that returns more gets all tokens


def is_of_library(function: Callable | None) -> bool:
    """Whether a function, and each that it wraps, is code of LIBRARIES."""
    while function is not None:
        function = getattr(function, "__func__", function)
        module = getattr(function, "__globals__", vars(type(function))).get("__name__")
        module = module or type(function).__module__
        if module.partition(".")[0] not in LIBRARIES:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def whole_labels(labels: Any, inputs: dict[str, Any]) -> Tensor:
    """Labels [B, T] of those that stand beside a forward's `inputs`: [B, T], or [B, N] where
    `logits_to_keep` keeps N tokens and its caller shortened them alike, as ms-swift does.

    Raises:
        ValueError: They are no whole numbers of such a shape.
    """
    kind = type(labels).__name__
    expect(isinstance(labels, Tensor), "labels", kind, "a tensor [batch, tokens]")
    expect(labels.ndim == 2, "labels.shape", list(labels.shape), "[batch, tokens]")
    expect(labels.dtype == torch.long, "labels.dtype", str(labels.dtype), "torch.int64")
    tokens, keep = inputs.get("input_ids"), inputs.get("logits_to_keep")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return labels
    rows, length = tokens.shape[:2]
    places = torch.arange(length, device=labels.device)
    if keep is not None and labels.shape[1] != length:
        places = places[-keep:] if isinstance(keep, int) else places[keep]
    expected = [rows, len(places)]
    expect(list(labels.shape) == expected, "labels.shape", list(labels.shape), expected)
    if len(places) == length:
        return labels
    whole = labels.new_full((rows, length), IGNORE_INDEX)
    whole[:, places[:-1] + 1] = labels[:, 1:]  # as the loss compares each token with the next
    return whole


def before_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [A] and places [A] of the tokens right before a target of `labels` [B, T]."""
    return (labels[:, 1:] != IGNORE_INDEX).nonzero().unbind(1)


def answer_keywords(labels: Tensor, row: Tensor, place: Tensor) -> dict[str, Tensor]:
    """The label keywords [1, A] of a forward that gets only the hidden states at (row, place) [A],
    which are those before the targets of `labels` [B, T]."""
    targets = labels[row, place + 1][None]
    return {"labels": targets, "shift_labels": targets}


class FixedOutput(nn.Module):
    """Takes the place of a base model: whatever its inputs, its last hidden state is `hidden`."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.last_hidden_state = hidden

    def forward(self, *_: Any, **__: Any) -> "FixedOutput":
        return self

    def __getitem__(self, index: object) -> Tensor | None:
        return self.last_hidden_state if index in (0, "last_hidden_state") else None

    def __getattr__(self, name: str) -> None:
        return None  # whatever else an output may have


@torch.no_grad()
def needs_only_answers(model: PreTrainedModel, path: str, kwargs: dict[str, Any]) -> bool:
    """Whether `model.forward` has the same loss if it gets only the hidden states before targets.

    A probe with small random hidden states: the loss must not change at all with hidden states that
    are before no target, and by no more than rounding when these are left out. A forward that
    returns anything but EXPECTED_OUTPUTS doesn't pass.

    Args:
        model: The outer model.
        path: Of its base model, which the probe replaces.
        kwargs: Of its forward; those that belong to no batch (numbers, names) are kept.
    """
    weight = head_of(model).weight
    labels = torch.tensor(PROBE_LABELS, device=weight.device)
    places = before_targets(labels)
    shape = (2, *labels.shape, model.config.get_text_config().hidden_size)
    inputs = {name: value for name, value in kwargs.items() if _is_of_no_batch(value)}
    inputs |= {"input_ids": labels.clamp(min=1), "attention_mask": torch.ones_like(labels)}
    if "output_router_logits" in signature(type(model).forward).parameters:
        inputs["output_router_logits"] = False  # FixedOutput has none

    def loss_of(hidden: Tensor, **targets: Tensor) -> tuple[float, bool]:
        """The loss, and whether the output holds something unexpected."""
        with replaced(model, path, FixedOutput(hidden)):
            output = model.forward(**inputs | targets | {"return_dict": True})
        names = {name for name, value in output.items() if isinstance(value, Tensor)}
        return float(output["loss"]), bool(names - EXPECTED_OUTPUTS)

    def passes(dtype: torch.dtype) -> bool:
        rounding = 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3
        for draw in range(2):
            generator = keyed_torch_generator("answers alone", draw)
            hidden, other = torch.randn(shape, generator=generator)
            hidden = (3 * hidden).to(weight.device, dtype)
            other = (9 * other).to(hidden)
            other[places] = hidden[places]
            full, _ = loss_of(hidden, labels=labels)
            changed, _ = loss_of(other, labels=labels)
            answers, has_more = loss_of(hidden[places][None], **answer_keywords(labels, *places))
            is_same = math.isfinite(full) and math.isclose(full, changed, rel_tol=1e-6)
            if has_more or not is_same or not math.isclose(full, answers, rel_tol=rounding):
                return False
        return True

    # under FSDP2 the weights that compute may have another dtype than those that are kept
    for dtype in dict.fromkeys((weight.dtype, torch.bfloat16, torch.float16, torch.float32)):
        try:
            return passes(dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a forward can't do with the answers alone
            log.debug("sts: the probe in %s raised %r", dtype, error)
    return False


def _is_of_no_batch(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0
    return value is None or isinstance(value, int | float | str)
