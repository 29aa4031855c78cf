"""Real processors over small tokenizers, made without the hub.

    processor = PROCESSORS["idefics3"]()

Each has the chat template of a checkpoint of its kind, as short as it can be.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
import transformers as hf
from tiny import CASES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from recipes.mini import lessons
from sts.pipeline.data.templates import CHAT_TEMPLATE

IMAGE, PATCH = 64, 16  # pixels; 16 patch tokens an image


def tiny_processor():
    """LlavaProcessor with a word-level tokenizer over the words of `scenes`."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    words = [*special, *sorted({"user", "assistant", ":", "\n", *lessons.vocabulary()})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return llava_around(tokenizer, IMAGE, PATCH)


def llava_around(tokenizer: Tokenizer, side: int, patch: int) -> LlavaProcessor:
    """LLaVA's processor of joined parts, for square images and a tokenizer with <pad>, <unk>, <s>,
    </s> and <image>."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="right",
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=fast,
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def byte_level(special: list[str], texts: list[str], size: int) -> Tokenizer:
    """A tokenizer that spells any text in bytes, with `size` tokens at most, made from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# ---- one of every kind, for images in patches of 4 pixels as the models of tiny.py --------------

VICUNA = (  # shows all images first; nothing says that an answer ends
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
INSTRUCT = (  # Llama 2's: an answer is text alone, and begins without a tag
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]"
    "{% for c in m['content'] %}"
    "{{ IMAGE if c['type'] == 'image' else c['text'] }}{% endfor %}[/INST]"
    "{% else %}{{ ' ' + m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
UTTERANCES = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{{ IMAGE if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (  # takes user and assistant in turn alone, and trims every text
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('order') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{% for c in m['content'] %}"
    "{{ '<start_of_image>' if c['type'] == 'image' else c['text'] | trim }}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Qwen3's: of a thought only the last answer's is kept, and where there is none an empty one is
# written; a prompt ends before it
THOUGHTS = (
    "{% for m in messages %}{% set text = m['content'] | map(attribute='text') | join %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ IMAGE }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{% set said = text.split('</think>')[-1].lstrip() %}"
    "{% if loop.last %}<think>\n{{ text.split('</think>')[0].split('<think>')[-1].strip()"
    " if '</think>' in text else '' }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_pairs(*special: str, bos: str | None = None, writes_bos: bool = False, **named: str):
    """A tokenizer that spells any text in bytes; `named` are special tokens with an attribute."""
    every = list(
        dict.fromkeys(["<pad>", "</s>", *([bos] if bos else []), *special, *named.values()])
    )
    texts = ["what is it a red circle user assistant \n\n"] * 9
    tokenizer = byte_level(every, texts, 400)
    if writes_bos:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, every.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=bos,
        eos_token="</s>",
        extra_special_tokens=named or list(special),
    )


def images(kind: str, name: str, **settings):
    """An image processor that needs no torchvision."""
    module = importlib.import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
    return getattr(module, name)(**settings)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def without_videos(kind: type[ProcessorMixin], **settings) -> ProcessorMixin:
    """A processor whose part for videos, which needs torchvision, is a stand-in."""
    videos = SimpleNamespace(model_input_names=[], num_frames=8, fps=1, size={"longest_edge": 64})
    with patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        return kind(video_processor=videos, **settings)


def llava() -> ProcessorMixin:
    return hf.LlavaProcessor(
        image_processor=images(
            "clip", "CLIPImageProcessorPil", size={"shortest_edge": 16}, crop_size=square(16)
        ),
        tokenizer=byte_pairs("<image>", bos="<s>", writes_bos=True),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


def llava_next() -> ProcessorMixin:
    return hf.LlavaNextProcessor(
        image_processor=images(
            "llava_next",
            "LlavaNextImageProcessorPil",
            size={"shortest_edge": 16},
            crop_size=square(16),
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        ),
        tokenizer=byte_pairs("<image>", bos="<s>", writes_bos=True),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=INSTRUCT.replace("IMAGE", "'<image>\n'"),
    )


def llava_onevision() -> ProcessorMixin:
    """Writes tiles for an image alone, and not for one of several."""
    return without_videos(
        hf.LlavaOnevisionProcessor,
        image_processor=images(
            "llava_onevision",
            "LlavaOnevisionImageProcessorPil",
            size=square(16),
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        ),
        tokenizer=byte_pairs("<image>", "<video>", "<|im_start|>", "<|im_end|>"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "'<image>'"),
    )


def idefics3() -> ProcessorMixin:
    return hf.Idefics3Processor(**idefics("idefics3", "Idefics3ImageProcessorPil"))


def smolvlm() -> ProcessorMixin:
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    with patch.object(module, "num2words", str):  # for the times of a video's frames
        return without_videos(
            module.SmolVLMProcessor, **idefics("smolvlm", "SmolVLMImageProcessorPil")
        )


def idefics(kind: str, name: str) -> dict:
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    return {
        "image_processor": images(
            kind, name, size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ),
        "tokenizer": byte_pairs(*special, "<|im_start|>", *rows, bos="<|im_start|>"),
        "image_seq_len": 16,
        "chat_template": UTTERANCES,
    }


def qwen(kind: type[ProcessorMixin], template: str = CHATML) -> ProcessorMixin:
    around = ("<|vision_start|>", "<|vision_end|>")
    return without_videos(
        kind,
        image_processor=images(
            "qwen2_vl",
            "Qwen2VLImageProcessorPil",
            patch_size=4,
            merge_size=2,
            size={"shortest_edge": 64, "longest_edge": 4096},
        ),
        tokenizer=byte_pairs(
            "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", *around
        ),
        chat_template=template.replace("IMAGE", repr("<|image_pad|>".join(around))),
    )


def internvl() -> ProcessorMixin:
    return without_videos(
        hf.InternVLProcessor,
        image_processor=images(
            "got_ocr2", "GotOcr2ImageProcessorPil", size=square(32), min_patches=1, max_patches=4
        ),
        tokenizer=byte_pairs(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
            start_token="<|im_start|>",
            end_token="<|im_end|>",
        ),
        image_seq_length=16,
        chat_template=CHATML.replace("IMAGE", "'<IMG_CONTEXT>\n'"),
    )


def pixtral() -> ProcessorMixin:
    """LLaVA with Pixtral's tower."""
    name = "transformers.models.pixtral.image_processing_pixtral"
    stand_in = ModuleType(name)  # needs torchvision, also for this one function
    stand_in.get_resize_output_image_size = None
    with patch.dict(sys.modules, {name: stand_in}):
        module = importlib.import_module("transformers.models.pixtral.processing_pixtral")
    return module.PixtralProcessor(
        image_processor=images(
            "pixtral", "PixtralImageProcessorPil", size={"longest_edge": 32}, patch_size=4
        ),
        tokenizer=byte_pairs(
            "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", bos="<s>", writes_bos=True
        ),
        patch_size=4,
        chat_template=INSTRUCT.replace("IMAGE", "'[IMG]'"),
    )


def gemma3() -> ProcessorMixin:
    return hf.Gemma3Processor(
        image_processor=images("gemma3", "Gemma3ImageProcessorPil", size=square(32)),
        tokenizer=byte_pairs(
            bos="<bos>",
            writes_bos=True,
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
            start_token="<start_of_turn>",
            end_token="<end_of_turn>",
        ),
        image_seq_length=16,
        chat_template=GEMMA,
    )


PROCESSORS: dict[str, Callable[[], ProcessorMixin]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_5_vl": lambda: qwen(hf.Qwen2_5_VLProcessor),
    "qwen3_vl": lambda: qwen(hf.Qwen3VLProcessor, THOUGHTS),
    "internvl": internvl,
    "pixtral": pixtral,
    "gemma3": gemma3,
}


def model_of(kind: str, processor: ProcessorMixin) -> PreTrainedModel:
    """A tiny random model for the tokens of a processor."""
    model = CASES[kind].build(torch.float32)
    model.resize_token_embeddings(len(processor.tokenizer))
    model.config.image_token_id = processor.image_token_ids[0]
    model.config.video_token_id = getattr(processor, "video_token_id", None)
    return model
