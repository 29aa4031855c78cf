"""Known shapes, and `bench --shape`: what it times, counts and says. No timing decides a test."""

import pytest
import torch

from recipes.mini.families import clip
from recipes.mini.language import language_config
from recipes.mini.words import make_tokenizer
from sts import LDS, VTC
from sts.__main__ import main
from sts.lds import POLICIES
from sts.mini import pictures
from sts.pipeline.files import read_json
from sts.pipeline.measure import shapes
from sts.pipeline.measure.shape_bench import parse_setting, speed
from sts.vtc import KINDS

COMPRESSED, SKIPPED = "avgpool2d@0.25", "layerdrop@0.5:draw=fixed_count"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed") / "bench.json"
    settings = [COMPRESSED, SKIPPED, f"{COMPRESSED}+{SKIPPED}"]
    result = speed(
        "llava-1.5-7b", settings, out, layers=2, width=1 / 32, batch=1, text=8, repeats=1,
        checkpointing=[False, True],
    )  # fmt: skip
    assert read_json(out) == result
    return result


def row(result, setting, stage="instruct", checkpointing=False):
    (match,) = [
        r
        for r in result["rows"]
        if (r["setting"], r["stage"], r["checkpointing"]) == (setting, stage, checkpointing)
    ]
    return match


@pytest.mark.slow
def test_the_cut_is_stated(result):
    assert result["cut"] == "2 of 32 layers, width 128 of 4096"
    assert result["shape"] == "llava-1.5-7b" and result["visual_tokens"] == 576


@pytest.mark.slow
def test_every_setting_in_both_stages_with_and_without_checkpointing(result):
    assert len(result["rows"]) == 2 * 2 * 7
    for row in result["rows"]:
        assert row["step_s"] > 0 and row["flops"] > 0 and row["held_mb"] > 0
        low, high = row["step_s_range"]
        assert low <= row["step_s"] <= high


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "instruct"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_and_memory_fall_as_they_should(result, stage, checkpointing):
    def of(setting):
        return row(result, setting, stage, checkpointing)

    dense, bare, plain = of("dense"), of("bare"), of("plain")
    assert dense["time_ratio"] == dense["flops_ratio"] == 1
    assert bare["flops"] == dense["flops"] < plain["flops"]  # logits on answer tokens alone
    assert of("chunked")["held_mb"] != dense["held_mb"]
    assert of("chunked")["flops_ratio"] == 1 and of("chunked")["realisation"] is None
    both = of(f"{COMPRESSED}+{SKIPPED}")
    for setting in (COMPRESSED, SKIPPED):
        assert both["flops"] < of(setting)["flops"] < dense["flops"]
        assert of(setting)["realisation"] is not None
    assert of(COMPRESSED)["held_mb"] < dense["held_mb"]
    if not checkpointing:
        assert of(SKIPPED)["held_mb"] < dense["held_mb"]
        assert row(result, "dense", stage, True)["held_mb"] < dense["held_mb"]


@pytest.mark.slow
def test_flops_do_not_depend_on_the_attention_and_what_is_held_does(result, tmp_path):
    eager_result = speed(
        "llava-1.5-7b", [COMPRESSED], tmp_path / "eager.json", layers=2, width=1 / 32, batch=1,
        text=8, repeats=1, stages=["instruct"], attention="eager",
    )  # fmt: skip
    assert (result["attention"], eager_result["attention"]) == ("sdpa", "eager")
    for setting in ("dense", COMPRESSED):
        fused, eager = row(result, setting), row(eager_result, setting)
        assert eager["flops"] == fused["flops"]
        assert eager["held_mb"] > fused["held_mb"], "scores [heads, tokens, tokens]"


@pytest.mark.slow
def test_other_architectures_and_a_table(tmp_path, capsys):
    out = tmp_path / "qwen.json"
    status = main(
        ["bench", "--shape", "qwen2.5-vl-7b", "--layers", "2", "--width", "0.03", "--batch", "1",
         "--repeats", "1", "--stages", "align", "--settings", "random@0.5", "--out", str(out)]
    )  # fmt: skip
    assert status in (0, None)
    text = capsys.readouterr().out
    assert "2 of 28 layers" in text and "random@0.5" in text and "realisation" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shape", "gpt-5"], "llava-1.5-7b"),
        (["--shape", "mini", "--settings", "jpeg@0.5"], "avgpool2d"),
        (["--shape", "mini", "--settings", "uniform"], "kind@keep or policy@rate"),
        (["--shape", "mini", "--settings", "sts@0.5:unit"], ":name=value"),
        (["--shape", "mini", "--settings", "sts@0.5:unit="], ":name=value"),
        (["--shape", "mini", "--settings", "sts@0.5:keep=1"], "names of schedule"),
        (["--shape", "mini", "--settings", "uniform@0.5:epsilon=1"], "names of schedule"),
        (["--shape", "mini", "--settings", "uniform@0.5:keep=0.25"], "names of schedule"),
        (["--shape", "mini", "--settings", "sts@0.5:unit=head"], "layer, samples, tokens"),
        (["--shape", "mini", "--settings", "sts@half"], "LDS.rate='half'"),
        (["--shape", "mini", "--settings", "avgpool2d@1.5"], r"(0, 1]"),
        (["--shape", "mini", "--attention", "paged"], "sdpa, eager, flash_attention_2"),
        (["--data", "x.json"], "--configs"),
    ],
)
def test_bad_arguments_say_what_is_accepted(arguments, named, tmp_path, capsys):
    assert main(["bench", *arguments, "--out", str(tmp_path / "out.json")]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_flash_attention_without_a_gpu_is_refused_before_a_model_is_made(tmp_path, capsys):
    arguments = ["--shape", "llava-1.5-13b", "--width", "1", "--attention", "flash_attention_2"]
    assert main(["bench", *arguments, "--out", str(tmp_path / "out.json")]) == 2
    assert "a GPU and the package flash-attn" in capsys.readouterr().err


SETTINGS = {
    "random@0.5+random_ltd@0.25": (VTC("random", keep=0.5), LDS("random_ltd", rate=0.25)),
    "sts@0.6:epsilon=0.5:unit=samples": (VTC(), LDS("sts", 0.6, epsilon=0.5, unit="samples")),
    "layerdrop@0.5:protect_first=1:rescale=true": (
        VTC(), LDS("layerdrop", 0.5, protect_first=1, rescale=True),
    ),
    "uniform@0.25:positions=mean": (VTC("uniform", 0.25, positions="mean"), LDS()),
}  # fmt: skip


@pytest.mark.parametrize("text", SETTINGS)
def test_settings_are_read_as_written(text):
    assert parse_setting(text) == SETTINGS[text]


def test_no_kind_has_the_name_of_a_policy():
    """So that a setting says which of the two it is."""
    assert set(KINDS) & set(POLICIES) == {"none"}


# ---- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights"),
    [("llava-1.5-7b", 7_063_427_072), ("qwen2.5-vl-7b", 8_292_166_656)],  # as the hub says
)
def test_a_published_model_has_its_number_of_weights(name, weights):
    with torch.device("meta"):
        model = shapes.random_model(shapes.shape(name))
    assert model.num_parameters() == weights


def test_mini_is_what_the_recipe_of_the_stand_ins_makes():
    made = shapes.joined(clip(pictures.SIZE), language_config(make_tokenizer(), layers=12))
    with torch.device("meta"):
        models = [shapes.random_model(config) for config in (shapes.shape("mini"), made)]
    mini, recipe = ({n: p.shape for n, p in model.named_parameters()} for model in models)
    assert mini == recipe


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_cut_model_keeps_its_heads_and_learns_from_a_made_up_batch(name):
    full, cut = shapes.shape(name), shapes.shape(name, layers=2, width=1 / 32)
    model = shapes.random_model(cut)
    batch = shapes.made_up_batch(cut, batch=1, text=8, answer=3)
    assert model.dtype == torch.float32
    assert batch["input_ids"].shape == (1, shapes.side(full) ** 2 + 8)
    assert (batch["labels"] != -100).sum() == 3
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    assert len(model.base_model.language_model.layers) == 2
    for part in ("text_config", "vision_config"):
        heads = [
            sizes.hidden_size // sizes.num_attention_heads
            for sizes in (getattr(full, part), getattr(cut, part))
        ]
        assert heads[0] == heads[1]


def test_a_cut_leaves_the_known_shape_as_it_is():
    shapes.shape("llava-1.5-13b", layers=4, width=0.25)
    text = shapes.shape("llava-1.5-13b").text_config
    assert (text.num_hidden_layers, text.hidden_size) == (40, 5120)
