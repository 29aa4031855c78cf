"""What a table says, in lines that follow from its numbers: for the report and for the terminal.

python -m sts summary --results results/mini
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sts.pipeline.report.statistics import MARGIN

NUMBERS = [
    "average", "blind", "retention", "retention_low", "retention_high",
    "time_ratio", "flops_ratio", "realisation",
    "loss", "loss_difference", "loss_difference_low", "loss_difference_high", "loss_difference_n",
]  # fmt: skip


def summary(results: str | Path) -> None:
    """Print what the main table found and where to look.

    Raises FileNotFoundError if there is no main table yet.
    """
    folder = Path(results) / "tables"
    file = folder / "main.csv"
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: no table yet; make it with `snakemake --cores all table_main`"
        )
    for line, methods in findings(pd.read_csv(file, keep_default_na=False)).items():
        print(line, *(f"  {method}" for method in methods), sep="\n")
    others = sorted(other.name for other in folder.glob("*.md"))
    if (page := Path(results) / "index.html").exists():
        print(f"All on one page, for a browser: {page}")
    print(f"Tables in {folder}: {', '.join(others)}. Figures in {Path(results) / 'figures'}.")


def configured(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """What was trained and measured by a resolved configuration, as far as it says so: lines, each
    with the lines under it."""
    lines = {}
    if stages := config.get("stages"):
        lines[f"Training of the first method, with {_counted(config['seeds'], 'seed')}:"] = [
            f"{name}: {block['steps']} steps of "
            f"{block['batch_size'] * block['gradient_accumulation_steps'] * block['processes']} "
            f"samples of {', '.join(block['data'])}; "
            f"trains {', '.join(block['trains']).replace('_', ' ')}"
            for name, block in stages.items()
        ]
    if names := config.get("evaluate", {}).get("benchmarks"):
        lines[f"Score: {_counted(names, 'benchmark')} ({', '.join(names)})."] = []
    return lines


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """What the rows of a table's CSV say: lines, each with the methods that it is said of.

    Methods differ from the one that they are relative to where an interval leaves out no
    difference: that of the held-out loss first, then that of the retention. A score is kept where
    the interval of the retention lies above MARGIN.
    """
    lines: dict[str, list[str]] = {}
    for base in dict.fromkeys(rows["relative_to"]):
        family = rows[(rows["relative_to"] == base) | (rows["ablation"] == base)]
        for line, methods in _findings(family.set_index("ablation"), base).items():
            lines.setdefault(line, []).extend(methods)
    return lines


def _findings(rows: pd.DataFrame, base: str) -> dict[str, list[str]]:
    """Of the methods that are relative to `base`."""
    names = rows["method"]
    # no interval in the table at all where nothing could be compared
    numbers = rows.reindex(columns=NUMBERS).apply(pd.to_numeric, errors="coerce")
    name, baseline, others = names[base], numbers.loc[base], numbers.drop(base)
    score = "no complete evaluation yet"
    if rows["average"][base] == "n/a":
        score = "scores that have no mean"
    elif pd.notna(baseline["average"]):
        score = f"average score {_percent(baseline['average'])}"
    if pd.notna(baseline["blind"]):
        score += f", {_percent(baseline['blind'])} with grey images"
    lines: dict[str, list[str]] = {
        f"{name}: {score}.": [],
        **_of_loss(numbers, others, names, name),
    }
    low, high, mean = (others[f"retention{end}"] for end in ("_low", "_high", ""))
    kept = _percent(MARGIN)
    groups = {
        f"Above {name} in score, beyond the spread of the seeds:": low > 1,
        f"Score of {name} kept, to {kept} or more:": (low >= MARGIN) & (low <= 1) & (high >= 1),
        f"No difference in score from {name} shown by these seeds:": (low < MARGIN) & (high >= 1),
        f"Below {name} in score, beyond the spread of the seeds:": high < 1,
        "Of one seed, so that small differences mean nothing:": mean.notna() & low.isna(),
        f"Without a score to compare with that of {name}:": mean.isna(),
    }
    for line, is_member in groups.items():
        if is_member.any():
            ordered = others[is_member].sort_values("time_ratio", kind="stable")
            lines[line] = [f"{names[id]}: {_sentence(row)}" for id, row in ordered.iterrows()]
    if front := _front(numbers):
        best = "; ".join(names[id] for id in front)
        lines[f"Beaten by no other in both mean score and training time: {best}."] = []
    return lines


def _of_loss(
    numbers: pd.DataFrame, others: pd.DataFrame, names: pd.Series, name: str
) -> dict[str, list[str]]:
    """What the held-out losses say, beside that of the method `name`."""
    if numbers["loss"].isna().all() or others["loss_difference_low"].isna().all():
        return {}
    low, high = (others[f"loss_difference_{end}"] for end in ("low", "high"))
    groups = {
        f"Lower held-out loss than {name}:": high < 0,
        f"No difference in held-out loss from {name} shown by these seeds:": (low <= 0)
        & (high >= 0),
        f"Higher held-out loss than {name}:": low > 0,
    }
    return {
        line: [
            f"{names[id]}: {row['loss_difference']:+.3f} nats per answer token (interval "
            f"{row['loss_difference_low']:+.3f} to {row['loss_difference_high']:+.3f}, "
            f"{row['loss_difference_n']:.0f} seeds)"
            for id, row in others[is_member].iterrows()
        ]
        for line, is_member in groups.items()
        if is_member.any()
    }


def _sentence(row: pd.Series) -> str:
    """What a method keeps of the baseline's score and what it takes of its time."""
    clauses = []
    if pd.notna(row["retention"]):
        clauses = [f"{_percent(row['retention'])} of the score"]
    if pd.notna(row["retention_low"]):
        low, high = (100 * row[f"retention_{end}"] for end in ("low", "high"))
        clauses[0] += f" (interval {low:.1f} to {high:.1f})"
    if pd.isna(row["time_ratio"]):
        return "; ".join([*clauses, "training time not measured yet"])
    time, flops = row["time_ratio"], row["flops_ratio"]
    clauses.append(f"x {time:.2f} of the time, x {flops:.2f} of the FLOPs")
    if flops < 1:
        share = f"{100 * row['realisation']:.0f} %" if row["realisation"] > 0 else "nothing"
        clauses.append(f"{share} of the saved FLOPs saved as time")
    return "; ".join(clauses)


def _front(numbers: pd.DataFrame) -> list[str]:
    """The methods that no other beats in both average and time, the slowest first."""
    rows = numbers.dropna(subset=["average", "time_ratio"])
    average, time = rows["average"], rows["time_ratio"]
    as_good = {id: (average >= average[id]) & (time <= time[id]) for id in rows.index}
    front = [id for id in rows.index if as_good[id].sum() == 1]  # itself
    return sorted(front, key=lambda id: -time[id])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _counted(things: list, word: str) -> str:
    return f"{len(things)} {word}{'s' * (len(things) != 1)}"
