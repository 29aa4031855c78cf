"""Tables from result files: CSV at full precision, Markdown, LaTeX, a page of HTML with what was
found, and numbers for `dvc metrics`.

    python -m sts table --name main --results results/mini --ablations dense vtc lds sts \
        --out-stem results/mini/tables/main

A method is compared with the first one, or with the one that it is said to be relative to. A cell
is a number, `missing` (its job has no result) or `n/a` (not defined: a deviation of one seed, a
saving of nothing). Nothing that was asked for is dropped, and nothing missing counts as 0.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sts.pipeline.files import json_text, read_json, sha256_json, write_text_atomic
from sts.pipeline.report.compare import COSTS, Cell, Row, compare
from sts.pipeline.report.findings import configured, findings
from sts.pipeline.report.labels import (
    Labels,
    code,
    label_by_id,
    of_csv,
    of_latex_line,
    of_markdown,
)
from sts.pipeline.report.paired import paired
from sts.pipeline.report.results import (
    MISSING,
    UNDEFINED,
    configuration,
    other_scales,
    scores,
    stages_of,
)
from sts.pipeline.run import provenance

# source of an ablation -> the head under which its row stands
HEADS = {"baseline": "Baselines", "paper": "The paper's", "ours": "Ours", "peers": "Peers'"}
COLUMNS = {
    "loss": "Loss", "average": "Average", "blind": "Blind", "retention": "Retention",
    "time_ratio": "Time", "flops_ratio": "FLOPs", "realisation": "Realisation",
}  # fmt: skip
NAMES = {  # of benchmarks that are not written as words are
    "pope": "POPE", "gqa": "GQA", "scienceqa_img": "ScienceQA-IMG", "textvqa": "TextVQA",
    "textvqa_ocr": "TextVQA, OCR", "vqav2": "VQAv2", "vizwiz": "VizWiz", "mme_perception": "MME P",
    "mme_cognition": "MME C", "seed_image": "SEED-Image", "mmbench_en": "MMBench EN",
    "mmbench_cn": "MMBench CN", "chartqa": "ChartQA", "mmmu_val": "MMMU",
}  # fmt: skip
NOTE = (
    "Scores in %, mean ± sd over seeds. Loss: of held-out questions, in nats per answer token. "
    "Blind: average with a grey image. Retention: average / average of {base}, paired by seed, "
    "with a 95 % t interval of its logarithm. Time, FLOPs: of training, relative to {base}. "
    "Realisation: (1 - time) / (1 - FLOPs)."
)
NARROW = ("loss", "average", "retention", "time_ratio", "flops_ratio")
LATEX_NEEDS = (
    r"% Needs: \usepackage{booktabs,siunitx} \sisetup{separate-uncertainty}. "
    r"Narrow, without the benchmarks: \def\stsnarrow{} before \input."
    "\n"
)
WRAPPED = r">{\raggedright\arraybackslash}p{0.25\linewidth}"  # names in a narrow table
INTERVAL = r"(?<=\d)(?: to )(?=-?\d)"
MEASURED = re.compile(r"(-?\d+)\.(\d+)(?: ± ([\d.]+))?")  # a number, with its deviation
FIRST_COLUMN = "text-align: left; white-space: normal; min-width: 12em"
PAGE_STYLE = [
    {"selector": "", "props": "border-collapse: collapse; font: 12px sans-serif"},
    {"selector": "th, td", "props": "padding: 3px 5px; text-align: right; white-space: nowrap"},
    {"selector": "th", "props": "border-bottom: 1px solid; text-align: right"},
    {"selector": "th:first-child, td:first-child", "props": FIRST_COLUMN},
]


def table(
    name: str,
    results: str | Path,
    ablations: Sequence[str],
    out_stem: str | Path,
    labels: Labels | None = None,
    sources: Mapping[str, str] | None = None,
    relative_to: Mapping[str, str] | None = None,
    beside: Sequence[tuple[str, str]] = (),
) -> None:
    """Write `out_stem`.csv, .md, .tex, .html and .json from the result files of `ablations`.

    Args:
        name: The table; times and FLOPs come from bench/`name`.json.
        results: Folder of a scale's results.
        ablations: The methods to show, in this order.
        labels: Their names, by default their ids.
        sources: A key of HEADS each, in whose order the methods then stand. Methods that are
            compared with different ones have no heads.
        relative_to: id of the method that each is compared with, by default the first.
        beside: More pairs of methods that are compared, such as two of equal time.

    Raises:
        FileNotFoundError: No method has an evaluation at all.
    """
    results, stem = Path(results), Path(out_stem)
    bases = dict.fromkeys(ablations, ablations[0]) | dict(relative_to or {})
    sources = sources if sources and len(set(bases.values())) == 1 else {}
    lines = scores(results, ablations)
    rows = compare(lines, results, bases, name)
    if sources:
        rows = {id: rows[id] for id in sorted(rows, key=lambda id: [*HEADS].index(sources[id]))}
    names = label_by_id(ablations, labels)
    numbers = pd.DataFrame(
        {"ablation": id, "method": names[id], "source": sources.get(id), "relative_to": bases[id]}
        | row
        for id, row in rows.items()
    )
    notes = _notes(results, bases, lines)
    base = " or ".join(names[id] for id in dict.fromkeys(bases.values()))
    plain, marked = ([NOTE.format(base=text), *notes] for text in (base, of_markdown(base)))
    grid, heads = _grid(rows, lines, names, sources)
    pairs = [(id, base, rows[id]) for id, base in bases.items() if id != base]
    pairs += [(a, b, compare(lines, results, {b: b, a: b}, name)[a]) for a, b in beside]
    differences = paired(pairs, names)
    lists = {
        "What was asked": configured(configuration(results, ablations[0])),
        "What was found": findings(numbers),
    }
    texts = {
        ".json": json_text({id: _numbers(row) for id, row in rows.items()}),
        ".csv": csv_text(numbers),
        ".md": page(name, grid, marked, heads) + _second_page(*differences),
        ".tex": _latex(grid, heads, plain),
        ".html": _html(name, grid, heads, plain, lists) + _second_html(*differences),
    }
    for suffix, text in texts.items():
        write_text_atomic(stem.with_suffix(suffix), text)


def _numbers(row: Row) -> Row:
    """The cells that are numbers, which `dvc metrics diff` compares."""
    return {key: cell for key, cell in row.items() if not isinstance(cell, str)}


# ---- the lines under a table ------------------------------------------------------------------


def _notes(results: Path, bases: Mapping[str, str], lines: pd.DataFrame) -> list[str]:
    """A table's command, commit and configuration; what is missing."""
    configs = {id: configuration(results, id) for id in bases}
    git = provenance.git()
    commit = (git["commit"] or f"unknown ({git['note']})") + " with edits" * bool(git["dirty"])
    notes = []
    if others := ", ".join(other_scales(lines)):
        notes += [f"On scales of their own, so not in % and not in Average and Blind: {others}"]
    notes += [
        f"Command: {code(provenance.command_line())}",
        f"Commit: {commit}",
        f"Configuration: {results}/configs/{{{','.join(bases)}}}.yaml, "
        f"SHA-256 {sha256_json(configs)[:16]}",
        f"Seeds: {', '.join(map(str, sorted(set(lines['seed']))))}",
        *_precisions(results, list(bases)),
    ]
    if gaps := _gaps(lines, list(bases)):
        notes += [f"Missing: {'; '.join(gaps)}"]
    return notes


def _gaps(lines: pd.DataFrame, ablations: Sequence[str]) -> list[str]:
    """What has no score: seeds with their benchmarks, whole methods."""
    empty = lines[lines["score"].isna()].groupby(["ablation", "seed"], sort=False)["benchmark"]
    gaps = [f"{id} seed {seed} ({', '.join(names)})" for (id, seed), names in empty]
    return gaps + [f"{id} (all)" for id in ablations if id not in set(lines["ablation"])]


def _precisions(results: Path, ablations: Sequence[str]) -> list[str]:
    """What the last stages were computed in, by manifest: some machines make fp32 of bf16."""
    ids_by_precision: dict[str | None, dict[str, None]] = {}
    for id in ablations:
        *_, last = stages_of(results, id)
        for file in sorted((results / "runs" / id).glob(f"seed*/{last}.json")):
            ids_by_precision.setdefault(read_json(file).get("precision"), {})[id] = None
    ids_by_precision.pop(None, None)
    if len(ids_by_precision) > 1:
        each = "; ".join(f"{name} {', '.join(ids)}" for name, ids in ids_by_precision.items())
        return [f"Precision: not the same for all, so compare with care: {each}"]
    return [f"Precision: {precision}" for precision in ids_by_precision]


# ---- what is printed --------------------------------------------------------------------------


def _grid(
    rows: Mapping[str, Row],
    lines: pd.DataFrame,
    names: Mapping[str, str],
    sources: Mapping[str, str],
) -> tuple[pd.DataFrame, list[int]]:
    """Rounded cells, with the reference lines majority and chance at the end, and which rows are
    heads over those that follow."""
    benchmarks = list(dict.fromkeys(lines["benchmark"]))
    keys = [*benchmarks, *COLUMNS]
    titles = COLUMNS | NAMES
    if all(row["loss"] == UNDEFINED for row in rows.values()):  # not measured, as of old runs
        keys.remove("loss")
    columns = ["Method", *(titles.get(key, key.replace("_", " ").capitalize()) for key in keys)]
    factor = dict.fromkeys(other_scales(lines), 1)  # shares are shown in %
    body, heads, source = [], [], None
    for id, row in rows.items():
        if sources.get(id) != source:
            source = sources.get(id)
            heads.append(len(body))
            body.append([HEADS[source], *[""] * len(keys)])
        body.append([names[id], *(_rounded(row, key, factor.get(key, 100)) for key in keys)])
    for label, value in (("Majority answer", "majority"), ("Chance", "chance")):
        cells = [_control(lines, name, value) for name in benchmarks]
        average = UNDEFINED if UNDEFINED in cells else pd.Series(cells).mean(skipna=False)
        of_row = dict(zip([*benchmarks, "average"], [*cells, average], strict=True))
        body.append([label, *(_number(of_row[key]) if key in of_row else "" for key in keys)])
    return pd.DataFrame(body, columns=columns), heads


def _control(lines: pd.DataFrame, benchmark: str, value: str) -> Cell:
    """The mean of a value for a benchmark; n/a where it was asked and has none of this."""
    lines = lines[lines["benchmark"] == benchmark]
    if lines["score"].notna().any() and lines[value].isna().all():
        return UNDEFINED
    return lines[value].mean()


def _rounded(row: Row, key: str, factor: int) -> str:
    """A cell with its spread or interval."""
    if key in COSTS:
        return _number(row[key], 1, 2)
    factor, digits = (1, 3) if key == "loss" else (factor, 1)
    text = _number(row[key], factor, digits)
    if f"{key}_sd" in row:
        return f"{text} ± {_number(row[f'{key}_sd'], factor, digits)}"
    if f"{key}_low" in row:
        low, high = (_number(row[f"{key}_{end}"]) for end in ("low", "high"))
        return f"{text} ({low if low == UNDEFINED else f'{low} to {high}'})"
    return text


def _number(cell: Any, factor: int = 100, digits: int = 1) -> str:
    """A number (also as text) rounded, by default in percent; `missing` and `n/a` as they are."""
    if cell in (MISSING, UNDEFINED):
        return cell
    return MISSING if pd.isna(cell) else f"{factor * float(cell):.{digits}f}"


def csv_text(rows: pd.DataFrame) -> str:
    """Rows as CSV, in which no text is a spreadsheet's formula."""
    texts = rows.map(lambda cell: of_csv(cell) if isinstance(cell, str) else cell)
    return texts.to_csv(index=False, na_rep=UNDEFINED)


def page(name: str, grid: pd.DataFrame, notes: list[str], heads: Sequence[int] = ()) -> str:
    """A table of texts as Markdown, with the lines under it; no cell is filled to a width.
    heads: Numbers of the rows that are heads over those that follow."""
    grid = grid.map(of_markdown).rename(columns=of_markdown)
    for row in heads:
        grid.iloc[row, 0] = f"*{grid.iloc[row, 0]}*"
    title, *rows = (f"| {' | '.join(row)} |" for row in [grid.columns, *grid.to_numpy()])
    rule = "| :-- |" + " --: |" * (len(grid.columns) - 1)
    listed = [f"- {note}" for note in notes]
    return "\n".join([f"### {name.capitalize()}", "", title, rule, *rows, "", *listed, ""])


def _second_page(grid: pd.DataFrame, notes: list[str]) -> str:
    return "\n" + page("differences, paired by seed", grid, notes) if notes else ""


def _second_html(grid: pd.DataFrame, notes: list[str]) -> str:
    if not notes:
        return ""
    return _block("paired", "Differences, paired by seed", _styled(grid, "html"), notes)


def _styled(grid: pd.DataFrame, escape: str) -> Any:
    return grid.style.hide(axis="index").format(escape=escape).format_index(escape=escape, axis=1)


def _latex(grid: pd.DataFrame, heads: list[int], notes: list[str]) -> str:
    """A table for a paper with booktabs and siunitx: all columns, or without the benchmarks where
    the paper has said `\\def\\stsnarrow{}`. A column without any value is left out."""
    cells = grid.map(_of_paper)
    used = [name for name in grid if set(cells[name]) - {"", "--"}]
    narrow = [name for name in ("Method", *map(COLUMNS.get, NARROW)) if name in used]
    tabulars = (_tabular(cells[narrow], heads, WRAPPED), _tabular(cells[used], heads, "l"))
    text = "\\ifdefined\\stsnarrow\n{}\\else\n{}\\fi\n".format(*tabulars)
    return "".join([*(f"% {note}\n" for note in notes), LATEX_NEEDS, text])


def _of_paper(cell: str) -> str:
    """A cell without the deviation or interval that one seed does not have; a dash for `n/a`."""
    text = cell.removesuffix(f" ± {UNDEFINED}").removesuffix(f" ({UNDEFINED})")
    return "--" if text == UNDEFINED else re.sub(INTERVAL, "--", text)


def _tabular(cells: pd.DataFrame, heads: list[int], first: str) -> str:
    formats = {name: _number_format(cells[name]) for name in cells.columns[1:]}
    style = cells.style.hide(axis="index").format_index(escape="latex", axis=1)
    style.format(escape="latex")
    style.format(_of_siunitx, escape="latex", subset=list(formats))
    style.map(lambda _: "emph:--rwrap;", subset=pd.IndexSlice[heads, ["Method"]])
    columns = "".join(f"S[{text}]" if text else "r" for text in formats.values())
    text = style.to_latex(hrules=True, column_format=first + columns, siunitx=True)
    text = "".join(map(of_latex_line, text.splitlines(keepends=True)))
    above, majority, below = text.rpartition("Majority answer")
    return f"{above}\\midrule\n{majority}{below}"


def _of_siunitx(cell: str) -> str:
    """A cell of a column of numbers: a number with its deviation, or text in braces."""
    return cell.replace("±", "+-") if MEASURED.fullmatch(cell) or not cell else f"{{{cell}}}"


def _number_format(cells: pd.Series) -> str:
    """What siunitx has to know to align a column at the point: digits before and after it, and of
    the deviation without it; empty for a column with intervals, which is no column of numbers."""
    numbers = [match for match in map(MEASURED.fullmatch, cells) if match]
    if not numbers or any("(" in cell for cell in cells):
        return ""
    before, after = (max(len(match[part]) for match in numbers) for part in (1, 2))
    deviation = max(len((match[3] or "").replace(".", "").lstrip("0")) for match in numbers)
    return f"table-format={before}.{after}" + f"({deviation})" * bool(deviation)


def _html(
    name: str,
    grid: pd.DataFrame,
    heads: list[int],
    notes: list[str],
    lists: Mapping[str, Mapping[str, Sequence[str]]],
) -> str:
    """A part of a page: lists by title, the table, the lines under it."""
    style = _styled(grid, "html")
    head = {"font-style": "italic", "padding-top": "8px"}
    style.set_properties(subset=pd.IndexSlice[heads, ["Method"]], **head)
    style.set_properties(subset=pd.IndexSlice[grid.index[-2:], :], color="gray")
    blocks = [f"<h2>{title}</h2>\n{_list(items)}\n" for title, items in lists.items() if items]
    text = _block(name, f"Table {name}", style, notes, "".join(blocks))
    return f'<meta charset="utf-8"/>\n{text}'


def _block(name: str, title: str, style: Any, notes: list[str], above: str = "") -> str:
    """A table under its title, and the lines under it."""
    table = style.set_table_styles(PAGE_STYLE).to_html(table_uuid=name, cell_ids=False)
    return f"""<div style="font: 14px sans-serif">
{above}<h2>{html.escape(title)}</h2>
<div style="overflow-x: auto">{table}</div>
<div style="font-size: 12px">{_list(dict.fromkeys(notes, ()))}</div>
</div>
"""


def _list(items: Mapping[str, Sequence[str]]) -> str:
    """Items, each with those under it, as a list of HTML."""
    lines = [
        f"<li>{html.escape(text)}{_list(dict.fromkeys(below, ())) if below else ''}</li>\n"
        for text, below in items.items()
    ]
    return f"<ul>{''.join(lines)}</ul>"
