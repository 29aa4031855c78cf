"""Schedules over the fraction of a stage that VTC and LDS share."""

import math

SCHEDULES = ("constant", "linear", "cosine", "staged", "exponential")


def expect(ok: bool, name: str, value: object, accepted: str) -> None:
    """Raise a ValueError that names the argument, its value and what is accepted."""
    if not ok:
        raise ValueError(f"{name}={value!r}: expected {accepted}")


def ramp(fraction: float, schedule: str, constant: float) -> float:
    """Strength in [0, 1] at a fraction of the stage: rises from 0 at the start to 1 at the end.

    `staged` takes four equal steps (0, 1/3, 2/3, 1), as LLaVolta's four stages (arXiv 2406.20092),
    in fractions of the stage and not in step numbers. `exponential` is 1 - e^(-5 fraction), the
    rise of PLD (arXiv 2010.13369: 1 - e^(-0.001 step)) for a stage of 5,000 steps. A `constant`
    schedule is at `constant`.
    """
    expect(0 <= fraction <= 1, "fraction", fraction, "a number in [0, 1]")
    expect(schedule in SCHEDULES, "schedule", schedule, f"one of {', '.join(SCHEDULES)}")
    return {
        "constant": constant,
        "linear": fraction,
        "cosine": (1 - math.cos(math.pi * fraction)) / 2,
        "staged": min(math.floor(4 * fraction), 3) / 3,
        "exponential": -math.expm1(-5 * fraction),
    }[schedule]


def annealing(fraction: float, anneal: float) -> bool:
    """Whether `fraction` lies in the last `anneal` share of the stage, where nothing is sparse."""
    expect(0 <= anneal <= 1, "anneal", anneal, "a number in [0, 1]")
    return anneal > 0 and fraction >= 1 - anneal - 1e-9  # 1 - 0.9 is a hair more than 0.1
