"""LDS on the decoder layers of one model: one decision a step, which every forward of it obeys."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from sts.architectures import Architecture
from sts.checks import expect
from sts.draws import keyed_torch_generator
from sts.lds import DEPTHS, UNITS, resolve
from sts.lds.decision import Decision, LayerDecision, decide
from sts.lds.distributed import prepare_skipped_layers
from sts.lds.measure import Measured
from sts.lds.parts import LDS
from sts.lds.units import Replacement
from sts.modules import show_hooks_to_compile
from sts.sequence import Batch


class Skipper:
    """Decides what LDS skips of a language model's layers, and skips it.

    Raises:
        ValueError: The model can't have these settings.
    """

    def __init__(
        self, lds: LDS, language_model: nn.Module, architecture: Architecture, seed: int
    ) -> None:
        self.lds, self.unit, self.seed = lds, UNITS[lds.unit], seed
        self._language_model, self._architecture = language_model, architecture
        lds.check_layers(len(self.layers))
        if lds.rate:
            self._check_unit()
        self._always = frozenset(
            i for i, layer in enumerate(self.layers) if architecture.always(layer)
        )
        self.measured = Measured(DEPTHS[lds.depth], len(self.layers), lds.ema)
        self.decision = Decision((0.0,) * len(self.layers))
        self._step = 0
        self._hooks: list = []
        self._hooked: dict[int, LayerDecision] = {}

    def _check_unit(self) -> None:
        """Raise ValueError for a unit that the model's layers can't have."""
        is_possible = self._architecture.partial or self.unit.drawn_by_step
        accepted = (
            "a unit of whole layers: those of this model share what they compute of all tokens"
        )
        expect(is_possible, "LDS.unit", self.lds.unit, accepted)
        for layer in self.layers if "mlp_backward" in self.unit.shares else ():
            sublayers = (self._architecture.attention, self._architecture.mlp)
            has_both = all(any(hasattr(layer, name) for name in names) for names in sublayers)
            accepted = f"another: {type(layer).__name__} has no attention and MLP of its own"
            expect(has_both, "LDS.unit", self.lds.unit, accepted)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return getattr(self._language_model, self._architecture.layers)

    @property
    def skipped(self) -> frozenset[int]:
        """The layers (0 = first) of which something is off for the whole step."""
        return frozenset(layer for layer, _ in self.decision.off)

    def begin_step(self, step: int, t: float, warn: Callable[[str], None]) -> None:
        """Decide for optimizer step `step`, at t of the stage. Collective for a measured depth."""
        if self.measured.is_needed:
            self.measured.fold(next(self.layers.parameters()).device)
        measured = self.measured.average
        self.decision = decide(
            self.lds, len(self.layers), t, self.seed, step, measured, self._always
        )
        self._step = step
        self.remove_hooks()
        if self.unit.hooks:
            show_hooks_to_compile()
            hook_layer = resolve(self.unit.hooks)
            self._hooked = {i: self.decision_of(i) for i in sorted(self.skipped)}
            for i, decision in self._hooked.items():
                self._hooks += hook_layer(self.layers[i], decision)
        if self.decision.off:
            prepare_skipped_layers(self.layers, self.skipped, warn)

    def remove_hooks(self) -> None:
        """Remove the hooks of the step."""
        for handle in self._hooks:
            handle.remove()
        self._hooks, self._hooked = [], {}

    def _sublayer(self, layer: int, names: Sequence[str]) -> str:
        """The first of the names that is an attribute of a layer."""
        return next((name for name in names if hasattr(self.layers[layer], name)), "")

    def decision_of(self, layer: int, micro_batch: int = 0) -> LayerDecision:
        """What the decision of the step means for a layer, in a micro-batch."""
        key = (self.seed, self._step, micro_batch, "layer", layer)
        return LayerDecision(
            chance=self.decision.chances[layer],
            off=self.decision.of(layer),
            draw=self.lds.draw,
            rescale=self.lds.rescale,
            generator=partial(keyed_torch_generator, *key),
            returned=self._architecture.returned,
            sublayers={
                "attention_backward": self._sublayer(layer, self._architecture.attention),
                "mlp_backward": self._sublayer(layer, self._architecture.mlp),
            },
        )

    def drop_zero_gradients(self) -> None:
        """Set gradients of zeros to None where something is skipped in this step.

        `zero_grad(set_to_none=False)` leaves them, and momentum and weight decay would then move
        the parameters.
        """
        for index, share in self.decision.off:
            sublayer = self.decision_of(index).sublayers.get(share, "")
            for parameter in self.layers[index].get_submodule(sublayer).parameters():
                if parameter.grad is not None and not parameter.grad.any():
                    parameter.grad = None

    def replacements(self, micro_batch: int) -> dict[int, Replacement]:
        """What is called instead of a layer in this micro-batch, by layer."""
        for decision in self._hooked.values():
            decision.skipped.clear()
        if self.unit.replacement is None or not any(self.decision.chances):
            return {}
        replace = resolve(self.unit.replacement)
        by_layer = {
            i: replace(layer, self.decision_of(i, micro_batch))
            for i, layer in enumerate(self.layers)
        }
        return {i: replacement for i, replacement in by_layer.items() if replacement is not None}

    def measuring_hooks(self, batch: Batch, replacements: Mapping[int, Replacement]) -> Iterator:
        """The hooks on the layers of a forward by which a measured depth measures."""
        if not self.measured.is_needed:
            return iter(())

        def mask_of(layer: int) -> Tensor:
            return replacements[layer].select(batch.mask) if layer in replacements else batch.mask

        return self.measured.hooks(self.layers, mask_of)

    def work(self, replacements: Mapping[int, Replacement]) -> dict[int, dict[str, float]]:
        """The work of those layers that did less than all of it, in the forward that is done.

        Raises:
            RuntimeError: The model's loop did not call the replacement of a layer.
        """
        uncalled = [
            layer for layer, replacement in replacements.items() if replacement.work is None
        ]
        if uncalled:
            raise RuntimeError(
                f"{type(self._language_model).__name__} did not call its layers {uncalled} out of "
                f"`{self._architecture.layers}`, so LDS could not skip them"
            )
        if replacements:
            return {layer: replacement.work for layer, replacement in replacements.items()}
        return {layer: dict.fromkeys(each.skipped, 0.0) for layer, each in self._hooked.items()}
