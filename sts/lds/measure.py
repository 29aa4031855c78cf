"""The measurements of a measured depth: a moving average of each layer, equal on every rank."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sts.checks import expect
from sts.lds.parts import Depth, unmeasured


class Measured:
    """The moving average of what a depth measures of every layer.

    Attributes:
        average: Of every layer, [layers]; infinite before its first measurement.
        awaits_gradients: Whether `gradients` has to be called before the next step.
    """

    def __init__(self, depth: Depth, layers: int, ema: float) -> None:
        self._depth, self._ema = depth, ema
        self.is_needed = bool(depth.of_forward or depth.of_gradients)
        self.average = unmeasured(layers)
        self.forget()

    def forget(self) -> None:
        """Be as before the first measurement."""
        layers = len(self.average)
        self.average = unmeasured(layers)
        self.awaits_gradients = False
        self._sums = torch.zeros(2, layers)  # sum and count since the last `fold`

    def fold(self, device: torch.device) -> None:
        """Add what the last step measured, averaged over ranks, to the moving averages.

        A collective operation.

        Raises:
            RuntimeError: The depth looks at gradients, and `gradients` was not called.
        """
        if self.awaits_gradients:
            raise RuntimeError(
                "this policy looks at gradients: call scheme.after_backward() after the last "
                "backward of each step, before the optimizer's step"
            )
        sums = self._sums.to(device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        for layer, (total, count) in enumerate(zip(*sums.tolist(), strict=True)):
            if count:
                new, old = total / count, self.average[layer]
                updated = old + (1 - self._ema) * (new - old)
                self.average[layer] = new if math.isinf(old) else updated
        self._sums = torch.zeros_like(sums)

    def hooks(
        self, layers: Sequence[nn.Module], mask_of: Callable[[int], Tensor | None]
    ) -> Iterator:
        """Hooks that measure each forward of every layer that is called.

        `mask_of`: layer -> which of the tokens that the layer saw are no padding, [B, T].
        """
        self.awaits_gradients = self._depth.of_gradients is not None
        if self._depth.of_forward:
            for index, layer in enumerate(layers):
                yield layer.register_forward_hook(partial(self._forward, index, mask_of))

    def _forward(
        self, index: int, mask_of: Callable, layer: nn.Module, args: tuple, output: Tensor
    ) -> None:
        self._add(index, self._depth.of_forward(args[0], output, mask_of(index)))

    def gradients(self, layers: Sequence[nn.Module]) -> None:
        """Measure the gradients of every layer that has any."""
        self.awaits_gradients = False
        for index, layer in enumerate(layers if self._depth.of_gradients else ()):
            if any(p.grad is not None for p in layer.parameters()):
                self._add(index, self._depth.of_gradients(layer))

    def _add(self, index: int, measurement: Tensor) -> None:
        self._sums[:, index] += measurement.to(self._sums)

    def state_dict(self) -> dict[str, list]:
        """The averages, and the sums of this rank since the last `fold`."""
        return {"average": list(self.average), "sums": self._sums.tolist()}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Restore a `state_dict`. Raises ValueError for another number of layers."""
        layers = len(state["average"])
        expect(layers == len(self.average), "layers in state", layers, f"{len(self.average)}")
        self.average = list(state["average"])
        self._sums = torch.tensor(state["sums"])
