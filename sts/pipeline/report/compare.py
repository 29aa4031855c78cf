"""Methods compared: scores and held-out loss over seeds, beside those of a baseline with the same
seeds; what is saved of its cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sts.pipeline.report.results import (
    MISSING,
    UNDEFINED,
    held_out,
    other_scales,
    stages_of,
    timings,
)
from sts.pipeline.report.statistics import difference, holm, interval, ratio

DIFFERENCES = ("loss_difference", "average_difference")
COSTS = ("time_ratio", "flops_ratio", "realisation")

Cell = float | str
Row = dict[str, Cell]
Runs = dict[int, list[dict[str, Any]]]  # seed -> points of the held-out loss


def compare(
    scores: pd.DataFrame, results: str | Path, bases: Mapping[str, str], table: str
) -> dict[str, Row]:
    """A row of cells for each method: each benchmark, average, blind, held-out loss, retention,
    cost ratios, and beside another method's the differences of average and loss.

    Beside a score stand its `_sd` and `_seeds`, and of a benchmark `_se`, the standard error over
    its questions; beside the retention its `_low` and `_high`, beside a difference what
    statistics.difference says, its `_p` adjusted over the rows (Holm). Average and blind are over
    the benchmarks whose scores are shares; `n/a` if there is none, or for blind if an evaluation
    leaves it out.

    Args:
        scores: What results.scores says of the methods.
        results: Folder of a scale's results.
        bases: id of each method -> id of the method that it is compared with.
        table: Table whose timing gives the costs.
    """
    benchmarks = list(dict.fromkeys(scores["benchmark"]))
    shares = [name for name in benchmarks if name not in other_scales(scores)]
    timing = timings(results, table)
    runs = {id: held_out(results, id) for id in bases}

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
        errors = (by_seed(id, "stderr") ** 2).mean() ** 0.5
        rows[id] = {
            **dict(cell for name in benchmarks for cell in over_seeds(name, score[name]).items()),
            **{f"{name}_se": float(error) for name, error in errors.dropna().items()},
            **average("average", score),
            **({"blind": UNDEFINED} if left_out else average("blind", blind)),
            **_held_out(runs[id], runs[base], id == base),
            **_scores_beside(score, by_seed(base, "score"), shares, id == base),
            **_costs(timing, id, base),
            **_time_to_loss(runs[id], runs[base], timing, id, base, stages_of(results, id)),
        }
    for name in DIFFERENCES:
        p_values = {id: row.get(f"{name}_p", UNDEFINED) for id, row in rows.items()}
        for id, p in holm({id: p for id, p in p_values.items() if p != UNDEFINED}).items():
            rows[id][f"{name}_p"] = p
    return rows


def over_seeds(name: str, values: pd.Series) -> Row:
    """Mean and sample standard deviation of what the seeds obtained."""
    values = values.dropna()
    if values.empty:
        return {name: MISSING}
    sd = float(values.std()) if len(values) > 1 else UNDEFINED
    return {name: float(values.mean()), f"{name}_sd": sd, f"{name}_seeds": len(values)}


def _final(runs: Runs) -> pd.Series:
    return pd.Series({seed: points[-1]["loss"] for seed, points in runs.items()}, dtype=float)


def _held_out(runs: Runs, base: Runs, is_base: bool) -> Row:
    """The held-out loss at the end; n/a where none was measured."""
    losses, of_base = _final(runs), _final(base)
    cells = over_seeds("loss", losses) if len(losses) else {"loss": UNDEFINED}
    return cells | ({} if is_base else difference("loss_difference", losses, of_base))


def _scores_beside(
    score: pd.DataFrame, baseline: pd.DataFrame, shares: list[str], is_base: bool
) -> Row:
    """Retention: average / average of the baseline; without shares the mean of score / score. The
    difference of the averages."""
    if not shares:
        if (baseline == 0).any(axis=None):
            return {"retention": UNDEFINED}
        retention = ratio("retention", (score / baseline).mean(axis=1, skipna=False), _ones(score))
        return retention or {"retention": MISSING}
    averages = [values[shares].mean(axis=1, skipna=False) for values in (score, baseline)]
    beside = {} if is_base else difference("average_difference", *averages)
    return (ratio("retention", *averages) or {"retention": MISSING}) | beside


def _ones(score: pd.DataFrame) -> pd.Series:
    return pd.Series(1.0, index=score.index)


def _time_to_loss(
    runs: Runs, base: Runs, timing: Mapping[str, Any], id: str, base_id: str, stages: list[str]
) -> Row:
    """The training time after which a run's held-out loss is first at or below the mean of the
    baseline's at its end, relative to the time of the baseline: mean, interval and `_n` of the
    seeds that get there. On the time axis of the interleaved timing."""
    if not runs or not base or not {id, base_id} <= timing.keys():
        return {"time_to_loss": UNDEFINED if id in timing else MISSING}
    if not {*stages} <= timing[id].keys():
        return {"time_to_loss": UNDEFINED}
    goal = float(_final(base).mean())
    *before, last = [timing[id][stage] for stage in stages]
    spent = sum(times["stage_s"] for times in before)
    steps = {seed: _first_step(points, goal) for seed, points in runs.items()}
    times = pd.Series({seed: spent + time_at(last, s) for seed, s in steps.items() if s})
    cells: Row = {"time_to_loss": UNDEFINED, "time_to_loss_n": len(times)}
    if len(times):
        shares = times / timing[base_id]["time_s"]
        low, high = interval(shares)
        cells |= {"time_to_loss": float(shares.mean())}
        cells |= {"time_to_loss_low": low, "time_to_loss_high": high}
    return cells


def _first_step(points: list[Mapping[str, Any]], goal: float) -> float | None:
    """The step at which a loss first gets to `goal`, on a line between two points; None: never."""
    before: Mapping[str, Any] | None = None
    for point in points:
        if point["loss"] <= goal:
            if before is None:
                return point["step"]
            share = (before["loss"] - goal) / (before["loss"] - point["loss"])
            return before["step"] + share * (point["step"] - before["step"])
        before = point
    return None


def time_at(timed: Mapping[str, Any], step: float) -> float:
    """Seconds of the first steps of a stage: each of its equal parts has the median of the step
    that was timed in it (`bench`)."""
    part = timed["steps"] / len(timed["step_s"])
    ends = part * np.arange(len(timed["step_s"]) + 1)
    return float(np.interp(step, ends, part * np.cumsum([0.0, *timed["step_s"]])))


def _costs(timing: Mapping[str, Any], id: str, base: str) -> Row:
    if id not in timing or base not in timing:
        return dict.fromkeys(COSTS, MISSING)
    flops, base_flops = (sum(timing[key]["flops"].values()) for key in (id, base))
    time_ratio, flops_ratio = timing[id]["time_s"] / timing[base]["time_s"], flops / base_flops
    saved = 1 - flops_ratio
    realisation = (1 - time_ratio) / saved if saved else UNDEFINED
    return dict(zip(COSTS, (time_ratio, flops_ratio, realisation), strict=True))
