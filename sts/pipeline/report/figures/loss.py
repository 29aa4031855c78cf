"""Training loss of every stage, and held-out loss of the last."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from sts.pipeline.report.figures._shared import (
    Labels,
    draw_stage,
    histories,
    styles,
    together,
)
from sts.pipeline.report.results import held_out

INPUTS = ("runs",)


def draw(results: Path, labels: Labels) -> Figure:
    """Smoothed training loss of each stage that a method has; where it was measured, the held-out
    loss of the last one: the mean over seeds, and each seed as a thin line. Methods that share a
    training have a curve together."""
    by_stage = histories(results, labels)
    measured = {id: runs for id in labels if (runs := held_out(results, id))}
    panels = len(by_stage) + bool(measured)
    page, grid = plt.subplots(1, panels, figsize=(3.6 * panels, 3.2), squeeze=False)
    for axes, (stage, runs) in zip(grid[0], by_stage.items(), strict=False):
        draw_stage(axes, stage, runs, "loss", together(results, stage, labels), has_band=True)
        axes.legend(loc="upper right", fontsize=7)
    if measured:
        _draw_held_out(grid[0][-1], measured, labels)
        grid[0][-1].legend(loc="upper right", fontsize=7)
    for axes in grid[0]:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    grid[0][0].set_ylabel("training loss")
    page.suptitle("Does a sparse training learn as fast? (lower is better)")
    return page


def _draw_held_out(axes: Axes, measured: dict, labels: Labels) -> None:
    for id, style in styles(labels, "ls"):
        curves = [([r["step"] for r in rows], [r["loss"] for r in rows])
                  for rows in measured.get(id, {}).values()]  # fmt: skip
        for steps, losses in curves:
            axes.plot(steps, losses, lw=0.5, alpha=0.4, color=style["color"])
        if curves and all(steps == curves[0][0] for steps, _ in curves):
            mean = np.mean([losses for _, losses in curves], axis=0)
            axes.plot(curves[0][0], mean, lw=1.3, **style)
    axes.set(title="Held-out questions", xlabel="optimizer step", ylabel="nats per answer token")
