"""Results held against a committed reference, cell by cell.

    python -m sts check --results results/mini --reference results/reference/mini

A number is `equal`, `within` what seeds and machines differ by (the interval of the difference of
two means of seeds, by Welch, at LEVEL; for ratios of cost TOLERANCES), or `outside`.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student

from sts.pipeline.files import read_json
from sts.pipeline.plan import TIME_TOLERANCE

LEVEL = 0.999  # a table has a hundred numbers
TOLERANCES = {"time_ratio": TIME_TOLERANCE, "flops_ratio": 0.01}  # of FLOPs: other batches
VERDICTS = {
    "equal": "every number is the reference's",
    "within": "the numbers differ from the reference's by no more than seeds and machines do",
    "outside": "numbers differ from the reference's by more than seeds and machines do",
    "nothing": "no number of a reference table is there to compare",
}


def check(results: Path, reference: Path) -> tuple[list[str], bool]:
    """Lines that say how results compare with a reference, the verdict last, and whether they
    agree.

    Raises:
        FileNotFoundError: The reference has no tables.
    """
    tables = sorted((reference / "tables").glob("*.csv"))
    if not tables:
        raise FileNotFoundError(f"{reference}/tables/*.csv: no such reference")
    lines, counts = [], Counter[str]()
    for file in tables:
        ours = results / "tables" / file.name
        if not ours.exists():
            lines.append(f"{file.stem}: not made here")
            continue
        verdicts = dict(_cells(_rows(ours), _rows(file)))
        of_table = Counter(verdict.partition(":")[0] for verdict in verdicts.values())
        counts += of_table
        said = ", ".join(f"{of_table[name]} {name}" for name in of_table)
        lines.append(f"{file.stem}: {said or 'nothing to compare'}")
        lines += [
            f"  {cell}: {verdict}"
            for cell, verdict in verdicts.items()
            if not verdict.startswith(("equal", "within"))
        ]
    lines += _machines(results, reference)
    worst = next((name for name in ("outside", "within", "equal") if counts[name]), "nothing")
    return [*lines, f"Verdict: {VERDICTS[worst]}."], worst in ("equal", "within")


def _rows(file: Path) -> dict[str, dict[str, Any]]:
    frame = pd.read_csv(file, keep_default_na=False, dtype=str)
    return {row["ablation"]: row for row in frame.to_dict("records")}


def _cells(ours: dict, theirs: dict) -> Iterator[tuple[str, str]]:
    """(method and number, verdict) of all that both tables should have."""
    for id, row in theirs.items():
        if id not in ours:
            yield id, "no such row here"
            continue
        for key in row:
            if f"{key}_seeds" not in row and key not in TOLERANCES:
                continue
            there, here = _number(row[key]), _number(ours[id].get(key, ""))
            if there is None:
                continue
            if here is None:
                yield f"{id} {key}", f"missing here, {there:.4g} in the reference"
                continue
            yield f"{id} {key}", _verdict(key, here, there, ours[id], row)


def _verdict(key: str, here: float, there: float, ours: dict, theirs: dict) -> str:
    if math.isclose(here, there, rel_tol=1e-9, abs_tol=1e-12):
        return "equal"
    most = TOLERANCES.get(key) or _welch(key, ours, theirs)
    if most is None:
        return f"one seed says nothing: {here:.4g}, in the reference {there:.4g}"
    side = "within" if abs(here - there) <= most else "outside"
    return f"{side}: {here:.4g}, in the reference {there:.4g} (up to {most:.2g} is expected)"


def _welch(key: str, *rows: dict[str, Any]) -> float | None:
    """Half of the interval of the difference of two means of seeds."""
    values = [(_number(row.get(f"{key}_sd")), _number(row.get(f"{key}_seeds"))) for row in rows]
    if any(sd is None or not n or n < 2 for sd, n in values):
        return None
    parts = [(sd**2 / n, n) for sd, n in values]  # type: ignore[operator]
    variance = sum(part for part, _ in parts)
    if not variance:
        return 0.0
    freedom = variance**2 / sum(part**2 / (n - 1) for part, n in parts)
    return float(student.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(variance))


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):  # `missing`, `n/a`
        return None


def _machines(results: Path, reference: Path) -> list[str]:
    """What the runs of both were computed by, and why digits may differ then."""
    here, there = map(_facts, (results, reference))
    lines = [
        f"{name}: {', '.join(here[name])}; reference: {', '.join(there[name])}"
        for name in here
        if here[name] != there[name] and here[name] and there[name]
    ]
    if lines:
        lines.append("Another processor, precision, torch or commit gives other last digits.")
    return lines


def _facts(results: Path) -> dict[str, list[str]]:
    """Precision, processor, torch and commit of the evaluated runs, each value once."""
    facts: dict[str, set[str]] = {key: set() for key in ("precision", "device", "torch", "commit")}
    for file in results.glob("runs/*/seed*/*.json"):
        facts["precision"].add(str(read_json(file).get("precision") or ""))
    for file in results.glob("runs/*/seed*/eval/provenance.json"):
        content = read_json(file)
        hardware = content.get("hardware") or {}
        facts["device"].add(str(hardware.get("gpu") or hardware.get("cpu") or ""))
        facts["torch"].add(str((content.get("packages") or {}).get("torch") or ""))
        facts["commit"].add(str((content.get("git") or {}).get("commit") or ""))
    return {key: sorted(filter(None, values)) for key, values in facts.items()}
