"""LDS on the decoder layers of one model: one decision a step, which every forward of it obeys."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from sts.architectures import Architecture
from sts.checks import expect
from sts.draws import keyed_torch_generator
from sts.lds import DEPTHS, UNITS, resolve
from sts.lds.decision import Decision, LayerDecision, Work, decide
from sts.lds.distributed import prepare_skipped_layers
from sts.lds.measure import Measured
from sts.lds.parts import LDS
from sts.lds.units import Replacement
from sts.modules import returns_tuple, show_hooks_to_compile
from sts.sequence import Batch


class Skipper:
    """Decides what LDS skips of a language model's layers, and skips it.

    Raises:
        ValueError: The model can't have these settings.
    """

    def __init__(
        self, lds: LDS, model: PreTrainedModel, architecture: Architecture, seed: int
    ) -> None:
        self.lds, self.unit, self.seed = lds, UNITS[lds.unit], seed
        self.language_model = model.get_submodule(architecture.language_model)
        self._architecture = architecture
        lds.check_layers(len(self.layers))
        if lds.rate:
            self._check_unit()
        always = architecture.always
        self._always = {i for i, layer in enumerate(self.layers) if always and always(layer)}
        self.measured = Measured(DEPTHS[lds.depth], len(self.layers), lds.ema)
        self.decision = Decision((0.0,) * len(self.layers))
        self._step = 0
        self._hooks: list = []
        self._hooked: dict[int, LayerDecision] = {}

    def _check_unit(self) -> None:
        """Raise ValueError for a unit that the model's layers can't have."""
        is_possible = self._architecture.partial or self.unit.drawn_by_step
        for kind in () if self._architecture.returned else {type(layer) for layer in self.layers}:
            accepted = f"0.0: {kind.__name__} returns more than the hidden state"
            expect(not returns_tuple(kind.forward), "LDS.rate", self.lds.rate, accepted)
        accepted = "a unit of whole layers: those of this model share what they compute of all "
        expect(is_possible, "LDS.unit", self.lds.unit, accepted + "tokens")
        for index, layer in enumerate(self.layers if "mlp_backward" in self.unit.shares else ()):
            accepted = f"another: {type(layer).__name__} has no attention and MLP of its own"
            has_both = all(self._sublayers(index).values())
            expect(has_both, "LDS.unit", self.lds.unit, accepted)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return getattr(self.language_model, self._architecture.layers)

    def begin_step(self, step: int, t: float) -> None:
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
            self._hooked = {i: self.decision_of(i) for i in sorted(self.decision.layers)}
            for i, decision in self._hooked.items():
                self._hooks += hook_layer(self.layers[i], decision)
        if self.decision.off:
            prepare_skipped_layers(self.layers, self.decision.layers)

    def remove_hooks(self) -> None:
        """Remove the hooks of the step."""
        for handle in self._hooks:
            handle.remove()
        self._hooks, self._hooked = [], {}

    def _sublayers(self, layer: int) -> dict[str, str]:
        """Share -> the attribute of a layer whose backward it is; empty where there is none."""

        def first_of(names: tuple[str, ...]) -> str:
            return next((name for name in names if hasattr(self.layers[layer], name)), "")

        attention, mlp = self._architecture.attention, self._architecture.mlp
        return {"attention_backward": first_of(attention), "mlp_backward": first_of(mlp)}

    def weights(self) -> list[dict[str, int]]:
        """Of each layer how many it has: `layer`, and of its sublayers by their share."""

        def count(module: nn.Module) -> int:
            return sum(p.numel() for p in module.parameters())

        return [
            {"layer": count(layer)}
            | {x: count(getattr(layer, name)) for x, name in self._sublayers(i).items() if name}
            for i, layer in enumerate(self.layers)
        ]

    def decision_of(self, layer: int, digest: Callable[[], str] = str) -> LayerDecision:
        """What the decision of the step means for a layer, in the micro-batch of this digest."""
        return LayerDecision(
            chance=self.decision.chances[layer],
            off=self.decision.of(layer),
            draw=self.lds.draw,
            rescale=self.lds.rescale,
            generator=partial(_generator, self.seed, self._step, digest, layer),
            returned=self._architecture.returned,
            sublayers=self._sublayers(layer),
        )

    def drop_zero_gradients(self) -> None:
        """Set gradients of zeros to None where something is skipped in this step.

        `zero_grad(set_to_none=False)` leaves them, and momentum and weight decay would then move
        the parameters.
        """
        for index, share in self.decision.off:
            sublayer = self._sublayers(index).get(share, "")
            for parameter in self.layers[index].get_submodule(sublayer).parameters():
                if parameter.grad is not None and not parameter.grad.any():
                    parameter.grad = None

    def replacements(self, digest: Callable[[], str]) -> dict[int, Replacement]:
        """What is called instead of a layer in the micro-batch of this digest, by layer."""
        for decision in self._hooked.values():
            decision.skipped.clear()
        if self.unit.replacement is None:
            return {}
        replace = resolve(self.unit.replacement)
        by_layer = {
            i: replace(self.layers[i], self.decision_of(i, digest))
            for i, chance in enumerate(self.decision.chances)
            if chance
        }
        return {i: replacement for i, replacement in by_layer.items() if replacement is not None}

    def measuring_hooks(self, batch: Batch, replacements: Mapping[int, Replacement]) -> Iterator:
        """The hooks on the layers of a forward by which a measured depth measures."""

        def mask_of(layer: int) -> Tensor:
            return replacements[layer].select(batch.mask) if layer in replacements else batch.mask

        return self.measured.hooks(self.layers, mask_of)

    def work(self, replacements: Mapping[int, Replacement]) -> dict[int, Work]:
        """The work of those layers that did less than all of it, in the forward that is done.

        Raises:
            RuntimeError: The model's loop did not call the replacement of a layer.
        """
        work = {layer: replacement.work for layer, replacement in replacements.items()}
        uncalled = [layer for layer, shares in work.items() if shares is None]
        if uncalled:
            raise RuntimeError(
                f"{type(self.language_model).__name__} did not call its layers {uncalled} out of "
                f"`{self._architecture.layers}`, so LDS could not skip them"
            )
        hooked = {i: dict.fromkeys(each.skipped, 0.0) for i, each in self._hooked.items()}
        return work or hooked

    def check_backward(self, hidden: Tensor) -> None:
        """See to it that a backward which computes the layers again, hooked by the unit, comes
        while the hooks are those of the forward that gave `hidden`."""
        hooks = self._hooks
        recorded = [x for each in self._hooked.values() for x in each.skipped.values()]

        def check(gradient: Tensor) -> None:
            if self._hooks is not hooks:
                raise RuntimeError(
                    f"LDS unit {self.lds.unit!r} under re-entrant checkpointing: end the backward "
                    "passes of a step before the next scheme.begin_step and before unsparsify"
                )

        if hidden.requires_grad and not all(recorded):
            hidden.register_hook(check)


def _generator(seed: int, step: int, digest: Callable[[], str], layer: int) -> Generator:
    return keyed_torch_generator(seed, step, digest(), "layer", layer)
