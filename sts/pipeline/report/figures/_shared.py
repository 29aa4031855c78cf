"""What the figures share: their look, the histories of trainings, curves and a legend."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a server

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sts.pipeline.files import read_json
from sts.pipeline.report.labels import Labels
from sts.pipeline.report.results import stages_of
from sts.pipeline.run.weights import read_history

# Okabe and Ito's palette: told apart with any colour vision
COLOURS = ["#000000", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"]
MARKERS = "osD^vPX"
DASHES = ["-", "--", "-.", ":"]  # curves that fall together stay visible
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "sts",  # else the ids in the file are random
}
SMOOTH = 0.05  # share of a stage that one plotted point averages

History = list[dict[str, Any]]  # history.jsonl of a training: a row for each optimizer step


def styles(labels: Labels, *marks: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, its colour, label and `marks`: marker, ls) of each method, the same in every figure."""
    for i, (id, label) in enumerate(labels.items()):
        style = {"marker": MARKERS[i % len(MARKERS)], "ls": DASHES[i % len(DASHES)]}
        chosen = {mark: style[mark] for mark in marks}
        yield id, {"color": COLOURS[i % len(COLOURS)], "label": label, **chosen}


def histories(results: Path, labels: Labels) -> dict[str, dict[str, list[History]]]:
    """Stage -> ablation that has it -> the training histories of its seeds.

    Raises:
        FileNotFoundError: There is no such run, or a history is gone.
    """
    by_stage: dict[str, dict[str, list[History]]] = {}
    for id in labels:
        for stage in stages_of(results, id):
            runs = results / "runs" / id
            manifests = sorted(runs.glob(f"seed*/{stage}.json"))
            if not manifests:
                message = "no such run; run snakemake first"
                raise FileNotFoundError(f"{runs}/seed*/{stage}.json: {message}")
            by_stage.setdefault(stage, {})[id] = [_history(results, file) for file in manifests]
    return by_stage


def _history(results: Path, manifest: Path) -> History:
    weights = Path(read_json(manifest)["weights"]).name
    return read_history(results / "weights" / weights)


def draw_stage(
    axes: Axes,
    stage: str,
    runs: Mapping[str, list[History]],
    key: str,
    labels: Labels,
    has_band: bool = False,
) -> None:
    """Draw the moving average of `key` over the steps of a stage: of each method that has it the
    mean over seeds, and as a band their standard deviation."""
    for id, style in styles(labels, "ls"):
        if id not in runs or labels[id] is None:
            continue
        steps = min(len(run) for run in runs[id])
        window = max(1, round(SMOOTH * steps))
        mask = np.full(window, 1 / window)
        curves = [np.convolve([row[key] for row in run[:steps]], mask, "valid") for run in runs[id]]
        mean = np.mean(curves, axis=0)
        middle = np.arange(len(mean)) + (window + 1) / 2  # of the window, steps from 1
        axes.plot(middle, mean, lw=1.3, **style)
        if has_band and len(curves) > 1:
            sd = np.std(curves, axis=0, ddof=1)
            axes.fill_between(middle, mean - sd, mean + sd, color=style["color"], alpha=0.15, lw=0)
    axes.set(title=stage.replace("_", " ").capitalize(), xlabel="optimizer step")


def together(results: Path, stage: str, labels: Labels) -> dict[str, str | None]:
    """The labels of methods, of those that share the trainings of a stage joined by =: None for all
    but the first."""
    runs: dict[tuple[str, ...], list[str]] = {}
    for id in labels:
        files = sorted((results / "runs" / id).glob(f"seed*/{stage}.json"))
        if weights := tuple(read_json(file)["weights"] for file in files):
            runs.setdefault(weights, []).append(id)
    joined = {ids[0]: " = ".join(labels[id] for id in ids) for ids in runs.values()}
    return {id: joined.get(id) for id in labels}


def legend_below(page: Figure, panels: Sequence[Axes]) -> None:
    """Draw one legend for panels that show some of the same methods."""
    handle_by_label: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handle_by_label.setdefault(label, handle)
    page.legend(handle_by_label.values(), handle_by_label, loc="outside lower center", ncols=2)
