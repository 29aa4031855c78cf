"""Steps of several variants, timed in turn on one machine, so that whatever else it does falls on
all alike. What counts is the ratio."""

from collections.abc import Callable, Sequence
from itertools import count
from statistics import fmean
from typing import Any

import torch

from sts.pipeline.config import StageConfig
from sts.pipeline.run import provenance
from sts.pipeline.run.progress import bar_of
from sts.pipeline.train.step import may_lack_gradients
from sts.scheme import Scheme


def in_turn(
    title: str,
    variants: Sequence[str],
    points: int,
    warmup: int,
    repeats: int,
    take: Callable[[str, int, int], Any],
) -> dict[str, list[list[tuple[int, Any]]]]:
    """Take a step of each variant in turn (A B C D, B C D A, ...), at one point after the other.

    Args:
        title: Of the bar of progress.
        variants: Their names.
        points: Places of a stage that are timed.
        warmup: Rounds at each point that don't count.
        repeats: Rounds that do.
        take: Takes the step of (variant, point, round); rounds that don't count are below 0.

    Returns:
        Variant -> of each point what `take` returned in each round that counts, after its place
        among all steps that count.
    """
    taken: dict[str, list] = {variant: [[] for _ in range(points)] for variant in variants}
    place = count()
    with bar_of(title, 0, points * (warmup + repeats) * len(variants)) as bar:
        for point in range(points):
            for repeat in range(-warmup, repeats):
                first = (point + repeat) % len(variants)
                for variant in (*variants[first:], *variants[:first]):
                    result = take(variant, point, repeat)
                    if repeat >= 0:
                        taken[variant][point].append((next(place), result))
                    bar.update()
    return taken


def what_is_held(block: StageConfig) -> tuple:
    """What the model and the optimizer of a stage that is timed depend on, beside the name of the
    stage and what it starts from: stages alike in it share them."""
    rank = block.lora.rank if "lora" in block.trains else 0
    parts = (*sorted(block.trains), rank, block.precision, block.weights, block.processes)
    is_copied = block.parallel == "ddp" and block.processes > 1
    return (*parts, block.parallel, is_copied and may_lack_gradients(block))


def typical_steps(scheme: Scheme, steps: int, points: int) -> list[int]:
    """A step in each of `points` equal parts of a stage, such that together they leave out as much
    as the whole stage does: with layers drawn on their own, the steps in the middle need not.

    In each part the step whose left-out layers are nearest the part's mean; what it is off by is
    made good in the parts that follow.
    """
    skipper = scheme.skipper

    def left_out(step: int) -> float:
        scheme.decide(step)
        decision, unit = skipper.decision, skipper.unit
        drawn = len(decision.off) / len(unit.shares)
        return drawn if unit.drawn_by_step else sum(decision.chances)

    chosen, owed = [], 0.0
    for point in range(points):
        first, end = point * steps // points, (point + 1) * steps // points
        part = range(first, max(first + 1, end))
        middle = min((first + part[-1] + 1) // 2, steps - 1)
        layers = {step: left_out(step) for step in part}
        goal = fmean(layers.values()) + owed
        best = min(part, key=lambda step: (abs(layers[step] - goal), abs(step - middle)))
        owed = goal - layers[best]
        chosen.append(best)
    return chosen


def measured_on() -> dict[str, Any]:
    """Where and by what it was measured."""
    facts = provenance.hardware()
    cpu = f"{facts['cores']} x {facts['cpu']}"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,  # of many one
        "threads": torch.get_num_threads(),
        "command": provenance.command_line(),
        "commit": provenance.git()["commit"],
    }
