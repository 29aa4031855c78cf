"""Training loss of every stage."""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from sts.pipeline.report.figures._shared import (
    Labels,
    curve,
    histories,
    legend_below,
    stage_title,
    styles,
)
from sts.pipeline.report.results import stages_of

INPUTS = ("runs",)


def draw(results: Path, labels: Labels) -> Figure:
    """Smoothed training loss of each stage, mean over seeds; the band is their standard
    deviation. A method is drawn in the stages that it has."""
    stages_by_id = {id: stages_of(results, id) for id in labels}
    stages = list(dict.fromkeys(stage for names in stages_by_id.values() for stage in names))
    page, grid = plt.subplots(1, len(stages), figsize=(3.6 * len(stages), 3.2), squeeze=False)
    panels = grid[0]
    for axes, stage in zip(panels, stages, strict=True):
        for id, style in styles(labels):
            if stage in stages_by_id[id]:
                curve(axes, histories(results, id, stage), "loss", style, band=True)
        axes.set(title=stage_title(stage), xlabel="optimizer step", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    panels[0].set_ylabel("training loss")
    legend_below(page, panels)
    return page
