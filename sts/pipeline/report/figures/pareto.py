"""Score against training time, a point for each method."""

import math
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sts.pipeline.report.compare import Row, compare
from sts.pipeline.report.figures._shared import Labels, styles
from sts.pipeline.report.results import MISSING, UNDEFINED, scores

INPUTS = ("eval", "bench")


def draw(results: Path, labels: Labels) -> Figure:
    """Mean score over benchmarks against the training time relative to the first method.

    Where no score is a share, scores have no mean: then the retention, which is the mean of score /
    score of the first method.
    """
    ids, base = list(labels), next(iter(labels.values()))
    frame = scores(results, ids)
    rows = compare(frame, results, dict.fromkeys(ids, ids[0]), "main")
    has_average = any(row["average"] != UNDEFINED for row in rows.values())
    key = "average" if has_average else "retention"
    quantity = "mean score over benchmarks" if has_average else f"mean of score / score of {base}"
    page, axes = plt.subplots(figsize=(5.6, 3.6))
    for id, style in styles(labels, "marker"):
        score, time = rows[id][key], rows[id]["time_ratio"]
        if MISSING in (score, time):
            missing = "eval.json" if score == MISSING else "time in bench/main.json"
            raise FileNotFoundError(
                f"{results}: {id} has no complete {missing}; run snakemake first"
            )
        mean, error = _point(rows[id], key)
        if math.isnan(mean):  # named, although there is no point to draw
            style["label"] += f" ({UNDEFINED}: a score of {base} is 0)"
        axes.errorbar(time, mean, error, ls="", ms=7, capsize=3, **style)
        name, colour = labels[id].partition(" (")[0], style["color"]
        axes.annotate(name, (time, mean), (6, 4), textcoords="offset points", color=colour)
    axes.set(title="Does less training time cost score?")
    axes.set(xlabel=f"training time / training time of {base}", ylabel=f"{quantity} (%)")
    axes.axvline(1, color="0.6", lw=0.8, zorder=0)
    axes.margins(0.15)
    axes.annotate(
        "better", (0.02, 0.98), (0.12, 0.88), "axes fraction", arrowprops={"arrowstyle": "->"}
    )
    chance = frame["chance"].mean(skipna=False)
    if has_average and not math.isnan(chance):
        text = f"chance: {100 * chance:.0f} %"
        axes.text(0.98, 0.02, text, transform=axes.transAxes, ha="right", color="0.4", fontsize=8)
    page.legend(loc="outside lower center", ncols=2)
    return page


def _point(row: Row, key: str) -> tuple[float, list[list[float]] | None]:
    """(mean, how far the bar goes down and up) in percent. The bar of an average is its sd, that of
    a retention its interval. nan for what is not defined, no bar for a single seed."""
    mean, sd = row[key], row.get(f"{key}_sd")
    if mean == UNDEFINED:
        return math.nan, None
    low, high = (row.get(f"{key}_{end}", UNDEFINED) for end in ("low", "high"))
    if sd not in (None, UNDEFINED):
        low, high = mean - sd, mean + sd
    if UNDEFINED in (low, high):
        return 100 * mean, None
    return 100 * mean, [[100 * (mean - low)], [100 * (high - mean)]]
