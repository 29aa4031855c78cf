"""The tokens of conversations, with a run of the same placeholder as one, and which are answers.

They are those that the processor gives for the rendered text and images of those sizes; a model's
first use compares them (`_check`).
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from sts.pipeline.data import conversation
from sts.pipeline.data.conversation import WRITERS, Message, Spans, answers, messages
from sts.pipeline.data.literal import HIDDEN, encode, hide
from sts.pipeline.data.rows import IMAGE_TOKEN
from sts.settings import IGNORE_INDEX

Size = tuple[int, int]  # height and width of an image in pixels
OF_TOKENS = ("ids", "repeats", "is_answer")  # entries of a sample that are [tokens]


def tokenise(
    processor: ProcessorMixin,
    conversations: Sequence[Sequence[dict]],
    sizes: Sequence[Sequence[Size]],
    template: str | None = None,
) -> list[dict]:
    """The tokens of LLaVA conversations (turns {from, value}) that have images of these sizes, by
    the processor's chat template or another `template` of WRITERS.

    Returns:
        Of each conversation
        ids: int32 [tokens], where a run of the same placeholder is one token.
        repeats: int32 [tokens], how many tokens each stands for (`expand`).
        is_answer: bool [tokens], whether a token is of an answer or its end.
        images_end: how many of the expanded tokens there are up to the end of the last image.

    Raises:
        ValueError: a conversation doesn't show as many images as it has, or the processor doesn't
            say what it writes for an image, or writes something else.
    """
    if any(sizes):
        _check(processor, conversation.template_of(processor))
    return _tokenise(processor, conversations, sizes, WRITERS[template])


@lru_cache(maxsize=8)
def _check(processor: ProcessorMixin, template: str) -> None:
    """Compare the tokens of texts with images with those that the processor itself gives."""
    for sizes in ([(64, 64)], [(64, 64), (32, 96)]):
        question = f"{IMAGE_TOKEN * len(sizes)}\nwhat?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "this"}]
        [sample] = _tokenise(processor, [turns], [sizes], answers)
        text = conversation.render(processor, messages(turns))
        [expected] = processor(images=[_blank(sizes)], text=[text])["input_ids"]
        if not np.array_equal(expand(sample)[0], expected):
            raise ValueError(
                f"the {type(processor).__name__} writes other tokens than those of its chat "
                "template and of its placeholders for images, so labels can't be put on them"
            )


def _blank(sizes: Sequence[Size]) -> list[Image.Image]:
    return [Image.new("RGB", (width, height)) for height, width in sizes]


def _tokenise(
    processor: ProcessorMixin,
    conversations: Sequence[Sequence[dict]],
    sizes: Sequence[Sequence[Size]],
    write: Callable[..., tuple[str, Spans]],
) -> list[dict]:
    chats = [_hidden(processor, messages(turns)) for turns in conversations]
    written = [
        _with_placeholders(processor, *write(processor, chat), images)
        for chat, images in zip(chats, sizes, strict=True)
    ]
    adds = conversation.adds_special_tokens(processor)
    encoded = processor.tokenizer(
        [text for text, *_ in written],
        add_special_tokens=adds,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    samples = []
    for (text, spans, counts, images_end), ids, offsets in zip(
        written, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        if HIDDEN.search(text):
            ids, offsets = encode(processor, text, adds)
        ids = np.array(ids, np.int32)
        is_placeholder = np.isin(ids, placeholder_ids(processor))
        if is_placeholder.sum() != len(counts):
            raise ValueError(f"the tokenizer takes placeholders of images apart: {text[:200]!r}")
        repeats = np.ones(len(ids), np.int32)
        repeats[is_placeholder] = counts
        begin, end = np.array(offsets).reshape(-1, 2).T
        # a token belongs to an answer if they share a character
        is_answer = np.zeros(len(ids), bool)
        for first, last in spans:
            is_answer |= (begin < last) & (end > first)
        before = 1 + np.flatnonzero((begin < images_end) & (end > begin)).max(initial=-1)
        sample = {"ids": ids, "repeats": repeats, "is_answer": is_answer}
        samples.append(sample | {"images_end": int(repeats[:before].sum())})
    return samples


def _hidden(processor: ProcessorMixin, chat: list[Message]) -> list[Message]:
    return [
        (role, tuple(piece and hide(processor, piece) for piece in content))
        for role, content in chat
    ]


def _with_placeholders(
    processor: ProcessorMixin, text: str, spans: Spans, sizes: Sequence[Size]
) -> tuple[str, Spans, list[int], int]:
    """A rendered text with what the processor writes for its images, where its answers are now, how
    many tokens each placeholder stands for, and where the last image ends."""
    marks = text.count(processor.image_token)
    if marks != len(sizes):
        raise ValueError(
            f"the conversation has {marks} {processor.image_token} but {len(sizes)} images: "
            f"{text[:200]!r}"
        )
    images = placeholders(processor, tuple(sizes))
    [text], [replaced] = processor.get_text_with_replacements([text], [text for text, _ in images])
    ends = [(0, 0), *((image["span"][1], image["new_span"][1]) for image in replaced)]

    def moved(place: int) -> int:
        old, new = max(end for end in ends if end[0] <= place)
        return place - old + new

    spans = [(moved(first), moved(last)) for first, last in spans]
    of_images = [range(*image["new_span"]) for image in replaced]
    runs = iter([count for _, counts in images for count in counts])
    counts = [
        next(runs) if any(match.start() in image for image in of_images) else 1
        for match in _single(processor).finditer(text)
    ]
    return text, spans, counts, ends[-1][1]


def length(processor: ProcessorMixin, text: str, sizes: Sequence[Size]) -> int:
    """How many tokens the processor makes of a rendered text with images of these sizes. Raises
    ValueError as `tokenise`."""
    text, _, counts, _ = _with_placeholders(processor, text, [], sizes)
    adds = conversation.adds_special_tokens(processor)
    ids = processor.tokenizer(text, add_special_tokens=adds)["input_ids"]
    return len(ids) + sum(counts) - len(counts)


@lru_cache(maxsize=2**16)
def placeholders(
    processor: ProcessorMixin, sizes: tuple[Size, ...]
) -> list[tuple[str, tuple[int, ...]]]:
    """What the processor writes for each image of a sample, with one in the place of a run of the
    same placeholder, and how many each stands for. Some write less for one of several images.

    Raises ValueError if the processor doesn't say it.
    """
    if not sizes:
        return []
    inputs = {"images": [_blank(sizes)], "text": [processor.image_token * len(sizes)]}
    try:
        written = processor(**inputs, return_text_replacement_offsets=True)
        [replaced] = written["text_replacement_offsets"]
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f"the {type(processor).__name__} doesn't say what it writes for an image: transformers "
            "has no replace_image_token for it"
        ) from error
    runs = re.compile(rf"({_single(processor).pattern})\1*")
    images = []
    for text in (image["replacement"] for image in replaced):
        counts = (len(run.group()) // len(run[1]) for run in runs.finditer(text))
        images.append((runs.sub(r"\1", text), tuple(counts)))
    return images


@lru_cache(maxsize=8)
def placeholder_ids(processor: ProcessorMixin) -> list[int]:
    """Ids of the tokens that stand for an image, and of those that the processor counts to it."""
    return [number for number in processor.image_token_ids if number is not None]


@lru_cache(maxsize=8)
def _single(processor: ProcessorMixin) -> re.Pattern:
    tokens = processor.tokenizer.convert_ids_to_tokens(placeholder_ids(processor))
    return re.compile("|".join(map(re.escape, tokens)))


def cut(sample: dict, length: int) -> dict:
    """A sample of `tokenise` without what comes after `length` expanded tokens; no image does."""
    kept = np.searchsorted(sample["repeats"].cumsum(), length, side="right")
    return sample | {name: sample[name][:kept] for name in OF_TOKENS}


def expand(sample: dict) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels, int32 [tokens], of a sample of `tokenise`, with every placeholder. A label is
    the id itself on tokens of an answer, else IGNORE_INDEX."""
    ids, is_answer = (np.repeat(sample[name], sample["repeats"]) for name in ("ids", "is_answer"))
    return ids, np.where(is_answer, ids, IGNORE_INDEX).astype(np.int32)
