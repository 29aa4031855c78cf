"""Decoder layers run over training, and which layers one method skipped."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sts.pipeline.report.figures._shared import (
    History,
    Labels,
    curve,
    histories,
    legend_below,
    stage_title,
    styles,
)
from sts.pipeline.report.results import stages_of

INPUTS = ("runs",)
BINS = 40  # columns of the heat map
CHANCES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of a skip, whose lines are drawn over it


def draw(results: Path, labels: Labels) -> Figure:
    """A row for each stage in which layers were skipped.

    On the left the decoder layers run, mean over seeds. On the right, layer by layer, the share
    that the last skipping method skipped, with lines for the chances that its formula asked for.
    """
    runs_by_stage: dict[str, dict[str, list[History]]] = {}  # stage -> id -> seeds' histories
    for id in labels:
        for stage in stages_of(results, id):
            runs_by_stage.setdefault(stage, {})[id] = histories(results, id, stage)
    skipper_by_stage = {
        stage: next(id for id in reversed(runs) if _has_skips(runs[id]))
        for stage, runs in runs_by_stage.items()
        if any(map(_has_skips, runs.values()))
    }
    if not skipper_by_stage:
        raise ValueError(f"{results}: none of {', '.join(labels)} skips layers")
    rows = len(skipper_by_stage)
    page, panels = plt.subplots(
        rows, 2, figsize=(7.2, 3.2 * rows), width_ratios=[1, 1.15], squeeze=False
    )
    for (axes, heat), (stage, skipper) in zip(panels, skipper_by_stage.items(), strict=True):
        for id, style in styles(labels):
            if id in runs_by_stage[stage]:
                curve(axes, runs_by_stage[stage][id], "layers_run", style)
        _draw_heat(page, heat, runs_by_stage[stage][skipper])
        axes.set(title=stage_title(stage), xlabel="optimizer step", ylabel="decoder layers run")
        axes.set_ylim(0, None)
    legend_below(page, panels[:, 0])
    return page


def _has_skips(runs: list[History]) -> bool:
    return any(any(row["skipped"]) for row in runs[0])


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
