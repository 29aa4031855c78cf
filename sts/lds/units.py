"""Replacements of decoder layers, and hooks on them, that skip a part of the layer's work.

The model's own loop over its layers calls the replacements, outside the region that checkpointing
computes again. Hooks stay for the whole step, so that what is computed again is cut in the same
way. Shapes: B rows of a micro-batch, T tokens of a row, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from sts.lds.decision import LayerDecision
from sts.modules import replaced
from sts.sequence import row_argument, take, token_argument, write_places, write_rows


class Replacement:
    """Is called instead of a decoder layer; attributes that it doesn't define are the layer's.

    Attributes:
        work: The shares below 1 of the layer's work that the last call did; None: no call yet.
    """

    def __init__(self, layer: nn.Module, decision: LayerDecision) -> None:
        self._layer, self._decision = layer, decision
        self.work: dict[str, float] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def select(self, mask: Tensor) -> Tensor:
        """The entries of a mask [B, T] for those tokens that the layer saw in the last call."""
        return mask


@contextmanager
def unrecorded() -> Iterator[None]:
    """A call in which transformers collects no hidden states: the layer sees some tokens only."""
    token = output_capturing._active_collector.set(None)
    try:
        yield
    finally:
        output_capturing._active_collector.reset(token)


def record(layer: nn.Module, before: Tensor, after: Tensor) -> None:
    """Show the hidden states [B, T, D] of all tokens to the hooks by which transformers collects
    them, if they were asked for."""
    for hook in layer._forward_hooks.values():
        if getattr(hook, "__module__", None) == output_capturing.__name__:
            hook(layer, (before,), after)


class Identity(Replacement):
    """Skips the layer: the hidden state [B, T, D] passes unchanged."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.work = {"rows": 0.0}
        record(self._layer, hidden, hidden)
        return self._decision.returned(hidden, kwargs) if self._decision.returned else hidden


class Rescaled(Replacement):
    """Divides what the layer adds by the chance that it runs (stochastic depth, 1603.09382)."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.work = {}
        out = self._layer(hidden, *args, **kwargs)
        return hidden + (out - hidden) / (1 - self._decision.chance)


class SomeRows(Replacement):
    """The layer gets some rows of the batch; the others pass unchanged.

    With `rescale`, what the layer adds is multiplied by rows / kept rows, as in DINOv2.
    """

    _rows: Tensor | None = None  # [k], or None: all

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = len(hidden)
        rows = kept_rows(batch, self._decision)
        self._rows = rows = rows.to(hidden.device) if len(rows) < batch else None
        if rows is None:
            self.work = {}
            return self._layer(hidden, *args, **kwargs)
        self.work = {"rows": len(rows) / batch}
        args = [row_argument("", value, rows, batch) for value in args]
        kwargs = {name: row_argument(name, value, rows, batch) for name, value in kwargs.items()}
        kept = hidden.index_select(0, rows)
        with unrecorded():
            out = self._layer(kept, *args, **kwargs)
        if self._decision.rescale:
            out = kept + (out - kept) * (batch / len(rows))
        after = write_places(hidden, rows, out)
        record(self._layer, hidden, after)
        return after

    def select(self, mask: Tensor) -> Tensor:
        return mask if self._rows is None else mask[self._rows]


class SomeTokens(Replacement):
    """The layer gets some tokens of each row, in their order; the others pass unchanged."""

    _tokens: Tensor | None = None  # [B, k]

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows, length = hidden.shape[:2]
        count = max(1, length - round(self._decision.chance * length))
        draws = torch.rand(rows, length, generator=self._decision.generator())
        kept = draws.topk(count, dim=1).indices.sort(dim=1).values.to(hidden.device)
        self._tokens, self.work = kept, {"tokens": count / length}
        args = [token_argument("an argument", value, kept, length) for value in args]
        kwargs = {name: token_argument(name, value, kept, length) for name, value in kwargs.items()}
        with unrecorded():
            out = self._layer(take(hidden, kept), *args, **kwargs)
        after = write_rows(hidden, kept, out)
        record(self._layer, hidden, after)
        return after

    def select(self, mask: Tensor) -> Tensor:
        return mask if self._tokens is None else mask.gather(1, self._tokens)


def kept_rows(rows: int, decision: LayerDecision) -> Tensor:
    """The rows of a batch that a layer gets, [k], ascending; at least one, so that it is trained.

    independent: each row has its own switch. fixed_count: floor(mean) or ceil(mean) rows are left
    out, so that their mean number is chance x rows.
    """
    draws = torch.rand(rows + 1, generator=decision.generator())
    if decision.draw == "independent":
        skipped = int((draws[:-1] < decision.chance).sum())
    else:
        skipped = int(decision.chance * rows + draws[-1].item())
    count = max(1, rows - skipped)
    return draws[:-1].topk(count).indices.sort().values


# ---- the units: (layer, decision) -> a replacement of the layer or None, or handles of hooks -----


def skip_layer(layer: nn.Module, decision: LayerDecision) -> Replacement | None:
    """Skip the layer for the whole batch, for this step."""
    if decision.off:
        return Identity(layer, decision)
    is_rescaled = decision.rescale and 0 < decision.chance < 1
    return Rescaled(layer, decision) if is_rescaled else None


def skip_rows(layer: nn.Module, decision: LayerDecision) -> Replacement | None:
    """Skip the layer for a share of the samples."""
    return SomeRows(layer, decision) if decision.chance else None


def skip_tokens(layer: nn.Module, decision: LayerDecision) -> Replacement | None:
    """Skip the layer for a share of each sample's tokens."""
    return SomeTokens(layer, decision) if decision.chance else None


def skip_backward(layer: nn.Module, decision: LayerDecision) -> list:
    """Skip the backward of attention or MLP: what they add is a constant to it.

    The graph that they recorded is freed at once. A norm that follows them still gets a gradient.
    """
    return [
        layer.get_submodule(decision.sublayers[share]).register_forward_hook(
            partial(_detach, decision, share)
        )
        for share in sorted(decision.off)
    ]


def _detach(
    decision: LayerDecision, share: str, module: nn.Module, args: tuple, output: Any
) -> Any:
    if not module.training:
        return output
    decision.skipped.add(share)
    if isinstance(output, tuple):
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in output)
    return output.detach()


# ---- replacements in the model's loop ------------------------------------------------------------


class _Layers(nn.ModuleList):
    """Decoder layers that show replacements for some of them when iterated or indexed.

    All real layers stay registered, so parameters(), hooks and state_dict() miss none.
    """

    def __init__(self, layers: nn.ModuleList, replacements: dict[int, Replacement]) -> None:
        super().__init__(layers)
        self._view: list[Callable] = [replacements.get(i, layer) for i, layer in enumerate(layers)]

    def __iter__(self) -> Iterator:
        return iter(self._view)

    def __getitem__(self, index: Any) -> Any:
        return self._view[index]


def with_replacements(
    language_model: nn.Module, attribute: str, replacements: dict[int, Replacement]
) -> AbstractContextManager[None]:
    """The language model, whose loop calls replacements for some layers of `attribute`."""
    layers = _Layers(getattr(language_model, attribute), replacements)
    return replaced(language_model, attribute, layers)
