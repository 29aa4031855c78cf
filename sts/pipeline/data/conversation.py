"""LLaVA conversations as tokens: the chat template, and labels on the answers only.

    user: <image>
    what shape is red? assistant: circle</s>user: where is it? assistant: left</s>

The template says where an answer begins and ends (its `{% generation %}` blocks), so no text of a
user, not even "assistant:", can move a label. Training and evaluation render with the processor's
own template, and tokens are those that the processor gives for the rendered text.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from sts.pipeline.data.rows import IMAGE_TOKEN, ROLES
from sts.settings import IGNORE_INDEX

# Content is text with <image> in it, or a list of parts as lm-eval and transformers pass it. Images
# come first wherever they stood, as in LLaVA, so that both forms of one message give equal tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}"
    "{% set images = message['content'].count('<image>') %}"
    "{% set text = message['content'].replace('<image>', '') | trim %}"
    "{% else %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list | count %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join | trim %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}user: {{ '<image>\n' * images }}{{ text }} "
    "{% elif message['role'] == 'assistant' %}"
    "assistant:{% generation %} {{ text }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('the roles are user and assistant, not ' ~ message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def messages(conversation: Sequence[dict]) -> list[dict]:
    """LLaVA turns [{from: human|gpt, value}] as chat messages [{role, content}]."""
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in conversation]


def render(processor: ProcessorMixin, conversation: Sequence[dict]) -> tuple[str, list[tuple]]:
    """The text of a conversation and where its answers are.

    Returns (text with one <image> an image, [(start, end) in characters: " answer</s>"]).
    Raises ValueError if the processor's chat template doesn't mark the answers.
    """
    template = processor.chat_template or ""
    if "{% generation %}" not in template:
        raise ValueError(
            "the processor's chat template has no {% generation %} blocks, so the answers can't be "
            "found. Set processor.chat_template = sts.pipeline.data.conversation.CHAT_TEMPLATE"
        )
    texts, spans = render_jinja_template(
        [messages(conversation)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    return texts[0], spans[0]


def tokenise(
    processor: ProcessorMixin, conversations: Sequence[Sequence[dict]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels), both int32 [tokens], of each conversation, with one token an image.

    A label is the id itself on tokens of an answer and its end token, else `IGNORE_INDEX`.
    """
    rendered = [render(processor, conversation) for conversation in conversations]
    encoded = processor.tokenizer(
        [text for text, _ in rendered], return_offsets_mapping=True, return_attention_mask=False
    )
    samples = []
    for ids, offsets, (_, spans) in zip(
        encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True
    ):
        ids = np.array(ids, np.int32)
        begin, end = np.array(offsets).reshape(-1, 2).T
        # a token belongs to an answer if they share a character
        answered = np.zeros(len(ids), bool)
        for first, last in spans:
            answered |= (begin < last) & (end > first)
        samples.append((ids, np.where(answered, ids, IGNORE_INDEX).astype(np.int32)))
    return samples


def expand(
    ids: np.ndarray, labels: np.ndarray, image_id: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels [tokens] with `count` placeholders where the image's one token stood."""
    repeats = np.where(ids == image_id, count, 1)
    return np.repeat(ids, repeats), np.repeat(labels, repeats)


def image_id(processor: ProcessorMixin) -> int:
    """Id of the image placeholder."""
    return processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


@lru_cache(maxsize=8)
def image_tokens(processor: ProcessorMixin) -> int:
    """Placeholders that the processor writes for one image (64 at the mini scale)."""
    ids = processor(images=Image.new("RGB", (64, 64)), text=IMAGE_TOKEN)["input_ids"]
    return int((np.asarray(ids) == image_id(processor)).sum())


def encode(
    processor: ProcessorMixin, conversation: Sequence[dict], image: Image.Image | None = None
) -> dict[str, torch.Tensor]:
    """One conversation, and its image if it has one, as a model takes them.

    Returns input_ids and labels, long [tokens], and with an image pixel_values
    [3, height, width]. Raises ValueError if the number of <image> isn't that of images.
    """
    [(ids, labels)] = tokenise(processor, [conversation])
    named, given = int((ids == image_id(processor)).sum()), int(image is not None)
    if named != given:
        raise ValueError(f"the conversation has {named} {IMAGE_TOKEN} but {given} images: {ids}")
    ids, labels = expand(ids, labels, image_id(processor), image_tokens(processor))
    sample = {"input_ids": torch.from_numpy(ids).long(), "labels": torch.from_numpy(labels).long()}
    if image is not None:
        pixels = processor.image_processor(images=image.convert("RGB"), return_tensors="pt")
        sample["pixel_values"] = pixels["pixel_values"][0]
    return sample
