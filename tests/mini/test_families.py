"""The checkpoints of the four families: what they hold, that they go from weights to scores, and
what their towers are told."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from configs import two_stages
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM

from recipes.mini import vision
from recipes.mini.families import FAMILIES, assemble
from recipes.mini.language import language_config
from recipes.mini.words import make_tokenizer
from sts.architectures import tower_of
from sts.mini import pictures, scenes
from sts.pipeline.evaluate.evaluate import evaluate
from sts.pipeline.train.job import Job
from sts.pipeline.train.model import write_manifest
from sts.pipeline.train.train import train

CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]
# visual tokens of a picture, and how a conversation is written
IMAGE_PART = {
    "llava": (144, "<image>" * 144),
    "llava_next": (36 + 144 + 12, "<image>" * 192),
    "idefics3": (
        144,
        "<fake_token_around_image><global-img>" + "<image>" * 144 + "<fake_token_around_image>",
    ),
    "qwen2_5_vl": (144, "<|vision_start|>" + "<|image_pad|>" * 144 + "<|vision_end|>"),
}
SLOW = pytest.mark.slow
each_family = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name == "llava" else SLOW) for name in FAMILIES],
)


@pytest.fixture(scope="module")
def language() -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(language_config(make_tokenizer(), layers=2)).eval()
    for weight in model.parameters():  # as they are once they were saved
        weight.data = weight.data.half().float()
    return model


@pytest.fixture(scope="module")
def folders(language, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each family, with random towers."""
    by_family = {}
    for family in FAMILIES:
        by_family[family] = tmp_path_factory.mktemp(family)
        torch.manual_seed(2)
        model, _ = vision.with_tower(family)
        [tower] = tower_of(model).values()
        assemble(family, tower, language, make_tokenizer(), by_family[family])
    return by_family


def loaded(folder: Path):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


@each_family
def test_a_checkpoint_loads_and_takes_a_picture_as_its_family_does(family, folders):
    model, processor = loaded(folders[family])
    assert model.config.model_type == family
    row = next(scenes.rows("align", 1, 0))
    text = processor.apply_chat_template(CHAT, tokenize=False)
    batch = processor(images=[row["image"]], text=[text], return_tensors="pt")
    count, written = IMAGE_PART[family]
    assert (batch["input_ids"] == processor.image_token_id).sum() == count
    assert processor.tokenizer.decode(batch["input_ids"][0]) == (
        f"user: {written}\nwhat is it? assistant: red</s>"
    )
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape[-1] == len(processor.tokenizer) and logits.isfinite().all()


@each_family
def test_text_alone_gets_the_logits_of_the_decoder(family, folders, language):
    model, processor = loaded(folders[family])
    ids = processor.tokenizer("user: where is the ring? assistant: at r3 c11</s>")["input_ids"]
    words = len(make_tokenizer())
    with torch.no_grad():
        expected = language(input_ids=torch.tensor([ids])).logits
        logits = model(input_ids=torch.tensor([ids])).logits
    torch.testing.assert_close(logits[..., :words], expected, atol=1e-5, rtol=1e-4)
    # the family's new tokens are no likelier than any other
    new, lowest, highest = logits[..., words:], expected.amin(-1), expected.amax(-1)
    assert (new > lowest[..., None]).all() and (new < highest[..., None]).all()


@each_family
def test_a_tower_comes_back_from_the_checkpoint(family, folders):
    torch.manual_seed(2)
    [tower] = tower_of(vision.with_tower(family)[0]).values()
    [saved] = tower_of(loaded(folders[family])[0]).values()
    saved = saved.state_dict()
    assert saved.keys() == tower.state_dict().keys()
    for name, value in tower.state_dict().items():
        if not name.startswith("merger."):  # the projector is another
            torch.testing.assert_close(saved[name], value.half().float())


@some_families
def test_a_checkpoint_is_trained_by_the_scheme_and_asked_with_all_it_has(
    family, folders, prepared, tmp_path, monkeypatch
):
    monkeypatch.setenv("STS_TRACKING", "off")
    few = {"steps": 3, "batch_size": 4, "lr": 1e-3, "max_length": 512}
    config = two_stages(
        few | {"vtc": {"kind": "uniform", "keep": 0.5}},
        few | {"lds": {"policy": "sts", "rate": 0.4, "epsilon": 0.5}},
        model={
            "family": "whole",
            "checkpoint": str(folders[family]),
            "fresh": ["projector"],
            "layers": 2,
        },
        evaluate={"benchmarks": ["existence"], "max_new_tokens": 2},
    )
    start, run = tmp_path / "start.json", {"ablation": "sts", "seed": 0}
    write_manifest(config.model, start)
    before = start
    for stage in config.stages:
        out = tmp_path / "runs" / f"{stage}.json"
        manifest = train(Job(config, **run, stage=stage, data=[prepared], init=before, out=out))
        before = out
        history = [
            json.loads(line)
            for line in (Path(manifest["weights"]) / "history.jsonl").read_text().splitlines()
        ]
        shown = {row["visual_tokens"] for row in history}
        tokens = IMAGE_PART[family][0]
        assert shown == {tokens} if stage == "instruct" else max(shown) < 0.7 * tokens
    assert type(loaded(manifest["weights"])[0]) is type(loaded(folders[family])[0])
    result = evaluate(config, **run, run=before, data=[prepared], out=tmp_path / "eval.json")
    assert result["benchmarks"]["existence"]["score"] in (0, 1)  # of one question


@each_family
@pytest.mark.parametrize("patch", [0, 30, 77, 143])
def test_what_a_feature_is_told_lies_under_it(family, patch):
    """Another colour in one patch of the grid changes those features most that are told of it: of
    a tower without attention, where no other patch can."""
    torch.manual_seed(0)
    model, processor = vision.with_tower(family)
    [tower] = tower_of(model).values()
    for name, weight in tower.named_parameters():
        if name.endswith(("out_proj.weight", "out_proj.bias", "attn.proj.weight")):
            weight.data.zero_()
    plain = np.full((pictures.SIZE, pictures.SIZE, 3), 90, np.uint8)
    row, column = patch // pictures.GRID, patch % pictures.GRID
    painted = plain.copy()
    where = [slice(pictures.PATCH * i, pictures.PATCH * (i + 1)) for i in (row, column)]
    painted[*where] = np.random.default_rng(0).integers(0, 255, (pictures.PATCH, pictures.PATCH, 3))
    with torch.no_grad():
        features, _ = vision.features_of(family, model.eval(), processor, [plain, painted])
    changed = (features[0] - features[1]).norm(dim=-1)
    truth = torch.zeros(1, pictures.GRID**2, len(pictures.ATTRIBUTES), dtype=torch.long)
    truth[0, patch] = 1
    is_told, places = vision.shown(family, truth)
    is_told = is_told[0, :, 0] > 0
    expected = {"llava": 1, "llava_next": 2, "idefics3": 4, "qwen2_5_vl": 4}[family]
    assert is_told.sum() == expected
    if family == "llava_next":  # the whole picture is made smaller, and neighbours mix a little
        view = torch.arange(len(is_told)) < 36
        for part in (view, ~view):
            assert changed[part].argmax() == is_told[part].float().argmax()
        tile_row, tile_column = (places[0, is_told & ~view] - pictures.GRID).flatten().tolist()
        assert (tile_row, tile_column) == (row % 6, column % 6)
        is_told = is_told & view
    else:
        assert set(changed.topk(expected).indices.tolist()) == set(is_told.nonzero()[:, 0].tolist())
        assert changed[~is_told].max() < 1e-4
    assert (places[0, is_told] == torch.tensor([row, column])).all()


def test_a_patch_of_the_smaller_whole_shows_a_centre_before_another_thing():
    truth = torch.zeros(1, pictures.GRID**2, len(pictures.ATTRIBUTES), dtype=torch.long)
    first, second = 4 * pictures.GRID + 6, 5 * pictures.GRID + 7  # corners of one block of 2 x 2
    truth[0, first, 0], truth[0, second, 0] = 1, 2
    block = 2 * 6 + 3
    assert vision.shown("llava_next", truth)[0][0, block, 0] == 1
    truth[0, second, -1] = 1
    values, places = vision.shown("llava_next", truth)
    assert values[0, block, 0] == 2 and places[0, block].tolist() == [5, 7]


@some_families
def test_a_tower_of_a_few_steps_learns(family):
    torch.set_num_threads(1)
    losses: list[float] = []
    tower = vision.train_vision(family, 24, batch=4, losses=losses)
    assert not tower.training and all(torch.isfinite(p).all() for p in tower.parameters())
    assert np.mean(losses[12:16]) < 0.9 * np.mean(losses[:4])  # of the first leg


def test_letters_which_are_learnt_last_come_more_often_later():
    rows = list(islice(vision.training_rows(0, words_from=100), 300))
    words = [row["qa"][0]["skill"] == "text" for row in rows]
    assert len({row["id"] for row in rows}) == len(rows) == 300
    assert np.mean(words[:100]) < 0.3 and 0.4 < np.mean(words[100:]) < 0.6
