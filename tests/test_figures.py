"""Figures from small result files: whole, the same every time, and clear about what is missing."""

import json
from xml.etree import ElementTree

import pytest
from PIL import Image

from sts import figures

IDS = ["dense", "sts"]
LAYERS, STEPS = 4, 20


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def row(id, stage, step):
    skipped = [1 + step % 2] if (id, stage) == ("sts", "instruct") else []
    loss = 3 / (step + 1)
    return {"step": step, "loss": loss, "layers_run": LAYERS - len(skipped), "skipped": skipped}


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


def test_layers_without_any_skip_is_an_error(results, prepared, tmp_path):
    with pytest.raises(ValueError, match="none of dense skips layers"):
        draw("layers", results, tmp_path / "x", prepared, ids=["dense"])


def test_tokens_shows_every_compressor(results, prepared):
    from sts.compressor import COMPRESSORS

    drawn = figures.tokens(results, {"dense": "Dense"}, prepared)
    titles = [axes.get_title() for axes in drawn.axes]
    assert [title.split(":")[0] for title in titles] == list(COMPRESSORS)
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
