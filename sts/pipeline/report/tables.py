"""Tables from result files: CSV at full precision, Markdown, LaTeX, a page of HTML with what was
found, and numbers for `dvc metrics`.

    python -m sts table --name main --results results/mini --ablations dense vtc lds sts \
        --out-stem results/mini/tables/main

A method is compared with the first one, or with the one that it is said to be relative to. A cell
is a number, `missing` (its job has no result) or `n/a` (not defined: a spread of one seed, a saving
of nothing). Nothing that was asked for is dropped, and nothing missing counts as 0.
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from scipy.stats import t as student
from tabulate import DataRow, TableFormat

from sts.pipeline.files import sha256_json, write_json_atomic
from sts.pipeline.report import findings
from sts.pipeline.run import provenance

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
NAMES = {  # of benchmarks that are not written as words are
    "pope": "POPE", "gqa": "GQA", "scienceqa_img": "ScienceQA-IMG", "textvqa": "TextVQA",
    "textvqa_ocr": "TextVQA, OCR", "vqav2": "VQAv2", "vizwiz": "VizWiz", "mme_perception": "MME P",
    "mme_cognition": "MME C", "seed_image": "SEED-Image", "mmbench_en": "MMBench EN",
    "mmbench_cn": "MMBench CN", "chartqa": "ChartQA", "mmmu_val": "MMMU",
}  # fmt: skip
NOTE = (
    "Scores in %, mean ± sd over seeds. Blind: average with a grey image. Retention: mean over "
    "benchmarks of score / score of {base}, paired by seed, with a 95 % t interval over seeds. "
    "Time, FLOPs: of training, relative to {base}. Realisation: (1 - time) / (1 - FLOPs)."
)
# Markdown as a person writes it: tabulate's own formats fill each cell to its column's width.
MARKDOWN = TableFormat(
    lineabove=None,
    linebelowheader=lambda widths, _: "| :-- |" + " --: |" * (len(widths) - 1),
    linebetweenrows=None,
    linebelow=None,
    headerrow=DataRow("| ", " | ", " |"),
    datarow=DataRow("| ", " | ", " |"),
    padding=0,
    with_header_hide=None,
)
PAGE_STYLE = [
    {"selector": "", "props": "border-collapse: collapse; font: 12px sans-serif"},
    {"selector": "th, td", "props": "padding: 3px 5px; text-align: right; white-space: nowrap"},
    {"selector": "th", "props": "border-bottom: 1px solid; text-align: right"},
    {
        "selector": "th:first-child, td:first-child",
        "props": "text-align: left; white-space: normal; min-width: 12em",
    },
]

Cell = float | str
Row = dict[str, Any]


def table(
    name: str,
    results: str | Path,
    ablations: Sequence[str],
    out_stem: str | Path,
    labels: Mapping[str, str] | None = None,
    sources: Mapping[str, str] | None = None,
    relative_to: Mapping[str, str] | None = None,
) -> None:
    """Write `out_stem`.csv, .md, .tex, .html and .json from the result files of `ablations`.

    `labels` gives the methods' names in the table, by default their ids; `sources` (a key of
    SOURCES each) under which head they stand there, in the order of SOURCES; `relative_to` the id
    of the method that each is compared with, by default the first; of several such there are no
    heads. Times and FLOPs come from bench/`name`.json. Raises FileNotFoundError if no method has an
    evaluation at all.
    """
    results, stem = Path(results), Path(out_stem)
    bases = dict.fromkeys(ablations, ablations[0]) | dict(relative_to or {})
    sources = sources if sources and len(set(bases.values())) == 1 else {}
    found = scores(results, ablations)
    rows = compare(found, results, bases, name)
    if sources:
        order = list(SOURCES)
        rows = dict(sorted(rows.items(), key=lambda row: order.index(sources[row[0]])))
    names = {id: (labels or {}).get(id, id) for id in ablations}
    notes = footer(results, bases, found, names)
    stem.parent.mkdir(parents=True, exist_ok=True)
    lines = pd.DataFrame(
        {
            "ablation": id,
            "method": names[id],
            "source": sources.get(id),
            "relative_to": bases[id],
            **_flat(row),
        }
        for id, row in rows.items()
    )
    lines.to_csv(stem.with_suffix(".csv"), index=False, na_rep=UNDEFINED)
    grid, heads = _printed(rows, found, names, sources)
    texts = {
        ".md": _markdown(name, grid, heads, notes),
        ".tex": _latex(grid, heads, notes),
        ".html": _html(
            name,
            grid,
            heads,
            notes,
            findings.asked(configuration(results, ablations[0])),
            findings.findings(lines),
        ),
    }
    for suffix, text in texts.items():
        stem.with_suffix(suffix).write_text(text, encoding="utf-8")
    write_json_atomic(stem.with_suffix(".json"), _metrics(rows))


def scores(results: str | Path, ablations: Sequence[str]) -> pd.DataFrame:
    """One line per ablation, seed and benchmark: score, blind, majority, chance; and `share`,
    whether the score is one of 0 to 1 (a metric of lm-eval's own may have another scale).

    A seed or a benchmark that the ablation's configuration names but no evaluation holds has empty
    scores. Raises FileNotFoundError if there is no evaluation at all.
    """
    lines = []
    for id in ablations:
        runs = Path(results) / "runs" / id
        files = {int(f.parent.name[4:]): f for f in runs.glob("seed*/eval.json")}
        evaluations = {seed: _read(file)["benchmarks"] for seed, file in files.items()}
        asked = configuration(results, id)
        seeds = asked.get("seeds") or sorted(evaluations)
        known = dict.fromkeys(b for found in evaluations.values() for b in found)
        benchmarks = asked.get("evaluate", {}).get("benchmarks") or list(known)
        for seed in seeds:
            for benchmark in benchmarks:
                found = evaluations.get(seed, {}).get(benchmark, {})
                values = {key: found.get(key) for key in ("score", "blind", "majority", "chance")}
                values["share"] = found.get("share", True)
                lines.append({"ablation": id, "seed": seed, "benchmark": benchmark, **values})
    frame = pd.DataFrame(lines)
    if frame.empty or frame["score"].isna().all():
        where = Path(results) / "runs" / f"{{{','.join(ablations)}}}"
        raise FileNotFoundError(f"{where}/seed*/eval.json: no evaluation yet; run snakemake first")
    return frame.astype({key: float for key in ("score", "blind", "majority", "chance")})


def compare(
    found: pd.DataFrame, results: str | Path, bases: Mapping[str, str], group: str
) -> dict[str, Row]:
    """id -> row of cells: each benchmark, average, blind, retention and the cost ratios; `bases`:
    id -> the id that it is compared with.

    A score is {"mean", "sd", "seeds"}, the retention {"mean", "low", "high"}; or it is `missing`.
    Average and blind are over the benchmarks whose scores are shares; `n/a` if there is none, or
    for blind if an evaluation leaves it out.
    """
    benchmarks = list(dict.fromkeys(found["benchmark"]))
    shares = [name for name in benchmarks if name not in other_scales(found)]
    timed = _bench(results, group)

    def of(id: str, key: str) -> pd.DataFrame:  # [seeds, benchmarks]
        lines = found[found["ablation"] == id]
        wide = lines.pivot(index="seed", columns="benchmark", values=key)
        return wide.reindex(columns=benchmarks)

    rows = {}
    for id, base in bases.items():
        seen, blind = of(id, "score"), of(id, "blind")
        row: Row = {name: _spread(seen[name]) for name in benchmarks}
        row["average"] = _average(seen[shares])
        left_out = (seen[shares].notna() & blind[shares].isna()).any(axis=None)
        row["blind"] = UNDEFINED if left_out else _average(blind[shares])
        row["retention"] = _retention(seen, of(base, "score"))
        rows[id] = row | _cost(timed, id, base)
    return rows


def other_scales(found: pd.DataFrame) -> list[str]:
    """The benchmarks of which a score is no share of 0 to 1."""
    return list(dict.fromkeys(found[~found["share"]]["benchmark"]))


def _average(values: pd.DataFrame) -> Row | str:
    return UNDEFINED if values.columns.empty else _spread(values.mean(axis=1, skipna=False))


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
    results: Path, bases: Mapping[str, str], found: pd.DataFrame, names: Mapping[str, str]
) -> list[str]:
    """Lines under a table: how to read it; command, commit and configuration; what is missing."""
    gone = found[found["score"].isna()].groupby(["ablation", "seed"], sort=False)["benchmark"]
    lost = [f"{id} seed {seed} ({', '.join(group)})" for (id, seed), group in gone]
    lost += [f"{id} (all)" for id in bases if id not in set(found["ablation"])]
    configs = {id: configuration(results, id) for id in bases}
    git = provenance.git()
    commit = (git["commit"] or f"unknown ({git['note']})") + " with edits" * bool(git["dirty"])
    seeds = ", ".join(str(seed) for seed in sorted(set(found["seed"])))
    lines = [
        NOTE.format(base=" or ".join(names[id] for id in dict.fromkeys(bases.values()))),
        *_scales(found),
        f"Command: `{provenance.command_line()}`",
        f"Commit: {commit}",
        f"Configuration: {results}/configs/{{{','.join(bases)}}}.yaml, "
        f"SHA-256 {sha256_json(configs)[:16]}",
        f"Seeds: {seeds}",
        *_precisions(results, list(bases)),
    ]
    return [*lines, f"Missing: {'; '.join(lost)}"] if lost else lines


def _scales(found: pd.DataFrame) -> list[str]:
    others = other_scales(found)
    said = f"On scales of their own, so not in % and not in Average and Blind: {', '.join(others)}"
    return [said] if others else []


def _precisions(results: Path, ablations: Sequence[str]) -> list[str]:
    """What the last stages were computed in, by manifest: some machines make fp32 of bf16."""
    of: dict[str, dict[str, None]] = {}
    for id in ablations:
        *_, last = stages(results, id)
        for file in sorted((results / "runs" / id).glob(f"seed*/{last}.json")):
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
) -> tuple[pd.DataFrame, list[int]]:
    """Rounded cells, with the reference lines majority and chance at the end, and which rows are
    heads over those that follow."""
    keys = list(next(iter(rows.values())))
    known = COLUMNS | NAMES
    head = ["Method", *(known.get(key, key.replace("_", " ").capitalize()) for key in keys)]
    factor = dict.fromkeys(other_scales(found), 1)  # shares are shown in %
    body, heads, last = [], [], None
    for id, row in rows.items():
        if sources.get(id) != last:
            last = sources.get(id)
            heads.append(len(body))
            body.append([SOURCES[last], *[""] * len(keys)])
        body.append([names[id], *(_rounded(row[key], factor.get(key, 100)) for key in keys)])
    for label, column in (("Majority answer", "majority"), ("Chance", "chance")):
        cells = [_reference(found, key, column) for key in keys if key not in COLUMNS]
        average = UNDEFINED if UNDEFINED in cells else pd.Series(cells).mean(skipna=False)
        empty = [""] * (len(COLUMNS) - 1)
        body.append([label, *map(_shown, [*cells, average]), *empty])
    return pd.DataFrame(body, columns=head), heads


def _reference(found: pd.DataFrame, benchmark: str, column: str) -> Cell:
    """The mean of a column for a benchmark; n/a where it was asked and has none of this."""
    lines = found[found["benchmark"] == benchmark]
    if lines["score"].notna().any() and lines[column].isna().all():
        return UNDEFINED
    return lines[column].mean()


def _rounded(cell: Any, factor: int) -> str:
    if not isinstance(cell, dict):
        return _shown(cell, 1, 2)
    if "low" in cell:
        span = f"{_shown(cell['low'])} to {_shown(cell['high'])}"
        return f"{_shown(cell['mean'])} ({UNDEFINED if UNDEFINED in span else span})"
    return f"{_shown(cell['mean'], factor)} ± {_shown(cell['sd'], factor)}"


def _shown(cell: Any, factor: int = 100, digits: int = 1) -> str:
    """A number (also as text) rounded, by default in percent; `missing` and `n/a` as they are."""
    if cell in (MISSING, UNDEFINED):
        return cell
    return MISSING if pd.isna(cell) else f"{factor * float(cell):.{digits}f}"


def _markdown(name: str, grid: pd.DataFrame, heads: list[int], notes: list[str]) -> str:
    grid = grid.map(lambda cell: cell.replace("|", r"\|"))
    grid.loc[heads, "Method"] = "*" + grid.loc[heads, "Method"] + "*"
    plain = {"stralign": None, "numalign": None, "disable_numparse": True}
    lines = grid.to_markdown(index=False, tablefmt=MARKDOWN, **plain)
    return "\n".join([f"### {name.capitalize()}", "", lines, "", *(f"- {n}" for n in notes), ""])


def _latex(grid: pd.DataFrame, heads: list[int], notes: list[str]) -> str:
    style = (
        grid.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    )
    style.map(lambda _: "emph:--rwrap;", subset=pd.IndexSlice[heads, ["Method"]])
    text = style.to_latex(hrules=True, column_format="l" + "r" * (len(grid.columns) - 1))
    above, majority, below = text.replace("±", r"$\pm$").rpartition("Majority answer")
    return "".join([*(f"% {note}\n" for note in notes), above, "\\midrule\n", majority, below])


def _html(
    name: str,
    grid: pd.DataFrame,
    heads: list[int],
    notes: list[str],
    asked: Mapping[str, list[str]],
    found: Mapping[str, list[str]],
) -> str:
    """A part of a page: what was asked, what was found, the table, the lines under it."""
    style = grid.style.hide(axis="index").format(escape="html").format_index(escape="html", axis=1)
    head = {"font-style": "italic", "padding-top": "8px"}
    style.set_properties(subset=pd.IndexSlice[heads, ["Method"]], **head)
    style.set_properties(subset=pd.IndexSlice[grid.index[-2:], :], color="gray")
    style.set_table_styles(PAGE_STYLE)

    def listed(lines: Mapping[str, list[str]]) -> str:
        items = "".join(_item(line, under) for line, under in lines.items())
        return f"<ul>{items}</ul>"

    return "\n".join(
        [
            '<meta charset="utf-8"/>',
            '<div style="font: 14px sans-serif">',
            *(["<h2>What was asked</h2>", listed(asked)] if asked else []),
            "<h2>What was found</h2>",
            listed(found),
            f"<h2>Table {html.escape(name)}</h2>",
            f'<div style="overflow-x: auto">{style.to_html(table_uuid=name, cell_ids=False)}</div>',
            f'<div style="font-size: 12px">{listed({note: [] for note in notes})}</div>',
            "</div>",
            "",
        ]
    )


def _item(line: str, under: list[str]) -> str:
    below = f"<ul>{''.join(_item(inner, []) for inner in under)}</ul>" if under else ""
    return f"<li>{html.escape(line)}{below}</li>\n"


def _bench(results: str | Path, group: str) -> dict[str, Any]:
    file = Path(results) / "bench" / f"{group}.json"
    return _read(file)["variants"] if file.exists() else {}


def configuration(results: str | Path, id: str) -> dict[str, Any]:
    """The resolved configuration of an ablation, without the stages that it takes out; empty if the
    workflow has not written one."""
    file = Path(results) / "configs" / f"{id}.yaml"
    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "stages" in found:
        found["stages"] = {n: block for n, block in found["stages"].items() if block is not None}
    return found


def stages(results: str | Path, id: str) -> list[str]:
    """The stages of an ablation, in order of training. Results of before they had names of their
    own, and those without a configuration, have the two that all had."""
    return list(configuration(results, id).get("stages", ("align", "instruct")))


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error}); delete it and run snakemake again") from None
