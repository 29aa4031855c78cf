"""Figures from result files, as SVG and PNG.

    python -m sts figure --name pareto --results results/mini --ablations dense vtc lds sts \
        --out-stem results/mini/figures/pareto

pareto   score against training time, one point a method
loss     training loss of every stage
layers   decoder layers run over training, and which layers one run skipped
tokens   the visual tokens that each compressor keeps, over a sample image

A new figure is a function and its entry in FIGURES. The same results give the same SVG, byte by
byte.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a server

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from sts.pipeline.report import tables

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
BINS = 40  # columns of the heat map
ASKED = (0.1, 0.3, 0.5, 0.7, 0.9)  # chances whose lines are drawn over it

Labels = Mapping[str, str]


def figure(
    name: str,
    results: str | Path,
    ablations: Sequence[str],
    out_stem: str | Path,
    labels: Labels | None = None,
) -> None:
    """Draw figure `name` of FIGURES and write `out_stem`.svg and .png.

    `labels` gives the methods' names, by default their ids. Raises KeyError for an unknown figure,
    FileNotFoundError naming the result that is missing.
    """
    if name not in FIGURES:
        raise KeyError(f"figure {name!r}: expected one of {', '.join(FIGURES)}")
    results, stem = Path(results), Path(out_stem)
    names = {id: (labels or {}).get(id, id) for id in ablations}
    stem.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        drawn = FIGURES[name](results, names)
        drawn.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        drawn.savefig(stem.with_suffix(".png"), metadata={"Software": None})
        plt.close(drawn)


def pareto(results: Path, names: Labels) -> Figure:
    """Mean score over benchmarks against time relative to the first method. Where no score is a
    share, and so none has a mean: what is kept of the first method's scores (the retention)."""
    ids, base = list(names), next(iter(names.values()))
    rows = tables.compare(tables.scores(results, ids), results, dict.fromkeys(ids, ids[0]), "main")
    shares = any(row["average"] != tables.UNDEFINED for row in rows.values())
    what = "mean score over benchmarks" if shares else f"mean of score / score of {base}"
    drawn, axes = plt.subplots(figsize=(5.6, 3.6))
    for id, style in _styles(names):
        score, time = rows[id]["average" if shares else "retention"], rows[id]["time_ratio"]
        if tables.MISSING in (score, time):
            gone = "eval.json" if score == tables.MISSING else "time in bench/main.json"
            raise FileNotFoundError(f"{results}: {id} has no complete {gone}; run snakemake first")
        mean, error = _point(score)
        style = {key: style[key] for key in ("color", "marker", "label")}
        if math.isnan(mean):  # named, although there is no point to draw
            style["label"] += f" ({tables.UNDEFINED}: a score of {base} is 0)"
        axes.errorbar(time, mean, error, ls="", ms=7, capsize=3, **style)
    axes.set(xlabel=f"training time / training time of {base}", ylabel=f"{what} (%)")
    axes.axvline(1, color="0.6", lw=0.8, zorder=0)
    axes.margins(0.15)
    drawn.legend(loc="outside lower center", ncols=2)
    return drawn


def _point(score: dict[str, Any] | str) -> tuple[float, float | None]:
    """(mean, half of the bar) in percent: of an average, whose bar is an sd, or of a retention,
    whose bar is its interval. nan for what is not defined, no bar for a single seed."""
    if isinstance(score, str):
        return math.nan, None
    end = score["sd"] if "sd" in score else score["low"]
    if isinstance(end, str):
        return 100 * score["mean"], None
    return 100 * score["mean"], 100 * (end if "sd" in score else score["mean"] - end)


def loss(results: Path, names: Labels) -> Figure:
    """Smoothed training loss of each stage, mean over seeds; the band is their standard
    deviation. A method is drawn in the stages that it has."""
    stages = {id: tables.stages(results, id) for id in names}
    every = list(dict.fromkeys(stage for own in stages.values() for stage in own))
    drawn, shown = plt.subplots(1, len(every), figsize=(3.6 * len(every), 3.2), squeeze=False)
    for axes, stage in zip(shown[0], every, strict=True):
        for id, style in _styles(names):
            if stage in stages[id]:
                _curve(axes, _histories(results, id, stage), "loss", style, band=True)
        axes.set(title=_title(stage), xlabel="optimizer step", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    shown[0, 0].set_ylabel("training loss")
    _legend_below(drawn, shown[0])
    return drawn


def layers(results: Path, names: Labels) -> Figure:
    """A row for each stage in which layers were skipped: layers run, mean over seeds; and of one
    method, layer by layer, the share that was skipped with the chances that its formula asked for
    as lines over it."""
    every: dict[str, dict[str, list]] = {}  # stage -> method -> the histories of its seeds
    for id in names:
        for stage in tables.stages(results, id):
            every.setdefault(stage, {})[id] = _histories(results, id, stage)
    skipping = {
        stage: next(id for id in reversed(runs) if _skips(runs[id]))
        for stage, runs in every.items()
        if any(map(_skips, runs.values()))
    }
    if not skipping:
        raise ValueError(f"{results}: none of {', '.join(names)} skips layers")
    size = (7.2, 3.2 * len(skipping))
    drawn, shown = plt.subplots(
        len(skipping), 2, figsize=size, width_ratios=[1, 1.15], squeeze=False
    )
    for (axes, heat), (stage, id) in zip(shown, skipping.items(), strict=True):
        for each, style in _styles(names):
            if each in every[stage]:
                _curve(axes, every[stage][each], "layers_run", style)
        _heat(drawn, heat, every[stage][id])
        axes.set(title=_title(stage), xlabel="optimizer step", ylabel="decoder layers run")
        axes.set_ylim(0, None)
    _legend_below(drawn, shown[:, 0])
    return drawn


def tokens(results: Path, names: Labels) -> Figure:
    """Each compressor's tokens over a picture (tokens.json, see kept_tokens.py).

    Averaging kinds show the area of each output, selecting kinds the patches that are left.
    """
    file = results / "tokens.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such result; run snakemake first")
    found = json.loads(file.read_text(encoding="utf-8"))
    with Image.open(io.BytesIO(base64.b64decode(found["picture"]))) as picture:
        seen = np.asarray(picture) / 255
    kinds, grid = found["kinds"], found["grid"]
    drawn, every = plt.subplots(1, len(kinds), figsize=(1.8 * len(kinds), 2.2))
    for axes, (kind, outputs) in zip(np.atleast_1d(every), kinds.items(), strict=True):
        held = np.zeros((len(outputs), grid[0] * grid[1]))
        for row, output in zip(held, outputs, strict=True):
            for token, weight in output:
                row[token] = weight
        _draw_tokens(axes, seen, held.reshape(-1, *grid))
        axes.set_title(f"{kind}: {len(outputs)} tokens")
        axes.set_axis_off()
    return drawn


FIGURES: dict[str, Callable[[Path, Labels], Figure]] = {
    "pareto": pareto,
    "loss": loss,
    "layers": layers,
    "tokens": tokens,
}


def _styles(names: Labels) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, colour, marker, line, label) of each method, the same in every figure."""
    for i, (id, label) in enumerate(names.items()):
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        # curves that fall together stay visible
        yield id, look | {"ls": DASHES[i % len(DASHES)], "label": label}


def _histories(results: Path, id: str, stage: str) -> list[list[dict[str, Any]]]:
    """The histories of an ablation's seeds: one row an optimizer step."""
    runs = results / "runs" / id
    manifests = sorted(runs.glob(f"seed*/{stage}.json"))
    if not manifests:
        raise FileNotFoundError(f"{runs}/seed*/{stage}.json: no such run; run snakemake first")
    return [_history(results, manifest) for manifest in manifests]


def _history(results: Path, manifest: Path) -> list[dict[str, Any]]:
    weights = Path(json.loads(manifest.read_text(encoding="utf-8"))["weights"]).name
    file = results / "weights" / weights / "history.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"{file}: missing although {manifest} names it; train it again")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _skips(runs: list[list[dict[str, Any]]]) -> bool:
    return any(any(row["skipped"]) for row in runs[0])


def _by_layer(runs: list[list[dict]], key: str, steps: int) -> np.ndarray:
    """[layers, bins]: `key` of each layer, mean over runs and over the steps of a bin."""
    values = np.mean([[row[key] for row in run[:steps]] for run in runs], axis=0).T
    bins = np.array_split(values, min(BINS, steps), axis=1)
    return np.stack([part.mean(axis=1) for part in bins], axis=1)


def _curve(axes: Axes, runs: list[list[dict]], key: str, style: dict, band: bool = False) -> None:
    """Moving average of `key` over the steps, mean over runs, with a band of one sd if asked."""
    steps = min(len(run) for run in runs)
    window = max(1, round(SMOOTH * steps))
    curves = np.stack(
        [
            np.convolve([row[key] for row in run[:steps]], np.full(window, 1 / window), "valid")
            for run in runs
        ]
    )
    middle = np.arange(curves.shape[1]) + (window + 1) / 2  # of the window, steps from 1
    mean = curves.mean(axis=0)
    line = {name: style[name] for name in ("color", "ls", "label")}
    axes.plot(middle, mean, lw=1.3, **line)
    if band and len(runs) > 1:
        sd = curves.std(axis=0, ddof=1)
        axes.fill_between(middle, mean - sd, mean + sd, color=style["color"], alpha=0.15, lw=0)


def _heat(drawn: Figure, heat: Axes, runs: list[list[dict]]) -> None:
    """The share that was skipped of each layer, in colours, and the chances asked for, as lines."""
    steps = min(len(run) for run in runs)
    skipped, asked = (_by_layer(runs, key, steps) for key in ("skipped", "asked"))
    image = heat.imshow(
        skipped, aspect="auto", origin="lower", cmap="cividis", vmin=0, vmax=1,
        interpolation="nearest", extent=(0, steps, -0.5, len(skipped) - 0.5),
    )  # fmt: skip
    middles = (np.arange(asked.shape[1]) + 0.5) * steps / asked.shape[1]
    levels = [level for level in ASKED if asked.min() < level < asked.max()]
    if levels and min(asked.shape) > 1:  # else there is no line to draw
        lines = heat.contour(
            middles, np.arange(len(asked)), asked, levels=levels, colors="w", linewidths=0.9
        )
        heat.clabel(lines, fmt="%.1f", fontsize=7)
    heat.grid(False)
    heat.set(title="Layers skipped (lines: the chance asked for)")
    heat.set(xlabel="optimizer step", ylabel="decoder layer")
    heat.set_yticks(range(0, len(skipped), max(1, len(skipped) // 8)))
    drawn.colorbar(image, ax=heat, label="share skipped, mean over seeds")


def _title(stage: str) -> str:
    return stage.replace("_", " ").capitalize()


def _legend_below(drawn: Figure, every: np.ndarray) -> None:
    """One legend for axes that show some of the same methods."""
    found: dict[str, Any] = {}
    for axes in every:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    drawn.legend(found.values(), found.keys(), loc="outside lower center", ncols=2)


def _draw_tokens(axes: Axes, seen: np.ndarray, weights: np.ndarray) -> None:
    """A picture [height, width, 3] with a line around the area of each token.

    weights [outputs, rows, columns]: how much of each patch is in an output. A patch in no output
    is faded.
    """
    rows, columns = weights.shape[1:]
    owner = np.where(weights.any(axis=0), weights.argmax(axis=0), -1)  # [rows, columns]
    tall, wide = seen.shape[0] // rows, seen.shape[1] // columns
    kept = np.kron(owner >= 0, np.ones((tall, wide)))[..., None]
    axes.imshow(np.where(kept, seen, 0.15 * seen + 0.85), interpolation="nearest")
    framed = np.pad(owner, 1, constant_values=-1)
    lines = []
    for row, column in np.ndindex(rows + 1, columns + 1):
        x, y = column * wide - 0.5, row * tall - 0.5
        above, left = framed[row, column + 1], framed[row + 1, column]
        here = framed[row + 1, column + 1]
        if column < columns and here != above:
            lines.append([(x, y), (x + wide, y)])
        if row < rows and here != left:
            lines.append([(x, y), (x, y + tall)])
    axes.add_collection(LineCollection(lines, colors=COLOURS[3], linewidths=0.9))
