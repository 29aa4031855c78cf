"""The tokens of conversations, with labels on the answers only and a run of placeholders as one.

They are those that the processor gives for the rendered text and images of those sizes; a model's
first use compares them (`_check`).
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from sts.pipeline.data.conversation import (
    WRITERS,
    Spans,
    adds_special_tokens,
    answers,
    messages,
    render,
    template_of,
)
from sts.pipeline.data.rows import IMAGE_TOKEN
from sts.settings import IGNORE_INDEX

Size = tuple[int, int]  # height and width of an image in pixels


def tokenise(
    processor: ProcessorMixin,
    conversations: Sequence[Sequence[dict]],
    sizes: Sequence[Sequence[Size]],
    template: str | None = None,
) -> list[dict[str, np.ndarray | int]]:
    """The tokens of LLaVA conversations that have images of these sizes.

    Args:
        processor: of the model.
        conversations: turns {from, value} of each.
        sizes: of the images of each.
        template: None for the processor's chat template, or another of WRITERS.

    Returns:
        Of each conversation
        ids, labels: int32 [tokens], where a run of the same placeholder is one token. A label is
            the id itself on tokens of an answer and its end, else IGNORE_INDEX.
        at, counts: int32 [placeholders], where they are and how many tokens each stands for
            (`expand`).
        shown: how many of the expanded tokens there are up to the end of the last image.

    Raises:
        ValueError: a conversation doesn't show as many images as it has, or the processor doesn't
            say what it writes for an image, or writes something else.
    """
    if any(sizes):
        _check(processor, template_of(processor))
    return _tokenise(processor, conversations, sizes, WRITERS[template])


@lru_cache(maxsize=8)
def _check(processor: ProcessorMixin, template: str) -> None:
    """Compare the tokens of texts with images with those that the processor itself gives."""
    for sizes in ([(64, 64)], [(64, 64), (32, 96)]):
        question = f"{IMAGE_TOKEN * len(sizes)}\nwhat?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "this"}]
        [sample] = _tokenise(processor, [turns], [sizes], answers)
        text, images = render(processor, messages(turns)), [_blank(size) for size in sizes]
        [expected] = processor(images=[images], text=[text])["input_ids"]
        if not np.array_equal(expand(sample)[0], expected):
            raise ValueError(
                f"the {type(processor).__name__} writes other tokens than those of its chat "
                "template and of its placeholders for images, so labels can't be put on them"
            )


def _blank(size: Size) -> Image.Image:
    height, width = size
    return Image.new("RGB", (width, height))


def _tokenise(
    processor: ProcessorMixin,
    conversations: Sequence[Sequence[dict]],
    sizes: Sequence[Sequence[Size]],
    write: Callable[..., tuple[str, Spans]],
) -> list[dict[str, np.ndarray | int]]:
    written = [
        _show(processor, *write(processor, messages(conversation)), images)
        for conversation, images in zip(conversations, sizes, strict=True)
    ]
    encoded = processor.tokenizer(
        [text for text, *_ in written],
        add_special_tokens=adds_special_tokens(processor),
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    samples = []
    for (text, spans, counts, shown), ids, offsets in zip(
        written, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        ids, counts = np.array(ids, np.int32), np.array(counts, np.int32)
        at = np.flatnonzero(np.isin(ids, placeholder_ids(processor)))
        if len(at) != len(counts):
            raise ValueError(f"the tokenizer takes placeholders of images apart: {text[:200]!r}")
        begin, end = np.array(offsets).reshape(-1, 2).T
        # a token belongs to an answer if they share a character
        answered = np.zeros(len(ids), bool)
        for first, last in spans:
            answered |= (begin < last) & (end > first)
        labels = np.where(answered, ids, IGNORE_INDEX).astype(np.int32)
        sample = {"ids": ids, "labels": labels, "at": at.astype(np.int32), "counts": counts}
        before = 1 + np.flatnonzero((begin < shown) & (end > begin)).max(initial=-1)
        samples.append(sample | {"shown": int(_repeats(sample)[:before].sum())})
    return samples


def _show(
    processor: ProcessorMixin, text: str, spans: Spans, sizes: Sequence[Size]
) -> tuple[str, np.ndarray, list[int], int]:
    """A rendered text with what the processor writes for its images: (text, spans moved, counts,
    where the last image ends)."""
    mark = re.escape(processor.image_token)
    places = np.array([match.span() for match in re.finditer(mark, text)], int).reshape(-1, 2)
    if len(places) != len(sizes):
        raise ValueError(
            f"the conversation has {len(places)} {processor.image_token} but {len(sizes)} images: "
            f"{text[:200]!r}"
        )
    single, pieces, counts, last = _single(processor), [], [], 0
    for (first, end), (written, runs) in zip(
        places, placeholders(processor, tuple(sizes)), strict=True
    ):
        counts += [1] * len(single.findall(text, last, first)) + list(runs)
        pieces += [text[last:first], written]
        last = end
    shown = sum(map(len, pieces))
    counts += [1] * len(single.findall(text, last))
    grown = [len(written) for written in pieces[1::2]] - (places[:, 1] - places[:, 0])
    moved = [0, *grown.cumsum()]
    spans = np.array(spans, int).reshape(-1, 2)
    spans = spans + np.take(moved, np.searchsorted(places[:, 1], spans, side="right"))
    return "".join([*pieces, text[last:]]), spans, counts, shown


@lru_cache(maxsize=2**16)
def placeholders(
    processor: ProcessorMixin, sizes: tuple[Size, ...]
) -> list[tuple[str, tuple[int, ...]]]:
    """What the processor writes for each image of a sample, with one in the place of a run of the
    same placeholder, and how many each stands for. Some write less for one of several images.

    Raises:
        ValueError: the processor doesn't say it.
    """
    if not sizes:
        return []
    images, marks = [_blank(size) for size in sizes], processor.image_token * len(sizes)
    try:
        made = processor(images=[images], text=[marks], return_text_replacement_offsets=True)
        [replacements] = made["text_replacement_offsets"]
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f"the {type(processor).__name__} doesn't say what it writes for an image: transformers "
            "has no replace_image_token for it"
        ) from error
    runs = re.compile(rf"({_single(processor).pattern})\1*")
    texts = [item["replacement"] for item in replacements]
    return [
        (
            runs.sub(r"\1", text),
            tuple(len(run.group()) // len(run[1]) for run in runs.finditer(text)),
        )
        for text in texts
    ]


@lru_cache(maxsize=8)
def placeholder_ids(processor: ProcessorMixin) -> list[int]:
    """Ids of the tokens that stand for an image, and of those that the processor counts to it."""
    return [number for number in processor.image_token_ids if number is not None]


@lru_cache(maxsize=8)
def _single(processor: ProcessorMixin) -> re.Pattern:
    tokens = processor.tokenizer.convert_ids_to_tokens(placeholder_ids(processor))
    return re.compile("|".join(map(re.escape, tokens)))


def cut(sample: dict, length: int) -> dict[str, np.ndarray | int]:
    """A sample of `tokenise` without what comes after `length` expanded tokens; no image does."""
    kept = np.searchsorted(_repeats(sample).cumsum(), length, side="right")
    images = np.searchsorted(sample["at"], kept)
    return sample | {
        **{name: sample[name][:kept] for name in ("ids", "labels")},
        **{name: sample[name][:images] for name in ("at", "counts")},
    }


def expand(sample: dict) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels [tokens] of a sample of `tokenise`, with every placeholder."""
    repeats = _repeats(sample)
    return np.repeat(sample["ids"], repeats), np.repeat(sample["labels"], repeats)


def _repeats(sample: dict) -> np.ndarray:
    repeats = np.ones(len(sample["ids"]), np.int32)
    repeats[sample["at"]] = sample["counts"]
    return repeats
