"""S(t): how strong VTC and LDS are at t, the share of a stage that is done. No torch needed.

A new schedule is one entry in SCHEDULES.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


class Schedule(NamedTuple):
    """S(t) in [0, 1] for t in [0, 1], and the formula as text."""

    at: Callable[[float], float]
    text: str


def _stage(t: float) -> int:
    """Which of four equal parts t lies in, 0 .. 3: LLaVolta's stages (arXiv 2406.20092)."""
    return min(math.floor(4 * t), 3)


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(lambda t: 1.0, "1"),
    "rising_linear": Schedule(lambda t: t, "t"),
    "rising_cosine": Schedule(lambda t: (1 - math.cos(math.pi * t)) / 2, "(1 - cos(pi t)) / 2"),
    "rising_staged": Schedule(lambda t: _stage(t) / 3, "floor(4 t) / 3"),
    # PLD (arXiv 2010.13369): 1 - e^(-0.001 step), for a stage of 5,000 steps
    "rising_exponential": Schedule(lambda t: -math.expm1(-5 * t), "(1 - e^(-5 t))"),
    "falling_linear": Schedule(lambda t: 1 - t, "(1 - t)"),
    "falling_cosine": Schedule(lambda t: (1 + math.cos(math.pi * t)) / 2, "(1 + cos(pi t)) / 2"),
    "falling_staged": Schedule(lambda t: 1 - _stage(t) / 3, "(1 - floor(4 t) / 3)"),
    # the paper's: ((E - e) / E)^2
    "falling_quadratic": Schedule(lambda t: (1 - t) ** 2, "(1 - t)^2"),
}


def strength(t: float, schedule: str, dense_tail: float = 0.0) -> float:
    """S(t) in [0, 1]; 0 in the last `dense_tail` share of the stage."""
    if dense_tail > 0 and t >= 1 - dense_tail - 1e-9:  # 1 - 0.9 is a hair more than 0.1
        return 0.0
    return SCHEDULES[schedule].at(t)


def keep_at(t: float, keep: float, schedule: str, dense_tail: float = 0.0) -> float:
    """The share of the visual tokens that is kept at t, in (0, 1]: 1 - (1 - keep) S(t)."""
    return 1 - (1 - keep) * strength(t, schedule, dense_tail)


def share_done(
    step: int, total_steps: int | None, clock: str = "steps", steps_per_epoch: int | None = None
) -> float:
    """t, the share of a stage that is done.

    Args:
        step: Optimizer steps done.
        total_steps: Of the stage; None: not known, and t stays 0.
        clock: t moves with each step (`steps`) or with each epoch (`epochs`).
        steps_per_epoch: For the clock `epochs`.
    """
    if total_steps is None:
        return 0.0
    if clock == "epochs":
        step = step // steps_per_epoch * steps_per_epoch
    return step / total_steps
