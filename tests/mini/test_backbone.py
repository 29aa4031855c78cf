"""The toy backbones: what they read, that they train, and how good the shipped are.

STS_REBUILD=1 make test-all ARGS="-k rebuilt -n0"    # trains them anew and compares
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
)

from recipes.mini import language, lessons, vision
from recipes.mini.__main__ import LANGUAGE_STEPS, LAYERS, TOWER_STEPS, main, save_parts, train_parts
from recipes.mini.families import FAMILIES
from recipes.mini.words import make_tokenizer
from sts.architectures import tower_of
from sts.mini import scenes
from sts.pipeline.config import ModelConfig
from sts.pipeline.train.model import SHIPPED, build, write_manifest

CHAT = [
    {"role": "user", "content": "<image>\nwhat is it?"},
    {"role": "assistant", "content": "red"},
]


def test_tokenizer_has_one_token_a_word_and_spells_the_rest():
    tokenizer = make_tokenizer()
    for word in lessons.vocabulary():
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1
    text = "Zebras? 2 of them; <image> user: ok"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_slot_is_the_sum_of_the_embeddings_of_its_words():
    tokenizer = make_tokenizer()
    embed = torch.nn.Embedding(len(tokenizer), 8)
    truth = next(scenes.rows("align", 1, 4))["truth"]
    slots = language.written_slots(
        embed, language.slot_ids(tokenizer), torch.from_numpy(truth[None]).long()
    )[0]
    for slot, words in zip(slots, lessons.written(truth), strict=True):
        ids = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words]
        torch.testing.assert_close(slot, embed.weight[ids].sum(0))


def test_a_turn_sees_the_picture_and_itself_only():
    """Changing an earlier question leaves the logits of a later turn as they are."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(language.language_config(tokenizer, 2)).eval()
    row = next(r for r in scenes.rows("align", 20, 0) if len(r["qa"]) >= 3)
    other = {**row, "qa": [{"question": "is there a ring?", "answer": "no"}, *row["qa"][1:]]}
    logits = []
    for example in (row, other):
        batch = language.written_batch(tokenizer, [example], captions=0)
        with torch.no_grad():
            logits.append(language.ask(model, tokenizer, language.slot_ids(tokenizer), batch)[0])
    last = len(logits[0]) - sum(
        len(tokenizer.encode(f" {qa['answer']}</s>", add_special_tokens=False))
        for qa in row["qa"][:1]
    )
    np.testing.assert_allclose(logits[0][-last:], logits[1][-last:], atol=1e-5)


def test_a_few_steps_of_the_decoder():
    torch.set_num_threads(1)
    model = language.train_language(make_tokenizer(), steps=6, layers=2, batch=4)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def quality_of(folder: Path) -> dict[str, dict[str, float]]:
    """What `quality.json` holds, measured anew on the saved backbones."""
    tower = CLIPVisionModel.from_pretrained(folder / "vision", dtype=torch.float32)
    decoder = LlamaForCausalLM.from_pretrained(folder / "language", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "processor")
    return {
        "seeing": vision.seeing("llava", tower),
        "reading": language.reading(decoder, tokenizer),
        "reading_without": language.reading_without(decoder, tokenizer, rows=128),
    }


@pytest.mark.slow
def test_shipped_backbones_are_as_good_as_is_said():
    """`quality.json` was written when they were trained, before they were rounded to fp16."""
    on_file = json.loads((SHIPPED / "quality.json").read_text())
    measured = quality_of(SHIPPED)
    for part in ("seeing", "reading"):
        assert measured[part] == pytest.approx(on_file[part], abs=0.03)
        assert min(on_file[part].values()) > 0.85
    without = on_file["reading_without"]
    assert measured["reading_without"] == pytest.approx(without, abs=0.03)
    middle = [without[str(index)] for index in (4, 5, 6)]
    assert min(middle) >= without["none"] - 0.01, "one of the middle layers can be left out"


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llava"])
def test_the_tower_of_a_shipped_checkpoint_sees_what_is_said(family):
    folder = SHIPPED.parent / family
    on_file = json.loads((folder / "quality.json").read_text())["seeing"]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    measured = vision.seeing(family, *tower_of(model).values())
    assert measured == pytest.approx(on_file, abs=0.03)
    assert min(on_file[name] for name in ("kind", "colour", "size")) > 0.9


@pytest.mark.slow
def test_a_rebuild_cut_short_learns_to_see_and_to_read(tmp_path):
    """A kind is 1 in 8, an untrained decoder answers nothing rightly."""
    steps = ["--tower-steps", "100", "--language-steps", "100", "--layers", "2"]
    main(["llava", "--out", str(tmp_path), *steps])
    quality = quality_of(tmp_path)
    on_file = json.loads((tmp_path / "quality.json").read_text())
    assert quality["seeing"] == pytest.approx(on_file["seeing"], abs=0.03)
    assert quality["seeing"]["kind"] > 0.5
    assert sum(quality["reading"].values()) / 7 > 0.1


def test_a_run_starts_from_rebuilt_parts_as_from_the_shipped(tmp_path):
    """`model.backbone: pretrained` with the two folders: equal tokens, template and pictures."""
    tokenizer = make_tokenizer()
    [tower] = tower_of(vision.with_tower("llava")[0]).values()
    decoder = LlamaForCausalLM(language.language_config(tokenizer, layers=2))
    save_parts(tmp_path / "rebuilt", tower, decoder, tokenizer)
    parts = {name: str(tmp_path / "rebuilt" / name) for name in ("vision", "language")}
    chosen = {"rebuilt": ModelConfig(backbone="pretrained", layers=2, **parts),
              "shipped": ModelConfig()}  # fmt: skip
    question = {"text": ["<image>\nwhat is red?"], "images": [np.zeros((72, 72, 3), np.uint8)]}
    batches, templates = [], []
    for name, model in chosen.items():
        write_manifest(model, tmp_path / f"{name}.json")
        built, processor = build(tmp_path / f"{name}.json", seed=0)
        batches.append(processor(**question, return_tensors="pt"))
        templates.append(processor.apply_chat_template(CHAT))
        assert len(processor.tokenizer) == built.config.text_config.vocab_size
    assert templates[0] == templates[1] == "user: <image>\nwhat is it? assistant: red</s>"
    assert batches[0].keys() == batches[1].keys()
    for key in batches[0]:
        assert torch.equal(batches[0][key], batches[1][key])


@pytest.mark.skipif("STS_REBUILD" not in os.environ, reason="an hour; see docs/training.md")
def test_rebuilt_backbones_are_as_good_as_the_shipped(tmp_path):
    train_parts(tmp_path, LAYERS, TOWER_STEPS["llava"], LANGUAGE_STEPS)
    shipped, rebuilt = quality_of(SHIPPED), quality_of(tmp_path)
    worse = {
        (part, name): (rebuilt[part][name], good)
        for part in shipped
        for name, good in shipped[part].items()
        if rebuilt[part][name] < good - 0.1
    }
    assert not worse
