"""Published scores beside those obtained, with a verdict."""

from pathlib import Path

import pytest

from sts.__main__ import main
from sts.pipeline.config import ConfigError, load_ablations, load_scale
from sts.pipeline.files import write_json_atomic
from sts.pipeline.report.expected import expected, read
from sts.pipeline.tasks import registry

WORKFLOW = Path(__file__).parents[2] / "workflow"
PAPER = WORKFLOW / "reference/paper.yaml"
TEXT = """
ablation: dense
scores:
  pope: {published: 85.9, source: "a page [R]", warn: 1, fail: 3}
  mme: {published: 1500, source: "a page [R]", warn: 50, fail: 100}
  gqa: {published: 62, source: "a page [R]", warn: 1, fail: 3}
"""


@pytest.fixture
def reference(tmp_path):
    file = tmp_path / "reference.yaml"
    file.write_text(TEXT)
    return file


@pytest.fixture
def obtained(tmp_path):
    """obtained(pope=[a score a seed], ...)"""

    def write(**scores):
        for seed in range(max(map(len, scores.values()))):
            rows = {name: {"score": values[seed], "share": name != "mme"}
                    for name, values in scores.items() if seed < len(values)}  # fmt: skip
            write_json_atomic(
                tmp_path / "results/runs/dense" / f"seed{seed}" / "eval.json", {"benchmarks": rows}
            )
        return tmp_path / "results"

    return write


def test_a_run_passes_warns_or_fails_by_its_distance(reference, obtained, tmp_path):
    results = obtained(pope=[0.86, 0.85], mme=[1430.0], gqa=[0.655])
    table = expected(reference, results, tmp_path / "out").set_index("benchmark")
    assert list(table["verdict"]) == ["pass", "warn", "FAIL"]
    assert table.loc["pope", "obtained"] == pytest.approx(85.5)
    assert table.loc["pope", "sd"] == pytest.approx(0.5**0.5)
    assert list(table["difference"]) == pytest.approx([-0.4, -70, 3.5])
    printed = (tmp_path / "out.md").read_text()
    assert "| mme | 1500.0 | 1430.0 | n/a | -70.0 | warn | a page \\[R\\] |" in printed
    assert "1 pass, 1 warn, 1 FAIL" in printed


def test_what_was_not_measured_is_missing_and_does_not_pass(reference, obtained, tmp_path):
    table = expected(reference, obtained(gqa=[0.62]), tmp_path / "out").set_index("benchmark")
    assert list(table["verdict"]) == ["missing", "missing", "pass"]
    assert (tmp_path / "out.csv").read_text().count("missing") == 8


@pytest.mark.parametrize(
    ("wrong", "key"),
    [("fail: 3}\n  mme", "scores.pope.fail"), ("published: 85.9", "scores.pope.published")],
)
def test_a_wrong_reference_is_refused_by_file_key_and_value(reference, wrong, key):
    instead = {"scores.pope.fail": "fail: 0.5}\n  mme", "scores.pope.published": "published: high"}
    reference.write_text(TEXT.replace(wrong, instead[key]))
    with pytest.raises(ConfigError) as refused:
        read(reference)
    assert key in str(refused.value) and reference.name in str(refused.value)


def test_the_references_are_of_scales_and_benchmarks_that_there_are():
    reference = read(PAPER)
    assert reference.ablation in load_ablations(WORKFLOW / "ablations.yaml")
    benchmarks = load_scale(WORKFLOW / "config/paper.yaml").evaluate.benchmarks
    assert set(reference.scores) < set(benchmarks) and all(map(registry.exists, benchmarks))
    for score in reference.scores.values():
        assert "[R]" in score.source or "[P]" in score.source


def test_from_the_command_line(obtained, tmp_path, capsys):
    results, stem = obtained(pope=[0.859]), tmp_path / "tables/expected"
    arguments = ["--reference", str(PAPER), "--results", str(results), "--out-stem", str(stem)]
    assert main(["expected", *arguments]) == 0
    assert "| pope | 85.9 | 85.9 | n/a | 0.0 | pass |" in stem.with_suffix(".md").read_text()
