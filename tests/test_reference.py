"""The reference results are what the README quotes, and their tables follow from their runs."""

from pathlib import Path

import pytest
from test_workflow import ROOT

from sts import tables
from sts.config import load_ablations

REFERENCES = ROOT / "results" / "reference"
REFERENCE = REFERENCES / "mini"
TABLES = sorted(REFERENCES.glob("*/tables/*.md"))


def rows(file: Path) -> list[str]:
    """Lines of the tables in a Markdown file that have the columns of ours."""
    return [line for line in file.read_text().splitlines() if line.count("|") > 10]


def test_the_readme_quotes_the_reference_table():
    assert rows(ROOT / "README.md") == rows(REFERENCE / "tables/main.md")


@pytest.mark.parametrize("file", TABLES, ids=lambda file: f"{file.parts[-3]}-{file.stem}")
def test_a_reference_table_follows_from_the_reference_runs(file, tmp_path):
    name, folder = file.stem, file.parents[1]
    entries = load_ablations(ROOT / "workflow/ablations.yaml").items()
    labels = {id: entry.label for id, entry in entries if name in entry.groups}
    sources = {id: entry.source for id, entry in entries if name in entry.groups}
    tables.table(name, folder, list(labels), tmp_path / name, labels, sources=sources)
    assert rows(tmp_path / f"{name}.md") == rows(file)
    assert tables.MISSING not in file.read_text()


def test_every_table_of_the_workflow_is_among_them():
    assert {file.stem for file in TABLES} == {"main", "components", "compressor", "skipper"}


@pytest.mark.parametrize("name", ["pareto", "loss", "layers", "tokens"])
def test_every_figure_is_there(name):
    assert (REFERENCE / f"figures/{name}.svg").stat().st_size > 1000
