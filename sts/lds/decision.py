"""What LDS skips in one step: numbers only, no torch.

A decision is a pure function of (settings, seed, step, measured): the same on every rank, for every
micro-batch and after a resume, and no other random stream moves.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sts.draws import keyed_generator
from sts.lds import DEPTHS, DRAWS, UNITS
from sts.lds.parts import LDS, unmeasured
from sts.schedule import strength

# Shares of a decoder layer's work in a step, 1 unless something is skipped: of the samples that run
# through it, of each sample's tokens, of the backward of its two sublayers.
SHARES = ("rows", "tokens", "attention_backward", "mlp_backward")

Work = Mapping[str, float]  # of a layer: share -> value, for the shares below 1


@dataclass(frozen=True)
class Decision:
    """What is skipped in one step."""

    chances: tuple[float, ...]  # p_l of every layer
    off: frozenset[tuple[int, str]] = frozenset()  # (layer, share), for the whole step

    @property
    def layers(self) -> frozenset[int]:
        """The layers (0 = first) of which something is off for the whole step."""
        return frozenset(layer for layer, _ in self.off)

    def of(self, layer: int) -> frozenset[str]:
        """The shares of a layer that are off for the whole step."""
        return frozenset(share for index, share in self.off if index == layer)


@dataclass(frozen=True)
class LayerDecision:
    """What the decision means for one layer, in one micro-batch where the unit draws anew in each.

    chance, draw and rescale are those of sts.settings.LDS, `returned` is that of Architecture.
    """

    chance: float
    off: frozenset[str]  # the shares that are off for the whole step
    draw: str
    rescale: bool
    generator: Callable[[], Any]  # -> a torch.Generator of this layer and micro-batch
    sublayers: Mapping[str, str] = field(default_factory=dict)  # share -> module of the layer
    returned: Callable[[Any, dict[str, Any]], Any] | None = None
    # the shares that hooks skipped in the forward -> whether it recorded gradients there
    skipped: dict[str, bool] = field(default_factory=dict)


def chances(
    lds: LDS, num_layers: int, t: float, measured: Sequence[float] | None = None
) -> tuple[float, ...]:
    """p_l(t) = rate x S(t) x D(l) of every layer, [num_layers]; 0 for protected layers.

    `measured` is the moving average of each layer, for a measured depth.
    """
    first, end = lds.protect_first, num_layers - lds.protect_last
    scale = lds.rate * strength(t, lds.schedule, lds.dense_tail)
    if not scale or end <= first:
        return (0.0,) * num_layers
    measured = unmeasured(num_layers) if measured is None else measured
    weights = DEPTHS[lds.depth].weights(end - first, lds, measured[first:end])
    inner = [min(1.0, scale * weight) for weight in weights]
    return (*[0.0] * first, *inner, *[0.0] * lds.protect_last)


def decide(
    lds: LDS,
    num_layers: int,
    t: float,
    seed: int,
    step: int,
    measured: Sequence[float] | None = None,
    always: Collection[int] = (),
) -> Decision:
    """The decision for optimizer step `step`, at t of the stage.

    At least one layer runs, and so does every layer in `always`.
    """
    shares, everywhere = UNITS[lds.unit].shares, enumerate(chances(lds, num_layers, t, measured))
    by_layer = tuple(0.0 if layer in always else chance for layer, chance in everywhere)
    if not (UNITS[lds.unit].drawn_by_step and any(by_layer)):
        return Decision(by_layer)
    free = range(lds.protect_first, num_layers - lds.protect_last)
    pieces = [(layer, share) for layer in free for share in shares]
    generator = keyed_generator(seed, step, "layers")
    drawn = DRAWS[lds.draw]([by_layer[layer] for layer, _ in pieces], generator)
    if len(drawn) == num_layers * len(shares):
        drawn.remove(min(drawn, key=lambda i: by_layer[pieces[i][0]]))
    return Decision(by_layer, frozenset(pieces[i] for i in drawn))


def expected_work(lds: LDS, num_layers: int, t: float) -> list[dict[str, float]]:
    """The mean work of every layer at t before anything was measured, [num_layers]."""
    by_layer = chances(lds, num_layers, t)
    return [dict.fromkeys(UNITS[lds.unit].shares, 1 - p) if p else {} for p in by_layer]


def skipped_share(lds: LDS, work: Sequence[Work]) -> list[float]:
    """The share of each layer that was skipped, of what the unit skips, [layers]."""
    shares = UNITS[lds.unit].shares
    return [1 - sum(layer.get(share, 1.0) for share in shares) / len(shares) for layer in work]
