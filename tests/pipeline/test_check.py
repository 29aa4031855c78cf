"""Results held against a reference: each verdict, by hand."""

import csv
import shutil

import pytest
from made_results import make, make_results

from sts.__main__ import main
from sts.pipeline.report.check import check


@pytest.fixture
def both(tmp_path):
    """(results, reference), which are equal."""
    results = make_results(tmp_path / "results/mini")
    make(results, "dense", "sts")
    return results, shutil.copytree(results, tmp_path / "reference/mini")


def change(results, id, **cells):
    file = results / "tables/main.csv"
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    for row in rows:
        row.update(cells if row["ablation"] == id else {})
    with file.open("w") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader(), writer.writerows(rows)


def test_equal_results_are_equal(both, capsys):
    lines, agrees = check(*both)
    assert agrees and lines[-1] == "Verdict: every number is the reference's."
    assert not main(["check", "--results", str(both[0]), "--reference", str(both[1])])
    assert "Verdict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cells", "agrees", "words"),
    [
        # six seeds each with a deviation of 0.01: t(0.9995, 10) = 4.587 times 0.01 (2 / 6)^1/2
        ({"colour": 0.876}, True, "no more than seeds and machines"),
        ({"colour": 0.877}, False, "sts colour: outside: 0.877, in the reference"),
        ({"time_ratio": 0.84}, True, "no more than"),
        ({"time_ratio": 0.9}, False, "sts time_ratio: outside: 0.9, in the reference 0.8 (up to"),
        ({"colour": "missing"}, True, "sts colour: missing here, 0.85 in the reference"),
        ({"ablation": "other"}, True, "sts: no such row here"),
        ({"colour": 0.7, "colour_sd": "n/a", "colour_seeds": 1}, True, "one seed says nothing"),
    ],
)
def test_a_number_is_within_or_outside_what_seeds_and_machines_differ_by(
    both, cells, agrees, words
):
    results, reference = both
    for folder in both:
        change(folder, "sts", colour=0.85, colour_sd=0.01, colour_seeds=6)
    change(results, "sts", **cells)
    lines, does_agree = check(results, reference)
    assert does_agree == agrees and words in "\n".join(lines)


def test_what_was_not_made_is_named_and_nothing_to_compare_is_no_agreement(both):
    results, reference = both
    (results / "tables/main.csv").unlink()
    lines, agrees = check(results, reference)
    assert not agrees and lines[0] == "main: not made here"
    shutil.rmtree(reference / "tables")
    with pytest.raises(FileNotFoundError, match=r"tables/\*.csv: no such reference"):
        check(results, reference)


def test_another_precision_is_named_as_a_reason(both):
    for folder, precision in zip(both, ("bf16", "fp32"), strict=True):
        file = folder / "runs/sts/seed0/instruct.json"
        file.write_text(f'{{"precision": "{precision}"}}')
    lines, _ = check(*both)
    assert "precision: bf16; reference: fp32" in lines
