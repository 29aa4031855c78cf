"""Methods beside others, paired by seed: what a reader is to believe, with what few seeds allow."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from sts.pipeline.report.compare import Row
from sts.pipeline.report.results import MISSING, UNDEFINED
from sts.pipeline.report.statistics import LEAST_SEEDS, MARGIN, POWER, detectable, power

Pair = tuple[str, str, Row]  # a method, the one beside which it stands, and its row then
COLUMNS = {
    "loss_difference": "Held-out loss, nats", "loss_difference_p": "p",
    "average_difference": "Average, points", "average_difference_p": "p ",
    "retention": "Retention, %", "time_ratio": "Time", "time_to_loss": "Time to its loss",
}  # fmt: skip
NOTE = (
    "Differences (a loss below 0 is better) and retention, average / average, are paired by seed, "
    "with 95 % t intervals, of the retention's logarithm. p: two-sided paired t test from "
    f"{LEAST_SEEDS} seeds on, Holm-adjusted over the methods of the table. A score is kept where "
    f"the interval of the retention lies above {100 * MARGIN:g} %. Time to its loss: the share of "
    "the other's training time after which the held-out loss is where the other's ends."
)
SCALES = {"loss_difference": (1, 3), "average_difference": (100, 1), "retention": (100, 1)}


def paired(pairs: Sequence[Pair], names: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """A table of texts of methods beside others, and the lines under it; both are empty if no two
    seeds can be paired."""
    pairs = [pair for pair in pairs if pair[2].get("average_difference_n", 0) > 1]
    if not pairs:
        return pd.DataFrame(), []
    body = [
        [
            names[id],
            names[base],
            str(row["average_difference_n"]),
            *(_cell(row, key) for key in COLUMNS),
        ]
        for id, base, row in pairs
    ]
    grid = pd.DataFrame(body, columns=["Method", "Beside", "Seeds", *COLUMNS.values()])
    empty = [title for title in COLUMNS.values() if set(grid[title]) == {UNDEFINED}]
    return grid.drop(columns=empty), [NOTE, *_detectable([row for *_, row in pairs])]


def _cell(row: Row, key: str) -> str:
    value = row.get(key, UNDEFINED)
    if value in (MISSING, UNDEFINED):
        return str(value)
    factor, digits = SCALES.get(key, (1, 2))
    if key.endswith("_p"):
        return "< 0.001" if float(value) < 0.001 else f"{value:.3f}"
    sign = "+" if key.endswith("difference") else ""
    text = f"{factor * float(value):{sign}.{digits}f}"
    low, high = (row.get(f"{key}_{end}", UNDEFINED) for end in ("low", "high"))
    if UNDEFINED not in (low, high):
        low, high = (f"{factor * float(end):{sign}.{digits}f}" for end in (low, high))
        text += f" ({low} to {high})"
    if key == "time_to_loss" and row["time_to_loss_n"] != row["loss_seeds"]:
        text += f", {row['time_to_loss_n']} of {row['loss_seeds']} seeds"
    return text


def _detectable(rows: Sequence[Row]) -> list[str]:
    """What so many seeds can find, by the mean of the rows' deviations."""
    n = min(row["average_difference_n"] for row in rows)
    points = _mean_sd(rows, "average_difference")
    nats = _mean_sd(rows, "loss_difference")
    found = f"{100 * detectable(n) * points:.1f} points"
    found += f" and {detectable(n) * nats:.3f} nats" if nats else ""
    return [
        f"{n} seeds find a difference of one standard deviation with a chance of "
        f"{power(1, n):.2f}, and with one of {POWER:g} differences of {found} (at the mean "
        "deviation of these rows)"
    ]


def _mean_sd(rows: Sequence[Row], name: str) -> float:
    values: list[Any] = [row.get(f"{name}_sd", UNDEFINED) for row in rows]
    return fmean([value for value in values if value != UNDEFINED] or [0.0])
