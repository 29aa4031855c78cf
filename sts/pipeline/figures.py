"""Figures from result files, as SVG and PNG.

    python -m sts figure --name pareto --results results/mini --ablations dense vtc lds sts \
        --out-stem results/mini/figures/pareto

pareto   accuracy against training time, one point a method
loss     training loss of both stages
layers   decoder layers run over training, and which layers one run skipped
tokens   the visual tokens that each compressor keeps, over a sample image

A new figure is a function and its entry in FIGURES. The same results give the same SVG, byte by
byte.
"""

import json
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

from sts.pipeline import tables

STAGES = {"align": "Align", "instruct": "Instruct"}
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
KEEP = 0.25  # share of the visual tokens in `tokens`
BINS = 40  # columns of the heat map
ASKED = (0.1, 0.3, 0.5, 0.7, 0.9)  # chances whose lines are drawn over it

Labels = Mapping[str, str]


def figure(
    name: str,
    results: str | Path,
    ablations: Sequence[str],
    out_stem: str | Path,
    labels: Labels | None = None,
    data: str | Path | None = None,
) -> None:
    """Draw figure `name` of FIGURES and write `out_stem`.svg and .png.

    `labels` gives the methods' names, by default their ids. `data` is the manifest of a prepared
    data set whose first picture `tokens` shows, by default that of `scenes` at the same scale.
    Raises KeyError for an unknown figure, FileNotFoundError naming the result that is missing.
    """
    if name not in FIGURES:
        raise KeyError(f"figure {name!r}: expected one of {', '.join(FIGURES)}")
    results, stem = Path(results), Path(out_stem)
    names = {id: (labels or {}).get(id, id) for id in ablations}
    data = Path(data or Path("data", results.name, "scenes", "manifest.json"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        drawn = FIGURES[name](results, names, data)
        drawn.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        drawn.savefig(stem.with_suffix(".png"), metadata={"Software": None})
        plt.close(drawn)


def pareto(results: Path, names: Labels, data: Path) -> Figure:
    """Mean score over benchmarks against time relative to the first method."""
    ids = list(names)
    rows = tables.compare(tables.scores(results, ids), results, ids, "main")
    drawn, axes = plt.subplots(figsize=(5.6, 3.6))
    for id, style in _styles(names):
        average, time = rows[id]["average"], rows[id]["time_ratio"]
        if tables.MISSING in (average, time):
            what = "eval.json" if average == tables.MISSING else "time in bench/main.json"
            raise FileNotFoundError(f"{results}: {id} has no complete {what}; run snakemake first")
        sd = average["sd"]
        error = None if sd == tables.UNDEFINED else 100 * sd
        style = {key: style[key] for key in ("color", "marker", "label")}
        axes.errorbar(time, 100 * average["mean"], error, ls="", ms=7, capsize=3, **style)
    axes.set(
        xlabel=f"training time / training time of {names[ids[0]]}",
        ylabel="mean score over benchmarks (%)",
    )
    axes.axvline(1, color="0.6", lw=0.8, zorder=0)
    axes.margins(0.15)
    drawn.legend(loc="outside lower center", ncols=2)
    return drawn


def loss(results: Path, names: Labels, data: Path) -> Figure:
    """Smoothed training loss, mean over seeds; the band is their standard deviation."""
    drawn, every = plt.subplots(1, len(STAGES), figsize=(7.2, 3.2))
    for axes, (stage, title) in zip(every, STAGES.items(), strict=True):
        for id, style in _styles(names):
            _curve(axes, _histories(results, id, stage), "loss", style, band=True)
        axes.set(title=title, xlabel="optimizer step", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    every[0].set_ylabel("training loss")
    _legend_below(drawn, every[0])
    return drawn


def layers(results: Path, names: Labels, data: Path) -> Figure:
    """Layers run, mean over seeds; and of one method, layer by layer, the share that was skipped
    with the chances that its formula asked for as lines over it."""
    drawn, (axes, heat) = plt.subplots(1, 2, figsize=(7.2, 3.2), width_ratios=[1, 1.15])
    shown = None
    for id, style in _styles(names):
        runs = _histories(results, id, "instruct")
        _curve(axes, runs, "layers_run", style)
        if any(any(row["skipped"]) for row in runs[0]):
            shown = (id, runs)
    if shown is None:
        raise ValueError(f"{results}: none of {', '.join(names)} skips layers in instruct")
    id, runs = shown
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
    axes.set(title="Instruct", xlabel="optimizer step", ylabel="decoder layers run")
    axes.set_ylim(0, None)
    _legend_below(drawn, axes)
    return drawn


def tokens(results: Path, names: Labels, data: Path) -> Figure:
    """Each compressor's tokens over the first picture of `data`, at a quarter of the tokens.

    Averaging kinds show the area of each output, selecting kinds the patches that are left. Scores
    and similarities are those of the frozen vision tower's class token and features. Kinds that
    look at text are left out: it is compared with projected tokens, of which there are none here;
    so are those with weights, which nothing has trained.
    """
    import torch  # the other figures do without

    from sts.vtc import KINDS, compress, kind_of, wants

    picture = _picture(data)
    seen, grid, features, scores = _look(results, picture)
    drawable = [kind for kind in KINDS if "text" not in wants(kind)]
    kinds = [kind for kind in drawable if kind != "none" and not isinstance(kind_of(kind), type)]
    drawn, every = plt.subplots(1, 1 + len(kinds), figsize=(1.8 * (1 + len(kinds)), 2.2))
    for axes, kind in zip(every, ["none", *kinds], strict=True):
        generator = torch.Generator().manual_seed(0)
        keep = 1.0 if kind == "none" else KEEP
        _, outputs = compress(kind, features, keep, grid, scores=scores, generator=generator)
        # [1, outputs, tokens, 1, channels]: of which tokens an output is made
        whole = lambda x, apply=outputs.apply: apply(x).sum(2)  # noqa: E731
        holds = torch.autograd.functional.jacobian(whole, features[..., :8])
        holds = holds[0, :, 0].abs().sum(-1)
        _draw_tokens(axes, seen, holds.numpy().reshape(-1, *grid))
        axes.set_title(f"{kind}: {len(holds)} tokens")
        axes.set_axis_off()
    return drawn


FIGURES: dict[str, Callable[[Path, Labels, Path], Figure]] = {
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


def _legend_below(drawn: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2)


def _picture(data: Path) -> Image.Image:
    """The first picture of the first training split of a data manifest."""
    from datasets import load_dataset

    if not data.exists():
        raise FileNotFoundError(f"{data}: no prepared data set to take a picture from")
    splits = json.loads(data.read_text(encoding="utf-8"))["splits"]
    split = next((name for name in ("align", "instruct") if name in splits), next(iter(splits)))
    file = data.parent / splits[split]["file"]
    rows = load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    return next(row["image"] for row in rows if row["image"] is not None)


def _look(results: Path, picture: Image.Image) -> tuple[np.ndarray, tuple[int, int], Any, Any]:
    """What the vision tower makes of a picture: (what it sees [height, width, 3] in 0..1, its grid
    of patches, their features [1, patches, dim], attention that its class token pays each patch [1,
    patches])."""
    import torch
    from transformers import CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    file = results / "backbone" / "manifest.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no backbone yet; run snakemake first")
    parts = json.loads(file.read_text(encoding="utf-8"))
    prepare = CLIPImageProcessorPil.from_pretrained(parts["processor"] or parts["vision"])
    tower = CLIPVisionModel.from_pretrained(parts["vision"], attn_implementation="eager").eval()
    pixels = prepare(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    attentions = out.attentions
    feature = parts.get("vision_feature_layer", -2) % (len(attentions) + 1)
    scores = attentions[max(feature - 1, 0)].mean(1)[:, 0, 1:]  # hidden state i is of layer i - 1
    side = tower.config.image_size // tower.config.patch_size
    seen = pixels[0].permute(1, 2, 0).numpy() * prepare.image_std + prepare.image_mean
    return seen.clip(0, 1), (side, side), out.hidden_states[feature][:, 1:], scores


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
