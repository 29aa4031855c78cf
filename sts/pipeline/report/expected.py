"""Published scores beside those that a run obtained: does it come near enough?

    python -m sts expected --reference workflow/reference/paper.yaml --results results/paper \
        --out-stem results/paper/tables/expected
"""

from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import pandas as pd
from annotated_types import Gt

from sts.pipeline.config import Block, ConfigError, Line, Name, load_yaml
from sts.pipeline.config.errors import parsed
from sts.pipeline.files import write_text_atomic
from sts.pipeline.report.results import MISSING, UNDEFINED, evaluations
from sts.pipeline.report.tables import csv_text, page

VERDICTS = {
    "pass": "as published, within `warn`",
    "warn": "further off than a run should be",
    "FAIL": "something is wrong: data, template, recipe or benchmark",
    MISSING: "not measured",
}


class Published(Block):
    """A published score, in percent unless it is no share, and how near is near enough."""

    published: float
    """The score."""
    source: Line
    """Who says so, and its mark."""
    warn: Annotated[float, Gt(0)]
    """Difference up to which a run passes."""
    fail: Annotated[float, Gt(0)]
    """Difference beyond which it fails."""


class Reference(Block):
    """What is known of a run."""

    ablation: Name
    """Id of the ablation that the scores are of."""
    scores: dict[str, Published]
    """Benchmark -> score."""


def read(path: str | Path) -> Reference:
    """A reference file. Raises ConfigError with file, key, value and what is accepted."""
    reference = parsed(Reference, load_yaml(path), path)
    for name, score in reference.scores.items():
        if score.fail < score.warn:
            key = f"scores.{name}.fail"
            raise ConfigError(path, key, score.fail, f"at least warn, {score.warn}")
    return reference


def expected(reference: str | Path, results: str | Path, out_stem: str | Path) -> pd.DataFrame:
    """Write `out_stem`.md and .csv, and return one line per benchmark: published, obtained (mean
    over seeds, sd), difference, verdict (VERDICTS) and source.

    What the runs of `results` have not measured is `missing`, and none of it passes.
    """
    published, stem = read(reference), Path(out_stem)
    runs = evaluations(results, published.ablation).values()
    lines = []
    for name, score in published.scores.items():
        entries = [run[name] for run in runs if name in run]
        values = [entry["score"] * (100 if entry["share"] else 1) for entry in entries]
        lines.append({"benchmark": name, **judged(values, score), "source": score.source})
    table = pd.DataFrame(lines)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in table["verdict"].value_counts().items())
    meaning = "; ".join(f"{verdict}: {text}" for verdict, text in VERDICTS.items())
    note = f"Row `{published.ablation}`, seeds: {len(runs)}. {counts}. {meaning}."
    grid = table.map(lambda cell: f"{cell:.1f}" if isinstance(cell, float) else str(cell))
    write_text_atomic(stem.with_suffix(".csv"), csv_text(table))
    write_text_atomic(stem.with_suffix(".md"), page("expected", grid, [note]))
    return table


def judged(values: list[float], score: Published) -> dict[str, Any]:
    """What seeds obtained, beside what was published."""
    row: dict[str, Any] = {"published": score.published}
    if not values:
        return row | dict.fromkeys(("obtained", "sd", "difference", "verdict"), MISSING)
    difference = fmean(values) - score.published
    off = abs(difference)
    return row | {
        "obtained": fmean(values),
        "sd": stdev(values) if len(values) > 1 else UNDEFINED,
        "difference": difference,
        "verdict": "pass" if off <= score.warn else "warn" if off <= score.fail else "FAIL",
    }
