"""Tables from small result files whose numbers can be checked by hand."""

import csv
import json
import math
import shutil
import subprocess
from xml.etree import ElementTree

import pandas as pd
import pytest
from made_results import make, write
from markdown_it import MarkdownIt

from sts.pipeline.report import tables
from sts.pipeline.report.compare import interval
from sts.pipeline.report.results import stages_of


def numbers(row, *keys):
    return [float(row[key]) for key in keys]


def test_mean_sd_average_and_controls(results):
    row = make(results, "dense", "sts")[0]["dense"]
    assert numbers(row, "colour", "text", "average") == pytest.approx([0.9, 0.45, 0.675])
    assert numbers(row, "colour_sd", "text_sd") == pytest.approx([0.2 / 2**0.5, 0.1 / 2**0.5])
    assert numbers(row, "colour_seeds", "blind") == pytest.approx([2, 0.2])


def test_the_footer_says_what_the_runs_were_computed_in(results):
    assert "Precision" not in make(results, "dense", "sts")[1]  # no manifest says it
    for id in ("dense", "sts"):
        write(results / "runs" / id / "seed0" / "instruct.json", {"precision": "bf16"})
    assert "- Precision: bf16\n" in make(results, "dense", "sts")[1]
    write(results / "runs" / "sts" / "seed1" / "instruct.json", {"precision": "fp32"})
    markdown = make(results, "dense", "sts")[1]
    assert (
        "Precision: not the same for all, so compare with care: bf16 dense, sts; fp32 sts"
        in markdown
    )


def test_the_precision_is_that_of_the_last_stage_whatever_its_name(results):
    block = {"steps": 4, "batch_size": 2, "gradient_accumulation_steps": 1, "processes": 1}
    block |= {"data": ["scenes"], "trains": ["projector"]}
    stages = {"early": block, "late": block}
    for id in ("dense", "sts"):
        write(results / f"configs/{id}.yaml", {"seeds": [0], "stages": stages})
        for stage, precision in (("early", "bf16"), ("late", "fp32"), ("instruct", "bf16")):
            write(results / f"runs/{id}/seed0/{stage}.json", {"precision": precision})
    assert "- Precision: fp32\n" in make(results, "dense", "sts")[1]
    assert stages_of(results, "dense") == ["early", "late"]
    assert stages_of(results, "no configuration") == ["align", "instruct"]


RETENTION = (60 / 65 * 65 / 70) ** 0.5  # of the averages of two seeds, a mean of logarithms


def test_retention_is_paired_by_seed_with_the_t_interval_of_its_logarithm(results):
    row = make(results, "dense", "sts")[0]["sts"]
    logs = math.log(60 / 65), math.log(65 / 70)  # t(0.975, 1) = 12.7062
    half = 12.7062 * (abs(logs[0] - logs[1]) / 2**0.5) / 2**0.5
    expected = [RETENTION, RETENTION * math.exp(-half), RETENTION * math.exp(half)]
    assert numbers(row, "retention", "retention_low", "retention_high") == pytest.approx(
        expected, rel=1e-5
    )


def test_cost_ratios_and_realisation(results):
    rows = make(results, "dense", "sts")[0]
    assert numbers(rows["sts"], "time_ratio", "flops_ratio", "realisation") == pytest.approx(
        [0.8, 0.6, 0.5]
    )
    assert numbers(rows["dense"], "time_ratio", "flops_ratio") == [1, 1]
    assert rows["dense"]["realisation"] == "n/a"  # nothing was saved


def test_interval_of_three_values_by_hand():
    low, high = interval(pd.Series([1.0, 2.0, 3.0]))  # t(0.975, 2) = 4.302653
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert interval(pd.Series([1.0])) == ("n/a", "n/a")


def test_markdown_is_rounded_and_says_where_it_comes_from(results):
    markdown = make(results, "dense", "sts", labels={"sts": "STS | ours"})[1]
    assert r"| STS \| ours | 85.0 ± 7.1 | 40.0 ± 0.0 | 62.5 ± 3.5 |" in markdown
    assert "| Majority answer | 30.0 | 30.0 | 30.0 |" in markdown
    assert "| Chance | 25.0 | 25.0 | 25.0 |" in markdown
    for fact in ("Command: `", "Commit: ", "{dense,sts}.yaml, SHA-256 ", "Seeds: 0, 1"):
        assert fact in markdown
    assert "Missing" not in markdown
    widths = {line.replace(r"\|", "").count("|") for line in markdown.splitlines() if "|" in line}
    assert len(widths) == 1  # a line of another length breaks the table


def test_latex_is_escaped_booktabs(results):
    latex = make(results, "dense", "sts", labels={"sts": "50% & a_b"})[2]
    assert r"50\% \& a\_b & 85.0 +- 7.1 &" in latex
    rules = [latex.index(rf"\{rule}") for rule in ("toprule", "midrule", "bottomrule")]
    assert rules == sorted(rules)
    body = [line for line in full(latex).splitlines() if line.endswith(r"\\")]
    assert len({line.replace(r"\&", "").count("&") for line in body}) == 1


PAPER = r"""\documentclass{article}
\usepackage{booktabs,siunitx}\sisetup{separate-uncertainty}
\begin{document}\noindent %s\input{tables/main}\end{document}
"""


def full(latex):
    """The table of all columns, without the narrow one before it."""
    return latex.partition("\\else\n")[2]


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("narrow", ["", r"\def\stsnarrow{}"])
def test_latex_sets_the_table_with_one_seed_without_na_and_narrow_within_the_page(
    results, seeds, narrow
):
    if seeds == 1:
        for file in results.glob("runs/*/seed1/eval.json"):
            file.unlink()
    long = "A method whose name says all that it does in align and in instruct, 50% & a_b"
    latex = make(results, "dense", "sts", "lds", labels={"sts": long, "dense": TEXT})[2]
    assert "n/a" not in latex
    (results / "paper.tex").write_text(PAPER % narrow)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(command, cwd=results, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert not (narrow and "Overfull" in done.stdout), done.stdout


TEXT = r"[=1+1] $\frac{$ 50% & `a|b` *c* _d_ <b>e</b> &copy; ~f~ #g \ $x$"


def test_a_label_is_text_in_every_format(results):
    _, markdown, latex, _ = make(results, "dense", "sts", labels={"dense": TEXT, "sts": "=1+1"})
    rendered = MarkdownIt("commonmark").enable("table").render(markdown)
    tree = ElementTree.fromstring(f"<page>{rendered}</page>")
    cells = [["".join(cell.itertext()) for cell in line] for line in tree.iter("tr")]
    assert [line[0] for line in cells[1:3]] == [TEXT, "=1+1"]
    assert f"relative to {TEXT}." in "".join(next(tree.iter("li")).itertext())
    page = ElementTree.fromstring(f"<page>{(results / 'tables/main.html').read_text()}</page>")
    assert TEXT in ["".join(cell.itertext()) for cell in page.iter("td")]
    (line,) = [line for line in full(latex).splitlines() if "frac" in line and line[0] != "%"]
    assert line.startswith(r"{[}=1+1] \$\textbackslash frac\{\$ 50\% \& `a|b` *c* \_d\_ <b>")
    with open(results / "tables/main.csv") as file:
        assert [row["method"] for row in csv.DictReader(file)] == [TEXT, "'=1+1"]


@pytest.mark.parametrize("label", ["two\nlines", "two\u2028lines", "\x1b[31mred", " ", "\ud800"])
def test_a_label_is_a_line(results, label):
    with pytest.raises(ValueError, match=r"labels\.sts=.*: expected a line of text"):
        make(results, "dense", "sts", labels={"sts": label})


def test_the_page_holds_the_table_escaped_and_as_itself_every_time(results):
    make(results, "dense", "sts", labels={"sts": "STS <ours> & co"})
    page = (results / "tables/main.html").read_text()
    tree = ElementTree.fromstring(f"<page>{page}</page>")
    cells = [["".join(cell.itertext()) for cell in line] for line in tree.iter("tr")]
    assert cells[0][:4] == ["Method", "Colour", "Text", "Average"]
    assert cells[2][:4] == ["STS <ours> & co", "85.0 ± 7.1", "40.0 ± 0.0", "62.5 ± 3.5"]
    titles = [title.text for title in tree.iter("h2")]
    assert titles == [
        "What was asked",
        "What was found",
        "Table main",
        "Differences, paired by seed",
    ]
    make(results, "dense", "sts", labels={"sts": "STS <ours> & co"})
    assert (results / "tables/main.html").read_text() == page


SOURCES = {"dense": "baseline", "lds": "ours", "short": "baseline", "sts": "paper"}


def lines(text: str) -> list[str]:
    """The rows of a table: of Markdown without head and rule, of LaTeX without its rules."""
    if "\\toprule" in text:
        return [line for line in full(text).splitlines() if line.endswith(r"\\")][1:]
    return [line for line in text.splitlines() if line.startswith("|")][2:]


def test_rows_stand_under_heads_in_their_order(results):
    rows, markdown, latex, _ = make(results, *SOURCES, sources=SOURCES)
    empty = lines(markdown)[0].count("|") - 2
    firsts = [line.split("|")[1].strip() for line in lines(markdown)]
    body = ["*Baselines*", "dense", "short", "*The paper's*", "sts", "*Ours*", "lds"]
    assert firsts == [*body, "Majority answer", "Chance"]
    assert "| *Ours* |" + "  |" * empty in markdown
    assert [line.split(" & ")[0] for line in lines(latex)] == [
        rf"\emph{{{name.strip('*')}}}" if "*" in name else name for name in firsts
    ]
    assert {line.count("&") for line in lines(latex)} == {empty}
    assert {id: row["source"] for id, row in rows.items()} == SOURCES
    assert list(rows) == ["dense", "short", "sts", "lds"]


def test_without_sources_there_are_no_heads_and_the_same_rows(results):
    rows, markdown, *_ = make(results, *SOURCES)
    firsts = [line.split("|")[1].strip() for line in lines(markdown)]
    assert firsts == [*SOURCES, "Majority answer", "Chance"]
    assert {row["source"] for row in rows.values()} == {"n/a"}
    _, headed, *_ = make(results, *SOURCES, sources=SOURCES)
    assert set(lines(markdown)) < set(lines(headed))


def test_the_first_method_is_the_baseline_wherever_it_stands(results):
    sources = {"dense": "peers", "sts": "paper"}
    rows, markdown, *_ = make(results, "dense", "sts", sources=sources)
    assert list(rows) == ["sts", "dense"]
    assert float(rows["sts"]["time_ratio"]) == pytest.approx(0.8)
    assert "relative to dense" in markdown


def test_each_family_is_compared_with_its_own_dense_row(results):
    """The rows of a second family at half the score and twice the time change no ratio."""
    bench = json.loads((results / "bench/main.json").read_text())
    for id in ("dense", "sts"):
        shutil.copytree(results / f"runs/{id}", results / f"runs/{id}_tiles")
        shutil.copy(results / f"configs/{id}.yaml", results / f"configs/{id}_tiles.yaml")
        timed = bench["variants"][id]
        bench["variants"][f"{id}_tiles"] = timed | {"time_s": 2 * timed["time_s"]}
        for file in (results / f"runs/{id}_tiles").glob("*/eval.json"):
            evaluation = json.loads(file.read_text())
            for score in evaluation["benchmarks"].values():
                score["score"] /= 2
            file.write_text(json.dumps(evaluation))
    (results / "bench/main.json").write_text(json.dumps(bench))
    bases = {
        "dense": "dense",
        "sts": "dense",
        "dense_tiles": "dense_tiles",
        "sts_tiles": "dense_tiles",
    }
    heads = dict.fromkeys(bases, "paper")
    rows, markdown, *_ = make(results, *bases, sources=heads, relative_to=bases)
    for name in ("retention", "retention_low", "time_ratio", "flops_ratio", "realisation"):
        assert rows["sts_tiles"][name] == rows["sts"][name]
        assert rows["dense_tiles"][name] == rows["dense"][name]
    assert float(rows["sts_tiles"]["average"]) == pytest.approx(float(rows["sts"]["average"]) / 2)
    assert [row["relative_to"] for row in rows.values()] == list(bases.values())
    assert "The paper's" not in markdown  # families stand together, not whose method it is
    assert r"relative to dense or dense\_tiles" in markdown


def test_every_source_that_an_ablation_may_name_has_a_head():
    from typing import get_args

    from sts.pipeline.config import Entry

    assert set(get_args(Entry.model_fields["source"].annotation)) == set(tables.HEADS)


def test_metrics_are_numbers_by_method(results):
    metrics = make(results, "dense", "sts")[3]
    assert metrics["sts"]["retention"] == pytest.approx(RETENTION)
    assert all(isinstance(v, int | float) for row in metrics.values() for v in row.values())


def test_a_method_without_results_is_shown_as_missing(results):
    rows, markdown, latex, metrics = make(results, "dense", "sts", "lds")
    cells = [rows["lds"][key] for key in ("colour", "text", "average", "retention", "time_ratio")]
    assert cells == ["missing"] * 5
    assert "| lds | missing | missing | missing |" in markdown
    assert "lds & {missing} &" in latex
    assert "Missing: lds (all)" in markdown
    assert metrics["lds"] == {}


def test_a_missing_seed_is_named_and_its_mean_says_so(results):
    (results / "runs" / "sts" / "seed1" / "eval.json").unlink()
    rows, markdown, *_ = make(results, "dense", "sts")
    assert rows["sts"]["colour"] == "0.8"
    assert (rows["sts"]["colour_sd"], rows["sts"]["colour_seeds"]) == ("n/a", "1")
    assert float(rows["sts"]["retention"]) == pytest.approx(0.6 / 0.65)
    assert rows["sts"]["retention_low"] == "n/a"
    assert "80.0 ± n/a" in markdown
    assert "92.3 (n/a)" in markdown
    assert "Missing: sts seed 1 (colour, text)" in markdown


def test_a_missing_benchmark_leaves_no_average(results):
    for seed in (0, 1):
        file = results / "runs" / "sts" / f"seed{seed}" / "eval.json"
        evaluation = json.loads(file.read_text())
        del evaluation["benchmarks"]["text"]
        file.write_text(json.dumps(evaluation))
    row = make(results, "dense", "sts")[0]["sts"]
    assert float(row["colour"]) == pytest.approx(0.85)
    assert [row["text"], row["average"], row["retention"]] == ["missing"] * 3


def test_a_benchmark_without_controls_has_none_and_no_average_of_them(results):
    for file in results.glob("runs/*/seed*/eval.json"):
        evaluation = json.loads(file.read_text())
        evaluation["benchmarks"]["text"] |= {"majority": None, "chance": None, "blind": None}
        file.write_text(json.dumps(evaluation))
    rows, markdown, *_ = make(results, "dense", "sts", "lds")
    assert "| Majority answer | 30.0 | n/a | n/a |" in markdown
    assert "| Chance | 25.0 | n/a | n/a |" in markdown
    assert [rows[id]["blind"] for id in rows] == ["n/a", "n/a", "missing"]
    assert float(rows["sts"]["average"]) == pytest.approx(0.625)


def test_a_score_on_a_scale_of_its_own_stays_and_is_in_no_average(results):
    for file in results.glob("runs/*/seed*/eval.json"):
        evaluation = json.loads(file.read_text())
        evaluation["benchmarks"]["text"]["score"] *= 3000
        evaluation["benchmarks"]["text"] |= {"majority": None, "chance": None, "share": False}
        file.write_text(json.dumps(evaluation))
    rows, markdown, *_ = make(results, "dense", "sts")
    assert "| sts | 85.0 ± 7.1 | 1200.0 ± 0.0 | 85.0 ± 7.1 | 20.0 ± 0.0 | 94.9 (" in markdown
    assert "- On scales of their own, so not in % and not in Average and Blind: text\n" in markdown
    for file in results.glob("runs/*/seed*/eval.json"):
        evaluation = json.loads(file.read_text())
        evaluation["benchmarks"]["colour"]["share"] = False
        file.write_text(json.dumps(evaluation))
    rows = make(results, "dense", "sts")[0]
    assert [rows["sts"]["average"], rows["sts"]["blind"]] == ["n/a", "n/a"]
    assert float(rows["sts"]["retention"]) == pytest.approx((0.9 * 0.95) ** 0.5)
    assert "dense: scores that have no mean." in (results / "tables/main.html").read_text()


def test_a_baseline_at_zero_has_no_retention(results):
    file = results / "runs" / "dense" / "seed0" / "eval.json"
    evaluation = json.loads(file.read_text())
    for score in evaluation["benchmarks"].values():
        score["score"] = 0.0
    file.write_text(json.dumps(evaluation))
    rows = make(results, "dense", "sts")[0]
    assert rows["sts"]["retention"] == "n/a"
    assert float(rows["dense"]["text"]) == pytest.approx(0.2)  # 0 is a score, not a gap


def test_without_a_benchmark_job_costs_are_missing(results):
    (results / "bench" / "main.json").unlink()
    rows = make(results, "dense", "sts")[0]
    assert {rows[id]["time_ratio"] for id in rows} == {"missing"}
    assert float(rows["sts"]["retention"]) == pytest.approx(RETENTION)


def test_results_written_without_configurations_still_make_a_table(results):
    for file in (results / "configs").iterdir():
        file.unlink()
    assert float(make(results, "dense", "sts")[0]["sts"]["average"]) == pytest.approx(0.625)


def test_no_result_at_all_is_an_error_that_names_the_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"runs/\{dense,sts\}/seed\*/eval\.json"):
        tables.table("main", tmp_path, ["dense", "sts"], tmp_path / "main")


def test_a_broken_result_is_an_error_that_names_the_file(results):
    (results / "runs" / "sts" / "seed0" / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"sts/seed0/eval\.json: not JSON"):
        make(results, "dense", "sts")
