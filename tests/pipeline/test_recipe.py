"""The recipe is LLaVA-1.5's: its texts and labels token by token, its squares, batches and curve.

The references are written from its rules: `preprocess_v1`, `preprocess_plain`, `expand2square` and
`get_modality_length_grouped_indices` of haotian-liu/LLaVA (llava/train).
"""

import json
import math
import re
from functools import partial
from itertools import chain
from pathlib import Path

import hypothesis.strategies as some
import numpy as np
import pytest
import torch
from asking import picture
from cases import turns
from configs import two_stages
from hypothesis import given, settings
from lm_eval.api.instance import Instance
from parts import TOWERS, VISUAL, joined
from PIL import Image
from sentencepiece import SentencePieceProcessor
from transformers import AutoProcessor, get_cosine_schedule_with_warmup
from transformers.convert_slow_tokenizer import import_protobuf

from sts.pipeline.config import (
    MINI,
    Config,
    deep_merge,
    load_scale,
    load_yaml,
    validate,
)
from sts.pipeline.cost.history import read_history
from sts.pipeline.data.collator import batch_indices
from sts.pipeline.data.prepare import prepare
from sts.pipeline.data.templates import V1
from sts.pipeline.data.tokens import cut, expand, tokenise
from sts.pipeline.evaluate.asking import load_model
from sts.pipeline.train.feed import my_pieces
from sts.pipeline.train.job import Job
from sts.pipeline.train.model import build, freeze
from sts.pipeline.train.step import lr_factor, make_optimizer
from sts.pipeline.train.train import train
from sts.settings import IGNORE_INDEX

PAPER = Path(__file__).parents[2] / "workflow/config/paper.yaml"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
LONG = turns(
    "<image>\nwhat is on the table?", "a red bowl", "and in it?", "two apples, one cut", "sure?",
    "yes",
)  # fmt: skip
CONVERSATIONS = {
    "one turn": turns("<image>\nwhat is it?", "a bowl"),
    "several turns": LONG,
    "the image last": turns("what is on the table?\n<image>", "a red bowl", "sure?", "yes"),
    "text alone": turns("what is a bowl?", "it is round", "sure?", "yes"),
    "a name that is no turn": turns("<image>\nis ASSISTANT:it a name, USER: too?", "ASSISTANT: no"),
    "spaces at the ends": turns(" <image> \n what? \n", " a  bowl \n", " sure?\n\n", "\tyes  "),
    "code": turns("what is it?\n", "def f(x):\n    return  x\n        # a\tbowl\n"),
}
TRAP = turns("<image>\nsay ASSISTANT: two", "what ASSISTANT: is", "sure?", "yes")
CAPTION = turns("<image>\nwhat is it?", "a red bowl, and two apples in it")
TEXTS = [
    *["xUSER: xASSISTANT:"] * 9,  # Llama has a token USER, and none with a space before it
    *(
        turn["value"].replace("<image>", "").replace("USER", "xUSER")
        for turn in chain(*CONVERSATIONS.values(), TRAP, CAPTION)
    ),
    SYSTEM,
]
V1_PAD = {"template": "v1", "image_aspect_ratio": "pad"}


@pytest.fixture(scope="module")
def paper() -> Config:
    return load_scale(PAPER)


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "today"])
def legacy(request) -> bool:
    """Whether Llama's tokenizer begins what follows a special token with a space, as it did."""
    return request.param


@pytest.fixture(scope="module")
def folder(legacy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    joined(folder, texts=TEXTS, legacy=legacy, **V1_PAD)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return build(folder / "backbone.json", 0)[1]


# ---- what LLaVA makes of a conversation --------------------------------------------------------


class Slow:
    """Llama's tokenizer as LLaVA loads it (use_fast=False), by SentencePiece itself."""

    def __init__(self, folder: Path, legacy: bool):
        content = (folder / "language/tokenizer.model").read_bytes()
        self.words, self.legacy = SentencePieceProcessor(model_proto=content), legacy
        file = import_protobuf().ModelProto.FromString(content)
        file.normalizer_spec.add_dummy_prefix = False
        self.inner = SentencePieceProcessor(model_proto=file.SerializeToString())

    def ids(self, text: str) -> list[int]:
        begin, *others = re.split("(</s>)", text)
        words = self.words if self.legacy else self.inner
        after = [[2] if piece == "</s>" else words.encode(piece) for piece in others]
        return [1, *self.words.encode(begin), *chain(*after)]


@pytest.fixture(scope="module")
def slow(folder, legacy) -> Slow:
    slow = Slow(folder, legacy)
    assert len(slow.words.encode("USER")) == len(slow.inner.encode("USER")) + 1
    return slow


IMAGE = -200


def encoded(slow: Slow, text: str) -> list[int]:
    """Tokens of a text in which each piece around an image is tokenised by itself."""
    first, *others = map(slow.ids, text.split("<image>"))
    return [*first, *chain(*([IMAGE, *piece[1:]] for piece in others))]


def llava_v1(slow: Slow, conversation: list[dict], limit: int = 2048):
    """Ids and labels: of every round, what is asked is left out, whose measure has two tokens too
    many; a text whose rounds don't add up is ignored as a whole."""
    text = f"{SYSTEM} "
    for turn in conversation:
        said = turn["value"]
        if "<image>" in said:
            said = ("<image>\n" + said.replace("<image>", "").strip()).strip()
        text += f"USER: {said} " if turn["from"] == "human" else f"ASSISTANT: {said}</s>"
    ids = encoded(slow, text)
    labels, at = [IGNORE_INDEX, *ids[1:]], 1
    for number, one in enumerate(text.split("</s>")):
        asked, *answer = one.split(" ASSISTANT: ")
        if len(answer) != 1:
            break
        shorter = int(number > 0 and not slow.legacy)
        skipped = len(encoded(slow, f"{asked} ASSISTANT: ")) - 2 - shorter
        labels[at : at + skipped] = [IGNORE_INDEX] * skipped
        at += len(encoded(slow, one)) - shorter
    labels[at:] = [IGNORE_INDEX] * len(labels[at:])
    if at < limit and at != len(ids):
        labels = [IGNORE_INDEX] * len(ids)
    return expanded(ids, labels, limit)


def llava_plain(slow: Slow, conversation: list[dict]):
    """Ids and labels: all after the image is the answer."""
    ids = encoded(slow, f"<image>{conversation[1]['value']}\n")
    asked = len(encoded(slow, "<image>"))
    return expanded(ids, [*[IGNORE_INDEX] * asked, *ids[asked:]])


def expanded(ids: list[int], labels: list[int], limit: int = 2048) -> tuple[list[int], list[int]]:
    """With as many tokens for an image as it has features."""
    times = [VISUAL if id == IMAGE else 1 for id in ids]
    return tuple(np.repeat(row, times).tolist()[:limit] for row in (ids, labels))


def ours(processor, conversation, template=None, limit=2048):
    """Ids, with LLaVA's number for those of an image, and labels."""
    shown = sum(turn["value"].count("<image>") for turn in conversation)
    [sample] = tokenise(processor, [conversation], [[(40, 60)] * shown], template)
    ids, labels = (row.tolist() for row in expand(cut(sample, limit)))
    return [IMAGE if id == processor.image_token_id else id for id in ids], labels


def answered(processor, labels: list[int]) -> list[str]:
    """The text of every run of labels."""
    runs = np.split(labels, np.flatnonzero(np.diff(np.array(labels) != IGNORE_INDEX)) + 1)
    return [processor.tokenizer.decode(run) for run in runs if run[0] != IGNORE_INDEX]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_v1_has_the_text_and_the_labels_of_llava(processor, slow, name):
    conversation = CONVERSATIONS[name]
    ids, labels = ours(processor, conversation)
    assert (ids, labels) == llava_v1(slow, conversation)
    said = [turn["value"] for turn in conversation if turn["from"] == "gpt"]
    assert answered(processor, labels) == [f"{text}</s>" for text in said]


WRITTEN = some.text(some.sampled_from(" \n\ta1é中😀|-:_.USER<s>"), min_size=1, max_size=24).filter(
    lambda text: text.strip() and not {"<s>", "</s>"} & {*re.findall("</?s>", text)}
)


@settings(max_examples=60, deadline=None)
@given(
    texts=some.lists(some.tuples(WRITTEN, WRITTEN), min_size=1, max_size=3),
    shown=some.sampled_from(["{}", "<image>\n{}", "{}\n<image>"]),
)
def test_any_conversation_has_the_ids_and_labels_of_llava(processor, slow, texts, shown):
    (question, answer), *others = texts
    conversation = turns(shown.format(question), answer, *chain(*others))
    ids, labels = ours(processor, conversation)
    expected, expected_labels = llava_v1(slow, conversation)
    assert ids == expected
    if set(expected_labels) != {IGNORE_INDEX}:  # else LLaVA warns of its count and leaves it out
        assert labels == expected_labels
    caption = turns("<image>\nwhat?", answer)
    assert ours(processor, caption, "plain") == llava_plain(slow, caption)


@pytest.mark.parametrize("kept", [1, 7, 20, 30])
def test_a_sample_that_is_too_long_is_cut_where_llava_cuts_it(processor, slow, kept):
    whole = ours(processor, LONG)
    limit = whole[0].index(IMAGE) + VISUAL + kept
    assert len(whole[0]) > limit
    found = ours(processor, LONG, limit=limit)
    assert found == tuple(row[:limit] for row in whole) == llava_v1(slow, LONG, limit)


def test_a_turn_that_holds_the_next_ones_head_keeps_its_labels(processor, slow):
    """LLaVA ignores the whole sample, with a warning about its tokenization."""
    _, labels = ours(processor, TRAP)
    assert answered(processor, labels) == ["what ASSISTANT: is</s>", "yes</s>"]
    assert set(llava_v1(slow, TRAP)[1]) == {IGNORE_INDEX}


def test_plain_is_the_caption_as_llava_aligns_on_it(processor, slow):
    found = ours(processor, CAPTION, "plain")
    assert found == llava_plain(slow, CAPTION)
    assert processor.tokenizer.decode(found[1][-2:]).endswith("\n")


def test_plain_is_for_one_caption(processor):
    with pytest.raises(ValueError, match=r"template: plain .* not for 6 turns: .*red bowl.*stage"):
        ours(processor, LONG, "plain")


# ---- squares ------------------------------------------------------------------------------------


def square_of(image: Image.Image, mean) -> Image.Image:
    """A picture in the middle of a square of the mean colour."""
    side = max(image.size)
    whole = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    whole.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return whole


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("size", [(64, 20), (20, 65), (33, 33)])
def test_pictures_are_padded_as_llava_pads_them(tmp_path, tower, size):
    own = AutoProcessorOf(joined(tmp_path / "own", tower=tower))
    pads = AutoProcessorOf(joined(tmp_path / "pad", tower=tower, image_aspect_ratio="pad"))
    image = picture(1, size=size)
    padded = own(square_of(image, own.image_mean))
    assert torch.equal(pads(image), padded)
    assert torch.equal(own(image), padded) == (size[0] == size[1])


class AutoProcessorOf:
    """The image processor of a model that was saved and is read again."""

    def __init__(self, backbone: Path):
        build(backbone, 0)[1].save_pretrained(backbone.parent / "saved")
        self.images = AutoProcessor.from_pretrained(backbone.parent / "saved").image_processor
        self.image_mean = self.images.image_mean

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.images(images=[[image]], return_tensors="pt")["pixel_values"]


# ---- batches ------------------------------------------------------------------------------------

COUNT = 1000
LENGTHS = np.random.default_rng(0).integers(5, 200, COUNT)
HAS_IMAGE = np.arange(COUNT) % 16 != 0


def test_batches_are_those_of_llavas_modality_grouping():
    """Of one kind each, drawn at random and not by length, what is left of both kinds together; the
    longest first within one, so that micro-batches are of similar length."""
    order = partial(batch_indices, LENGTHS, HAS_IMAGE, 32, epoch=0, sorted_batches=1)
    batches = order(seed=3)
    assert order(seed=3) == batches != order(seed=4), "a seed of their own"
    assert sorted(chain(*batches)) == list(range(COUNT))
    kinds = [{bool(HAS_IMAGE[i]) for i in batch} for batch in batches]
    pure = [batch for batch, kind in zip(batches, kinds, strict=True) if len(kind) == 1]
    assert len(batches) - len(pure) <= 2
    assert all((np.diff(LENGTHS[batch]) <= 0).all() for batch in pure if len(batch) == 32)
    # a batch's mean length says nothing: it spreads as that of random draws does
    means = [LENGTHS[batch].mean() for batch in pure if HAS_IMAGE[batch[0]]]
    drawn = LENGTHS.std() / math.sqrt(32)
    assert 0.5 * drawn < np.std(means) < 2 * drawn
    by_length = batch_indices(LENGTHS, HAS_IMAGE, 32, seed=3, epoch=0)
    assert np.std([LENGTHS[batch].mean() for batch in by_length]) > 4 * drawn


class Processes:
    def __init__(self, rank: int, world: int):
        self.process_index, self.num_processes = rank, world


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_a_step_of_the_recipe_is_the_same_on_any_number_of_gpus(paper, stage):
    block = paper.stage(stage)
    batch = list(range(block.global_batch))
    for processes, size in ((1, 4), (2, 16), (4, 1), (8, block.batch_size), (16, 8)):
        steps = block.global_batch // processes // size
        split = {"processes": processes, "batch_size": size, "gradient_accumulation_steps": steps}
        other = block.model_copy(update=split)
        assert other.identity() == block.identity()
        shares = [my_pieces(batch, steps, Processes(rank, processes)) for rank in range(processes)]
        assert {len(piece) for share in shares for piece in share} == {size}
        assert sorted(chain(*chain(*shares))) == batch


# ---- the curve and the optimizer ----------------------------------------------------------------


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_the_learning_rate_is_that_of_the_cosine_schedule_of_transformers(paper, stage):
    """But for the warm-up, which is a step ahead: its first step moves the weights already."""
    block = paper.stage(stage)
    rising = math.ceil(0.03 * block.steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, rising, block.steps)
    rates = []
    for _ in range(block.steps):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    found = [lr_factor(step, block.steps, rising) for step in range(block.steps)]
    assert found[rising:] == pytest.approx(rates[rising:])
    assert found[: rising - 1] == pytest.approx(rates[1:rising])


def test_the_optimizer_is_adamw_without_decay_on_all_that_is_trained(paper, tmp_path):
    model, _ = build(joined(tmp_path), 0)
    for stage, rate in (("align", 1e-3), ("instruct", 2e-5)):
        block = paper.stage(stage)
        freeze(model, block.trains)
        optimizer = make_optimizer(model, block)
        assert type(optimizer) is torch.optim.AdamW
        for group in optimizer.param_groups:
            assert (group["weight_decay"], group["peak"]) == (0, rate)
            assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}


# ---- from parts to answers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Manifests of captions and of conversations, some without an image, as LLaVA's files are."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(8):
        picture(number, size=(64, 20) if number % 2 else (20, 48)).save(folder / f"{number}.png")
    shown = [{"id": str(n), "image": f"{n}.png", "conversations": CAPTION} for n in range(8)]
    asked = [{**row, "conversations": LONG} for row in shown]
    text = [{"id": f"t{n}", "conversations": CONVERSATIONS["text alone"]} for n in range(4)]
    found = {}
    for stage, rows in (("align", shown), ("instruct", asked + text)):
        (folder / f"{stage}.json").write_text(json.dumps(rows))
        entry = {"json": str(folder / f"{stage}.json"), "images": str(folder), "split": stage}
        merged = deep_merge(load_yaml(MINI), {"data": {"custom": {stage: entry}}})
        found[stage] = folder / stage / "manifest.json"
        assert prepare(validate(merged, "test"), stage, found[stage])["bad_rows"] == {}
    return found


FEW = {"steps": 2, "lr": 1e-3, "max_length": 256, "sorted_batches": 1}


def config(**more) -> Config:
    align = {"split": "align", "template": "plain", "batch_size": 4, "group_by_length": False}
    instruct = {"split": "instruct", "batch_size": 2, "gradient_accumulation_steps": 2}
    return two_stages(FEW | align | more, FEW | instruct | more)


@pytest.mark.parametrize("tower", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_the_recipe_from_parts_in_folders_to_a_model_that_is_asked_as_it_was_trained(
    tmp_path, data, monkeypatch, tower
):
    monkeypatch.setenv("STS_TRACKING", "off")
    start, trained = joined(tmp_path, tower, texts=TEXTS, **V1_PAD), {}
    runs, init = tmp_path / "results" / "runs" / "dense" / "seed0", start
    for stage in ("align", "instruct"):
        out = runs / f"{stage}.json"
        trained[stage] = train(Job(config(), "dense", 0, stage, [data[stage]], init, out))
        init = out
    captions = [row["answer_tokens"] for row in read_history(trained["align"]["weights"])]
    labels = llava_plain(Slow(tmp_path, legacy=False), CAPTION)[1]
    assert captions == [4 * sum(label != IGNORE_INDEX for label in labels[1:])] * 2

    lm = load_model(trained["instruct"]["weights"], "fp32", config())
    own_space = V1.replace(r"<image>\n", r"<image> \n")  # as a text begins after an image
    assert lm.processor.chat_template == own_space and lm.processor.image_processor.do_pad
    prompt = lm.apply_chat_template([{"role": "user", "content": "<image>\nwhat is it?"}])
    assert prompt.endswith(f"{SYSTEM} USER: <image> \nwhat is it? ASSISTANT:")
    seen, until = [], {"until": ["\n"], "do_sample": False, "max_gen_toks": 3}
    tower = lm.model.model.vision_tower
    tower.register_forward_pre_hook(lambda _, args, __: seen.append(args[0]), with_kwargs=True)
    image = picture(9, size=(64, 20))
    arguments = (prompt, until, {"visual": [image]})
    request = Instance("generate_until", {}, arguments, 0, ("task", 0, 1))
    lm.generate_until([request], disable_tqdm=True)
    own = lm.processor.image_processor
    square = own(images=[[square_of(image, own.image_mean)]], return_tensors="pt")
    assert torch.equal(seen[0].cpu(), square["pixel_values"])
