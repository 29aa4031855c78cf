"""Figures from small result files: whole, the same every time, and clear about what is missing."""

import io
import math
import random
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from made_results import LAYERS, STEPS, row, train, write
from matplotlib import pyplot as plt
from matplotlib.contour import ContourSet
from PIL import Image

from sts.pipeline import plan
from sts.pipeline.report import figures
from sts.pipeline.report.figures import layers, loss, pareto, time_parts, tokens

IDS = ["dense", "sts"]


@pytest.fixture(scope="module")
def results(tmp_path_factory, kept):
    folder = tmp_path_factory.mktemp("figures") / "results" / "mini"
    for id in IDS:
        for seed in (0, 1):
            run = folder / "runs" / id / f"seed{seed}"
            values = {"score": 0.8 + 0.1 * seed, "blind": 0.5, "majority": 0.5, "chance": 0.5}
            write(run / "eval.json", {"benchmarks": {"colour": values}})
            for stage in ("align", "instruct"):
                train(folder, id, seed, stage, [row(id, stage, step) for step in range(STEPS)])
    variants = {
        id: {"time_s": time, "flops": {"align": time, "instruct": time}}
        for id, time in (("dense", 10.0), ("sts", 8.0))
    }
    write(folder / "bench" / "main.json", {"variants": variants})
    write(folder / "tokens.json", kept)
    return folder


def draw(name, results, stem, ids=IDS):
    figures.figure(name, results, ids, stem, labels={"sts": r"_<ours> & $\frac{$ $x$"})
    return stem.with_suffix(".svg"), stem.with_suffix(".png")


@pytest.mark.parametrize("name", plan.figures())
def test_every_figure_is_valid_and_the_same_twice(name, results, tmp_path):
    svg, png = draw(name, results, tmp_path / "new" / "first")
    ElementTree.parse(svg)
    legend = r"<!-- {}_&lt;ours&gt; &amp; $\frac{{$ $x$ -->".format(" ")
    assert name == "tokens" or legend in svg.read_text()
    with Image.open(png) as image:
        assert image.width > 500
        assert len(image.convert("L").getcolors()) > 10  # something is drawn
    again, png_again = draw(name, results, tmp_path / "second")
    assert again.read_bytes() == svg.read_bytes()
    assert png_again.read_bytes() == png.read_bytes()


def test_time_parts_stacks_means_and_says_where_there_are_none(results, tmp_path):
    folder = tmp_path / "timed"
    old, seconds = (
        {"dense": {"flops": {"align": 1.0}}},
        {"tower": [1.0, 3.0], "backward": [4.0, 4.0]},
    )
    new = {"sts": {"flops": {"align": 1.0}, "align": {"parts_s": seconds}}}
    write(folder / "bench/main.json", {"variants": old | new})
    [axes] = time_parts.draw(folder, {"dense": "Dense", "sts": "STS"}).axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 2), (2, 4)]
    assert [text.get_text() for text in axes.texts] == [" n/a"]


def test_pareto_puts_time_on_x_and_the_score_with_its_spread_on_y(results):
    page = pareto.draw(results, {"dense": "Dense", "sts": "STS"})
    points = {c.get_label(): c.lines[0].get_xydata()[0] for c in page.axes[0].containers}
    assert points["Dense"] == pytest.approx([1.0, 85.0])
    assert points["STS"] == pytest.approx([0.8, 85.0])
    bar = page.axes[0].containers[0].lines[2][0].get_segments()[0]
    assert bar[1][1] - bar[0][1] == pytest.approx(2 * 10 / 2**0.5)


def on_own_scale(results, folder, scores):
    """The results with one benchmark whose scores, {id: by seed}, are no shares."""
    shutil.copytree(results, folder)
    for id, values in scores.items():
        for seed, value in enumerate(values):
            entry = {"score": value, "blind": None, "majority": None, "chance": None}
            write(
                folder / f"runs/{id}/seed{seed}/eval.json",
                {"benchmarks": {"mme_perception": entry | {"share": False}}},
            )
    return folder


def test_pareto_shows_what_is_kept_where_no_score_is_a_share(results, tmp_path):
    own = on_own_scale(results, tmp_path / "own", {"dense": (1000, 1600), "sts": (900, 1200)})
    page = pareto.draw(own, {"dense": "Dense", "sts": "STS"})
    points = {c.get_label(): c.lines[0].get_xydata()[0] for c in page.axes[0].containers}
    assert points["Dense"] == pytest.approx([1.0, 100.0])
    middle = 100 * (0.9 * 0.75) ** 0.5
    assert points["STS"] == pytest.approx([0.8, middle])
    bar = page.axes[0].containers[1].lines[2][0].get_segments()[0]
    half = 12.7062 * math.log(0.9 / 0.75) / 2  # t of two seeds times the error of the logarithm
    ends = [middle / math.exp(half), middle * math.exp(half)]
    assert bar[:, 1] == pytest.approx(ends, rel=1e-4)
    assert page.axes[0].get_ylabel() == "mean of score / score of Dense (%)"
    ElementTree.parse(draw("pareto", own, tmp_path / "drawn")[0])


def test_pareto_names_a_method_without_a_point(results, tmp_path):
    """Nothing can be kept of a score of 0."""
    own = on_own_scale(results, tmp_path / "own", {"dense": (0, 1600), "sts": (900, 1200)})
    page = pareto.draw(own, {"dense": "Dense", "sts": "STS"})
    (legend,) = page.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{name} (n/a: a score of Dense is 0)" for name in ("Dense", "STS")
    ]
    ElementTree.parse(draw("pareto", own, tmp_path / "drawn")[0])


def test_layers_shows_the_layers_run_and_the_skips_of_each_layer(results):
    page = layers.draw(results, {"dense": "Dense", "sts": "STS"})
    curves, heat = page.axes[:2]
    means = {line.get_label(): line.get_ydata().mean() for line in curves.lines}
    assert means == pytest.approx({"Dense": LAYERS, "STS": LAYERS - 1})
    assert list(heat.images[0].get_array().mean(axis=1)) == [0, 0.5, 0.5, 0]


def history(asked, skipped):
    """A row for each step; asked, skipped [steps, layers]."""
    return [
        {"asked": a, "skipped": s, "layers_run": LAYERS - sum(s)}
        for a, s in zip(asked, skipped, strict=True)
    ]


def falling(steps=100, seed=0, layers=LAYERS):
    """What the paper's formula asks and a draw that follows it, to exactly 0 at the last step."""
    draw = random.Random(seed)
    asked = [
        [0.6 * (1 - step / (steps - 1)) ** 2 * (0.5 + layer / layers) for layer in range(layers)]
        for step in range(steps)
    ]
    return history(asked, [[float(draw.random() < p) for p in row] for row in asked])


def test_by_layer_is_the_mean_over_runs_and_over_the_steps_of_a_bin():
    runs = [falling(103, seed) for seed in (0, 1)]  # no multiple of the bins
    for key in ("asked", "skipped"):
        means = layers.by_layer(runs, key, 101)
        edges, start = [], 0  # the first bins have one step more
        for bin in range(layers.BINS):
            end = start + 101 // layers.BINS + (bin < 101 % layers.BINS)
            edges.append((start, end))
            start = end
        assert (means.shape, end) == ((LAYERS, layers.BINS), 101)
        for layer in range(LAYERS):
            for bin, (start, end) in enumerate(edges):
                values = [run[step][key][layer] for run in runs for step in range(start, end)]
                assert means[layer, bin] == pytest.approx(sum(values) / len(values))


def heat_of(runs, monkeypatch):
    """The map of `layers` over made-up histories, drawn as it is to a file."""
    monkeypatch.setattr(layers, "histories", lambda *_: {"tune": {"sts": runs}})
    with plt.rc_context(figures.STYLE):
        page = layers.draw(Path("results"), {"sts": "STS"})
        svg = io.BytesIO()
        page.savefig(svg, format="svg", metadata={"Date": None})
    return page.axes[1], svg.getvalue()


def test_layers_shows_a_skipping_that_falls_to_zero_with_the_chances_as_lines(monkeypatch):
    runs = [falling(seed=seed) for seed in range(20)]
    heat, svg = heat_of(runs, monkeypatch)
    shown = heat.images[0].get_array()
    assert shown[:, 0].mean() > 0.3
    assert shown[:, -1].max() == 0
    asked = layers.by_layer(runs, "asked", 100)
    assert abs(shown - asked).max() < 0.35  # 40 draws or more a cell
    (lines,) = [c for c in heat.collections if isinstance(c, ContourSet)]
    assert list(lines.levels) == [p for p in layers.CHANCES if asked.min() < p < asked.max()]
    assert len(lines.levels) > 1
    assert svg == heat_of([falling(seed=seed) for seed in range(20)], monkeypatch)[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ([0.5] * LAYERS, 50),  # one chance: no line
        ([0.0, 0.5, 0.5, 0.5], 50),  # a protected layer: lines across
        ([0.2, 0.22, 0.24, 0.26], 50),  # no level among them
        ([0.2, 0.4, 0.6, 0.8], 1),  # one column
    ],
)
def test_layers_draws_chances_that_stay_as_they_are(monkeypatch, asked, steps):
    skipped = [[float((step + layer) % 2) for layer in range(LAYERS)] for step in range(steps)]
    heat, _ = heat_of([history([asked] * steps, skipped)], monkeypatch)
    lines = [c for c in heat.collections if isinstance(c, ContourSet)]
    assert bool(lines) == (asked[0] == 0)
    assert heat.images[0].get_array().shape == (LAYERS, min(steps, layers.BINS))


def test_loss_draws_a_training_that_methods_share_once_for_all_of_them(results, tmp_path):
    shutil.copytree(results, tmp_path / "shared")
    for seed in (0, 1):
        runs = tmp_path / "shared/runs"
        shutil.copy(runs / f"dense/seed{seed}/align.json", runs / f"sts/seed{seed}/align.json")
    page = loss.draw(tmp_path / "shared", {"dense": "Dense", "sts": "STS"})
    curves = [[line.get_label() for line in axes.lines] for axes in page.axes[:2]]
    assert curves == [["Dense = STS"], ["Dense", "STS"]]


def test_layers_without_any_skip_is_an_error(results, tmp_path):
    with pytest.raises(ValueError, match="none of dense skips layers"):
        draw("layers", results, tmp_path / "x", ids=["dense"])


def test_the_stages_are_those_of_each_methods_configuration(results, tmp_path):
    """Three stages by any name: one in which two methods skip, one in which one does, one in none;
    a method that lacks a stage is not drawn there."""
    stages = {"dense": ["warm_up", "tune"], "sts": ["warm_up", "tune", "polish"]}
    skips = {("sts", "warm_up"), ("sts", "tune")}
    for id, names in stages.items():
        config = {"stages": {name: {} for name in names}}
        write(tmp_path / f"configs/{id}.yaml", yaml.safe_dump(config, sort_keys=False))
        for stage in names:
            shown = ("sts", "instruct") if (id, stage) in skips else ("dense", "instruct")
            train(tmp_path, id, 0, stage, [row(*shown, step) for step in range(STEPS)])
    page = loss.draw(tmp_path, {"dense": "Dense", "sts": "STS"})
    assert [axes.get_title() for axes in page.axes] == ["Warm up", "Tune", "Polish"]
    assert [len(axes.lines) for axes in page.axes] == [2, 2, 1]
    page = layers.draw(tmp_path, {"dense": "Dense", "sts": "STS"})
    titles = [axes.get_title() for axes in page.axes]
    assert [title for title in titles if title and "skipped" not in title] == ["Warm up", "Tune"]
    assert len([axes for axes in page.axes if axes.images]) == 2
    (legend,) = page.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Dense", "STS"]


def test_tokens_shows_every_kind_of_its_result_file(results, kept):
    page = tokens.draw(results, {"dense": "Dense"})
    titles = [axes.get_title() for axes in page.axes]
    assert titles == [f"{kind}: {len(kept['kinds'][kind])} tokens" for kind in kept["kinds"]]
    faded = {axes.get_title(): axes.images[0].get_array().mean() for axes in page.axes}
    assert faded["uniform: 4 tokens"] > faded["none: 16 tokens"]  # towards white


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("pareto", "sts has no complete eval.json"),
        ("loss", "runs/lost/seed\\*/align.json"),
        ("layers", "runs/lost/seed\\*/align.json"),
    ],
)
def test_missing_results_are_named(name, gone, results, tmp_path):
    gone = gone.replace("sts", "lost")
    with pytest.raises(FileNotFoundError, match=gone):
        draw(name, results, tmp_path / "x", ids=["dense", "lost"])
    assert not list(tmp_path.iterdir())


def test_a_missing_history_or_result_of_the_tokens_is_named(tmp_path):
    write(tmp_path / "runs" / "dense" / "seed0" / "align.json", {"weights": "weights/gone"})
    with pytest.raises(FileNotFoundError, match=r"weights/gone/history\.jsonl"):
        draw("loss", tmp_path, tmp_path / "x", ids=["dense"])
    with pytest.raises(FileNotFoundError, match=r"tokens\.json"):
        draw("tokens", tmp_path, tmp_path / "x")


def test_an_unknown_figure_says_which_there_are(results, tmp_path):
    with pytest.raises(KeyError, match="expected one of layers, loss, pareto, time_parts, tokens"):
        figures.figure("pie", results, IDS, tmp_path / "pie")
