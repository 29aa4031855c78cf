"""The reference results are what the README quotes; tables and figures follow from them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sts.pipeline import figures, tables

ROOT = Path(__file__).resolve().parents[2]
REFERENCES = ROOT / "results" / "reference"
REFERENCE = REFERENCES / "mini"
TABLES = sorted(REFERENCES.glob("*/tables/*.md"))


def rows(file: Path) -> list[str]:
    """Lines of the tables in a Markdown file that have the columns of ours."""
    return [line for line in file.read_text().splitlines() if line.count("|") > 10]


def test_the_readme_quotes_the_reference_table():
    assert rows(ROOT / "README.md") == rows(REFERENCE / "tables/main.md")


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
    assert tables.MISSING not in file.read_text()


def test_the_tables_that_the_readme_links_are_among_them():
    shown = {"main", "components", "compressor", "skipper", "architectures", "real_lm"}
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


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_there(name):
    assert (REFERENCE / f"figures/{name}.svg").stat().st_size > 1000
