"""LDS on the decoder layers of one model: decides once a step, then acts on every forward of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from sts.architectures import Architecture
from sts.checks import expect
from sts.draws import keyed_torch_generator
from sts.lds import DEPTHS, UNITS, resolve
from sts.lds.decision import Decision, Part, decide
from sts.lds.distributed import care_for_several_processes
from sts.lds.measure import Measured
from sts.lds.units import StandIn
from sts.modules import see_hooks
from sts.sequence import Batch
from sts.settings import LDS


class Skipper:
    """What LDS knows and does. Raises ValueError for settings that the model can't have."""

    def __init__(
        self, lds: LDS, language_model: nn.Module, architecture: Architecture, seed: int
    ) -> None:
        self.lds, self.unit, self.seed = lds, UNITS[lds.unit], seed
        self._language_model, self._names = language_model, architecture
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
        self._hung: dict[int, Part] = {}

    def _check_unit(self) -> None:
        """Raise ValueError for a unit that the model's layers can't do."""
        parts = self._names.partial or self.unit.drawn_by_step
        accepted = (
            "a unit of whole layers: those of this model share what they compute of all tokens"
        )
        expect(parts, "LDS.unit", self.lds.unit, accepted)
        for layer in self.layers if "mlp_backward" in self.unit.lowers else ():
            names = (self._names.attention, self._names.mlp)
            whole = all(any(hasattr(layer, name) for name in each) for each in names)
            accepted = f"another: {type(layer).__name__} has no attention and MLP of its own"
            expect(whole, "LDS.unit", self.lds.unit, accepted)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return getattr(self._language_model, self._names.layers)

    @property
    def skipped(self) -> frozenset[int]:
        """Layers (0 = first) some of which is off for the whole step."""
        return frozenset(layer for layer, _ in self.decision.off)

    def begin_step(self, step: int, t: float, warn: Callable[[str], None]) -> None:
        """Decide for optimizer step `step`, at t of the stage. Collective for a measured depth."""
        if self.measured.any:
            self.measured.fold(next(self.layers.parameters()).device)
        measured = self.measured.average
        self.decision = decide(
            self.lds, len(self.layers), t, self.seed, step, measured, self._always
        )
        self._step = step
        self.let_go()
        if self.unit.hooks:
            see_hooks()
            hang = resolve(self.unit.hooks)
            self._hung = {i: self._part(i) for i in sorted(self.skipped)}
            hung = [hang(self.layers[i], part) for i, part in self._hung.items()]
            self._hooks = [handle for handles in hung for handle in handles]
        if self.decision.off:
            care_for_several_processes(self.layers, self.skipped, warn)

    def let_go(self) -> None:
        """Remove the hooks of the step."""
        for handle in self._hooks:
            handle.remove()
        self._hooks, self._hung = [], {}

    def _first(self, layer: int, names: Sequence[str]) -> str:
        """The first of the names that is an attribute of a layer."""
        return next((name for name in names if hasattr(self.layers[layer], name)), "")

    def _part(self, layer: int, micro_batch: int = 0) -> Part:
        key = (self.seed, self._step, micro_batch, "layer", layer)
        return Part(
            chance=self.decision.chances[layer],
            off=self.decision.of(layer),
            draw=self.lds.draw,
            rescale=self.lds.rescale,
            generator=partial(keyed_torch_generator, *key),
            returned=self._names.returned,
            sublayers={
                "attention_backward": self._first(layer, self._names.attention),
                "mlp_backward": self._first(layer, self._names.mlp),
            },
        )

    def forget_zeros(self) -> None:
        """What is skipped in this step must have no gradient rather than one of zeros, which
        `zero_grad(set_to_none=False)` leaves: momentum and weight decay would move it."""
        for index, share in self.decision.off:
            sublayer = self._part(index).sublayers.get(share, "")
            for parameter in self.layers[index].get_submodule(sublayer).parameters():
                if parameter.grad is not None and not parameter.grad.any():
                    parameter.grad = None

    def stand_ins(self, micro_batch: int) -> dict[int, StandIn]:
        """What is called instead of a layer in this micro-batch, by layer."""
        for part in self._hung.values():
            part.did.clear()
        if self.unit.stand_in is None or not any(self.decision.chances):
            return {}
        make = resolve(self.unit.stand_in)
        made = {i: make(real, self._part(i, micro_batch)) for i, real in enumerate(self.layers)}
        return {i: stand_in for i, stand_in in made.items() if stand_in is not None}

    def measuring(self, batch: Batch, stand_ins: Mapping[int, StandIn]) -> Iterator:
        """Hooks of a forward for what a measured depth wants to know."""
        if not self.measured.any:
            return iter(())

        def mask_of(layer: int) -> Tensor:
            return stand_ins[layer].seen(batch.mask) if layer in stand_ins else batch.mask

        return self.measured.hooks(self.layers, mask_of)

    def work(self, stand_ins: Mapping[int, StandIn]) -> dict[int, dict[str, float]]:
        """What the layers did in the forward that is done, those that did not do all of it.

        Raises RuntimeError where the model's loop did not call what stood in for a layer.
        """
        unseen = [layer for layer, stand_in in stand_ins.items() if stand_in.work is None]
        if unseen:
            raise RuntimeError(
                f"{type(self._language_model).__name__} did not call its layers {unseen} out of "
                f"`{self._names.layers}`, so LDS could not skip them"
            )
        if stand_ins:
            return {layer: stand_in.work for layer, stand_in in stand_ins.items()}
        return {layer: dict.fromkeys(part.did, 0.0) for layer, part in self._hung.items()}
