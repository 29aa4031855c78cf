"""Replacements of decoder layers, and hooks on them, that skip a part of the layer's work.

The model's own loop over its layers calls the replacements, outside the region that checkpointing
computes again. Hooks stay for the whole step, so that what is computed again is cut in the same
way. Shapes: B rows of a micro-batch, T tokens of a row, D model width.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from inspect import getclosurevars
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from sts.lds.decision import LayerDecision
from sts.modules import replaced
from sts.sequence import row_argument, take, token_argument, write_places, write_rows

log = logging.getLogger(__name__)


class Replacement:
    """Is called instead of a decoder layer; attributes that it doesn't define are the layer's.

    Attributes:
        work: The shares below 1 of the layer's work that the call did; None: no call yet.
        select: The entries of a mask [B, T] for those tokens that the layer saw in the call.
    """

    def __init__(self, layer: nn.Module, decision: LayerDecision) -> None:
        self._layer, self._decision = layer, decision
        self.work: dict[str, float] | None = None
        self.select: Callable[[Tensor], Tensor] = lambda mask: mask

    def __getattr__(self, name: str) -> Any:
        if name == "_layer":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._layer, name)

    def _run(self, hidden: Tensor, argument: Callable, args: tuple, kwargs: dict) -> Tensor:
        """The layer's output for a part of its input, with arguments for that part.

        Transformers collects no hidden states in this call, which sees some tokens only.
        """
        args = [argument("an argument", value) for value in args]
        kwargs = {name: argument(name, value) for name, value in kwargs.items()}
        token = output_capturing._active_collector.set(None)
        try:
            return self._layer(hidden, *args, **kwargs)
        finally:
            output_capturing._active_collector.reset(token)

    def _record(self, before: Tensor, after: Tensor) -> Tensor:
        """`after`, shown to the hooks by which transformers collects hidden states [B, T, D] of all
        tokens, if they were asked for. Among attentions the layer's is None."""
        for hook in _capturing_hooks(self._layer):
            hook(self._layer, (before,), after)
        collected = output_capturing._active_collector.get() or {}
        hooks = (hook for module in self._layer.modules() for hook in _capturing_hooks(module))
        if "attentions" in collected and any(
            getclosurevars(hook).nonlocals.get("key") == "attentions" for hook in hooks
        ):
            collected["attentions"].append(None)
        return after


def _capturing_hooks(module: nn.Module) -> list[Callable]:
    """The hooks by which transformers collects what the module returns."""
    hooks = module._forward_hooks.values()
    name = output_capturing.__name__
    return [hook for hook in hooks if getattr(hook, "__module__", None) == name]


class Skipped(Replacement):
    """The hidden state [B, T, D] passes unchanged."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.work = {"rows": 0.0}
        self._record(hidden, hidden)
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

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = len(hidden)
        rows = kept_rows(batch, self._decision).to(hidden.device)
        if len(rows) == batch:
            self.work = {}
            return self._layer(hidden, *args, **kwargs)
        self.work, self.select = {"rows": len(rows) / batch}, lambda mask: mask[rows]
        kept = hidden.index_select(0, rows)
        out = self._run(kept, partial(row_argument, rows=rows, batch=batch), args, kwargs)
        if self._decision.rescale:
            out = kept + (out - kept) * (batch / len(rows))
        return self._record(hidden, write_places(hidden, rows, out))


class SomeTokens(Replacement):
    """The layer gets some tokens of each row, in their order; the others pass unchanged."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows, length = hidden.shape[:2]
        count = max(1, length - round(self._decision.chance * length))
        draws = torch.rand(rows, length, generator=self._decision.generator())
        kept = draws.topk(count, dim=1).indices.sort(dim=1).values.to(hidden.device)
        self.work, self.select = {"tokens": count / length}, lambda mask: mask.gather(1, kept)
        argument = partial(token_argument, index=kept, length=length)
        out = self._run(take(hidden, kept), argument, args, kwargs)
        return self._record(hidden, write_rows(hidden, kept, out))


def kept_rows(rows: int, decision: LayerDecision) -> Tensor:
    """The rows of a batch that a layer gets, [k], ascending; at least one, so that it is trained.

    independent: each row has its own switch. fixed_count: floor(mean) or ceil(mean) rows are left
    out, so that their mean number is chance x rows.
    """
    if decision.chance ** (rows - 1) > 0.1 * rows:  # a tenth of what is left out is lacking
        log.warning_once(  # transformers' addition to loggers
            f"sts: LDS unit 'samples' keeps at least one row: of {rows} rows of a micro-batch it "
            "leaves out less than the chance that was set (scheme.metrics()); give it more rows"
        )
    draws = torch.rand(rows + 1, generator=decision.generator())
    if decision.draw == "independent":
        skipped = int((draws[:-1] < decision.chance).sum())
    else:
        skipped = int(decision.chance * rows + draws[-1].item())
    count = max(1, rows - skipped)
    return draws[:-1].topk(count).indices.sort().values


def skip_layer(layer: nn.Module, decision: LayerDecision) -> Replacement | None:
    """The unit `layer`: skips the layer for the whole batch, for this step."""
    if decision.off:
        return Skipped(layer, decision)
    is_rescaled = decision.rescale and decision.chance < 1
    return Rescaled(layer, decision) if is_rescaled else None


def skip_backward(layer: nn.Module, decision: LayerDecision) -> list:
    """The unit `backward`: what attention or MLP adds is a constant to the backward.

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
    decision.skipped[share] = torch.is_grad_enabled()
    if isinstance(output, tuple):
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in output)
    return output.detach()


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
