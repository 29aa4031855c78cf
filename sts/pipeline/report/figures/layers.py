"""Decoder layers run over training, and which layers one method skipped."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sts.pipeline.report.figures._shared import (
    History,
    Labels,
    draw_stage,
    histories,
    legend_below,
)

INPUTS = ("runs",)
BINS = 40  # columns of the heat map
CHANCES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of a skip, whose lines are drawn over it


def draw(results: Path, labels: Labels) -> Figure:
    """A row for each stage in which layers were skipped.

    On the left the decoder layers run. On the right, layer by layer, the share that the last
    skipping method skipped, with lines for the chances that its formula asked for.
    """
    by_stage = histories(results, labels)
    skipping = {
        stage: [seeds for seeds in runs.values() if any(any(row["skipped"]) for row in seeds[0])]
        for stage, runs in by_stage.items()
    }
    stages = [stage for stage, runs in skipping.items() if runs]
    if not stages:
        raise ValueError(f"{results}: none of {', '.join(labels)} skips layers")
    size = (7.2, 3.2 * len(stages))
    page, panels = plt.subplots(len(stages), 2, figsize=size, width_ratios=[1, 1.15], squeeze=False)
    for (axes, heat), stage in zip(panels, stages, strict=True):
        draw_stage(axes, stage, by_stage[stage], "layers_run", labels)
        axes.set(ylabel="decoder layers run", ylim=(0, None))
        _draw_heat(page, heat, skipping[stage][-1])
    page.suptitle("Which decoder layers does LDS leave out?")
    legend_below(page, panels[:, 0])
    return page


def by_layer(runs: list[History], key: str, steps: int) -> np.ndarray:
    """[layers, bins]: `key` of each layer, mean over runs and over the steps of a bin."""
    values = np.mean([[row[key] for row in run[:steps]] for run in runs], axis=0).T
    bins = np.array_split(values, min(BINS, steps), axis=1)
    return np.stack([bin.mean(axis=1) for bin in bins], axis=1)


def _draw_heat(page: Figure, heat: Axes, runs: list[History]) -> None:
    """The share that was skipped of each layer, in colours, and the chances asked for, as lines."""
    steps = min(len(run) for run in runs)
    skipped, chances = (by_layer(runs, key, steps) for key in ("skipped", "asked"))
    image = heat.imshow(
        skipped, aspect="auto", origin="lower", cmap="cividis", vmin=0, vmax=1,
        interpolation="nearest", extent=(0, steps, -0.5, len(skipped) - 0.5),
    )  # fmt: skip
    middles = (np.arange(chances.shape[1]) + 0.5) * steps / chances.shape[1]
    levels = [level for level in CHANCES if chances.min() < level < chances.max()]
    if levels and min(chances.shape) > 1:  # else there is no line to draw
        lines = heat.contour(
            middles, np.arange(len(chances)), chances, levels=levels, colors="w", linewidths=0.9
        )
        heat.clabel(lines, fmt="%.1f", fontsize=7)
    heat.grid(False)
    heat.set(title="Layers skipped (lines: the chance asked for)")
    heat.set(xlabel="optimizer step", ylabel="decoder layer")
    heat.set_yticks(range(0, len(skipped), max(1, len(skipped) // 8)))
    page.colorbar(image, ax=heat, label="share skipped, mean over seeds")
