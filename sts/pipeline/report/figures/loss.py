"""Training loss of every stage."""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from sts.pipeline.report.figures._shared import Labels, draw_stage, histories, legend_below

INPUTS = ("runs",)


def draw(results: Path, labels: Labels) -> Figure:
    """Smoothed training loss of each stage; a method is drawn in the stages that it has."""
    by_stage = histories(results, labels)
    page, grid = plt.subplots(1, len(by_stage), figsize=(3.6 * len(by_stage), 3.2), squeeze=False)
    for axes, (stage, runs) in zip(grid[0], by_stage.items(), strict=True):
        draw_stage(axes, stage, runs, "loss", labels, has_band=True)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    grid[0][0].set_ylabel("training loss")
    legend_below(page, grid[0])
    return page
