"""Layer dynamic skipping (LDS): which decoder layers a step leaves out.

Pure functions of (policy, seed, step, statistics): the draw comes from a generator keyed by
(seed, step), so it is the same on every rank, for every micro-batch and after a resume, and no
other random stream moves. A new policy is one function and one entry in POLICIES.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sts.schedule import annealing, expect, ramp


def keyed_generator(*key: object) -> random.Random:
    """A generator that depends on its key alone (Python seeds it with the key's SHA-512).

    Only `.random()` of it is promised to stay the same over Python versions.
    """
    return random.Random("/".join(map(str, key)))


def _with_mean(weights: Sequence[float], mean: float) -> list[float]:
    """Probabilities proportional to `weights` with the given mean.

    What would exceed 1 is held at 1 and the excess goes to the others in proportion; a weight of 0
    stays at 0 unless all others are at 1.
    """
    wanted = mean * len(weights)
    capped: set[int] = set()
    while True:
        free = sum(w for i, w in enumerate(weights) if i not in capped)
        if not free and wanted > len(capped) + 1e-9:
            left = (wanted - len(capped)) / (len(weights) - len(capped))
            return [1.0 if i in capped else left for i in range(len(weights))]
        scale = (wanted - len(capped)) / free if free else 0.0
        over = {i for i, w in enumerate(weights) if i not in capped and w * scale > 1}
        if not over:
            return [1.0 if i in capped else w * scale for i, w in enumerate(weights)]
        capped |= over


class Policy(NamedTuple):
    """Which layers a step alters, and what happens to them.

    probabilities: (layers, rate, stats, explore) -> each layer's chance to be chosen, mean `rate`.
    acts_on: `layer`, a chosen layer does not run; `backward`, it runs but no gradient flows through
    it or to it; `tokens`, every unprotected layer runs on a random 1 - rate of the tokens.
    """

    probabilities: Callable[..., list[float]]
    acts_on: str = "layer"


def none(layers: Sequence[int], rate: float, stats: Sequence[float], explore: float) -> list[float]:
    """No layer, whatever the rate says."""
    return [0.0] * len(layers)


def uniform(
    layers: Sequence[int], rate: float, stats: Sequence[float], explore: float
) -> list[float]:
    """Every layer alike: LayerDrop (arXiv 1909.11556)."""
    return [rate] * len(layers)


def linear(
    layers: Sequence[int], rate: float, stats: Sequence[float], explore: float
) -> list[float]:
    """In proportion to depth: p_l ~ l / L, stochastic depth (arXiv 1603.09382), PLD (2010.13369).

    There the deepest layer's probability is given; here the mean over the layers is. PLD's rise
    over time is the schedule `exponential`.
    """
    return _with_mean([layer + 1 for layer in layers], rate)


def exponential(
    layers: Sequence[int], rate: float, stats: Sequence[float], explore: float
) -> list[float]:
    """Growing with depth as 2^(l / (L - 1)) - 1, l = 0 .. L - 1: LayerSkip (arXiv 2404.16710).

    There the deepest layer's probability is given; here the mean over the layers (those that are
    not protected, L of them) is. The first of them is never skipped.
    """
    depth = max(1, len(layers) - 1)
    return _with_mean([2 ** (i / depth) - 1 for i in range(len(layers))], rate)


def need(layers: Sequence[int], rate: float, stats: Sequence[float], explore: float) -> list[float]:
    """Layers that lately changed their input least are skipped most.

    `stats` holds each layer's block influence, 1 - cos(input, output) (ShortGPT, arXiv 2403.03853);
    infinite = not yet measured, so run it. The probability is linear in the rank of the influence
    (ties share their mean rank: with nothing measured it is uniform), mixed with an `explore`
    share of uniform skipping so that no estimate goes stale.
    """
    values = [stats[layer] for layer in layers]
    ranks = [sum(v < o for o in values) + (values.count(v) + 1) / 2 for v in values]
    return [explore * rate + (1 - explore) * p for p in _with_mean(ranks, rate)]


POLICIES: dict[str, Policy] = {
    "none": Policy(none),
    "uniform": Policy(uniform),
    "linear": Policy(linear),
    "exponential": Policy(exponential),
    "need": Policy(need),
    # DropBP (arXiv 2402.17812), of whole layers: there attention and MLP are drawn apart
    "dropbp": Policy(uniform, acts_on="backward"),
    # random-LTD (arXiv 2211.11586): another random set of tokens in each layer, in their order
    "random_ltd": Policy(uniform, acts_on="tokens"),
}


def _systematic_sample(probabilities: Sequence[float], generator: random.Random) -> set[int]:
    """Indices, each with exactly its probability, floor(sum) or ceil(sum) of them in all.

    Systematic sampling in random order (Madow 1949; Hartley & Rao 1962): lay the probabilities end
    to end and take those that the points u, u + 1, u + 2, ... fall on, u uniform in [0, 1).
    """
    point = generator.random()
    order = sorted(range(len(probabilities)), key=lambda _: generator.random())
    chosen, reached = set(), 0.0
    for i in order:
        reached += probabilities[i]
        if reached > point + len(chosen) + 1e-12:  # rounding must not add to a whole sum
            chosen.add(i)
    return chosen


def check_rate(num_layers: int, rate: float, protect_first: int, protect_last: int) -> None:
    """Raise ValueError for a rate or protection that `num_layers` layers can't have."""
    expect(0 <= rate < 1, "rate", rate, "a number in [0, 1)")
    for name, value in (("protect_first", protect_first), ("protect_last", protect_last)):
        expect(0 <= value <= num_layers, name, value, f"a number of layers in 0..{num_layers}")
    skippable = max(0, num_layers - protect_first - protect_last)
    if rate > 0:
        expect(
            skippable > 0,
            "protect_first + protect_last",
            protect_first + protect_last,
            f"fewer than the {num_layers} layers of the model (or rate=0)",
        )
        most = (num_layers - 1) / skippable
        accepted = f"at most {most:.3g}, so that one of {num_layers} layers always runs"
        expect(rate <= most + 1e-9, "rate", rate, accepted)


def skipped_layers(
    policy: str,
    *,
    num_layers: int,
    rate: float,
    seed: int,
    step: int,
    protect_first: int = 1,
    protect_last: int = 1,
    exact: bool = True,
    stats: Sequence[float] | None = None,
    explore: float = 0.1,
) -> frozenset[int]:
    """The layers (0 = first) left out at `step`, or otherwise altered (`Policy.acts_on`).

    `rate` is the mean share of the layers between the first `protect_first` and the last
    `protect_last` that is left out. `exact`: every step leaves out the same number, or the two
    nearest whole numbers in turn so that the mean holds; else each layer is drawn on its own. A
    policy that acts on tokens alters every layer that is not protected while the rate is above 0.
    `stats`: block influence per layer, [num_layers], for policy `need`. At least one layer always
    runs. Raises ValueError for an unknown policy, or a rate that leaves no layer.
    """
    expect(policy in POLICIES, "policy", policy, f"one of {', '.join(POLICIES)}")
    expect(0 <= explore <= 1, "explore", explore, "a number in [0, 1]")
    check_rate(num_layers, rate, protect_first, protect_last)
    stats = [math.inf] * num_layers if stats is None else stats
    expect(len(stats) == num_layers, "len(stats)", len(stats), f"num_layers = {num_layers}")
    layers = range(protect_first, num_layers - protect_last)
    if POLICIES[policy].acts_on == "tokens":
        return frozenset(layers if rate else ())
    probabilities = POLICIES[policy].probabilities(layers, rate, stats, explore)
    generator = keyed_generator(seed, step, "layers")
    if exact:
        chosen = _systematic_sample(probabilities, generator)
    else:
        chosen = {i for i, p in enumerate(probabilities) if generator.random() < p}
    if len(chosen) == num_layers:
        chosen.remove(min(chosen, key=lambda i: probabilities[i]))
    return frozenset(layers[i] for i in chosen)


def rate_at(fraction: float, rate: float, schedule: str, anneal: float = 0.0) -> float:
    """The skip rate at a fraction of the stage: from 0 up to `rate` by the schedule, or `rate`
    throughout (constant); 0 in the last `anneal` share."""
    expect(0 <= rate < 1, "rate", rate, "a number in [0, 1)")
    strength = ramp(fraction, schedule, constant=1.0)
    return 0.0 if annealing(fraction, anneal) else rate * strength
