"""Conversations as a model's own chat template writes them, and where their answers lie.

Where an answer lies is found by rendering, whatever the template: it begins where the prompt that
asks for it ends, and ends with the token that ends the turn. So no text of a user, not even
"assistant:", can move a label. Training and evaluation render with the same functions.
"""

import re
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial
from itertools import accumulate, chain, count, pairwise, takewhile

from jinja2 import TemplateError
from transformers import ProcessorMixin

from sts.pipeline.data.rows import IMAGE_TOKEN, ROLES

Spans = list[tuple[int, int]]  # first and last + 1 of the characters of each answer
Content = tuple[str | None, ...]  # texts, and None for each image between them
Message = tuple[str, Content]  # role and content

MARK = "\ue000{}\ue001"  # characters for private use: no text has them
MARKED = re.compile(MARK.format(r"(\d+)"))
QUESTION, ANSWER = MARK.format(0), MARK.format(1)
SAMPLE: list[Message] = [("user", (None, QUESTION)), ("assistant", (ANSWER,))]
ROLES_WITH_LISTS = (("system", "user", "assistant"), ("user",), ())  # what templates take


def messages(conversation: Sequence[dict]) -> list[Message]:
    """LLaVA turns [{from: human|gpt, value}] as messages."""
    return [(ROLES[turn["from"]], content_of(turn["value"])) for turn in conversation]


def content_of(text: str) -> Content:
    """The content of a text, with None where an <image> stands. As in LLaVA a text with images is
    without the spaces at its ends, and without texts of spaces alone; another stays as it is."""
    if IMAGE_TOKEN not in text:
        return (text,)
    pieces = [piece for piece in re.split(f"({IMAGE_TOKEN})", text) if piece.strip()]
    content = [None if piece == IMAGE_TOKEN else piece for piece in pieces]
    places = [place for place, piece in enumerate(content) if piece is not None]
    if not places:
        return (*content, "")
    content[places[0]] = content[places[0]].lstrip()
    content[places[-1]] = content[places[-1]].rstrip()
    return tuple(content)


def render(processor: ProcessorMixin, chat: Sequence[Message], ask: bool = False) -> str:
    """The text of messages in the processor's chat template, with one mark an image; with `ask`, up
    to where the model's next answer begins. The token at the beginning that the tokenizer writes
    itself is left out. Raises ValueError if there is no chat template, or it shows no image.
    """
    return _writer(processor, template_of(processor))(chat, ask)


def template_of(processor: ProcessorMixin) -> str:
    """The processor's chat template. Raises ValueError if it has none."""
    template = processor.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if not template:
        raise ValueError(
            f"the {type(processor).__name__} has no chat template: give it that of its model, as "
            "processor.chat_template or chat_template.jinja in the checkpoint (for joined parts: "
            "sts.pipeline.data.templates.CHAT_TEMPLATE)"
        )
    return template


@lru_cache(maxsize=8)
def _writer(processor: ProcessorMixin, template: str) -> Callable[..., str]:
    """`render` for a template: with lists of parts if it takes them, else with text."""
    mark, error = processor.image_token, None
    for lists in ROLES_WITH_LISTS:
        write = partial(_write, processor, template, lists, "")
        try:
            text = write(SAMPLE)
        except (TemplateError, TypeError) as raised:
            error = raised
            continue
        if [text.count(part) for part in (mark, QUESTION, ANSWER, "'type'")] == [1, 1, 1, 0]:
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
    """`chat` in `template`; content is a list of parts for the roles in `lists`, and `end` follows
    each answer."""
    turns = []
    for role, content in chat:
        if role == "assistant":
            content = (*content[:-1], content[-1] + end)
        parts = [
            {"type": "image"} if piece is None else {"type": "text", "text": piece}
            for piece in content
        ]
        mark = f"{processor.image_token}\n"
        joined = "".join(mark if piece is None else piece for piece in content)
        turns.append({"role": role, "content": parts if role in lists else joined})
    text = processor.apply_chat_template(turns, template, add_generation_prompt=ask)
    return text.removeprefix(_begin(processor))


@lru_cache(maxsize=8)
def _begin(processor: ProcessorMixin) -> str:
    """The token that the tokenizer writes before any text."""
    tokenizer = processor.tokenizer
    ids = tokenizer("", add_special_tokens=adds_special_tokens(processor))["input_ids"]
    return tokenizer.bos_token if tokenizer.bos_token_id in ids[:1] else ""


def adds_special_tokens(processor: ProcessorMixin) -> bool:
    """Whether the processor lets its tokenizer write special tokens around a text."""
    return getattr(processor, "text_kwargs", {}).get("add_special_tokens", True)


def _end(processor: ProcessorMixin, text: str) -> str:
    """What of a text after an answer ends it: up to the first special tokens."""
    tokens = processor.tokenizer.added_tokens_decoder.values()
    special = sorted((token.content for token in tokens if token.special), key=len, reverse=True)
    match = re.search(f"(?:{'|'.join(map(re.escape, special))})+", text) if special else None
    return text[: match.end()] if match else ""


def answers(processor: ProcessorMixin, chat: Sequence[Message]) -> tuple[str, Spans]:
    """The text of a conversation and where its answers are, each with its end token.

    Raises ValueError if the template writes a turn otherwise when others come after it, so that
    what it is asked with is not what stands before its answer.
    """
    text = render(processor, chat)
    texts = [piece for _, content in chat for piece in content if piece is not None]
    marks = map(MARK.format, count())
    blank = tuple(
        (role, tuple(None if piece is None else next(marks) for piece in content))
        for role, content in chat
    )
    marked, spans = _layout(processor, template_of(processor), blank)

    def fill(part: str) -> str:
        return MARKED.sub(lambda match: texts[int(match[1])], part)

    if fill(marked) != text:  # the template does more with a text than write it
        return text, _spans(processor, chat)
    bounds = [0, *chain.from_iterable(spans)]
    places = accumulate(len(fill(marked[first:last])) for first, last in pairwise(bounds))
    return text, list(zip(places, places, strict=True))


def plain(processor: ProcessorMixin, chat: Sequence[Message]) -> tuple[str, Spans]:
    """The text of a captioned image as LLaVA aligns on it, and where its answer is.

    First the images, then the caption and a newline; what the caption was asked for with is left
    out. The space before the caption is the one with which Llama's tokenizer begins a text: LLaVA
    has the caption tokenised as a text of its own. Raises ValueError if it isn't one caption.
    """
    if [role for role, _ in chat] != ["user", "assistant"]:
        raise ValueError(
            f"template: plain is for one question and one answer, not for {len(chat)} turns: "
            f"{str(chat)[:200]}...; leave it out of the stage, or their data set"
        )
    (_, request), (_, caption) = chat
    images = processor.image_token * request.count(None)
    text = f"{images} {''.join(filter(None, caption))}\n"
    return text, [(len(images), len(text))]


# What a stage's `template` may say: how a conversation becomes a text with answers in it
WRITERS: dict[str | None, Callable[..., tuple[str, Spans]]] = {None: answers, "plain": plain}


@lru_cache(maxsize=1024)
def _layout(processor: ProcessorMixin, _: str, chat: Sequence[Message]) -> tuple[str, Spans]:
    """The text of a conversation of marks in the processor's template, and where its answers lie.
    Rendering is slow, and many conversations have as many turns and images."""
    return render(processor, chat), _spans(processor, chat)


def _spans(processor: ProcessorMixin, chat: Sequence[Message]) -> Spans:
    """Where the answers lie in `render(processor, chat)`: told by rendering it with another one in
    the place of each."""
    text, spans, mark = render(processor, chat), [], MARK.format("answer")
    for place, (role, _) in enumerate(chat):
        if role != "assistant":
            continue
        other, earlier = (role, (mark,)), chat[:place]
        before, _, after = render(processor, [*earlier, other, *chat[place + 1 :]]).partition(mark)
        as_last = render(processor, [*earlier, other]).partition(mark)[2]
        prompt = render(processor, earlier, ask=True)
        # the header of a turn may hold more than the prompt (an empty thought) or less (its tag)
        begin = min(prompt, before, key=len)
        first, last = len(begin), len(text) - len(after)
        same_begin = all(other.startswith(begin) for other in (prompt, before, text))
        if not (same_begin and text.endswith(after) and first <= last):
            raise ValueError(
                f"the chat template of the {type(processor).__name__} writes turn {place} of this "
                "conversation otherwise when turns come after it, so its answer can't be told from "
                "what it was asked with: split the conversation into one for each answer, or set "
                f"processor.chat_template to one that doesn't. The text is {text[:200]!r}..."
            )
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(after, as_last, strict=False))
        common = "".join(letter for letter, _ in pairs)
        spans.append((first, last + len(_end(processor, common))))
    return spans


def end_token(processor: ProcessorMixin) -> int | None:
    """Id of the first token after the text of an answer, if it is a special one."""
    text, [(_, last)] = answers(processor, SAMPLE)
    end = _end(processor, text[:last].partition(ANSWER)[2]).strip()
    ids = processor.tokenizer(end, add_special_tokens=False)["input_ids"]
    return ids[0] if ids else None
