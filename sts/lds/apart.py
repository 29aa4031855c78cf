"""Spacing: whole layers, any of them, but never two neighbours in one step. Ours."""

import random
from collections.abc import Sequence

from sts.lds import Policy, Unit
from sts.lds.parts import DRAWS


def apart(chances: Sequence[float], generator: random.Random) -> set[int]:
    """Draw indices of which no two are neighbours, each with its own probability.

    From the first to the last: one that comes after a skipped one runs, another is skipped with
    p_l / (1 - p_(l-1)), so that p_l is met exactly where p_l + p_(l-1) is at most 1. Where it is
    more, there is no such draw, and layer l is skipped whenever the one before it runs.
    """
    chosen: set[int] = set()
    drawn = 0.0  # probability that the one before was skipped
    for index, chance in enumerate(chances):
        point = generator.random()
        reached = min(chance, 1 - drawn)
        if index - 1 not in chosen and point * (1 - drawn) < reached:
            chosen.add(index)
        drawn = reached
    return chosen


DRAWS["apart"] = apart
UNIT = Unit(("rows",), True, "sts.lds.units:skip_layer", draws=("apart",), rescales=True)
POLICY = Policy(schedule="falling_quadratic", draw="apart", unit="apart")
