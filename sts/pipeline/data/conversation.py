"""Conversations as a model's own chat template writes them, with labels on the answers only.

    <|im_start|>user
    <|vision_start|><|image_pad|><|vision_end|>what shape is red?<|im_end|>
    <|im_start|>assistant
    circle<|im_end|>

Where an answer lies is found by rendering, whatever the template: it begins where the prompt that
asks for it ends, and ends with the token that ends the turn. So no text of a user, not even
"assistant:", can move a label. Training and evaluation render with the same functions, and tokens
are those that the processor gives for the rendered text and images of those sizes.
"""

import re
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial
from itertools import accumulate, takewhile

import numpy as np
from jinja2 import TemplateError
from PIL import Image
from transformers import ProcessorMixin

from sts.pipeline.data.rows import IMAGE_TOKEN, ROLES
from sts.settings import IGNORE_INDEX

# The template of joined parts. Content is text with <image> in it, or a list of parts as lm-eval
# and transformers pass it. Images come first wherever they stood, as in LLaVA, so that both forms
# of one message give equal tokens.
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
# LLaVA-1.5's, which is Vicuna's
V1 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
) + CHAT_TEMPLATE.replace("user: ", "USER: ").replace("assistant:", "ASSISTANT:")

Size = tuple[int, int]  # height and width of an image in pixels
Spans = list[tuple[int, int]]  # first and last + 1 of the characters of each answer
Message = tuple[str, tuple[str | None, ...]]  # (role, texts, and None for each image)

MARK = "\ue000{}\ue001"  # characters for private use: no text has them
MARKED = re.compile(MARK.format(r"(\d+)"))
QUESTION, ANSWER = MARK.format(0), MARK.format(1)
ROLES_WITH_LISTS = (("system", "user", "assistant"), ("user",), ())  # what templates take
ASKED, ANSWERED = ("user", (None, QUESTION)), ("assistant", (ANSWER,))


# ---- messages and their text ------------------------------------------------------------------


def messages(conversation: Sequence[dict]) -> list[Message]:
    """LLaVA turns [{from: human|gpt, value}] as messages."""
    return [(ROLES[turn["from"]], parts(turn["value"])) for turn in conversation]


def parts(text: str) -> tuple[str | None, ...]:
    """A message's texts, and None where an <image> stands between them; without the spaces at its
    ends, and without texts of spaces alone."""
    pieces = text.split(IMAGE_TOKEN)
    found = [part for piece in pieces for part in (piece, None)][:-1]
    found = [part for part in found if part is None or part.strip()]
    texts = [place for place, part in enumerate(found) if part is not None]
    if not texts:
        return (*found, "")
    found[texts[0]] = found[texts[0]].lstrip()
    found[texts[-1]] = found[texts[-1]].rstrip()
    return tuple(found)


def render(processor: ProcessorMixin, chat: Sequence[Message], ask: bool = False) -> str:
    """The text of messages in the processor's chat template, with one mark an image, and without
    the token at the beginning that the tokenizer writes itself. `ask`: up to where an answer of the
    model begins.

    Raises ValueError if there is no chat template or it shows no image.
    """
    return _writer(processor, template_of(processor))(chat, ask)


def template_of(processor: ProcessorMixin) -> str:
    """The processor's chat template. Raises ValueError if it has none."""
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ValueError(
            f"the {type(processor).__name__} has no chat template: give it that of its model, as "
            "processor.chat_template or chat_template.jinja in the checkpoint (for joined parts: "
            "sts.pipeline.data.conversation.CHAT_TEMPLATE)"
        )
    return template


@lru_cache(maxsize=8)
def _writer(processor: ProcessorMixin, template: str) -> Callable[..., str]:
    """`render` for a template: with lists of parts if it takes them, else with text."""
    mark, error = processor.image_token, None
    for lists in ROLES_WITH_LISTS:
        write = partial(_write, processor, template, lists, "")
        try:
            text = write([ASKED, ANSWERED])
        except (TemplateError, TypeError) as raised:
            error = raised
            continue
        if [text.count(one) for one in (mark, QUESTION, ANSWER, "'type'")] == [1, 1, 1, 0]:
            if _end(processor, text.partition(ANSWER)[2]):
                return write
            # the template ends no answer: with nothing to learn that from, none would stop
            return partial(_write, processor, template, lists, processor.tokenizer.eos_token or "")
    raise ValueError(
        f"the chat template of the {type(processor).__name__} doesn't write {mark} for an image "
        "and the texts of a question and its answer. Give it that of its model"
    ) from error


def _write(
    processor: ProcessorMixin,
    template: str,
    lists: Collection[str],
    end: str,
    chat: Sequence[Message],
    ask: bool = False,
) -> str:
    turns = []
    for role, found in chat:
        if role == "assistant":
            found = (*found[:-1], found[-1] + end)
        if role in lists:
            content = [
                {"type": "image"} if part is None else {"type": "text", "text": part}
                for part in found
            ]
        else:
            mark = f"{processor.image_token}\n"
            content = "".join(mark if part is None else part for part in found)
        turns.append({"role": role, "content": content})
    text = processor.apply_chat_template(turns, template, add_generation_prompt=ask)
    return text.removeprefix(_begin(processor))


@lru_cache(maxsize=8)
def _begin(processor: ProcessorMixin) -> str:
    """The token that the tokenizer writes before any text."""
    tokenizer = processor.tokenizer
    ids = tokenizer("", add_special_tokens=_special(processor))["input_ids"]
    return tokenizer.bos_token if tokenizer.bos_token_id in ids[:1] else ""


def _special(processor: ProcessorMixin) -> bool:
    """Whether the processor lets its tokenizer write special tokens around a text."""
    return getattr(processor, "text_kwargs", {}).get("add_special_tokens", True)


def _end(processor: ProcessorMixin, text: str) -> str:
    """What of a text after an answer ends it: up to the first special tokens."""
    tokens = processor.tokenizer.added_tokens_decoder.values()
    special = sorted((one.content for one in tokens if one.special), key=len, reverse=True)
    found = re.search(f"(?:{'|'.join(map(re.escape, special))})+", text) if special else None
    return text[: found.end()] if found else ""


# ---- where answers lie ------------------------------------------------------------------------


def answers(processor: ProcessorMixin, chat: Sequence[Message]) -> tuple[str, Spans]:
    """The text of a conversation and where its answers are, each with its end token.

    Raises ValueError if the template writes a turn otherwise when others come after it, so that
    what it is asked with is not what stands before its answer.
    """
    text = render(processor, chat)
    shape = tuple((role, tuple(part is None for part in found)) for role, found in chat)
    layout = _layout(processor, template_of(processor), shape)
    if layout:
        filled, spans = layout([part for _, found in chat for part in found if part is not None])
        if filled == text:
            return text, spans
    return text, _find(processor, chat)  # the template does more with a text than write it


def plain(processor: ProcessorMixin, chat: Sequence[Message]) -> tuple[str, Spans]:
    """The text of a captioned image as LLaVA aligns on it, and where its answer is: the images,
    then the caption and a newline. What the caption was asked for with is left out.

    The space before the caption is the one with which Llama's tokenizer begins a text; LLaVA has
    the caption tokenised as a text of its own. Raises ValueError if it isn't one question and one
    answer.
    """
    if [role for role, _ in chat] != ["user", "assistant"]:
        raise ValueError(
            f"template: plain is for one question and one answer, not for {len(chat)} turns: "
            f"{str(chat)[:200]}...; leave it out of the stage, or their data set"
        )
    (_, asked), (_, caption) = chat
    marks = processor.image_token * asked.count(None)
    text = f"{marks} {''.join(filter(None, caption))}\n"
    return text, [(len(marks), len(text))]


# What a stage's `template` may say: how a conversation becomes a text with answers in it
WRITERS: dict[str | None, Callable[..., tuple[str, Spans]]] = {None: answers, "plain": plain}


@lru_cache(maxsize=1024)
def _layout(processor: ProcessorMixin, template: str, shape: tuple) -> Callable | None:
    """The function texts -> (text, spans) of conversations with as many turns, texts and images;
    None if the template leaves a text out or repeats it."""
    count, chat = 0, []
    for role, images in shape:
        found = []
        for image in images:
            found.append(None if image else MARK.format(count))
            count += not image
        chat.append((role, tuple(found)))
    spans = _find(processor, chat)
    literal, *rest = MARKED.split(marked := render(processor, chat))
    order, literals = [int(number) for number in rest[::2]], [literal, *rest[1::2]]
    if sorted(order) != list(range(count)):
        return None
    ends = [match.end() for match in MARKED.finditer(marked)]
    lengths = [len(MARK.format(number)) for number in order]
    before = [[sum(end <= place for end in ends) for place in span] for span in spans]

    def fill(texts: Sequence[str]) -> tuple[str, Spans]:
        ordered = [texts[number] for number in order]
        filled = "".join(
            part for pair in zip(literals, [*ordered, ""], strict=True) for part in pair
        )
        grown = (len(text) - length for text, length in zip(ordered, lengths, strict=True))
        shifts = [0, *accumulate(grown)]
        return filled, [
            (first + shifts[a], last + shifts[b])
            for (first, last), (a, b) in zip(spans, before, strict=True)
        ]

    return fill


def _find(processor: ProcessorMixin, chat: Sequence[Message]) -> Spans:
    """Where the answers lie in `render(processor, chat)`: found by rendering it with another one in
    the place of each."""
    text, spans = render(processor, chat), []
    for place, (role, _) in enumerate(chat):
        if role != "assistant":
            continue
        other, asked = (role, (MARK.format("answer"),)), chat[:place]
        mark = other[1][0]
        before, _, after = render(processor, [*asked, other, *chat[place + 1 :]]).partition(mark)
        as_last = render(processor, [*asked, other]).partition(mark)[2]
        prompt = render(processor, asked, ask=True)
        # the header of a turn may hold more than the prompt (an empty thought) or less (its tag)
        begin = min(prompt, before, key=len)
        first, last = len(begin), len(text) - len(after)
        if not (
            prompt.startswith(begin)
            and before.startswith(begin)
            and text.startswith(begin)
            and text.endswith(after)
            and first <= last
        ):
            raise ValueError(
                f"the chat template of the {type(processor).__name__} writes turn {place} of this "
                "conversation otherwise when turns come after it, so its answer can't be told from "
                "what it was asked with: split the conversation into one for each answer, or set "
                f"processor.chat_template to one that doesn't. The text is {text[:200]!r}..."
            )
        pairs = zip(after, as_last, strict=False)
        common = "".join(a for a, b in takewhile(lambda pair: pair[0] == pair[1], pairs))
        spans.append((first, last + len(_end(processor, common))))
    return spans


def end_token(processor: ProcessorMixin) -> int | None:
    """Id of the first token after the text of an answer, if it is a special one."""
    chat = [ASKED, ANSWERED]
    text, [(_, last)] = answers(processor, chat)
    end = _end(processor, text[:last].partition(ANSWER)[2]).strip()
    ids = processor.tokenizer(end, add_special_tokens=False)["input_ids"]
    return ids[0] if ids else None


# ---- tokens and placeholders ------------------------------------------------------------------


def tokenise(
    processor: ProcessorMixin,
    conversations: Sequence[Sequence[dict]],
    sizes: Sequence[Sequence[Size]],
    template: str | None = None,
) -> list[dict[str, np.ndarray | int]]:
    """The tokens of LLaVA conversations that have images of these sizes, by the processor's chat
    template or by another of WRITERS, each as

    ids, labels  int32 [tokens], where a run of the same placeholder is one token. A label is the id
                 itself on tokens of an answer and its end, else `IGNORE_INDEX`
    at, counts   int32 [placeholders]: where they are, how many tokens each stands for (`expand`)
    shown        how many of the expanded tokens there are up to the end of the last image

    Raises ValueError if a conversation doesn't show as many images as it has, and if the processor
    doesn't say what it writes for an image, or writes something else.
    """
    if any(sizes):
        _check(processor, template_of(processor))
    return _tokenise(processor, conversations, sizes, WRITERS[template])


@lru_cache(maxsize=8)
def _check(processor: ProcessorMixin, template: str) -> None:
    """Compare the tokens of texts with images with those that the whole processor gives."""
    for sizes in ([(64, 64)], [(64, 64), (32, 96)]):
        question = f"{IMAGE_TOKEN * len(sizes)}\nwhat?"
        asked = [{"from": "human", "value": question}, {"from": "gpt", "value": "this"}]
        [sample] = _tokenise(processor, [asked], [sizes], answers)
        text, images = render(processor, messages(asked)), [_blank(size) for size in sizes]
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
    texts, spans, counts, ends = [], [], [], []
    for conversation, images in zip(conversations, sizes, strict=True):
        text, found = write(processor, messages(conversation))
        text, found, count, end = _show(processor, text, found, images)
        texts.append(text)
        spans.append(found)
        counts.append(count)
        ends.append(end)
    encoded = processor.tokenizer(
        texts,
        add_special_tokens=_special(processor),
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    samples = []
    for text, found, count, shown, ids, offsets in zip(
        texts, spans, counts, ends, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        ids, count = np.array(ids, np.int32), np.array(count, np.int32)
        at = np.flatnonzero(np.isin(ids, placeholder_ids(processor)))
        if len(at) != len(count):
            raise ValueError(f"the tokenizer takes placeholders of images apart: {text[:200]!r}")
        begin, end = np.array(offsets).reshape(-1, 2).T
        # a token belongs to an answer if they share a character
        answered = np.zeros(len(ids), bool)
        for first, last in found:
            answered |= (begin < last) & (end > first)
        labels = np.where(answered, ids, IGNORE_INDEX).astype(np.int32)
        sample = {"ids": ids, "labels": labels, "at": at.astype(np.int32), "counts": count}
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

    Raises ValueError if the processor doesn't say it.
    """
    if not sizes:
        return []
    images, marks = [_blank(size) for size in sizes], processor.image_token * len(sizes)
    try:
        made = processor(images=[images], text=[marks], return_text_replacement_offsets=True)
        [found] = made["text_replacement_offsets"]
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f"the {type(processor).__name__} doesn't say what it writes for an image: transformers "
            "has no replace_image_token for it"
        ) from error
    runs = re.compile(rf"({_single(processor).pattern})\1*")
    written = [one["replacement"] for one in found]
    counts = [
        tuple(len(run.group()) // len(run[1]) for run in runs.finditer(text)) for text in written
    ]
    return [(runs.sub(r"\1", text), count) for text, count in zip(written, counts, strict=True)]


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
