"""Depths D(l) and draws: pure functions on numbers, no torch.

A depth is `(layers, lds, measured) -> [D(0), ..., D(layers - 1)]` over the layers that are not
protected; the first of them is l = 0. `measured` is the moving average of each (infinite before its
first measurement); only a measured depth looks at it.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Stands for sts.settings.LDS, which is made of this package's tables and can't be imported here.
LDS = Any


class Depth(NamedTuple):
    """D(l) and what it measures.

    Attributes:
        weights: D(l) of the layers, [layers]; of a measured depth by the moving average of
            sum / count over the steps.
        text: The formula, with {epsilon}, {layers} and {last} = layers - 1.
        of_forward: (before [B, T, D], after [B, T, D], mask [B, T] or None) -> (sum, count), [2],
            after each forward of a layer.
        of_gradients: (layer) -> (sum, count), [2], once a step, after its backward passes.
    """

    weights: Callable[[int, LDS, Sequence[float]], list[float]]
    text: str
    of_forward: Callable | None = None
    of_gradients: Callable | None = None


def uniform(layers: int, lds: LDS, measured: Sequence[float]) -> list[float]:
    """The same for every layer: LayerDrop (arXiv 1909.11556)."""
    return [1.0] * layers


def slope(layers: int, lds: LDS, measured: Sequence[float]) -> list[float]:
    """1 + epsilon (2 l - (L - 1)) / (L - 1), of mean 1: the paper's depth-based adjustment."""
    last = layers - 1
    return [1 + lds.epsilon * (2 * i - last) / last for i in range(layers)] if last else [1.0]


def linear(layers: int, lds: LDS, measured: Sequence[float]) -> list[float]:
    """(l + 1) / L: stochastic depth (arXiv 1603.09382), PLD (2010.13369)."""
    return [(i + 1) / layers for i in range(layers)]


def exponential(layers: int, lds: LDS, measured: Sequence[float]) -> list[float]:
    """2^(l / (L - 1)) - 1, from 0 to 1: LayerSkip (arXiv 2404.16710)."""
    last = layers - 1
    return [2 ** (i / last) - 1 for i in range(layers)] if last else [1.0]


DEPTHS: dict[str, Depth] = {
    "uniform": Depth(uniform, "1"),
    "slope": Depth(slope, "(1 + {epsilon:g} (2 l - {last}) / {last})"),
    "linear": Depth(linear, "(l + 1) / {layers}"),
    "exponential": Depth(exponential, "(2^(l / {last}) - 1)"),
}


def independent(chances: Sequence[float], generator: random.Random) -> set[int]:
    """Draw each index with its own probability, independently: the paper's switches."""
    return {i for i, chance in enumerate(chances) if generator.random() < chance}


def fixed_count(chances: Sequence[float], generator: random.Random) -> set[int]:
    """Draw floor(sum) or ceil(sum) indices, each with exactly its own probability: ours.

    Systematic sampling in random order (Madow 1949; Hartley & Rao 1962): lay the probabilities end
    to end and take those that the points u, u + 1, u + 2, ... hit, with u uniform in [0, 1).
    """
    point = generator.random()
    order = sorted(range(len(chances)), key=lambda _: generator.random())
    chosen, reached = set(), 0.0
    for i in order:
        reached += chances[i]
        if reached > point + len(chosen) + 1e-12:  # rounding adds none to an integer sum
            chosen.add(i)
    return chosen


DRAWS: dict[str, Callable[[Sequence[float], random.Random], set[int]]] = {
    "independent": independent,
    "fixed_count": fixed_count,
}


def unmeasured(layers: int) -> list[float]:
    """The moving averages before the first measurement."""
    return [math.inf] * layers
