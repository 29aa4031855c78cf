"""The page of results: its numbers are those of the result files, what is missing is said, and it
works in a real browser."""

import base64
import csv
import io
import json
import re

import pytest
from browser import CHROMIUM, HAS_AXE, ask
from made_results import LAYERS, STEPS, row, train, write

from sts.pipeline.config import MINI, deep_merge, load_yaml, validate
from sts.pipeline.files import read_json
from sts.pipeline.measure.examples import choose, examples
from sts.pipeline.report import tables
from sts.pipeline.report.page import overlay, page

IDS = ["dense", "short", "sts"]
TIMES = {"dense": 10.0, "short": 8.0, "sts": 8.0}  # seconds of a training
LABELS = {"dense": "Dense", "short": "Dense, short", "sts": "_<ours> & {{ 7 * 7 }}"}
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


def answer(id, output, target="no"):
    row = {"id": id, "question": f"is {id} there?", "form": "x", "target": target}
    return row | {"output": output, "correct": output == target}


@pytest.fixture(scope="module")
def shown_questions(backbone, prepared, tmp_path_factory):
    """examples.json of two runs that differ in one answer of the prepared benchmark `colour`."""
    folder = tmp_path_factory.mktemp("questions")
    names = ["colour", "shape"]
    config = validate(deep_merge(load_yaml(MINI), {"evaluate": {"benchmarks": names}}), "test")
    for id, output in (("dense", "yes"), ("sts", "no")):
        rows = [json.dumps(answer("colour-000000", output)), ""]
        write(folder / id / "seed0/samples/colour.jsonl", "\n".join(rows))
    runs = tuple(folder / id / "seed0/eval.json" for id in ("dense", "sts"))
    return examples(config, backbone, [prepared], runs, folder / "examples.json")


def make_results(folder, shown_questions=None, seeds=(0, 1, 2)):
    """Results of three methods, and their main table."""
    for i, id in enumerate(IDS):
        for seed in seeds:
            values = {"score": 0.8 - 0.1 * i + 0.01 * seed, "blind": 0.5, "majority": 0.5}
            entries = {"benchmarks": {"colour": values | {"chance": 0.25}}}
            write(folder / f"runs/{id}/seed{seed}/eval.json", entries)
            for stage in ("align", "instruct"):
                train(folder, id, seed, stage, [row(id, stage, step) for step in range(STEPS)])
    stage = {"steps": STEPS, "parts_s": {"forward": [0.1, 0.3], "backward": [0.4]}}
    variants = {
        id: {"time_s": time, "flops": {"align": time, "instruct": time}}
        | {name: stage | {"stage_s": time / 2, "step_s": [time / 2 / STEPS]}
           for name in ("align", "instruct")}
        for id, time in TIMES.items()
    }  # fmt: skip
    write(folder / "bench/main.json", {"variants": variants})
    if shown_questions:
        write(folder / "examples.json", shown_questions)
    tables.table("main", folder, IDS, folder / "tables/main", LABELS)
    return folder


@pytest.fixture(scope="module")
def made(shown_questions, tmp_path_factory):
    """A page with all its parts."""
    folder = make_results(tmp_path_factory.mktemp("page") / "mini", shown_questions)
    page(folder, folder / "index.html", beside=[("sts", "short")], configfiles=["my.yaml"])
    return folder / "index.html"


def csv_of(text, name):
    """The rows of a CSV that lies in the page."""
    content = re.search(rf'download="{name}.csv" href="data:text/csv;base64,([^"]*)"', text)[1]
    return list(csv.DictReader(io.StringIO(base64.b64decode(content).decode())))


def test_what_is_drawn_is_what_the_result_files_hold(made):
    text = made.read_text()
    points = {(r["ablation"], r["seed"]): r for r in csv_of(text, "cost")}
    assert len(points) == 9
    assert float(points["sts", "2"]["average"]) == pytest.approx(62)
    assert float(points["sts", "2"]["seconds"]) == pytest.approx(8, rel=1e-5)
    losses = [r for r in csv_of(text, "loss") if (r["ablation"], r["seed"]) == ("dense", "1")]
    # the second stage begins after 5 s, and its step 10 of 20 is 2.5 s later
    assert [float(r["seconds"]) for r in losses] == pytest.approx([7.5, 10], rel=1e-5)
    assert [float(r["loss"]) for r in losses] == pytest.approx([1.1, 1.05])
    means = {
        (r["ablation"], r["beside"]): float(r["mean"])
        for r in csv_of(text, "differences")
        if r["quantity"] == "average_difference"
    }
    expected = {("short", "dense"): -0.1, ("sts", "dense"): -0.2, ("sts", "short"): -0.1}
    assert means == pytest.approx(expected)
    parts = {(r["stage"], r["ablation"], r["part"]): r for r in csv_of(text, "time")}
    assert float(parts["align", "sts", "forward"]["seconds"]) == pytest.approx(0.2)
    shares = [float(r["skipped"]) for r in csv_of(text, "layers")]
    assert len(shares) == LAYERS * STEPS and sum(shares) == STEPS
    assert "snakemake --cores all --configfile my.yaml fig_loss" in text
    assert "-20.0 points" in text and "× 0.80" in text


def test_labels_are_text_and_the_same_results_give_the_same_page(made, tmp_path):
    text = made.read_text()
    assert "_&lt;ours&gt; &amp; {{ 7 * 7 }}" in text and "<ours>" not in text
    page(made.parent, tmp_path / "x.html", beside=[("sts", "short")], configfiles=["my.yaml"])
    assert (tmp_path / "x.html").read_bytes() == made.read_bytes()


def test_what_is_missing_is_said(tmp_path):
    folder = make_results(tmp_path / "mini", seeds=(0,))
    for file in folder.rglob("history.jsonl"):
        file.unlink()
    for file in folder.glob("runs/*/*/instruct.json"):
        write(file, {key: v for key, v in read_json(file).items() if key != "held_out"})
    timing = read_json(folder / "bench/main.json")
    for variant in timing["variants"].values():
        variant.pop("align")
        variant["instruct"].pop("parts_s")
    write(folder / "bench/main.json", timing)
    tables.table("main", folder, IDS, folder / "tables/main", LABELS)
    page(folder, folder / "index.html")
    text = (folder / "index.html").read_text()
    for sentence in (
        "No run has measured a held-out loss",
        "An interval takes two seeds",
        "was made without its parts",
        "No history of a training",
        "kept no answers",
        "one seed: no interval",
    ):
        assert sentence in text
    assert text.count('<svg class="plot"') == 1  # the scores
    with pytest.raises(FileNotFoundError, match=r"other\.csv"):
        page(folder, tmp_path / "none.html", tables=["main", "other"])


def test_published_scores_stand_beside_those_obtained(made, tmp_path):
    text = "benchmark,published,obtained,verdict\npope,85.9,85.1,pass\n"
    write(made.parent / "tables/expected.csv", text)
    page(made.parent, tmp_path / "x.html", tables=["main", "expected"])
    assert "<td>85.9</td><td>85.1</td><td>pass</td>" in (tmp_path / "x.html").read_text()


# ---- questions ----------------------------------------------------------------------------------


def test_questions_that_tell_the_runs_apart_come_first_in_turn():
    same, other = (answer(f"same{i}", "no") for i in range(2)), ("yes", "maybe")
    pairs = [(row, row) for row in same]
    pairs += [(answer("wrong", other[0]), answer("wrong", other[1]))]
    pairs += [(answer(f"worse{i}", "no"), answer(f"worse{i}", "yes")) for i in range(2)]
    pairs += [(answer("better", "yes"), answer("better", "no"))]
    chosen = [first["id"] for first, _ in choose(pairs, 5)]
    assert chosen == ["better", "worse0", "wrong", "worse1", "same0"]


def test_a_question_has_its_picture_and_the_tokens_of_every_kind(shown_questions, kept):
    [question] = shown_questions["questions"]
    assert question["answers"] == ["yes", "no"] and question["correct"] == [0, 1]
    assert shown_questions["agreement"] == {"colour": {"questions": 1, "first": 0, "second": 1}}
    assert base64.b64decode(question["picture"])[8:12] == b"WEBP"
    assert question["kept"].keys() == kept["kinds"].keys()
    assert question["kept"]["avgpool2d"] == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert sum(owner >= 0 for owner in question["kept"]["uniform"]) == 4


def test_an_overlay_fades_what_is_dropped_and_frames_each_output():
    paths = overlay([0, 0, -1, 1], [2, 2])
    assert paths["dropped"] == "M0 1h1v1h-1z"
    across = set(re.findall(r"M(\d \d)h1", paths["edges"]))
    assert across == {"0 0", "1 0", "0 1", "1 1", "1 2"}
    assert set(re.findall(r"M(\d \d)v1", paths["edges"])) == {"0 0", "2 0", "1 1", "2 1"}


# ---- in a browser -------------------------------------------------------------------------------


@in_browser
def test_a_browser_draws_every_plot_and_asks_nothing_of_a_network(made):
    async def steps(tab):
        sizes = await tab.run(
            "[...document.querySelectorAll('.plot')].map(plot => [plot.clientWidth,"
            " plot.clientHeight, plot.querySelectorAll('[data-tip]').length])"
        )
        widths = {}
        for width in (1280, 390):
            await tab.size(width)
            widths[width] = await tab.run("document.documentElement.scrollWidth")
        return sizes, widths, tab.problems, tab.requests

    sizes, widths, problems, requests = ask(made, steps)
    assert len(sizes) == 7  # score, loss, two of differences, two stages, layers
    assert all(width > 200 and height > 100 and marks for width, height, marks in sizes)
    assert widths[1280] <= 1280 and widths[390] <= 390
    assert not problems
    assert [url for url in requests if not url.startswith("data:")] == [made.absolute().as_uri()]


@in_browser
def test_the_keyboard_reaches_values_rows_and_kinds(made):
    async def steps(tab):
        await tab.run("document.querySelector('#loss .plot').focus()")
        await tab.press("ArrowRight")
        tip = "document.getElementById('tip')"
        shown_tip = await tab.run(f"[{tip}.textContent, getComputedStyle({tip}).visibility]")
        await tab.press("Escape")
        gone = await tab.run(f"getComputedStyle({tip}).visibility")
        visible = "document.querySelectorAll('#loss [data-row=sts]:not(.off)').length"
        before = await tab.run(visible)
        await tab.run("document.querySelector('.rows input[value=sts]').focus()")
        await tab.press(" ")
        shown = "getComputedStyle(document.querySelector('svg.kind-uniform')).display"
        kinds = [await tab.run(shown)]
        await tab.run("document.querySelector('#kind-uniform').focus()")
        await tab.press(" ")
        return shown_tip, gone, before, await tab.run(visible), [*kinds, await tab.run(shown)]

    shown_tip, gone, before, after, kinds = ask(made, steps)
    assert shown_tip == ["Dense, seed 0: ends at 0.050 nats", "visible"] and gone == "hidden"
    assert (before, after) == (4, 0)  # three seeds and their mean
    assert kinds == ["none", "block"]


@in_browser
@pytest.mark.skipif(not HAS_AXE, reason="no axe")
def test_axe_finds_no_serious_fault(made):
    async def steps(tab):
        faults = []
        for width, is_dark in ((1280, False), (1280, True), (390, False)):
            await tab.size(width, is_dark=is_dark)
            faults += await tab.faults()
        return faults

    assert ask(made, steps) == []
