"""Depth D(l) and the draws: pure functions on numbers, no torch.

A depth is `(layers, lds, measured) -> [D(0), ..., D(layers - 1)]` over the layers that are not
protected, the first of them l = 0. `measured` is a moving average for each of them (infinite = not
measured yet), which only a measured depth looks at.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sts.settings import LDS


class Depth(NamedTuple):
    """D(l), its formula as text ({epsilon}, {layers}, {last} = layers - 1), and what it measures.

    of_forward: (before [B, T, D], after [B, T, D], mask [B, T] or None) -> (sum, count), [2], after
    each forward of a layer. of_gradients: (layer) -> (sum, count), [2], once a step, after its
    backwards. The moving average of sum / count over steps is what `weights` gets.
    """

    weights: Callable[[int, "LDS", Sequence[float]], list[float]]
    text: str
    of_forward: Callable | None = None
    of_gradients: Callable | None = None


def uniform(layers: int, lds: "LDS", measured: Sequence[float]) -> list[float]:
    """Every layer alike: LayerDrop (arXiv 1909.11556)."""
    return [1.0] * layers


def slope(layers: int, lds: "LDS", measured: Sequence[float]) -> list[float]:
    """1 + epsilon (2 l - (L - 1)) / (L - 1): the paper's depth-based adjustment, mean 1."""
    last = layers - 1
    return [1 + lds.epsilon * (2 * i - last) / last for i in range(layers)] if last else [1.0]


def linear(layers: int, lds: "LDS", measured: Sequence[float]) -> list[float]:
    """(l + 1) / L, 1 at the deepest: stochastic depth (arXiv 1603.09382), PLD (2010.13369)."""
    return [(i + 1) / layers for i in range(layers)]


def exponential(layers: int, lds: "LDS", measured: Sequence[float]) -> list[float]:
    """2^(l / (L - 1)) - 1, 0 at the first and 1 at the deepest: LayerSkip (arXiv 2404.16710)."""
    last = layers - 1
    return [2 ** (i / last) - 1 for i in range(layers)] if last else [1.0]


DEPTHS: dict[str, Depth] = {
    "uniform": Depth(uniform, "1"),
    "slope": Depth(slope, "(1 + {epsilon:g} (2 l - {last}) / {last})"),
    "linear": Depth(linear, "(l + 1) / {layers}"),
    "exponential": Depth(exponential, "(2^(l / {last}) - 1)"),
}


def independent(chances: Sequence[float], generator: random.Random) -> set[int]:
    """Each index with its own probability, whatever the others do: the paper's switches."""
    return {i for i, chance in enumerate(chances) if generator.random() < chance}


def fixed_count(chances: Sequence[float], generator: random.Random) -> set[int]:
    """Indices, each with exactly its probability, floor(sum) or ceil(sum) of them in all: ours.

    Systematic sampling in random order (Madow 1949; Hartley & Rao 1962): lay the probabilities end
    to end and take those that the points u, u + 1, u + 2, ... fall on, u uniform in [0, 1).
    """
    point = generator.random()
    order = sorted(range(len(chances)), key=lambda _: generator.random())
    chosen, reached = set(), 0.0
    for i in order:
        reached += chances[i]
        if reached > point + len(chosen) + 1e-12:  # rounding must not add to a whole sum
            chosen.add(i)
    return chosen


DRAWS: dict[str, Callable[[Sequence[float], random.Random], set[int]]] = {
    "independent": independent,
    "fixed_count": fixed_count,
}


def unmeasured(layers: int) -> list[float]:
    """What a measured depth gets before anything was measured."""
    return [math.inf] * layers
