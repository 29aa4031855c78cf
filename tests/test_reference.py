"""The reference results are what the README quotes, and their tables follow from their runs."""

from pathlib import Path

import pytest
from test_workflow import ROOT

from sts import tables
from sts.config import load_ablations

REFERENCE = ROOT / "results" / "reference" / "mini"


def rows(file: Path) -> list[str]:
    """Lines of the tables in a Markdown file that have the columns of ours."""
    return [line for line in file.read_text().splitlines() if line.count("|") > 10]


def test_the_readme_quotes_the_reference_table():
    assert rows(ROOT / "README.md") == rows(REFERENCE / "tables/main.md")


def test_the_reference_table_follows_from_the_reference_runs(tmp_path):
    entries = load_ablations(ROOT / "workflow/ablations.yaml").items()
    labels = {id: entry.label for id, entry in entries if "main" in entry.groups}
    tables.table("main", REFERENCE, list(labels), tmp_path / "main", labels)
    assert rows(tmp_path / "main.md") == rows(REFERENCE / "tables/main.md")


@pytest.mark.parametrize("name", ["pareto", "loss", "layers", "tokens"])
def test_every_figure_is_there(name):
    assert (REFERENCE / f"figures/{name}.svg").stat().st_size > 1000
