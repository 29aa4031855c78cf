"""A tower and a language model of the real classes in two folders, as joined models start from."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from sts.pipeline.config import ModelConfig
from sts.pipeline.train.model import write_manifest

SIDE, PATCH, VISUAL = 32, 8, 16  # pixels of a picture and a patch; visual tokens
SQUARE = {"height": SIDE, "width": SIDE}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
TOWERS = {
    "clip": (
        CLIPVisionConfig, CLIPVisionModel,
        lambda: CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE),
    ),
    "siglip": (
        SiglipVisionConfig, SiglipVisionModel, lambda: SiglipImageProcessorPil(size=SQUARE)
    ),
}  # fmt: skip
LANGUAGES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
TEXTS = ("USER: what is it? ASSISTANT: a red bowl",)


def sentencepiece_model(texts: Iterable[str], size: int = 700) -> bytes:
    """A SentencePiece file of Llama's settings, over the words of these texts."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.split("\n")]),
        model_writer=model, model_type="bpe", vocab_size=size, hard_vocab_limit=False,
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def save_tokenizer(folder: Path, model: bytes, legacy: bool) -> None:
    """The files of Vicuna's tokenizer, which are not those that transformers saves.

    legacy: what follows a special token begins with a space, as a text does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"add_bos_token": True, "add_eos_token": False, "legacy": legacy, "pad_token": None}
    settings |= {"tokenizer_class": "LlamaTokenizer", "padding_side": "right"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))
    text = json.dumps(special | {"pad_token": "<unk>"})
    (folder / "special_tokens_map.json").write_text(text)


def joined(
    folder: Path,
    tower: str = "clip",
    language: str = "llama",
    texts: Iterable[str] = TEXTS,
    legacy: bool = False,
    **more: str,
) -> Path:
    """Backbone manifest of untrained parts in a folder; `more` of the model's settings."""
    torch.manual_seed(0)
    config, model, images = TOWERS[tower]
    vision = config(**SIZES, num_hidden_layers=3, image_size=SIDE, patch_size=PATCH)
    model(vision).save_pretrained(folder / "vision")
    images().save_pretrained(folder / "vision")
    words = sentencepiece_model(texts)
    size = SentencePieceProcessor(model_proto=words).vocab_size()
    config, model = LANGUAGES[language]
    decoder = config(
        **SIZES, vocab_size=size, num_hidden_layers=2, num_key_value_heads=2,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model(decoder).save_pretrained(folder / "language")
    save_tokenizer(folder / "language", words, legacy)
    parts = {name: str(folder / name) for name in ("vision", "language")}
    settings = ModelConfig(backbone="pretrained", **parts, layers=2, **more)
    write_manifest(settings, folder / "backbone.json")
    return folder / "backbone.json"
