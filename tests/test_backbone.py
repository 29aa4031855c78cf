"""The stand-ins for CLIP and Vicuna: what is shipped, how they are joined, and that they train.

STS_REBUILD=1 make test-all ARGS="-k rebuilt -n0"    # trains them anew and compares
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sts.mini import backbone, scenes
from sts.pipeline.config import load_scale

MINI = Path(__file__).parent.parent / "workflow" / "config" / "mini.yaml"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "manifest.json"
    backbone.main(load_scale(MINI), out)
    return out


def test_shipped_files_are_small_and_join_to_a_llava_with_a_seeded_projector(manifest):
    size = sum(path.stat().st_size for path in backbone.SHIPPED.rglob("*") if path.is_file())
    assert size < 10e6
    a, processor = backbone.build_llava(manifest, 1)
    b, _ = backbone.build_llava(manifest, 1)
    c, _ = backbone.build_llava(manifest, 2)
    states = [model.state_dict() for model in (a, b, c)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    moved = {name for name in states[0] if not torch.equal(states[0][name], states[2][name])}
    assert moved and all("multi_modal_projector" in name for name in moved)
    assert len(a.model.language_model.layers) >= 8
    assert a.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_pixels_equal_the_image_processor(manifest):
    _, processor = backbone.build_llava(manifest, 0)
    image = next(scenes.rows("align", 1, 0))["image"]
    theirs = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(backbone.pixels(image[None]), theirs, atol=1e-5, rtol=0)


def test_tokenizer_has_one_token_a_word_and_spells_the_rest():
    tokenizer = backbone.make_tokenizer()
    for word in scenes.vocabulary():
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1
    text = "Zebras? 2 of them; <image> user: ok"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_slot_is_the_sum_of_the_embeddings_of_its_words():
    tokenizer = backbone.make_tokenizer()
    embed = torch.nn.Embedding(len(tokenizer), 8)
    truth = next(scenes.rows("align", 1, 4))["truth"]
    slots = backbone.written_slots(
        embed, backbone.slot_ids(tokenizer), torch.from_numpy(truth[None]).long()
    )[0]
    for slot, words in zip(slots, scenes.written(truth), strict=True):
        ids = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words]
        torch.testing.assert_close(slot, embed.weight[ids].sum(0))


def test_a_turn_sees_the_picture_and_itself_only():
    """Changing an earlier question leaves the logits of a later turn as they are."""
    tokenizer = backbone.make_tokenizer()
    torch.manual_seed(0)
    model = backbone.LlamaForCausalLM(backbone.language_config(tokenizer, 2)).eval()
    row = next(r for r in scenes.rows("align", 20, 0) if len(r["qa"]) >= 3)
    other = {**row, "qa": [{"question": "is there a ring?", "answer": "no"}, *row["qa"][1:]]}
    logits = []
    for one in (row, other):
        batch = backbone.written_batch(tokenizer, [one], captions=0)
        with torch.no_grad():
            logits.append(backbone.ask(model, tokenizer, backbone.slot_ids(tokenizer), batch)[0])
    last = len(logits[0]) - sum(
        len(tokenizer.encode(f" {qa['answer']}</s>", add_special_tokens=False))
        for qa in row["qa"][:1]
    )
    np.testing.assert_allclose(logits[0][-last:], logits[1][-last:], atol=1e-5)


def test_a_few_steps_of_both_trainings(capsys):
    torch.set_num_threads(1)
    assert not backbone.train_vision(2, batch=4).training
    model = backbone.train_language(backbone.make_tokenizer(), steps=6, layers=2, batch=4)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def quality_of(folder: Path) -> dict[str, dict[str, float]]:
    """What `quality.json` holds, measured anew on the saved backbones."""
    vision = backbone.CLIPVisionModel.from_pretrained(folder / "vision", dtype=torch.float32)
    language = backbone.LlamaForCausalLM.from_pretrained(folder / "language", dtype=torch.float32)
    tokenizer = backbone.AutoTokenizer.from_pretrained(folder / "processor")
    return {"seeing": backbone.seeing(vision), "reading": backbone.reading(language, tokenizer)}


@pytest.mark.slow
def test_shipped_backbones_are_as_good_as_is_said():
    """`quality.json` was written when they were trained, before they were rounded to fp16."""
    said = json.loads((backbone.SHIPPED / "quality.json").read_text())
    measured = quality_of(backbone.SHIPPED)
    for part in ("seeing", "reading"):
        assert measured[part] == pytest.approx(said[part], abs=0.03)
        assert min(said[part].values()) > 0.85


@pytest.mark.slow
def test_a_rebuild_cut_short_learns_to_see_and_to_read(tmp_path):
    """A kind is 1 in 8, an untrained decoder answers nothing rightly."""
    backbone.rebuild(tmp_path, layers=2, vision_steps=200, language_steps=60, threads=2)
    quality = quality_of(tmp_path)
    said = json.loads((tmp_path / "quality.json").read_text())
    assert quality["seeing"] == pytest.approx(said["seeing"], abs=0.03)
    assert quality["seeing"]["kind"] > 0.5
    assert sum(quality["reading"].values()) / 7 > 0.1


@pytest.mark.skipif("STS_REBUILD" not in os.environ, reason="an hour; see docs/training.md")
def test_rebuilt_backbones_are_as_good_as_the_shipped(tmp_path):
    model = load_scale(MINI).model
    backbone.rebuild(
        tmp_path, model.layers, model.vision_steps, model.language_steps, model.threads
    )
    shipped, rebuilt = quality_of(backbone.SHIPPED), quality_of(tmp_path)
    worse = {
        (part, name): (rebuilt[part][name], good)
        for part in shipped
        for name, good in shipped[part].items()
        if rebuilt[part][name] < good - 0.1
    }
    assert not worse


def test_missing_files_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(backbone, "SHIPPED", tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"git checkout.*rebuild"):
        backbone.main(load_scale(MINI), tmp_path / "manifest.json")
