"""What a few seeds can say of a difference.

Intervals are t intervals of differences paired by seed, never a bootstrap: over three seeds that of
percentiles holds the truth in 77 of 100 cases, not 95. A p-value takes LEAST_SEEDS seeds, as fewer
can't get below 0.05 by their signs. Not worse is shown by an interval that lies above MARGIN, which
was written down before the runs, and never by a large p.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import chi2, norm
from scipy.stats import t as student

from sts.pipeline.report.results import UNDEFINED

CONFIDENCE = 0.95
LEAST_SEEDS = 6
POWER = 0.8
MARGIN = 0.975  # of retention: a loss of 2.5 % is what a user of a faster training may accept


def interval(values: pd.Series) -> tuple[Any, Any]:
    """Two-sided 95 % t interval of the mean: m ± t(0.975, n - 1) s / sqrt(n); n/a for one value."""
    n = len(values)
    if n < 2:
        return UNDEFINED, UNDEFINED
    half = student.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std() / n**0.5
    return float(values.mean() - half), float(values.mean() + half)


def difference(name: str, values: pd.Series, base: pd.Series) -> dict[str, Any]:
    """The mean of values - base, paired by seed (their index), as `name` with its `_low` and
    `_high`, `_n` seeds, `_sd` of the differences and `_p` of a two-sided paired t test."""
    pairs = (values - base).dropna()
    n = len(pairs)
    if not n:
        return {}
    low, high = interval(pairs)
    sd = float(pairs.std()) if n > 1 else UNDEFINED
    p = UNDEFINED
    if n >= LEAST_SEEDS and sd:
        p = float(2 * student.sf(abs(pairs.mean()) / (sd / math.sqrt(n)), n - 1))
    of_name = {"low": low, "high": high, "n": n, "sd": sd, "p": p}
    return {name: float(pairs.mean())} | {f"{name}_{key}": of_name[key] for key in of_name}


def ratio(name: str, values: pd.Series, base: pd.Series) -> dict[str, Any]:
    """The ratio values / base, paired by seed, with its log interval: exp of the mean of the
    logarithms and of its t interval. n/a where a value is 0."""
    pairs = pd.concat([values, base], axis=1).dropna()
    if pairs.empty:
        return {}
    if (pairs <= 0).any(axis=None):
        return {name: UNDEFINED}
    logs = np.log(pairs.iloc[:, 0] / pairs.iloc[:, 1])
    ends = [end if end == UNDEFINED else math.exp(end) for end in interval(logs)]
    return {name: math.exp(logs.mean()), f"{name}_low": ends[0], f"{name}_high": ends[1]}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: the i-th smallest of m times m - i + 1, at least those before it,
    at most 1 (Holm, 1979)."""
    adjusted, least = {}, 0.0
    for rank, (id, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = adjusted[id] = max(least, min(1.0, (len(p_values) - rank) * p))
    return adjusted


def power(effect: float, n: int) -> float:
    """Chance that a two-sided paired t test of n seeds finds a difference of `effect` standard
    deviations at 5 %.

    A noncentral t, as the mean over quantiles of the estimated deviation: scipy's own is nan for
    few seeds and a large effect.
    """
    quantiles = (np.arange(2000) + 0.5) / 2000
    deviation = np.sqrt(chi2.ppf(quantiles, n - 1) / (n - 1))
    critical = student.ppf((1 + CONFIDENCE) / 2, n - 1) * deviation
    shift = effect * math.sqrt(n)
    return float((norm.sf(critical - shift) + norm.cdf(-critical - shift)).mean())


def detectable(n: int) -> float:
    """The smallest difference, in standard deviations of the paired differences, that n seeds find
    with a chance of POWER."""
    most = 1.0
    while power(most, n) < POWER:
        most *= 2
    return brentq(lambda effect: power(effect, n) - POWER, 0.0, most)
