"""Result files of a scale, as numbers: scores, timings, configurations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from sts.pipeline.files import read_json

MISSING, UNDEFINED = "missing", "n/a"  # its job has no result; there is no such value
VALUES = ["score", "blind", "majority", "chance", "stderr"]  # of a benchmark in eval.json


def evaluations(results: str | Path, id: str) -> dict[int, dict[str, Any]]:
    """The benchmarks of each evaluation of an ablation, by seed."""
    files = sorted((Path(results) / "runs" / id).glob("seed*/eval.json"))
    return {int(file.parent.name[4:]): read_json(file)["benchmarks"] for file in files}


def scores(results: str | Path, ablations: Sequence[str]) -> pd.DataFrame:
    """One line per ablation, seed and benchmark: VALUES, and `is_share`.

    A share is a score of 0 to 1; a metric of lm-eval's own may have another scale. A seed or a
    benchmark that the ablation's configuration names but no evaluation holds has empty values.

    Raises:
        FileNotFoundError: There is no evaluation at all.
    """
    lines = []
    for id in ablations:
        by_seed, config = evaluations(results, id), configuration(results, id)
        measured = dict.fromkeys(name for entries in by_seed.values() for name in entries)
        benchmarks = config.get("evaluate", {}).get("benchmarks") or measured
        for seed in config.get("seeds") or sorted(by_seed):
            for benchmark in benchmarks:
                entry = by_seed.get(seed, {}).get(benchmark, {})
                line = {"ablation": id, "seed": seed, "benchmark": benchmark}
                line |= {key: entry.get(key) for key in VALUES}
                if line["stderr"] == "N/A":  # lm-eval has none for this metric
                    line["stderr"] = None
                lines.append(line | {"is_share": entry.get("share", True)})
    frame = pd.DataFrame(lines)
    if frame.empty or frame["score"].isna().all():
        where = Path(results) / "runs" / f"{{{','.join(ablations)}}}"
        raise FileNotFoundError(f"{where}/seed*/eval.json: no evaluation yet; run snakemake first")
    return frame.astype(dict.fromkeys(VALUES, float))


def other_scales(scores: pd.DataFrame) -> list[str]:
    """The benchmarks of which a score is no share of 0 to 1."""
    return list(dict.fromkeys(scores[~scores["is_share"]]["benchmark"]))


def held_out(results: str | Path, id: str) -> dict[int, list[dict[str, Any]]]:
    """The held-out losses of an ablation's last stage, by seed: `step`, `loss` and `skills` at each
    point, the last at the end. Runs without are left out."""
    stages = stages_of(results, id)
    files = sorted((Path(results) / "runs" / id).glob(f"seed*/{stages[-1]}.json"))
    runs = {int(file.parent.name[4:]): read_json(file).get("held_out") for file in files}
    return {seed: rows for seed, rows in runs.items() if rows}


def timings(results: str | Path, table: str) -> dict[str, Any]:
    """Seconds and FLOPs of the trainings by ablation, from a table's timing if there is one."""
    file = Path(results) / "bench" / f"{table}.json"
    return read_json(file)["variants"] if file.exists() else {}


def configuration(results: str | Path, id: str) -> dict[str, Any]:
    """The resolved configuration of an ablation, without the stages that it takes out; empty if the
    workflow has not written one."""
    file = Path(results) / "configs" / f"{id}.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "stages" in config:
        blocks = config["stages"].items()
        config["stages"] = {name: block for name, block in blocks if block is not None}
    return config


def stages_of(results: str | Path, id: str) -> list[str]:
    """The stages of an ablation, in order of training. Results of before they had names of their
    own, and those without a configuration, have the two that all had."""
    return list(configuration(results, id).get("stages", ("align", "instruct")))
