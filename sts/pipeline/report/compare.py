"""Methods compared: scores over seeds, what is kept of a baseline's, what is saved of its cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student

from sts.pipeline.report.results import MISSING, UNDEFINED, other_scales, timings

CONFIDENCE = 0.95
COSTS = ("time_ratio", "flops_ratio", "realisation")

Cell = float | str
Row = dict[str, Cell]


def compare(
    scores: pd.DataFrame, results: str | Path, bases: Mapping[str, str], table: str
) -> dict[str, Row]:
    """A row of cells for each method: each benchmark, average, blind, retention, cost ratios.

    Beside a score stand its `_sd` and `_seeds`, beside the retention its `_low` and `_high`, unless
    it is `missing`. Average and blind are over the benchmarks whose scores are shares; `n/a` if
    there is none, or for blind if an evaluation leaves it out.

    Args:
        scores: What results.scores says of the methods.
        results: Folder of a scale's results.
        bases: id of each method -> id of the method that it is compared with.
        table: Table whose timing gives the costs.
    """
    benchmarks = list(dict.fromkeys(scores["benchmark"]))
    shares = [name for name in benchmarks if name not in other_scales(scores)]
    timing = timings(results, table)

    def by_seed(id: str, value: str) -> pd.DataFrame:  # [seeds, benchmarks]
        lines = scores[scores["ablation"] == id]
        frame = lines.pivot(index="seed", columns="benchmark", values=value)
        return frame.reindex(columns=benchmarks)

    def average(name: str, values: pd.DataFrame) -> Row:
        means = values[shares].mean(axis=1, skipna=False)
        return over_seeds(name, means) if shares else {name: UNDEFINED}

    rows = {}
    for id, base in bases.items():
        score, blind = by_seed(id, "score"), by_seed(id, "blind")
        left_out = (score[shares].notna() & blind[shares].isna()).any(axis=None)
        rows[id] = {
            **dict(cell for name in benchmarks for cell in over_seeds(name, score[name]).items()),
            **average("average", score),
            **({"blind": UNDEFINED} if left_out else average("blind", blind)),
            **_retention(score, by_seed(base, "score")),
            **_costs(timing, id, base),
        }
    return rows


def over_seeds(name: str, values: pd.Series) -> Row:
    """Mean and sample standard deviation of what the seeds obtained."""
    values = values.dropna()
    if values.empty:
        return {name: MISSING}
    sd = float(values.std()) if len(values) > 1 else UNDEFINED
    return {name: float(values.mean()), f"{name}_sd": sd, f"{name}_seeds": len(values)}


def _retention(score: pd.DataFrame, baseline: pd.DataFrame) -> Row:
    """Mean over benchmarks of score / baseline score, by seed; its mean and interval over seeds."""
    seeds = score.dropna().index.intersection(baseline.dropna().index)
    if seeds.empty:
        return {"retention": MISSING}
    if (baseline.loc[seeds] == 0).any(axis=None):
        return {"retention": UNDEFINED}
    ratios = (score.loc[seeds] / baseline.loc[seeds]).mean(axis=1)
    low, high = interval(ratios)
    return {"retention": float(ratios.mean()), "retention_low": low, "retention_high": high}


def interval(values: pd.Series) -> tuple[Cell, Cell]:
    """Two-sided 95 % t interval of the mean: m ± t(0.975, n - 1) s / sqrt(n); n/a for one value."""
    n = len(values)
    if n < 2:
        return UNDEFINED, UNDEFINED
    half = student.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std() / n**0.5
    return float(values.mean() - half), float(values.mean() + half)


def _costs(timing: Mapping[str, Any], id: str, base: str) -> Row:
    if id not in timing or base not in timing:
        return dict.fromkeys(COSTS, MISSING)
    flops, base_flops = (sum(timing[key]["flops"].values()) for key in (id, base))
    time_ratio, flops_ratio = timing[id]["time_s"] / timing[base]["time_s"], flops / base_flops
    saved = 1 - flops_ratio
    realisation = (1 - time_ratio) / saved if saved else UNDEFINED
    return dict(zip(COSTS, (time_ratio, flops_ratio, realisation), strict=True))
