"""What LDS leaves out of one step: numbers only, no torch.

A decision is a pure function of (settings, seed, step, measured): the same on every rank, for every
micro-batch and after a resume, and no other random stream moves.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sts.draws import keyed_generator
from sts.lds import DEPTHS, DRAWS, UNITS
from sts.lds.parts import unmeasured
from sts.schedule import strength

if TYPE_CHECKING:
    from sts.settings import LDS

# Shares of a decoder layer's work in a step, 1 unless it is left out: of the samples that run
# through it, of each sample's tokens, of the backward of its two sublayers.
SHARES = ("rows", "tokens", "attention_backward", "mlp_backward")

Work = Mapping[str, float]  # share -> value, for those that are less than 1


@dataclass(frozen=True)
class Decision:
    """chances: p_l of every layer, [layers]. off: the (layer, share) that are off this step."""

    chances: tuple[float, ...]
    off: frozenset[tuple[int, str]] = frozenset()

    def of(self, layer: int) -> frozenset[str]:
        """The shares of a layer that are off this step."""
        return frozenset(share for index, share in self.off if index == layer)


@dataclass(frozen=True)
class Part:
    """A layer's part in a decision, for what stands in for it.

    generator: () -> a torch.Generator of this layer and micro-batch. sublayers: share -> the name
    of the layer's module whose backward it is. returned: see Architecture. did: the shares that
    hooks did leave out in the forward under way, which they note here.
    """

    chance: float
    off: frozenset[str]
    draw: str
    rescale: bool
    generator: Callable[[], Any]
    sublayers: Mapping[str, str] = field(default_factory=dict)
    returned: Callable[[Any, dict[str, Any]], Any] | None = None
    did: set[str] = field(default_factory=set)


def chances(
    lds: "LDS", num_layers: int, t: float, measured: Sequence[float] | None = None
) -> tuple[float, ...]:
    """p_l(t) = rate x S(t) x D(l) for every layer, [num_layers]; 0 for those that are protected.

    `measured`: a moving average per layer, for a measured depth.
    """
    first, end = lds.protect_first, num_layers - lds.protect_last
    wanted = lds.rate * strength(t, lds.schedule, lds.dense_tail)
    if not wanted or end <= first:
        return (0.0,) * num_layers
    measured = unmeasured(num_layers) if measured is None else measured
    weights = DEPTHS[lds.depth].weights(end - first, lds, measured[first:end])
    inner = [min(1.0, wanted * weight) for weight in weights]
    return (*[0.0] * first, *inner, *[0.0] * lds.protect_last)


def decide(
    lds: "LDS",
    num_layers: int,
    t: float,
    seed: int,
    step: int,
    measured: Sequence[float] | None = None,
    always: Collection[int] = (),
) -> Decision:
    """The decision for optimizer step `step`, at t of the stage. At least one layer always runs,
    and those that the architecture says."""
    asked, unit = chances(lds, num_layers, t, measured), UNITS[lds.unit]
    asked = tuple(0.0 if layer in always else chance for layer, chance in enumerate(asked))
    if not (unit.drawn_by_step and any(asked)):
        return Decision(asked)
    free = range(lds.protect_first, num_layers - lds.protect_last)
    pieces = [(layer, share) for layer in free for share in unit.lowers]
    drawn = DRAWS[lds.draw](
        [asked[layer] for layer, _ in pieces], keyed_generator(seed, step, "layers")
    )
    if len(drawn) == num_layers * len(unit.lowers):
        drawn.remove(min(drawn, key=lambda i: asked[pieces[i][0]]))
    return Decision(asked, frozenset(pieces[i] for i in drawn))


def expected_work(lds: "LDS", num_layers: int, t: float) -> list[dict[str, float]]:
    """The mean work of every layer at t, before anything was measured: [num_layers]."""
    lowers = UNITS[lds.unit].lowers
    return [
        {share: 1 - chance for share in lowers} if chance else {}
        for chance in chances(lds, num_layers, t)
    ]


def left_out(lds: "LDS", work: Sequence[Work]) -> list[float]:
    """The share of each layer that was left out, by what the unit leaves out, [layers]."""
    lowers = UNITS[lds.unit].lowers
    return [1 - sum(one.get(share, 1.0) for share in lowers) / len(lowers) for one in work]
