"""The families that have a toy backbone, each as a whole Hugging Face checkpoint.

    assemble("idefics3", tower, language, make_tokenizer(), folder)

All have the same decoder. A family has a vision tower, a projector, image tokens and a processor of
its own, and its chat template writes an image as the family does, in the words that the decoder
knows: "user: <image>\\nquestion assistant: answer</s>".
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    Idefics3Config,
    Idefics3Processor,
    Idefics3VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PaddleOCRVLProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_window_index

from sts.architectures import projector_of, tower_of
from sts.mini import pictures
from sts.pipeline.data.templates import CHAT_TEMPLATE

MEAN, STD = [0.5] * 3, [0.25] * 3  # of a pixel's channels
NORMAL = {"image_mean": MEAN, "image_std": STD}
TILE = pictures.SIZE // 2  # pixels of a tile's side
FINE = pictures.PATCH // 2  # pixels of a patch's side, where four are merged into a token


class Family(NamedTuple):
    """config: (the decoder's, the tokenizer) -> the whole model's.
    shows: truth [batch, 144, attributes] -> (patch of the grid [batch, features], place [batch,
    features, 2]) of each feature that the projector is called with, in that order.
    """

    config: Callable[[LlamaConfig, PreTrainedTokenizerFast], PreTrainedConfig]
    processor: Callable[[PreTrainedTokenizerFast, str], ProcessorMixin]
    shows: Callable[[Tensor], tuple[Tensor, Tensor]]
    tokens: dict[str, str]  # special ones, by their attribute
    image: str = "<image>"  # what the chat template writes for one
    class_token: bool = False  # whether the tower has one


# --- what a feature shows ---


def places_of(patches: Tensor) -> Tensor:
    """[...] patches of the grid -> [..., 2]: row and column, from 0."""
    return torch.stack([patches // pictures.GRID, patches % pictures.GRID], -1)


def in_order(order: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Features that show the same patches of the grid [features] of every picture."""

    def shows(truth: Tensor) -> tuple[Tensor, Tensor]:
        patches = order.expand(len(truth), -1)
        return patches, places_of(patches)

    return shows


def quarters() -> Tensor:
    """[576]: the patch of the grid that each of the patches a half as wide lies in."""
    row = torch.arange(2 * pictures.GRID) // 2
    return (pictures.GRID * row[:, None] + row).flatten()


def windows(vision: Qwen2_5_VLVisionConfig) -> Tensor:
    """[576]: as `quarters`, a window after the other and in it the four of a token together."""
    index, _ = get_vision_window_index(
        torch.tensor([[1, 2 * pictures.GRID, 2 * pictures.GRID]]),
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    return index.repeat_interleave(vision.spatial_merge_size**2)


def in_tiles(truth: Tensor) -> tuple[Tensor, Tensor]:
    """The whole picture's 36 patches, then those of four tiles.

    A patch of the whole shows, of its 2 x 2 of the grid, the one that holds a centre, else one that
    shows a thing. A tile's tower does not know which tile it has: a place is one in the tile, and
    is counted from 12 to tell it from one in the picture.
    """
    half = pictures.GRID // 2
    patch = torch.arange(pictures.GRID**2).view(half, 2, half, 2)
    fours = patch.transpose(1, 2).reshape(-1, 4)  # of each patch of the whole
    worth = 2 * truth[..., -1] + (truth[..., 0] > 0)
    first = worth[:, fours].argmax(-1, keepdim=True)
    chosen = fours.expand(len(truth), -1, -1).gather(-1, first).squeeze(-1)
    tiles = patch.view(2, half, 2, half).transpose(1, 2).reshape(-1)  # row by row of each tile
    tiles = tiles.expand(len(truth), -1)
    inside = places_of(tiles) % half + pictures.GRID
    return torch.cat([chosen, tiles], 1), torch.cat([places_of(chosen), inside], 1)


# --- configurations and processors ---


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def clip(side: int) -> CLIPVisionConfig:
    """Five layers: LLaVA reads the fourth (`vision_feature_layer: -2`), CLS learns on the last."""
    return CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=side,
        patch_size=pictures.PATCH,
    )


def llava(text: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    return LlavaConfig(
        vision_config=clip(pictures.SIZE),
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=pictures.GRID**2,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def llava_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> LlavaProcessor:
    """Pictures squashed to 72x72; 144 tokens."""
    return LlavaProcessor(
        CLIPImageProcessorPil(
            size=square(pictures.SIZE),
            crop_size=square(pictures.SIZE),
            do_center_crop=False,
            **NORMAL,
        ),
        tokenizer,
        patch_size=pictures.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]


def llava_next(text: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=clip(TILE),
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def llava_next_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> LlavaNextProcessor:
    """A square: the whole at half its size and 2x2 tiles, 36 + 144 tokens and 12 newlines."""
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE},
            crop_size=square(TILE),
            image_grid_pinpoints=PINPOINTS,
            **NORMAL,
        ),
        tokenizer,
        patch_size=pictures.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def idefics3(text: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    return Idefics3Config(
        vision_config=Idefics3VisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=pictures.SIZE,
            patch_size=FINE,
        ),
        text_config=text,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def idefics3_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> Idefics3Processor:
    """Pictures squashed to 72x72; 144 tokens between three of the family's."""
    return Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": pictures.SIZE},
            max_image_size={"longest_edge": pictures.SIZE},
            do_image_splitting=False,
            **NORMAL,
        ),
        tokenizer,
        image_seq_len=pictures.GRID**2,
        chat_template=template,
    )


QWEN_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "depth": 4,
    "num_heads": 2,
    "patch_size": FINE,
    "window_size": pictures.SIZE // 2,  # 2 x 2 windows
    "fullatt_block_indexes": [1],
}


def qwen2_5_vl(text: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Llama's decoder with biases. A token of a text has the same place thrice, so that M-RoPE
    turns it as Llama does, whatever the sections."""
    turned = text.head_dim // 2
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    kept += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    kept += ("rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    sections = [turned - 2 * (3 * turned // 8), 3 * turned // 8, 3 * turned // 8]
    return Qwen2_5_VLConfig(
        vision_config=QWEN_VISION | {"out_hidden_size": text.hidden_size},
        text_config=Qwen2_5_VLTextConfig(
            **{name: getattr(text, name) for name in kept},
            rope_parameters=text.rope_parameters | {"mrope_section": sections},
        ).to_dict(),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def qwen2_5_vl_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> PaddleOCRVLProcessor:
    """72x72 as it is: 144 tokens between two of the family's. Qwen's own class can't be loaded
    without torchvision, for its videos; this one does the same with images."""
    return PaddleOCRVLProcessor(
        Qwen2VLImageProcessorPil(
            patch_size=FINE,
            size={"shortest_edge": TILE**2, "longest_edge": 4 * pictures.SIZE**2},
            **NORMAL,
        ),
        tokenizer,
        chat_template=template,
    )


FAMILIES: dict[str, Family] = {
    "llava": Family(
        config=llava,
        processor=llava_processor,
        class_token=True,
        shows=in_order(torch.arange(pictures.GRID**2)),
        tokens={"image_token": "<image>"},
    ),
    "llava_next": Family(
        config=llava_next,
        processor=llava_next_processor,
        class_token=True,
        shows=in_tiles,
        tokens={"image_token": "<image>"},
    ),
    "idefics3": Family(
        config=idefics3,
        processor=idefics3_processor,
        shows=in_order(quarters()),
        tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    ),
    "qwen2_5_vl": Family(
        config=qwen2_5_vl,
        processor=qwen2_5_vl_processor,
        shows=in_order(windows(Qwen2_5_VLVisionConfig(**QWEN_VISION))),
        tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
        image="<|vision_start|><|image_pad|><|vision_end|>",
    ),
}


# --- whole models ---


def with_tokens(
    tokenizer: PreTrainedTokenizerFast, tokens: dict[str, str]
) -> PreTrainedTokenizerFast:
    """A copy that has these special tokens, by their attribute; new ones come after all others."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token=tokenizer.pad_token,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        extra_special_tokens=tokens,
        padding_side=tokenizer.padding_side,
        model_max_length=tokenizer.model_max_length,
    )


def build(
    name: str, tokenizer: PreTrainedTokenizerFast, text: LlamaConfig
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model of the family with random weights in float32 and a decoder as `text`, whose
    vocabulary is grown by the family's tokens; and its processor."""
    family = FAMILIES[name]
    tokenizer = with_tokens(tokenizer, family.tokens)
    processor = family.processor(
        tokenizer, CHAT_TEMPLATE.replace(r"'<image>\n'", rf"'{family.image}\n'")
    )
    text = LlamaConfig(**text.to_dict() | {"vocab_size": len(processor.tokenizer)})
    model = AutoModelForImageTextToText.from_config(family.config(text, tokenizer))
    return model.float(), processor


def put_tower(model: PreTrainedModel, tower: PreTrainedModel) -> None:
    """Give a model this tower; what lies in it of the projector stays the model's."""
    [(path, old)] = tower_of(model).items()
    [projector] = projector_of(model)
    inner = f"{projector.removeprefix(f'{path}.')}."  # of Qwen's tower
    new = {key: x for key, x in tower.state_dict().items() if not key.startswith(inner)}
    old.load_state_dict(old.state_dict() | new)


def assemble(
    name: str,
    tower: PreTrainedModel,
    language: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
) -> None:
    """Save the family's checkpoint with this tower and decoder, in half precision as such are
    shipped. Its projector is random: every run draws its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = build(name, tokenizer, language.config)
        words = language.get_input_embeddings().weight.detach().float()
        # the mean's logit is a middling one, so no new token is ever the answer, as one with a row
        # of zeros or of another length might be; the noise tells them apart
        noise = torch.randn(len(processor.tokenizer) - len(words), words.shape[1])
        rows = torch.cat([words, words.mean(0) + 0.1 * words.std(0) * noise])
    put_tower(model, tower)
    decoder = model.get_decoder()
    zeros = {key: torch.zeros_like(old) for key, old in decoder.state_dict().items()}
    biases = {key: zero for key, zero in zeros.items() if key.endswith(".bias")}  # Llama has none
    decoder.load_state_dict(biases | language.model.state_dict() | {"embed_tokens.weight": rows})
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
