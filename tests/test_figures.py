"""Figures from small result files: whole, the same every time, and clear about what is missing."""

import io
import json
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.contour import ContourSet
from PIL import Image

from sts.pipeline import figures
from sts.vtc import KINDS

IDS = ["dense", "sts"]
LAYERS, STEPS = 4, 20


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def row(id, stage, step):
    """sts skips layer 1 or 2 in turn, half of the stage each; with what its formula asks."""
    on = (id, stage) == ("sts", "instruct")
    skipped = [float(on and layer == 1 + step % 2) for layer in range(LAYERS)]
    return {
        "step": step,
        "loss": 3 / (step + 1),
        "layers_run": LAYERS - sum(skipped),
        "skipped": skipped,
        "asked": [0.5 * on * (layer in (1, 2)) for layer in range(LAYERS)],
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory, backbone):
    folder = tmp_path_factory.mktemp("figures") / "results" / "mini"
    for id in IDS:
        for seed in (0, 1):
            run = folder / "runs" / id / f"seed{seed}"
            values = {"score": 0.8 + 0.1 * seed, "blind": 0.5, "majority": 0.5, "chance": 0.5}
            write(run / "eval.json", {"benchmarks": {"colour": values}})
            for stage in ("align", "instruct"):
                key = f"{id}-{seed}-{stage}"
                write(run / f"{stage}.json", {"weights": f"results/mini/weights/{key}"})
                history = folder / "weights" / key / "history.jsonl"
                history.parent.mkdir(parents=True)
                lines = [json.dumps(row(id, stage, step)) for step in range(STEPS)]
                history.write_text("\n".join(lines) + "\n")
    variants = {
        id: {"time_s": time, "flops": {"align": time, "instruct": time}}
        for id, time in (("dense", 10.0), ("sts", 8.0))
    }
    write(folder / "bench" / "main.json", {"variants": variants})
    write(folder / "backbone" / "manifest.json", json.loads(backbone.read_text()))
    return folder


def draw(name, results, stem, prepared, ids=IDS):
    labels = {"sts": "STS <ours> & co"}
    figures.figure(name, results, ids, stem, labels=labels, data=prepared)
    return stem.with_suffix(".svg"), stem.with_suffix(".png")


@pytest.mark.parametrize("name", list(figures.FIGURES))
def test_every_figure_is_valid_and_the_same_twice(name, results, prepared, tmp_path):
    svg, png = draw(name, results, tmp_path / "new" / "first", prepared)
    ElementTree.parse(svg)
    with Image.open(png) as image:
        assert image.width > 500
        assert len(image.convert("L").getcolors()) > 10  # something is drawn
    again, png_again = draw(name, results, tmp_path / "second", prepared)
    assert again.read_bytes() == svg.read_bytes()
    assert png_again.read_bytes() == png.read_bytes()


def test_pareto_puts_time_on_x_and_the_score_with_its_spread_on_y(results, prepared):
    drawn = figures.pareto(results, {"dense": "Dense", "sts": "STS"}, prepared)
    points = {c.get_label(): c.lines[0].get_xydata()[0] for c in drawn.axes[0].containers}
    assert points["Dense"] == pytest.approx([1.0, 85.0])
    assert points["STS"] == pytest.approx([0.8, 85.0])
    bar = drawn.axes[0].containers[0].lines[2][0].get_segments()[0]
    assert bar[1][1] - bar[0][1] == pytest.approx(2 * 10 / 2**0.5)


def test_layers_shows_the_layers_run_and_the_skips_of_each_layer(results, prepared):
    drawn = figures.layers(results, {"dense": "Dense", "sts": "STS"}, prepared)
    curves, heat = drawn.axes[:2]
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
        found = figures._by_layer(runs, key, 101)
        edges, start = [], 0  # the first bins have one step more
        for bin in range(figures.BINS):
            end = start + 101 // figures.BINS + (bin < 101 % figures.BINS)
            edges.append((start, end))
            start = end
        assert (found.shape, end) == ((LAYERS, figures.BINS), 101)
        for layer in range(LAYERS):
            for bin, (start, end) in enumerate(edges):
                values = [run[step][key][layer] for run in runs for step in range(start, end)]
                assert found[layer, bin] == pytest.approx(sum(values) / len(values))


def heat_of(runs, monkeypatch):
    """The map of `layers` over made-up histories, drawn as it is to a file."""
    monkeypatch.setattr(figures, "_histories", lambda *_: runs)
    with plt.rc_context(figures.STYLE):
        drawn = figures.layers(Path("results"), {"sts": "STS"}, Path("data"))
        svg = io.BytesIO()
        drawn.savefig(svg, format="svg", metadata={"Date": None})
    return drawn.axes[1], svg.getvalue()


def test_layers_shows_a_skipping_that_falls_to_zero_with_the_chances_as_lines(monkeypatch):
    runs = [falling(seed=seed) for seed in range(20)]
    heat, svg = heat_of(runs, monkeypatch)
    shown = heat.images[0].get_array()
    assert shown[:, 0].mean() > 0.3
    assert shown[:, -1].max() == 0
    asked = figures._by_layer(runs, "asked", 100)
    assert abs(shown - asked).max() < 0.35  # 40 draws or more a cell
    (lines,) = [c for c in heat.collections if isinstance(c, ContourSet)]
    assert list(lines.levels) == [p for p in figures.ASKED if asked.min() < p < asked.max()]
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
    drawn = [c for c in heat.collections if isinstance(c, ContourSet)]
    assert bool(drawn) == (asked[0] == 0)
    assert heat.images[0].get_array().shape == (LAYERS, min(steps, figures.BINS))


def test_layers_without_any_skip_is_an_error(results, prepared, tmp_path):
    with pytest.raises(ValueError, match="none of dense skips layers"):
        draw("layers", results, tmp_path / "x", prepared, ids=["dense"])


def with_weights(monkeypatch):
    class Learned(torch.nn.Module):
        def __init__(self, dim):
            super().__init__()

        def forward(self, tokens, keep): ...

    monkeypatch.setitem(KINDS, "learned", Learned)


def test_tokens_shows_every_compressor_that_needs_no_text_and_no_training(
    results, prepared, monkeypatch
):
    with_weights(monkeypatch)
    drawn = figures.tokens(results, {"dense": "Dense"}, prepared)
    titles = [axes.get_title() for axes in drawn.axes]
    left_out = {"text_guided", "text_guided_max", "learned"}
    assert [title.split(":")[0] for title in titles] == [k for k in KINDS if k not in left_out]
    assert titles[0].endswith("16 tokens")
    assert titles[1].endswith(" 4 tokens")


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("pareto", "sts has no complete eval.json"),
        ("loss", "runs/lost/seed\\*/align.json"),
        ("layers", "runs/lost/seed\\*/instruct.json"),
    ],
)
def test_missing_results_are_named(name, gone, results, prepared, tmp_path):
    gone = gone.replace("sts", "lost")
    with pytest.raises(FileNotFoundError, match=gone):
        draw(name, results, tmp_path / "x", prepared, ids=["dense", "lost"])
    assert not list(tmp_path.iterdir())


def test_a_missing_history_picture_or_backbone_is_named(results, prepared, tmp_path):
    write(tmp_path / "runs" / "dense" / "seed0" / "align.json", {"weights": "weights/gone"})
    with pytest.raises(FileNotFoundError, match=r"weights/gone/history\.jsonl"):
        draw("loss", tmp_path, tmp_path / "x", prepared, ids=["dense"])
    with pytest.raises(FileNotFoundError, match="no prepared data set"):
        draw("tokens", results, tmp_path / "x", tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"backbone/manifest\.json"):
        draw("tokens", tmp_path, tmp_path / "x", prepared)


def test_an_unknown_figure_says_which_there_are(results, tmp_path):
    with pytest.raises(KeyError, match="expected one of pareto, loss, layers, tokens"):
        figures.figure("pie", results, IDS, tmp_path / "pie")
