"""The reference results are what the docs quote; tables and figures follow from them."""

import json
from pathlib import Path
from statistics import fmean

import campaign
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import norm

from sts.pipeline import plan
from sts.pipeline.report import figures, tables
from sts.pipeline.report.results import MISSING

ROOT = Path(__file__).resolve().parents[2]
REFERENCES = ROOT / "results" / "reference"
REFERENCE = REFERENCES / "mini"
PAGE = ROOT / "docs/results.md"
TABLES = sorted(REFERENCES.glob("*/tables/*.md"))


def rows(file: Path) -> list[str]:
    """Lines of the tables of methods in a Markdown file; those of differences are narrower."""
    return [line for line in file.read_text().splitlines() if line.count("|") > 11]


def test_committed_results_name_no_host():
    files = [*REFERENCES.rglob("provenance.json")]
    assert files and not any("host" in json.loads(file.read_text()) for file in files)


def test_the_page_of_results_quotes_the_reference_table():
    assert rows(PAGE) == rows(REFERENCE / "tables/main.md")


EQUAL_TIME = REFERENCES / "mini_bf16/tables/equal_time"
# Rows of README's table
HEADLINE = {
    "Dense": "dense",
    "Dense, with the time of STS": "dense_short",
    "**STS**": "sts",
    "STS, with the time of dense": "sts_long",
}


def test_the_page_quotes_the_differences_of_equal_time():
    _, differences = EQUAL_TIME.with_suffix(".md").read_text().split("### Differences")
    lines = [line for line in differences.splitlines() if line.startswith("|")]
    assert len(lines) == 6 and set(lines) <= set(PAGE.read_text().splitlines())
    alone = pd.read_csv(EQUAL_TIME.with_name("main.csv")).set_index("ablation").loc[["vtc", "lds"]]
    for row in alone.to_dict("records"):
        loss, low, high = (row[f"loss_difference{end}"] for end in ("", "_low", "_high"))
        assert f"{loss:+.3f} ({low:+.3f} to {high:+.3f})" in PAGE.read_text()


def correlation(first: list[float], second: list[float]) -> str:
    """With its 95 % interval by Fisher's z."""
    r = np.corrcoef(first, second)[0, 1]
    half = norm.ppf(0.975) / (len(first) - 3) ** 0.5
    low, high = np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half)
    return f"{r:.2f} ({low:.2f} to {high:.2f})"


def test_the_page_quotes_what_the_spread_of_the_seeds_goes_with():
    def of_runs(id: str, name: str) -> list[dict]:
        runs = EQUAL_TIME.parents[1] / "runs" / id
        return [json.loads(file.read_text()) for file in sorted(runs.glob(f"seed*/{name}.json"))]

    loss, short = (
        [run["held_out"][-1]["loss"] for run in of_runs(id, "instruct")]
        for id in ("dense", "dense_short")
    )
    align = [run["final_loss"] for run in of_runs("dense", "align")]
    score = [
        fmean(entry["score"] for entry in run["benchmarks"].values())
        for run in of_runs("dense", "eval")
    ]
    text = PAGE.read_text()
    for pair in ((align, score), (align, loss), (loss, short)):
        assert correlation(*pair) in text


def test_the_readme_quotes_the_table_of_equal_time():
    table = pd.read_csv(EQUAL_TIME.with_suffix(".csv")).set_index("ablation")
    lines = (ROOT / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    rows_by_name = {row[0]: row[1:] for row in cells if len(row) == 6}
    for name, id in HEADLINE.items():
        row = table.loc[id]
        low, mean, high = (percent(row[f"retention{end}"]) for end in ("_low", "", "_high"))
        to_loss = row["time_to_loss"]
        assert rows_by_name[name] == [
            f"{row['loss']:.3f} ± {row['loss_sd']:.3f}",
            average(row),
            "100" if id == "dense" else f"{mean} ({low} to {high})",
            f"{row['time_ratio']:.2f}",
            "never"
            if pd.isna(to_loss)
            else f"{to_loss:.2f}, {row['time_to_loss_n']:.0f} of {row['average_seeds']:.0f}",
        ]


def test_the_numbers_on_top_of_the_readme_are_of_the_table_of_equal_time():
    """Each with its interval: time, held-out loss at equal time in both ways of asking."""
    text = (ROOT / "README.md").read_text()
    top = text[: text.index("```python")]
    table = pd.read_csv(EQUAL_TIME.with_suffix(".csv")).set_index("ablation")
    assert f"**x {table.loc['sts', 'time_ratio']:.2f} of the time**" in top
    row = table.loc["sts_long"]
    ends = [f"{row[f'loss_difference{end}']:+.3f}" for end in ("", "_low", "_high")]
    assert f"**{ends[0]} nats** ({ends[1]} to {ends[2]})" in top
    _, differences = EQUAL_TIME.with_suffix(".md").read_text().split("### Differences")
    last = [line for line in differences.splitlines() if line.startswith("|")][-1]
    loss = last.split(" | ")[3]
    assert f"**{loss.partition(' ')[0]} nats** {loss.partition(' ')[2]}" in top


# Rows of the page's two digests, and the ablations that they are of: one, or dense and sparse
CONTROL = {
    "Dense": "dense",
    "Dense, fewer steps": "dense_short",
    "STS": "sts",
    "VTC and LDS in both stages (v1)": "v1",
    "2-D pooling to 1/4, block influence (ours)": "sts_pool",
}
FAMILIES = {
    "LLaVA (CLIP tower)": ("dense", "sts"),
    "LLaVA-NeXT (tiles, newlines)": ("next_dense", "next_sts"),
    "Idefics3 (pixel shuffle)": ("idefics3_dense", "idefics3_sts"),
    "Qwen2.5-VL (any resolution, M-RoPE)": ("qwen_dense", "qwen_sts"),
}


def quoted(width: int) -> dict[str, list[str]]:
    """Rows of the page's tables that have so many cells, by the first one."""
    lines = PAGE.read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells if len(row) == width}


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def average(row: pd.Series) -> str:
    return f"{percent(row['average'])} ± {percent(row['average_sd'])}"


def costs(row: pd.Series) -> list[str]:
    return [f"{row[name]:.2f}" for name in ("time_ratio", "flops_ratio")]


def test_the_page_compares_with_training_less_as_the_reference_does():
    table = pd.read_csv(REFERENCE / "tables/components.csv").set_index("ablation")
    found = quoted(5)
    for label, id in CONTROL.items():
        files = sorted((REFERENCE / "runs" / id).glob("seed*/eval.json"))
        results = [json.loads(file.read_text())["benchmarks"].values() for file in files]
        seeds = ", ".join(percent(fmean(one["score"] for one in result)) for result in results)
        row = table.loc[id]
        assert found[label] == [average(row), seeds, *costs(row)]


def test_the_page_compares_architectures_as_the_reference_does():
    file = REFERENCES / "mini_architectures/tables/architectures.csv"
    table, found = pd.read_csv(file).set_index("ablation"), quoted(7)
    for label, (dense, sparse) in FAMILIES.items():
        base, row = table.loc[dense], table.loc[sparse]
        sees = ", ".join(percent(base[name]) for name in ("existence", "colour", "shape"))
        low, mean, high = (percent(row[f"retention{end}"]) for end in ("_low", "", "_high"))
        kept = f"{mean} ({low} to {high})"
        assert found[label] == [sees, average(base), average(row), kept, *costs(row)]


def shown(table: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(label, source) of each ablation that a table shows, by id."""
    lines = pd.read_csv(table).set_index("ablation")
    return lines["method"].to_dict(), lines["source"].to_dict()


@pytest.mark.parametrize("file", TABLES, ids=lambda file: f"{file.parts[-3]}-{file.stem}")
def test_a_reference_table_follows_from_the_reference_runs(file, tmp_path):
    name, folder = file.stem, file.parents[1]
    labels, sources = shown(file.with_suffix(".csv"))
    bases = pd.read_csv(file.with_suffix(".csv")).set_index("ablation").get("relative_to")
    bases = None if bases is None else bases.to_dict()
    tables.table(name, folder, list(labels), tmp_path / name, labels, sources, bases)
    assert rows(tmp_path / f"{name}.md") == rows(file)
    assert MISSING not in file.read_text()


def test_the_tables_that_the_page_links_are_among_them():
    shown = {
        "main",
        "equal_time",
        "components",
        "compressor",
        "skipper",
        "architectures",
        "real_lm",
    }
    assert {file.stem for file in TABLES} == shown


@pytest.mark.parametrize("name", ["pareto", "tokens"])  # the others need the histories
def test_a_reference_figure_follows_from_the_reference_results(name, tmp_path):
    labels, _ = shown(REFERENCE / "tables/main.csv")
    figures.figure(name, REFERENCE, list(labels), tmp_path / name, labels)
    drawn, kept = (
        np.asarray(Image.open(folder / f"{name}.png").convert("RGB"), dtype=int)
        for folder in (tmp_path, REFERENCE / "figures")
    )
    assert drawn.shape == kept.shape
    assert abs(drawn - kept).max() <= 1  # of 255


@pytest.mark.parametrize("name", plan.figures())
def test_every_figure_is_there(name):
    assert (REFERENCE / f"figures/{name}.svg").stat().st_size > 1000


def test_the_page_quotes_what_was_survived():
    faults = set()
    for name in ("survival", "survival_spoilt"):
        found = json.loads((REFERENCES / f"{name}.json").read_text())
        trials = found["trials"]
        assert not found["not tried"] and all(trial["survived"] for trial in trials)
        faults |= {trial["fault"] for trial in trials}
        lines = (REFERENCES / f"{name}.md").read_text().splitlines()
        table = [line for line in lines if line.startswith("|")]
        assert sum(int(row.split("|")[3]) for row in table[2:]) == len(trials)
        assert "\n".join(table) in (ROOT / "docs/workflow.md").read_text()
    assert faults == {*campaign.FAULTS}
