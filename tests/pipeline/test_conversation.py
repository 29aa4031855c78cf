"""Labels sit on answers and nowhere else, and training tokens are those of the processor, whatever
the processor and its chat template."""

import hypothesis.strategies as some
import jinja2
import numpy as np
import pytest
from configs import short
from hypothesis import given, settings
from PIL import Image
from processors import PROCESSORS, byte_level, byte_pairs, images, llava_around
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, Idefics2Processor, LlavaProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from sts.pipeline.data.conversation import answers, content_of, end_token, messages, render
from sts.pipeline.data.templates import CHAT_TEMPLATE
from sts.pipeline.data.tokens import cut, expand, placeholders, tokenise
from sts.pipeline.run import follows
from sts.pipeline.train.model import SHIPPED
from sts.settings import IGNORE_INDEX

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
QUESTIONS = [
    "<image>\nwhat is this? assistant: a trap</s> user: really assistant:",
    "is it red?\nassistant: no",
    "and now {{ eos_token }} {% generation %}",
]
ANSWERS = ["a red circle", "assistant: yes user:", "two"]


def turns(questions: list[str], answers: list[str]) -> list[dict]:
    return [
        turn
        for question, answer in zip(questions, answers, strict=True)
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    ]


CONVERSATION, SIZES = turns(QUESTIONS, ANSWERS), [(64, 64)]


def words() -> Tokenizer:
    texts = " ".join([*QUESTIONS, *ANSWERS, "user: assistant: plain"])
    for special in SPECIAL:
        texts = texts.replace(special, " ")
    vocabulary = dict.fromkeys([*SPECIAL, *texts.split()])
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def bytes_alone() -> Tokenizer:
    return byte_level(SPECIAL, [*QUESTIONS, *ANSWERS], 300)


def like_llama() -> Tokenizer:
    """Spaces are part of the words that follow, and every text begins with <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([*QUESTIONS, *ANSWERS, "user: assistant: plain"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return tokenizer


def joined(tokenizer: Tokenizer) -> LlavaProcessor:
    """64x64 images in patches of 8, so 64 placeholders, as at the mini scale."""
    return llava_around(tokenizer, 64, 8)


TOKENIZERS = (words, bytes_alone, like_llama)


@pytest.fixture(params=TOKENIZERS, ids=lambda make: make.__name__)
def processor(request) -> LlavaProcessor:
    return joined(request.param())


def sample_of(processor, conversation: list[dict], sizes: list) -> tuple[np.ndarray, np.ndarray]:
    [sample] = tokenise(processor, [conversation], [sizes])
    return expand(sample)


def labelled(processor, labels: np.ndarray) -> list[str]:
    """The text of each run of labels."""
    runs = np.split(labels, np.flatnonzero(np.diff(labels != IGNORE_INDEX)) + 1)
    return [processor.tokenizer.decode(run) for run in runs if run[0] != IGNORE_INDEX]


# --- joined parts ---


def test_labelled_tokens_are_the_answers_and_their_ends(processor):
    ids, labels = sample_of(processor, CONVERSATION, SIZES)
    assert ((labels == ids) | (labels == IGNORE_INDEX)).all()
    ends = [text.strip().removesuffix("</s>").strip() for text in labelled(processor, labels)]
    assert ends == ANSWERS
    assert (labels == processor.tokenizer.eos_token_id).sum() == len(ANSWERS)


def old_way(processor, conversation: list[dict], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels by the marks of the template and one number of placeholders for all images."""
    roles = {"human": "user", "gpt": "assistant"}
    chat = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in conversation]
    tokenizer = processor.tokenizer
    [text], [spans] = render_jinja_template(
        [chat],
        chat_template=CHAT_TEMPLATE,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = np.array(encoded["input_ids"], np.int32)
    begin, end = np.array(encoded["offset_mapping"]).T
    answered = np.any([(begin < last) & (end > first) for first, last in spans], axis=0)
    repeats = np.where(ids == tokenizer.convert_tokens_to_ids("<image>"), count, 1)
    return np.repeat(ids, repeats), np.repeat(np.where(answered, ids, -100), repeats)


PIECES = [
    "red",
    "user:",
    "assistant:",
    "</s>",
    "is it",
    "what\n",
    " ",
    "<s>",
    "\n\n",
    "{{ x }}",
    "é",
]
TEXTS = some.lists(some.sampled_from(PIECES), max_size=5).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    pairs=some.lists(some.tuples(TEXTS, TEXTS), min_size=1, max_size=4),
    shown=some.sampled_from(["{}", "<image>\n{}", "{}\n<image>", "is <image> {}"]),
)
def test_the_shipped_processor_gives_the_tokens_that_it_always_gave(pairs, shown):
    shipped = LlavaProcessor.from_pretrained(SHIPPED / "processor")
    (first, answer), *others = pairs
    pairs = [(shown.format(first.replace("{", "").replace("}", "")), answer), *others]
    conversation = turns(*map(list, zip(*pairs, strict=True)))
    sizes = [(50, 90)] * shown.count("<image>")
    pixels = shipped.image_processor.crop_size
    count = pixels["height"] * pixels["width"] // shipped.patch_size**2
    sample = sample_of(shipped, conversation, sizes)
    for new, old in zip(sample, old_way(shipped, conversation, count), strict=True):
        assert np.array_equal(new, old) and new.dtype == np.int32


@pytest.mark.parametrize(
    "content",
    [
        "<image>\nis it red?",
        "is it red?\n<image>",
        [{"type": "image"}, {"type": "text", "text": "\nis it red?"}],
        [{"type": "text", "text": "is it red?"}, {"type": "image", "image": None}],
    ],
)
def test_every_form_of_a_message_renders_the_same(content):
    [text], _ = render_jinja_template(
        [[{"role": "user", "content": content}]],
        chat_template=CHAT_TEMPLATE,
        add_generation_prompt=True,
        eos_token="</s>",
    )
    assert text == "user: <image>\nis it red? assistant:"


def test_rendered_text_has_the_documented_format(processor):
    conversation = turns(["<image>\none?", "two?"], [" 1 ", "2"])
    text, spans = answers(processor, messages(conversation))
    assert text == "user: <image>\none? assistant: 1</s>user: two? assistant: 2</s>"
    assert [text[first:last] for first, last in spans] == [" 1</s>", " 2</s>"]


def test_a_saved_processor_keeps_the_template(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, use_fast=False)
    chat = messages(CONVERSATION)
    assert answers(loaded, chat) == answers(processor, chat)


def test_an_image_without_its_placeholder_is_an_error(processor):
    with pytest.raises(ValueError, match="0 <image> but 1 images"):
        tokenise(processor, [CONVERSATION[2:]], [SIZES])
    with pytest.raises(ValueError, match="1 <image> but 0 images"):
        tokenise(processor, [CONVERSATION], [[]])


def test_the_template_knows_two_roles(processor):
    with pytest.raises(jinja2.TemplateError, match="system"):
        processor.apply_chat_template([{"role": "system", "content": "be brief"}])


# --- any processor, with its own template ---

TRAPS = [
    "First: <image>\n then: <image> assistant:</s> ASSISTANT: [/INST] x <end_of_utterance>\n",
    "<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n<start_of_turn>model\nAssistant:",
    "<image>",
    "sure?\n<image>\n",
]
SAID = ["a red circle", "assistant: yes [/INST] user:", "two\n\n lines", "<|im_start|>user"]
SHOWN = [(20, 60), (64, 32), (16, 16), (33, 33)]  # height and width of the four images
ENDS = {
    "llava": "</s>",  # that of the tokenizer: the template has none
    "llava_next": "</s>",
    "llava_onevision": "<|im_end|>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
    "internvl": "<|im_end|>",
    "pixtral": "</s>",
    "gemma3": "<end_of_turn>",
}
LONG = turns(TRAPS, SAID)


def blank(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    return [Image.new("RGB", (width, height)) for height, width in sizes]


@pytest.fixture(scope="module", params=PROCESSORS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def own(kind):
    """A processor of each kind."""
    return PROCESSORS[kind]()


def test_answers_are_found_whatever_the_template(kind, own):
    ids, labels = sample_of(own, LONG, SHOWN)
    assert ((labels == ids) | (labels == IGNORE_INDEX)).all()
    expected = [answer + ENDS[kind] for answer in SAID]
    if kind == "qwen3_vl":  # the last answer begins with the thought that its template writes
        expected[-1] = f"<think>\n\n</think>\n\n{expected[-1]}"
    assert [text.lstrip(" ") for text in labelled(own, labels)] == expected
    assert end_token(own) == own.tokenizer.convert_tokens_to_ids(ENDS[kind])


def test_tokens_are_those_the_processor_gives_for_text_and_images(own):
    ids, _ = sample_of(own, LONG, SHOWN)
    expected = own(text=[render(own, messages(LONG))], images=[blank(SHOWN)], return_tensors="np")
    assert np.array_equal(ids, expected["input_ids"][0])


def test_what_precedes_an_answer_is_the_prompt_that_asks_for_it(own):
    """A model is asked for an answer with the tokens after which it learned to give one."""
    ids, labels = sample_of(own, LONG, SHOWN)
    starts = np.flatnonzero(np.diff(labels != IGNORE_INDEX) & (labels[1:] != IGNORE_INDEX)) + 1
    for number, (start, shown) in enumerate(zip(starts, (2, 2, 3, 4), strict=True)):
        prompt = render(own, messages(LONG)[: 2 * number + 1], ask=True)
        expected = own(text=[prompt], images=[blank(SHOWN[:shown])], return_tensors="np")
        assert np.array_equal(expected["input_ids"][0], ids[:start])


def test_a_placeholder_in_words_stays_words(own):
    """The ids of all else are those of any other word in its place."""
    ids_of, count = own.tokenizer.convert_tokens_to_ids, np.count_nonzero
    placeholder = own.image_token if own.image_token != "<image>" else None
    for token in filter(None, (placeholder, getattr(own, "video_token", None))):
        asked = turns([f"<image> what is {token}?", "no"], [f"it is {token} or", token])
        ids, labels = sample_of(own, asked, [SHOWN[0]])
        plain = turns(["<image> what is ZQ?", "no"], ["it is ZQ or", "ZQ"])
        expected, _ = sample_of(own, plain, [SHOWN[0]])
        assert count(ids == ids_of(token)) == count(expected == ids_of(token))
        assert own.tokenizer.decode(ids) == own.tokenizer.decode(expected).replace("ZQ", token)
        assert len(labelled(own, labels)) == 2


def test_text_alone_needs_no_image(kind, own):
    _, labels = sample_of(own, turns(["plain"], ["two"]), [])
    [answer] = labelled(own, labels)
    assert answer.endswith(f"two{ENDS[kind]}")


def test_a_cut_sample_is_the_beginning_of_the_whole(own):
    [sample] = tokenise(own, [LONG], [SHOWN])
    uncut = expand(sample)
    for length in range(sample["images_end"], len(uncut[0]) + 2):
        for shortened, full in zip(expand(cut(sample, length)), uncut, strict=True):
            assert np.array_equal(shortened, full[:length])
    assert np.isin(uncut[0][sample["images_end"] :], own.image_token_ids).sum() == 0
    assert np.isin(uncut[0][: sample["images_end"]], own.image_token_ids).any()


def test_placeholders_follow_the_size_of_an_image():
    """By hand: of 4 pixels a patch, 2 x 2 patches a token; of 16 tokens a tile of 32 pixels."""
    qwen, internvl, pixtral = (PROCESSORS[k]() for k in ("qwen2_5_vl", "internvl", "pixtral"))
    assert placeholders(qwen, ((16, 40),)) == [("<|image_pad|>", (2 * 5,))]
    [(text, counts)] = placeholders(internvl, ((32, 64),))  # two tiles side by side and the whole
    assert (text, counts) == ("<img><IMG_CONTEXT></img>", (1, 3 * 16, 1))
    [(text, counts)] = placeholders(pixtral, ((8, 12),))
    assert text == "[IMG][IMG_BREAK][IMG][IMG_END]" and counts == (3, 1, 3, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nwhat?", (None, "what?")),
        ("what?\n<image>", ("what?", None)),
        ("<image>\n<image>\n what? ", (None, None, "what?")),
        ("one <image> two\n<image>", ("one ", None, " two", None)),
        ("<image>", (None, "")),
        (" what?\n", (" what?\n",)),
    ],
)
def test_marks_say_where_images_stand(text, expected):
    assert content_of(text) == expected


def test_a_thought_is_a_part_of_the_last_answer_alone():
    """Its template drops the thoughts of answers that others follow."""
    thinker = PROCESSORS["qwen3_vl"]()
    texts = [f"<think>\nhm {number}\n</think>\n\n{number}" for number in range(2)]
    _, labels = sample_of(thinker, turns(["a?", "b?"], texts), [])
    assert labelled(thinker, labels) == ["0<|im_end|>", f"{texts[1]}<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_an_error():
    rewriting = PROCESSORS["qwen2_5_vl"]()
    rewriting.chat_template = "{{ messages | length }} turns" + rewriting.chat_template
    with pytest.raises(ValueError, match=r"Qwen2_5_VLProcessor writes turn 1 .* otherwise"):
        sample_of(rewriting, turns(["a?", "b?"], ["1", "2"]), [])


@pytest.mark.parametrize("template", [None, "", {"rag": CHAT_TEMPLATE}])
def test_a_processor_without_a_template_is_an_error(template):
    bare = PROCESSORS["llava"]()
    bare.chat_template = template
    with pytest.raises(ValueError, match=r"LlavaProcessor has no chat template.*CHAT_TEMPLATE"):
        sample_of(bare, LONG, SHOWN)


def test_a_template_for_text_alone_is_an_error():
    blind = PROCESSORS["qwen2_5_vl"]()
    blind.chat_template = (
        "{% for m in messages %}{{ m['content'] | selectattr('text') | join }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"doesn't write <\|image_pad\|> for an image"):
        sample_of(blind, LONG, SHOWN)


def test_a_template_that_takes_text_alone_gets_the_placeholder_in_it():
    simple = PROCESSORS["llava"]()
    simple.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    conversation = turns(["<image>\nwhat?"], ["a dog"])
    assert render(simple, messages(conversation)) == "user: <image>\nwhat?</s>assistant: a dog</s>"
    _, labels = sample_of(simple, conversation, [(8, 8)])
    assert labelled(simple, labels) == [" a dog</s>"]


def test_a_processor_that_does_not_say_what_it_writes_for_an_image_is_named():
    old = Idefics2Processor(
        images(
            "idefics2",
            "Idefics2ImageProcessorPil",
            size={"shortest_edge": 32, "longest_edge": 64},
        ),
        byte_pairs("<image>", "<fake_token_around_image>"),
        chat_template=PROCESSORS["idefics3"]().chat_template,
    )
    with pytest.raises(ValueError, match="Idefics2Processor doesn't say what it writes"):
        sample_of(old, LONG, SHOWN)


class Odd(LlavaProcessor):
    """Writes more than its template and its placeholders."""

    def __call__(self, images=None, text=None, **settings):
        return super().__call__(images=images, text=[f"{prompt}!" for prompt in text], **settings)


def test_a_processor_that_writes_other_tokens_is_refused():
    plain = PROCESSORS["llava"]()
    odd = Odd(
        image_processor=plain.image_processor,
        tokenizer=plain.tokenizer,
        patch_size=4,
        chat_template=plain.chat_template,
    )
    with pytest.raises(ValueError, match="the Odd writes other tokens"):
        sample_of(odd, LONG, SHOWN)


def test_a_training_follows_the_bytes_of_the_templates():
    stage = short().stages["align"]
    assert {"joined.jinja", "v1.jinja"} <= {file.name for file in follows.training(stage)}
