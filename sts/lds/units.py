"""What stands in for a decoder layer, or hangs on it, while LDS leaves some of it out.

The model's own loop over its layers calls the stand-ins, outside the region that checkpointing
computes again; hooks stay for the whole step, so that what is computed again is cut in the same
way. Shapes: B rows of a micro-batch, T tokens of a row, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from sts.lds.decision import Part
from sts.modules import in_the_place_of
from sts.sequence import of_rows, of_tokens, placed, replaced, take


class StandIn:
    """Stands in for a decoder layer; what it doesn't define is the layer's own.

    work: the shares of the layer's work that its last call did, where less than 1; None: no call.
    """

    def __init__(self, layer: nn.Module, part: Part) -> None:
        self._layer, self._part = layer, part
        self.work: dict[str, float] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def seen(self, mask: Tensor) -> Tensor:
        """Of a mask [B, T], what the layer saw in the last call."""
        return mask


@contextmanager
def unrecorded() -> Iterator[None]:
    """A layer runs on a part of what there is: transformers is not to collect that."""
    token = output_capturing._active_collector.set(None)
    try:
        yield
    finally:
        output_capturing._active_collector.reset(token)


def record(layer: nn.Module, before: Tensor, after: Tensor) -> None:
    """What a layer made of all there is, for the hooks by which transformers collects hidden
    states, if they were asked for."""
    for hook in layer._forward_hooks.values():
        if getattr(hook, "__module__", None) == output_capturing.__name__:
            hook(layer, (before,), after)


class Identity(StandIn):
    """The layer does not run: the hidden state [B, T, D] goes through."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.work = {"rows": 0.0}
        record(self._layer, hidden, hidden)
        return self._part.returned(hidden, kwargs) if self._part.returned else hidden


class Rescaled(StandIn):
    """What the layer adds, divided by the chance that it runs (stochastic depth, 1603.09382)."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.work = {}
        out = self._layer(hidden, *args, **kwargs)
        return hidden + (out - hidden) / (1 - self._part.chance)


class SomeRows(StandIn):
    """The layer sees some rows of the batch; the others go through.

    Rescaled, what it adds counts rows / kept rows times, as in DINOv2.
    """

    _rows: Tensor | None = None  # [k], or None: all

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = kept_rows(len(hidden), self._part)
        self._rows = rows = rows.to(hidden.device) if len(rows) < len(hidden) else None
        if rows is None:
            self.work = {}
            return self._layer(hidden, *args, **kwargs)
        self.work = {"rows": len(rows) / len(hidden)}
        size = len(hidden)
        args = [of_rows("", value, rows, size) for value in args]
        kwargs = {name: of_rows(name, value, rows, size) for name, value in kwargs.items()}
        some = hidden.index_select(0, rows)
        with unrecorded():
            out = self._layer(some, *args, **kwargs)
        if self._part.rescale:
            out = some + (out - some) * (len(hidden) / len(rows))
        after = placed(hidden, rows, out)
        record(self._layer, hidden, after)
        return after

    def seen(self, mask: Tensor) -> Tensor:
        return mask if self._rows is None else mask[self._rows]


class SomeTokens(StandIn):
    """The layer sees some tokens of each row, in their order; the others go through."""

    _tokens: Tensor | None = None  # [B, k]

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows, length = hidden.shape[:2]
        count = max(1, length - round(self._part.chance * length))
        draws = torch.rand(rows, length, generator=self._part.generator())
        chosen = draws.topk(count, dim=1).indices.sort(dim=1).values.to(hidden.device)
        self._tokens, self.work = chosen, {"tokens": count / length}
        args = [of_tokens("an argument", value, chosen, length) for value in args]
        kwargs = {name: of_tokens(name, value, chosen, length) for name, value in kwargs.items()}
        with unrecorded():
            out = self._layer(take(hidden, chosen), *args, **kwargs)
        after = replaced(hidden, chosen, out)
        record(self._layer, hidden, after)
        return after

    def seen(self, mask: Tensor) -> Tensor:
        return mask if self._tokens is None else mask.gather(1, self._tokens)


def kept_rows(rows: int, part: Part) -> Tensor:
    """Rows [k] of a batch that the layer sees, ascending; at least one, so that it is trained.

    independent: each row with its own switch; fixed_count: as many as the chance says, one more or
    less in turn so that the mean holds.
    """
    draws = torch.rand(rows + 1, generator=part.generator())
    if part.draw == "independent":
        left_out = int((draws[:-1] < part.chance).sum())
    else:
        left_out = int(part.chance * rows + draws[-1].item())
    count = max(1, rows - left_out)
    return draws[:-1].topk(count).indices.sort().values


# ---- the units: (layer, part) -> what is called instead of the layer, or handles of hooks --------


def whole_layer(layer: nn.Module, part: Part) -> StandIn | None:
    """The layer for the whole batch, for this step."""
    if part.off:
        return Identity(layer, part)
    return Rescaled(layer, part) if part.rescale and 0 < part.chance < 1 else None


def some_rows(layer: nn.Module, part: Part) -> StandIn | None:
    """The layer for a share of the samples."""
    return SomeRows(layer, part) if part.chance else None


def some_tokens(layer: nn.Module, part: Part) -> StandIn | None:
    """The layer for a share of each sample's tokens."""
    return SomeTokens(layer, part) if part.chance else None


def without_backward(layer: nn.Module, part: Part) -> list:
    """The backward of attention or MLP: what they add is a constant to it, and the graph that they
    recorded is let go at once. A norm that comes after them still has a gradient of its own."""
    return [
        layer.get_submodule(part.sublayers[share]).register_forward_hook(
            partial(_constant, part, share)
        )
        for share in sorted(part.off)
    ]


def _constant(part: Part, share: str, module: nn.Module, args: tuple, output: Any) -> Any:
    if not module.training:
        return output
    part.did.add(share)
    if isinstance(output, tuple):
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in output)
    return output.detach()


# ---- putting stand-ins into the model's loop -----------------------------------------------------


class _Layers(nn.ModuleList):
    """Decoder layers with stand-ins for some of them when iterated or indexed.

    All real layers stay registered, so parameters(), hooks and state_dict() miss none.
    """

    def __init__(self, layers: nn.ModuleList, stand_ins: dict[int, StandIn]) -> None:
        super().__init__(layers)
        self._view: list[Callable] = [stand_ins.get(i, layer) for i, layer in enumerate(layers)]

    def __iter__(self) -> Iterator:
        return iter(self._view)

    def __getitem__(self, index: Any) -> Any:
        return self._view[index]


def standing_in(
    language_model: nn.Module, attribute: str, stand_ins: dict[int, StandIn]
) -> AbstractContextManager[None]:
    """The language model with stand-ins for some of its layers."""
    layers = _Layers(getattr(language_model, attribute), stand_ins)
    return in_the_place_of(language_model, attribute, layers)
