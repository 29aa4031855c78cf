"""Published scores beside those that a run obtained: does it come near enough?

    python -m sts expected --reference workflow/reference/paper.yaml --results results/paper \
        --out-stem results/paper/tables/expected
"""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import pandas as pd
from annotated_types import Gt
from pydantic import ValidationError

from sts.pipeline.config import Block, ConfigError, Number, load_yaml
from sts.pipeline.report.tables import MARKDOWN, MISSING

VERDICTS = {
    "pass": "as published, within `warn`",
    "warn": "further off than a run should be",
    "FAIL": "something is wrong: data, template, recipe or benchmark",
    MISSING: "not measured",
}


class Published(Block):
    """A published score, in percent unless it is no share, and how near is near enough."""

    published: Number
    """The score."""
    source: str
    """Who says so, and its mark."""
    warn: Annotated[Number, Gt(0)]
    """Difference up to which a run passes."""
    fail: Annotated[Number, Gt(0)]
    """Difference beyond which it fails."""


class Reference(Block):
    """What is known of a run."""

    ablation: str
    """Id of the ablation that the scores are of."""
    scores: dict[str, Published]
    """Benchmark -> score."""


def read(path: str | Path) -> Reference:
    """A reference file. Raises ConfigError with file, key, value and what is accepted."""
    content = load_yaml(path)
    try:
        found = Reference.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(path, key, first.get("input"), first["msg"]) from None
    for name, score in found.scores.items():
        if score.fail < score.warn:
            key = f"scores.{name}.fail"
            raise ConfigError(path, key, score.fail, f"at least warn, {score.warn}")
    return found


def expected(reference: str | Path, results: str | Path, out_stem: str | Path) -> pd.DataFrame:
    """Write `out_stem`.md and .csv, and return one line per benchmark: published, obtained (mean
    over seeds, sd), difference, verdict (VERDICTS) and source.

    What the runs of `results` have not measured is `missing`, and none of it passes.
    """
    known, stem = read(reference), Path(out_stem)
    runs = sorted((Path(results) / "runs" / known.ablation).glob("seed*/eval.json"))
    measured = [json.loads(file.read_text(encoding="utf-8"))["benchmarks"] for file in runs]
    lines = []
    for name, score in known.scores.items():
        found = [run[name] for run in measured if name in run]
        values = [one["score"] * (100 if one["share"] else 1) for one in found]
        lines.append({"benchmark": name, **judged(values, score), "source": score.source})
    table = pd.DataFrame(lines)
    stem.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(stem.with_suffix(".csv"), index=False)
    stem.with_suffix(".md").write_text(_markdown(table, known, len(runs)), encoding="utf-8")
    return table


def judged(values: list[float], score: Published) -> dict[str, Any]:
    """What seeds obtained, beside what was published."""
    if not values:
        nothing = dict.fromkeys(("obtained", "sd", "difference", "verdict"), MISSING)
        return {"published": score.published, **nothing}
    difference = fmean(values) - score.published
    off = abs(difference)
    return {
        "published": score.published,
        "obtained": fmean(values),
        "sd": stdev(values) if len(values) > 1 else "n/a",
        "difference": difference,
        "verdict": "pass" if off <= score.warn else "warn" if off <= score.fail else "FAIL",
    }


def _markdown(table: pd.DataFrame, known: Reference, seeds: int) -> str:
    def shown(value: Any) -> str:
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    counts = ", ".join(f"{n} {verdict}" for verdict, n in table["verdict"].value_counts().items())
    plain = {"stralign": None, "numalign": None, "disable_numparse": True}
    lines = table.map(shown).to_markdown(index=False, tablefmt=MARKDOWN, **plain)
    meaning = "; ".join(f"{verdict}: {what}" for verdict, what in VERDICTS.items())
    said = f"- Row `{known.ablation}`, seeds: {seeds}. {counts}. {meaning}."
    return "\n".join(["### Expected", "", lines, "", said, ""])
