"""What the terminal and the report's first page say follows from the numbers, whatever they are."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from docutils.core import publish_parts
from jinja2 import Environment
from made_results import make

from sts.pipeline.config import dump, load_scale
from sts.pipeline.report import findings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "workflow/report/overview.rst"


def row(id, average, retention=None, low=None, high=None, time=None, flops=0.8, blind=0.2):
    """A line of a table's CSV; `missing` where nothing is given."""
    numbers = {
        "average": average,
        "blind": blind,
        "retention": retention,
        "retention_low": low,
        "retention_high": high,
        "time_ratio": time,
        "flops_ratio": time and flops,
        "realisation": time and ((1 - time) / (1 - flops) if flops != 1 else "n/a"),
    }
    cells = {key: "missing" if value is None else value for key, value in numbers.items()}
    return {"ablation": id, "method": id.upper(), "relative_to": "dense", **cells}


DENSE = row("dense", 0.8, 1.0, 1.0, 1.0, 1.0, flops=1)


def say(*rows):
    return findings.findings(pd.DataFrame([DENSE, *rows]))


def test_each_family_speaks_of_its_own_baseline():
    tiles = [
        row("dense_tiles", 0.6, 1.0, 1.0, 1.0, 1.0, flops=1) | {"relative_to": "dense_tiles"},
        row("sts_tiles", 0.5, 0.83, 0.8, 0.86, 0.9) | {"relative_to": "dense_tiles"},
    ]
    lines = say(row("sts", 0.79, 0.987, 0.9, 0.99, 0.9), row("single", 0.7, 0.9), *tiles)
    below = [line for line in lines if line.startswith("Below")]
    assert below == [
        f"Below {name} in score, beyond the spread of the seeds:"
        for name in ("DENSE", "DENSE_TILES")
    ]
    assert [method.partition(":")[0] for line in below for method in lines[line]] == [
        "STS",
        "STS_TILES",
    ]
    assert "DENSE_TILES: average score 60.0 %, 20.0 % with grey images." in lines


@pytest.mark.parametrize(
    ("low", "high", "line"),
    [
        (0.9, 0.99, "Below DENSE in score, beyond the spread of the seeds:"),
        (0.9, 1.0, "No difference in score from DENSE shown by these seeds:"),
        (0.974, 1.1, "No difference in score from DENSE shown by these seeds:"),
        (0.975, 1.1, "Score of DENSE kept, to 97.5 % or more:"),
        (1.01, 1.1, "Above DENSE in score, beyond the spread of the seeds:"),
    ],
)
def test_a_method_is_told_from_the_baseline_where_its_interval_leaves_out_1(low, high, line):
    lines = say(row("sts", 0.79, 0.987, low, high, 0.9))
    interval = f"interval {100 * low:.1f} to {100 * high:.1f}"
    assert lines[line] == [
        f"STS: 98.7 % of the score ({interval}); x 0.90 of the time, x 0.80 of the FLOPs; "
        "50 % of the saved FLOPs saved as time"
    ]
    assert len(lines) == 3  # the baseline, this one, those that no other beats
    assert lines["DENSE: average score 80.0 %, 20.0 % with grey images."] == []


@pytest.mark.parametrize(
    ("low", "high", "line"),
    [
        (-0.09, -0.01, "Lower held-out loss than DENSE:"),
        (-0.09, 0.01, "No difference in held-out loss from DENSE shown by these seeds:"),
        (0.01, 0.09, "Higher held-out loss than DENSE:"),
    ],
)
def test_the_held_out_loss_is_judged_by_its_interval(low, high, line):
    mean = (low + high) / 2
    of_loss = {"loss": 0.3, "loss_difference": mean, "loss_difference_n": 6}
    of_loss |= {"loss_difference_low": low, "loss_difference_high": high}
    said = say(row("sts", 0.79, 0.987, 0.9, 0.99, 0.9) | of_loss)
    assert said[line] == [
        f"STS: {mean:+.3f} nats per answer token (interval {low:+.3f} to {high:+.3f}, 6 seeds)"
    ]


def test_nothing_is_said_of_what_is_not_there():
    lines = say(
        row("seed", 0.7, 0.9, "n/a", "n/a", 0.9, blind="n/a"),
        row("untimed", 0.7, 0.9, 0.8, 0.95),
        row("lost", None, time=0.5, blind=None),
        row("nothing", None, blind=None),
        row("same_flops", 0.7, 0.9, "n/a", "n/a", 1.2, flops=1),
        row("slower", 0.7, 0.9, "n/a", "n/a", 1.3),
    )
    single = lines["Of one seed, so that small differences mean nothing:"]
    assert single[0].startswith("SEED: 90.0 % of the score; x 0.90 of the time")
    assert single[1] == "SAME_FLOPS: 90.0 % of the score; x 1.20 of the time, x 1.00 of the FLOPs"
    assert single[2].endswith("x 0.80 of the FLOPs; nothing of the saved FLOPs saved as time")
    (below,) = lines["Below DENSE in score, beyond the spread of the seeds:"]
    assert below.endswith("(interval 80.0 to 95.0); training time not measured yet")
    lost, nothing = lines["Without a score to compare with that of DENSE:"]
    assert lost.startswith("LOST: x 0.50 of the time")
    assert nothing == "NOTHING: training time not measured yet"
    assert "missing" not in str(lines) and "nan" not in str(lines)


def test_those_that_no_other_beats_are_the_pareto_front():
    line = next(line for line in say(
        row("slower_and_worse", 0.7, 0.9, 0.8, 1.1, 1.1),
        row("faster_and_worse", 0.7, 0.9, 0.8, 1.1, 0.5),
        row("as_fast_and_worse", 0.6, 0.9, 0.8, 1.1, 0.5),
        row("unknown", 0.9, 0.9, 0.8, 1.1),
    ) if line.startswith("Beaten by no other"))  # fmt: skip
    assert line.endswith(": DENSE; FASTER_AND_WORSE.")


def test_the_baseline_may_lack_everything():
    lines = findings.findings(pd.DataFrame([row("dense", None, blind=None)]))
    assert lines == {"DENSE: no complete evaluation yet.": []}


def test_summary_says_what_was_found_and_where(results, capsys):
    make(results, "dense", "sts", "lds", labels={"sts": "STS"})
    findings.summary(results)
    text = capsys.readouterr().out
    assert "STS: 92.6 % of the score" in text
    assert "x 0.80 of the time, x 0.60 of the FLOPs; 50 % of the saved FLOPs" in text
    assert "lds: training time not measured yet" in text
    assert f"{results}/tables: main.md" in text


def test_summary_before_any_table_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="table_main"):
        findings.summary(tmp_path)


def test_what_was_asked_comes_from_the_resolved_configuration():
    config = yaml.safe_load(dump(load_scale(ROOT / "workflow/config/mini.yaml")))
    training, score = findings.configured(config).items()
    assert training[0] == "Training of the first method, with 3 seeds:"
    assert [line.partition(":")[0] for line in training[1]] == list(config["stages"])
    assert "340 steps of 8 samples of scenes; trains projector, language model" in training[1][1]
    assert score[0].startswith("Score: 8 benchmarks (existence, ")
    assert findings.configured({}) == {}


def rendered(*files):
    """The report's first page, made as Snakemake makes it, of these result files."""
    text = Environment(trim_blocks=True, lstrip_blocks=True).from_string(PAGE.read_text())
    entries = [SimpleNamespace(path=file, target=file.name) for file in files]
    page = text.render(snakemake=SimpleNamespace(config={"scale": "mine"}), files=entries)
    return publish_parts(page, writer="html", settings_overrides={"halt_level": 2})["html_body"]


def test_the_first_page_holds_the_main_table_and_the_pareto_figure(results, tmp_path):
    make(results, "dense", "sts", labels={"sts": "STS <ours> & co"})
    figure = tmp_path / "pareto.svg"
    figure.write_text("<svg>drawn</svg>" + 30_000 * " ")  # docutils refuses lines of this length
    page = rendered(results / "tables/main.html", figure)
    assert "Sparse training, scale mine" in page
    assert "STS &lt;ours&gt; &amp; co: 92.6 % of the score" in page
    assert "85.0 ± 7.1" in page
    assert 'src="data:image/svg+xml,%3Csvg%3Edrawn%3C/svg%3E%20' in page


def test_the_first_page_says_what_is_not_there_yet(results):
    for files in ([], [results / "tables/components.html"]):
        page = rendered(*files)
        assert "table_main" in page
        assert "data:image" not in page
        assert "<dt>Retention</dt>" in page and "<dt>Realisation</dt>" in page
