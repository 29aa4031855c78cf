"""Batches hold what any processor gives, and a model of its kind learns from them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import turns
from own_sets import config, samples_of
from PIL import ExifTags, Image
from processors import PROCESSORS, model_of
from transformers import ProcessorMixin

from sts.pipeline.data.collator import Conversations, collate, split_files
from sts.pipeline.data.conversation import messages, render
from sts.pipeline.data.prepare import prepare
from sts.settings import IGNORE_INDEX

TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
SIZES = {"a.png": (40, 60), "b.jpg": (24, 16), "c.png": (33, 20)}  # width and height


ROWS = [
    {"id": "one", "image": "a.png", "conversations": turns("<image>\nwhat is it?", "a circle")},
    {"id": "text", "conversations": turns("what?", "this", "sure?", "yes")},
    {
        "id": "two",
        "image": ["b.jpg", "a.png"],
        "conversations": turns("<image> or <image>?", "the red", "and?", "a"),
    },
    {"id": "later", "image": ["c.png"], "conversations": turns("ready?", "yes", "<image>", "red")},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, each of another size and with other pixels."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        pixels = random.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def prepared(rows: list[dict], images: Path, out: Path) -> list[Path]:
    """The Arrow file of rows of a user's own."""
    out.mkdir(exist_ok=True)
    (out / "own.json").write_text(json.dumps(rows))
    own = {"json": str(out / "own.json"), "images": str(images)}
    manifest = prepare(config(custom={"own": own}), "own", out / "manifest.json")
    assert manifest["bad_rows"] == {}
    return split_files([out / "manifest.json"], "instruct")


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory) -> list[Path]:
    return prepared(ROWS, folder, tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module", params=PROCESSORS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def processor(kind) -> ProcessorMixin:
    return PROCESSORS[kind]()


@pytest.fixture(scope="module")
def data(files, processor) -> Conversations:
    return samples_of(files, processor)


def test_a_batch_is_what_the_processor_gives_for_texts_and_images(processor, data, folder):
    order = [2, 0, 1, 3]
    batch = collate(processor, [data[index] for index in order])
    rows = [ROWS[index] for index in order]
    texts = [render(processor, messages(row["conversations"])) for row in rows]
    names = [row.get("image", []) for row in rows]
    names = [[name] if isinstance(name, str) else name for name in names]
    images = [[Image.open(folder / name).convert("RGB") for name in some] for some in names]
    options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    of_all = processor(text=texts, images=images, **options)
    of_images = [number for number, some in enumerate(images) if some]
    of_images = processor(
        text=[texts[number] for number in of_images],
        images=[images[number] for number in of_images],
        **options,
    )
    assert batch.keys() == {*of_all.keys(), "labels"}
    for name in batch.keys() - {"labels"}:
        expected = of_all if name in TEXT else of_images
        assert torch.equal(batch[name], expected[name]), name


def test_a_model_of_the_kind_learns_from_mixed_batches(kind, processor, data):
    model = model_of(kind, processor)
    for order in ([2, 0, 1, 3], [1], [0]):
        batch = collate(processor, [data[index] for index in order])
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        answered = batch["labels"][:, 1:] != IGNORE_INDEX
        logits = model(**batch).logits[:, :-1][answered].float()
        expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][answered])
        assert torch.allclose(loss, expected, rtol=1e-3)
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_lengths_are_known_before_an_image_is_decoded(processor, files, data, monkeypatch):
    assert data.has_image == [True, False, True, True]
    assert data.lengths == [len(data[index]["input_ids"]) for index in range(len(data))]
    monkeypatch.setattr(Image.Image, "load", None)  # decoding calls it
    with pytest.raises(TypeError):
        data[0]
    # the sizes are known by now, and so is what the processor writes for them
    assert samples_of(files, processor).lengths == data.lengths


@pytest.fixture(scope="module")
def qwen() -> ProcessorMixin:
    return PROCESSORS["qwen2_5_vl"]()


def test_a_turned_photo_has_the_size_that_it_is_shown_in(qwen, folder, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 16)).save(tmp_path / "images" / "a.png", "JPEG", exif=exif)
    data = samples_of(prepared(ROWS[:1], tmp_path / "images", tmp_path / "own"), qwen)
    assert data[0]["images"][0].size == (16, 64)
    [grid] = collate(qwen, [data[0]])["image_grid_thw"].tolist()
    assert grid == [1, 16, 4]  # patches of 4 pixels
    assert (data[0]["input_ids"] == qwen.image_token_id).sum() == 16 * 4 / 4


def test_sets_with_one_image_a_row_and_with_several_are_mixed(qwen, folder, files, tmp_path):
    single = prepared(ROWS[:2], folder, tmp_path / "own")
    data = samples_of([*single, *files], qwen)
    assert len(data) == 2 + len(ROWS)
    shown = [[image.size for image in data[index]["images"]] for index in range(len(data))]
    a, b, c = SIZES.values()
    assert shown == [[a], [], [a], [], [b, a], [c]]


def test_the_row_that_a_processor_refuses_is_named(files):
    refusing = PROCESSORS["qwen2_5_vl"]()
    condition = (
        "{% if 'ready?' in messages | string %}{{ raise_exception('no offers') }}{% endif %}"
    )
    refusing.chat_template = condition + refusing.chat_template
    with pytest.raises(ValueError, match="row later can't be tokenised: no offers"):
        samples_of(files, refusing)


def test_a_cut_leaves_images_and_an_answer_or_is_refused(qwen, files, caplog):
    uncut = samples_of(files, qwen)
    longest = max(uncut.lengths)
    row = uncut.lengths.index(longest)
    data = samples_of(files, qwen, longest - 1)
    assert np.array_equal(data[row]["input_ids"], uncut[row]["input_ids"][:-1])
    assert (data.lengths[row], data.has_image) == (longest - 1, uncut.has_image)
    is_image = uncut[2]["input_ids"] == qwen.image_token_id
    end = int(np.flatnonzero(is_image)[-1]) + 1
    samples_of(files, qwen, end)
    assert f"max_length {end}" in caplog.text  # some row has no answer left
    message = (
        rf"max_length {end - 1} doesn't hold the {end} tokens up to the end of the images of row "
        r"two \(height x width: 16 x 24, 60 x 40\): raise it"
    )
    with pytest.raises(ValueError, match=message):
        samples_of(files, qwen, end - 1)
