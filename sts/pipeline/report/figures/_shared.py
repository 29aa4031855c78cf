"""What the figures share: their look, the histories of trainings, curves and a legend."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a server

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sts.pipeline.files import read_json

# Okabe and Ito's palette: told apart with any colour vision
COLOURS = ["#000000", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"]
MARKERS = "osD^vPX"
DASHES = ["-", "--", "-.", ":"]
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

Labels = Mapping[str, str]  # id of an ablation -> its name in the figure
History = list[dict[str, Any]]  # history.jsonl of a training: a row for each optimizer step


def styles(labels: Labels) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, colour, marker, line and label) of each method, the same in every figure."""
    for i, (id, label) in enumerate(labels.items()):
        yield (
            id,
            {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKERS[i % len(MARKERS)],
                "ls": DASHES[i % len(DASHES)],  # curves that fall together stay visible
                "label": label,
            },
        )


def histories(results: Path, id: str, stage: str) -> list[History]:
    """The training histories of an ablation's seeds in a stage.

    Raises:
        FileNotFoundError: There is no such run, or a history is gone.
    """
    runs = results / "runs" / id
    manifests = sorted(runs.glob(f"seed*/{stage}.json"))
    if not manifests:
        raise FileNotFoundError(f"{runs}/seed*/{stage}.json: no such run; run snakemake first")
    return [_history(results, manifest) for manifest in manifests]


def _history(results: Path, manifest: Path) -> History:
    weights = Path(read_json(manifest)["weights"]).name
    file = results / "weights" / weights / "history.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"{file}: missing although {manifest} names it; train it again")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def curve(
    axes: Axes, runs: Sequence[History], key: str, style: Mapping[str, Any], band: bool = False
) -> None:
    """Draw the moving average of `key` over the steps, mean over runs; `band`: of one sd."""
    steps = min(len(run) for run in runs)
    window = max(1, round(SMOOTH * steps))
    mask = np.full(window, 1 / window)
    curves = np.stack(
        [np.convolve([row[key] for row in run[:steps]], mask, "valid") for run in runs]
    )
    middle = np.arange(curves.shape[1]) + (window + 1) / 2  # of the window, steps from 1
    mean = curves.mean(axis=0)
    line = {name: style[name] for name in ("color", "ls", "label")}
    axes.plot(middle, mean, lw=1.3, **line)
    if band and len(runs) > 1:
        sd = curves.std(axis=0, ddof=1)
        axes.fill_between(middle, mean - sd, mean + sd, color=style["color"], alpha=0.15, lw=0)


def stage_title(stage: str) -> str:
    """The name of a stage as a title."""
    return stage.replace("_", " ").capitalize()


def legend_below(page: Figure, panels: Sequence[Axes]) -> None:
    """Draw one legend for panels that show some of the same methods."""
    handle_by_label: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handle_by_label.setdefault(label, handle)
    page.legend(handle_by_label.values(), handle_by_label, loc="outside lower center", ncols=2)
