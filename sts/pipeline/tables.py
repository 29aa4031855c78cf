"""Tables from result files: CSV at full precision, Markdown, LaTeX, and numbers for `dvc metrics`.

    python -m sts table --name main --results results/mini --ablations dense vtc lds sts \
        --out-stem results/mini/tables/main

The first method is the baseline. A cell is a number, `missing` (its job has no result) or `n/a`
(not defined: a spread of one seed, a saving of nothing). Nothing that was asked for is dropped, and
nothing missing counts as 0.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from scipy.stats import t as student

from sts.pipeline import provenance

MISSING, UNDEFINED = "missing", "n/a"
SOURCES = {
    "baseline": "Baselines",
    "paper": "The paper's",
    "ours": "Ours",
    "peers": "Peers'",
}
CONFIDENCE = 0.95
COLUMNS = {
    "average": "Average",
    "blind": "Blind",
    "retention": "Retention",
    "time_ratio": "Time",
    "flops_ratio": "FLOPs",
    "realisation": "Realisation",
}
NOTE = (
    "Scores in %, mean ± sd over seeds. Blind: average with a grey image. Retention: mean over "
    "benchmarks of score / score of {base}, paired by seed, with a 95 % t interval over seeds. "
    "Time, FLOPs: of training, relative to {base}. Realisation: (1 - time) / (1 - FLOPs)."
)

Cell = float | str
Row = dict[str, Any]


def table(
    name: str,
    results: str | Path,
    ablations: Sequence[str],
    out_stem: str | Path,
    labels: Mapping[str, str] | None = None,
    sources: Mapping[str, str] | None = None,
) -> None:
    """Write `out_stem`.csv, .md, .tex and .json from the result files of `ablations`.

    `labels` gives the methods' names in the table, by default their ids; `sources` (a key of
    SOURCES each) under which head they stand there, in the order of SOURCES. Times and FLOPs come
    from bench/`name`.json. Raises FileNotFoundError if no method has an evaluation at all.
    """
    results, stem, sources = Path(results), Path(out_stem), sources or {}
    found = scores(results, ablations)
    rows = compare(found, results, ablations, name)
    if sources:
        order = list(SOURCES)
        rows = dict(sorted(rows.items(), key=lambda row: order.index(sources[row[0]])))
    names = {id: (labels or {}).get(id, id) for id in ablations}
    notes = footer(results, ablations, found, names)
    stem.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"ablation": id, "method": names[id], "source": sources.get(id), **_flat(row)}
        for id, row in rows.items()
    ]
    pd.DataFrame(lines).to_csv(stem.with_suffix(".csv"), index=False, na_rep=UNDEFINED)
    head, body = _printed(rows, found, names, sources)
    stem.with_suffix(".md").write_text(_markdown(name, head, body, notes), encoding="utf-8")
    stem.with_suffix(".tex").write_text(_latex(head, body, notes), encoding="utf-8")
    provenance.write_json_atomic(stem.with_suffix(".json"), _metrics(rows))


def scores(results: str | Path, ablations: Sequence[str]) -> pd.DataFrame:
    """One line per ablation, seed and benchmark: score, blind, majority, chance, all in 0..1.

    A seed or a benchmark that the ablation's configuration names but no evaluation holds has empty
    scores. Raises FileNotFoundError if there is no evaluation at all.
    """
    lines = []
    for id in ablations:
        runs = Path(results) / "runs" / id
        files = {int(f.parent.name[4:]): f for f in runs.glob("seed*/eval.json")}
        evaluations = {seed: _read(file)["benchmarks"] for seed, file in files.items()}
        asked = _config(results, id)
        seeds = asked.get("seeds") or sorted(evaluations)
        known = dict.fromkeys(b for found in evaluations.values() for b in found)
        benchmarks = asked.get("evaluate", {}).get("benchmarks") or list(known)
        for seed in seeds:
            for benchmark in benchmarks:
                found = evaluations.get(seed, {}).get(benchmark, {})
                values = {key: found.get(key) for key in ("score", "blind", "majority", "chance")}
                lines.append({"ablation": id, "seed": seed, "benchmark": benchmark, **values})
    frame = pd.DataFrame(lines)
    if frame.empty or frame["score"].isna().all():
        where = Path(results) / "runs" / f"{{{','.join(ablations)}}}"
        raise FileNotFoundError(f"{where}/seed*/eval.json: no evaluation yet; run snakemake first")
    return frame.astype({key: float for key in ("score", "blind", "majority", "chance")})


def compare(
    found: pd.DataFrame, results: str | Path, ablations: Sequence[str], group: str
) -> dict[str, Row]:
    """id -> row of cells: each benchmark, average, blind, retention and the cost ratios.

    A score is {"mean", "sd", "seeds"}, the retention {"mean", "low", "high"}; or it is `missing`.
    """
    benchmarks = list(dict.fromkeys(found["benchmark"]))
    timed = _bench(results, group)

    def of(id: str, key: str) -> pd.DataFrame:  # [seeds, benchmarks]
        lines = found[found["ablation"] == id]
        wide = lines.pivot(index="seed", columns="benchmark", values=key)
        return wide.reindex(columns=benchmarks)

    rows = {}
    for id in ablations:
        seen = of(id, "score")
        row: Row = {name: _spread(seen[name]) for name in benchmarks}
        row["average"] = _spread(seen.mean(axis=1, skipna=False))
        row["blind"] = _spread(of(id, "blind").mean(axis=1, skipna=False))
        row["retention"] = _retention(seen, of(ablations[0], "score"))
        rows[id] = row | _cost(timed, id, ablations[0])
    return rows


def _spread(values: pd.Series) -> Row | str:
    values = values.dropna()
    if values.empty:
        return MISSING
    sd = float(values.std(ddof=1)) if len(values) > 1 else UNDEFINED
    return {"mean": float(values.mean()), "sd": sd, "seeds": len(values)}


def _retention(seen: pd.DataFrame, baseline: pd.DataFrame) -> Row | str:
    """Mean over benchmarks of score / baseline score, by seed; its mean and interval over seeds."""
    seeds = seen.dropna().index.intersection(baseline.dropna().index)
    if seeds.empty:
        return MISSING
    if (baseline.loc[seeds] == 0).any(axis=None):
        return UNDEFINED
    ratios = (seen.loc[seeds] / baseline.loc[seeds]).mean(axis=1)
    low, high = interval(list(ratios))
    return {"mean": float(ratios.mean()), "low": low, "high": high}


def interval(values: Sequence[float]) -> tuple[Cell, Cell]:
    """Two-sided 95 % t interval of the mean: m ± t(0.975, n - 1) s / sqrt(n); n/a for one value."""
    n = len(values)
    if n < 2:
        return UNDEFINED, UNDEFINED
    series = pd.Series(values)
    half = student.ppf((1 + CONFIDENCE) / 2, n - 1) * series.std(ddof=1) / n**0.5
    return float(series.mean() - half), float(series.mean() + half)


def _cost(timed: Mapping[str, Any], id: str, baseline: str) -> dict[str, Cell]:
    names = ("time_ratio", "flops_ratio", "realisation")
    if id not in timed or baseline not in timed:
        return dict.fromkeys(names, MISSING)
    flops = {key: sum(timed[key]["flops"].values()) for key in (id, baseline)}
    time_ratio = timed[id]["time_s"] / timed[baseline]["time_s"]
    flops_ratio = flops[id] / flops[baseline]
    saved = 1 - flops_ratio
    realisation = (1 - time_ratio) / saved if saved else UNDEFINED
    return dict(zip(names, (time_ratio, flops_ratio, realisation), strict=True))


def footer(
    results: Path, ablations: Sequence[str], found: pd.DataFrame, names: Mapping[str, str]
) -> list[str]:
    """Lines under a table: how to read it; command, commit and configuration; what is missing."""
    gone = found[found["score"].isna()].groupby(["ablation", "seed"], sort=False)["benchmark"]
    lost = [f"{id} seed {seed} ({', '.join(group)})" for (id, seed), group in gone]
    lost += [f"{id} (all)" for id in ablations if id not in set(found["ablation"])]
    configs = {id: _config(results, id) for id in ablations}
    git = provenance.git()
    commit = (git["commit"] or f"unknown ({git['note']})") + " with edits" * bool(git["dirty"])
    seeds = ", ".join(str(seed) for seed in sorted(set(found["seed"])))
    lines = [
        NOTE.format(base=names[ablations[0]]),
        f"Command: `{provenance.command_line()}`",
        f"Commit: {commit}",
        f"Configuration: {results}/configs/{{{','.join(ablations)}}}.yaml, "
        f"SHA-256 {provenance.sha256_json(configs)[:16]}",
        f"Seeds: {seeds}",
        *_precisions(results, ablations),
    ]
    return [*lines, f"Missing: {'; '.join(lost)}"] if lost else lines


def _precisions(results: Path, ablations: Sequence[str]) -> list[str]:
    """What the runs were computed in, by their manifests: some machines make fp32 of bf16."""
    of: dict[str, dict[str, None]] = {}
    for id in ablations:
        for file in sorted((results / "runs" / id).glob("seed*/instruct.json")):
            if precision := _read(file).get("precision"):
                of.setdefault(precision, {})[id] = None
    if len(of) > 1:
        each = "; ".join(f"{precision} {', '.join(ids)}" for precision, ids in of.items())
        return [f"Precision: not the same for all, so compare with care: {each}"]
    return [f"Precision: {precision}" for precision in of]


def _flat(row: Row) -> dict[str, Cell]:
    """{"colour": {"mean": 0.9, "sd": 0.1}} gives {"colour": 0.9, "colour_sd": 0.1}."""
    flat: dict[str, Cell] = {}
    for key, cell in row.items():
        parts = cell if isinstance(cell, dict) else {"mean": cell}
        flat |= {key if part == "mean" else f"{key}_{part}": parts[part] for part in parts}
    return flat


def _metrics(rows: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """The numbers alone, by method: `dvc metrics diff` compares numbers."""
    return {
        id: {key: cell for key, cell in _flat(row).items() if not isinstance(cell, str)}
        for id, row in rows.items()
    }


def _printed(
    rows: Mapping[str, Row],
    found: pd.DataFrame,
    names: Mapping[str, str],
    sources: Mapping[str, str],
) -> tuple[list[str], list[list[str]]]:
    """Column heads and rounded cells, with the reference lines majority and chance at the end. A
    row of empty cells but for the first is a head over the rows that follow."""
    keys = list(next(iter(rows.values())))
    head = ["Method", *(COLUMNS.get(key, key.replace("_", " ").capitalize()) for key in keys)]
    body, last = [], None
    for id, row in rows.items():
        if sources.get(id) != last:
            last = sources.get(id)
            body.append([SOURCES[last], *[""] * len(keys)])
        body.append([names[id], *(_rounded(row[key]) for key in keys)])
    for label, column in (("Majority answer", "majority"), ("Chance", "chance")):
        reference = found.groupby("benchmark")[column].mean()
        cells = [_shown(reference.get(key, UNDEFINED)) for key in keys if key not in COLUMNS]
        average = _shown(reference.mean(skipna=False))
        body.append([label, *cells, average, *[""] * (len(COLUMNS) - 1)])
    return head, body


def _rounded(cell: Any) -> str:
    if not isinstance(cell, dict):
        return _shown(cell, 1, 2)
    if "low" in cell:
        span = f"{_shown(cell['low'])} to {_shown(cell['high'])}"
        return f"{_shown(cell['mean'])} ({UNDEFINED if UNDEFINED in span else span})"
    return f"{_shown(cell['mean'])} ± {_shown(cell['sd'])}"


def _shown(cell: Any, factor: int = 100, digits: int = 1) -> str:
    """A number (also as text) rounded, by default in percent; `missing` and `n/a` as they are."""
    if cell in (MISSING, UNDEFINED):
        return cell
    return MISSING if pd.isna(cell) else f"{factor * float(cell):.{digits}f}"


def _markdown(name: str, head: list[str], body: list[list[str]], notes: list[str]) -> str:
    rule = [":--", *["--:"] * (len(head) - 1)]
    body = [row if any(row[1:]) else [f"*{row[0]}*", *row[1:]] for row in body]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in [head, rule, *body]]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([f"### {name.capitalize()}", "", *lines, "", *(f"- {n}" for n in notes), ""])


def _latex(head: list[str], body: list[list[str]], notes: list[str]) -> str:
    cells = [list(map(_tex, row)) for row in body]
    cells = [row if any(row[1:]) else [rf"\emph{{{row[0]}}}", *row[1:]] for row in cells]
    *methods, majority, chance = (" & ".join(row) + r" \\" for row in cells)
    return "\n".join(
        [
            *(f"% {note}" for note in notes),
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            " & ".join(map(_tex, head)) + r" \\",
            r"\midrule",
            *methods,
            r"\midrule",
            majority,
            chance,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {sign: "\\" + sign for sign in "&%$#_{}"} | {"±": r"$\pm$"}
    return "".join(special.get(sign, sign) for sign in text)


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
    for row in pd.read_csv(file, keep_default_na=False).to_dict("records"):
        low, high = (_shown(row.get(f"retention_{end}", UNDEFINED)) for end in ("low", "high"))
        print(
            f"{row['method']}: average {_shown(row['average'])} %, "
            f"retention {_shown(row['retention'])} % ({low} to {high}), "
            f"time x {_shown(row['time_ratio'], 1, 2)}, FLOPs x {_shown(row['flops_ratio'], 1, 2)}"
        )
    others = sorted(other.name for other in folder.glob("*.md"))
    print(f"Tables in {folder}: {', '.join(others)}. Figures in {Path(results) / 'figures'}.")


def _bench(results: str | Path, group: str) -> dict[str, Any]:
    file = Path(results) / "bench" / f"{group}.json"
    return _read(file)["variants"] if file.exists() else {}


def _config(results: str | Path, id: str) -> dict[str, Any]:
    """The resolved configuration of an ablation, empty if the workflow has not written one."""
    file = Path(results) / "configs" / f"{id}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error}); delete it and run snakemake again") from None
