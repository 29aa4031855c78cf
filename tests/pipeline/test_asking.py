"""lm-eval asks a model of any kind with the prompts that it was trained on, in batches, and stops
at its own end of a turn."""

import numpy as np
import pytest
import torch
from configs import short
from lm_eval.api.instance import Instance
from PIL import Image
from processors import PROCESSORS, model_of
from transformers import AutoProcessor

from sts.pipeline.cost import memory
from sts.pipeline.data.conversation import content_of, end_token, render
from sts.pipeline.evaluate.asking import batches, kept_answers, load_model

# to be loaded
NEED_TORCHVISION = (
    "llava_onevision", "smolvlm", "qwen2_5_vl", "qwen3_vl", "internvl", "pixtral",
)  # fmt: skip
SIZES = [[(40, 60)], [(24, 16), (33, 20)], [(64, 16)]]  # width and height of each one's images
QUESTIONS = ["<image>\nwhat is it?", "a <image> and\n<image>\nwhich is red?", "what?\n<image>"]
UNTIL = {"until": ["\n\n\n"], "do_sample": False, "max_gen_toks": 5}


@pytest.fixture(scope="module")
def images() -> list[list[Image.Image]]:
    """Of several modes."""
    random, modes = np.random.default_rng(0), iter(("RGB", "L", "RGBA", "P"))
    return [
        [
            Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)).convert(
                next(modes)
            )
            for width, height in sizes
        ]
        for sizes in SIZES
    ]


@pytest.fixture(scope="module", params=PROCESSORS)
def lm(request, tmp_path_factory):
    """A checkpoint of random weights, loaded for lm-eval."""
    folder, kind = tmp_path_factory.mktemp("weights"), request.param
    processor = PROCESSORS[kind]()
    model = model_of(kind, processor).double().eval()
    model.generation_config.suppress_tokens = processor.tokenizer.all_special_ids  # to hear words
    model.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        if kind in NEED_TORCHVISION:
            patch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)
        else:
            processor.save_pretrained(folder)
        yield load_model(folder, "fp32", short())


def requested(lm, images) -> list[Instance]:
    """The questions as lm-eval asks them."""
    requests = []
    for number, (question, shown) in enumerate(zip(QUESTIONS, images, strict=True)):
        prompt = lm.apply_chat_template([{"role": "user", "content": question}])
        arguments = (prompt, UNTIL, {"visual": shown})
        requests.append(Instance("generate_until", {}, arguments, number, ("task", number, 1)))
    return requests


def ask(lm, images) -> list[str]:
    """What lm-eval's own way from a question to its answer gives."""
    return lm.generate_until(requested(lm, images), disable_tqdm=True)


def test_a_question_is_as_long_as_the_processor_makes_it(lm, images):
    for request in requested(lm, images):
        prompt, _, shown = request.args
        pictures = [[image.convert("RGB") for image in shown["visual"]]]
        [ids] = lm.processor(text=[prompt], images=pictures)["input_ids"]
        assert lm.length(request) == len(ids) > 20


def test_answers_of_a_batch_are_those_that_each_question_gets_alone(lm, images):
    alone = []
    for question, shown in zip(QUESTIONS, images, strict=True):
        prompt = render(lm.processor, [("user", content_of(question))], ask=True)
        inputs = lm.processor(
            text=[prompt], images=[[image.convert("RGB") for image in shown]], return_tensors="pt"
        ).to(lm.device, lm.model.dtype)
        output = lm.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        alone.append(lm.tokenizer.decode(new, skip_special_tokens=True))
    assert ask(lm, images) == alone and any(alone)


def test_an_answer_ends_with_the_turn(lm, images, monkeypatch):
    word, end = lm.tokenizer("a", add_special_tokens=False)["input_ids"][0], end_token(lm.processor)
    steps = iter([word, end] * 50)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden.new_zeros(*hidden.shape[:-1], len(lm.tokenizer))
        logits[..., next(steps)] = 1
        return logits

    monkeypatch.setattr(lm.model.generation_config, "suppress_tokens", None)
    monkeypatch.setattr(lm.model.get_output_embeddings(), "forward", head)
    assert ask(lm, images) == ["a"] * len(QUESTIONS)


def test_a_prompt_may_begin_the_answer(lm):
    chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "It is"}]
    prompt = lm.apply_chat_template(chat[:1])
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == f"{prompt}It is"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_model_is_asked_in_the_precision_that_it_is_loaded_in_if_it_fits(
    tmp_path, monkeypatch, precision, dtype
):
    processor = PROCESSORS["llava"]()
    model_of("llava", processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    lm = load_model(tmp_path, precision, short())
    assert {value.dtype for value in lm.model.parameters()} == {dtype}
    monkeypatch.setattr(memory, "memory_here", lambda processes: 1e8)
    with pytest.raises(MemoryError, match=r"evaluate: a process needs .* batch_tokens below 8192"):
        load_model(tmp_path, precision, short())


def test_a_batch_holds_so_many_tokens_with_its_padding_the_longest_first():
    lengths = dict(enumerate([5, 9, 2, 5, 30, 3, 4, 8]))
    kinds = dict.fromkeys(lengths, "word") | {7: "letter"}
    assert batches(lengths, kinds, most=18) == [[4], [1, 0], [7], [3, 6, 5], [2]]
    assert batches(lengths, kinds, most=10**6) == [[4, 1, 0, 3, 6, 5, 2], [7]]
    assert batches(lengths, kinds, most=1) == [[4], [1], [7], [0], [3], [6], [5], [2]]


@pytest.mark.parametrize("line", [b'[[["b", "t"], 1], "y', b"0", b"null", b"\0\0\0", b'[[["b\xff"'])
def test_a_spoilt_line_costs_its_own_answer(tmp_path, line):
    (tmp_path / "answers0.jsonl").write_bytes(line + b'\n[[["b", "t"], 2], "yes\\u2028"]\n')
    assert kept_answers(tmp_path) == {(("b", "t"), 2): "yes\u2028"}
