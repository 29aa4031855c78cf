"""Logits only where they count, if the model's own forward agrees.

A forward in training computes logits of every token, and its loss looks at those right before a
target alone. Nothing here computes a loss: the model's own forward, whoever wrote it, is shown the
hidden states before the targets as a batch of one row. Whether its loss is then the same, it is
asked once.
"""

import logging
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sts.architectures import head_of
from sts.draws import keyed_torch_generator
from sts.modules import in_the_place_of
from sts.settings import IGNORE_INDEX

log = logging.getLogger(__name__)

# The batch on which a forward is asked, [2, 6]: unlike numbers of targets in its rows
ASKED = ((-100, 1, -100, -100, 1, -100), (-100, -100, 2, 3, 1, 2))
EXTRAS = ("loss", "logits", "aux_loss")  # all that an output may hold that was shown the answers


def before_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [A] and places [A] of the tokens that stand right before a target of `labels` [B, T]."""
    return (labels[:, 1:] != IGNORE_INDEX).nonzero().unbind(1)


def targets_alone(labels: Tensor, row: Tensor, place: Tensor) -> dict[str, Tensor]:
    """Keywords that go with the hidden states at (row, place) [A], before the targets of `labels`
    [B, T]: [1, A]."""
    targets = labels[row, place + 1][None]
    return {"labels": targets, "shift_labels": targets}


class Shown(nn.Module):
    """Stands in for a base model: whatever it is given, its last hidden state is `hidden`."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.last_hidden_state = hidden

    def forward(self, *_: Any, **__: Any) -> "Shown":
        return self

    def __getitem__(self, index: object) -> Tensor | None:
        return self.last_hidden_state if index in (0, "last_hidden_state") else None

    def __getattr__(self, name: str) -> None:
        return None  # whatever else an output may have


@torch.no_grad()
def sees_only_answers(model: PreTrainedModel, path: str, kwargs: dict[str, Any]) -> bool:
    """Whether `model.forward` with `kwargs` has the same loss, and returns nothing else, if it is
    shown the hidden states before the targets alone.

    `path`: of the base model, in whose place small random hidden states are shown. The loss must
    not change at all with those that are before no target, and not by more than rounding when they
    are left out.
    """
    weight = head_of(model).weight
    width = model.config.get_text_config().hidden_size
    labels = torch.tensor(ASKED, device=weight.device)
    places = before_targets(labels)
    given = {k: v for k, v in kwargs.items() if _belongs_to_no_batch(v)}
    given |= {"input_ids": labels.clamp(min=1), "attention_mask": torch.ones_like(labels)}
    if "output_router_logits" in signature(type(model).forward).parameters:
        given["output_router_logits"] = False  # of a base model that said nothing

    def ask(hidden: Tensor, **targets: Tensor) -> tuple[float, bool]:
        with in_the_place_of(model, path, Shown(hidden)):
            output = model.forward(**given | targets | {"return_dict": True})
        more = [k for k, v in output.items() if isinstance(v, Tensor) and k not in EXTRAS]
        return float(output["loss"]), bool(more)

    def same(dtype: torch.dtype) -> bool:
        close = {"rel": 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3}
        for draw in range(2):
            generator = keyed_torch_generator("answers alone", draw)
            hidden, other = torch.randn(2, *labels.shape, width, generator=generator)
            hidden = (3 * hidden).to(weight.device, dtype)
            other = (9 * other).to(hidden)
            other[places] = hidden[places]
            whole, _ = ask(hidden, labels=labels)
            moved, _ = ask(other, labels=labels)
            alone, more = ask(hidden[places][None], **targets_alone(labels, *places))
            if more or not (_near(whole, moved, 1e-6) and _near(whole, alone, close["rel"])):
                return False
        return True

    # under FSDP2 the weights that compute may have another dtype than those that are kept
    for dtype in dict.fromkeys((weight.dtype, torch.bfloat16, torch.float16, torch.float32)):
        try:
            return same(dtype)
        except Exception as error:  # whatever a forward can't do with answers alone
            log.debug("sts: asked in %s, the forward raised %r", dtype, error)
    return False


def _belongs_to_no_batch(value: Any) -> bool:
    """Whether it is a number, a name or nothing, as the settings of a forward are."""
    if isinstance(value, Tensor):
        return value.ndim == 0
    return value is None or isinstance(value, int | float | str)


def _near(a: float, b: float, relative: float) -> bool:
    return abs(a - b) <= relative * abs(a)
