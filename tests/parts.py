"""A tower and a language model of the real classes in two folders, as joined models start from."""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
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


def llama_tokenizer(texts: Iterable[str], legacy: bool) -> LlamaTokenizer:
    """Llama's, over the words of these texts; what it does not know it spells in bytes.

    legacy: what follows a special token begins with a space, as a text does.
    """
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    words.train_from_iterator(chain(*(text.split("\n") for text in texts)), trainer)
    made = json.loads(words.to_str())["model"]
    merges = [tuple(pair) for pair in made["merges"]]
    return LlamaTokenizer(vocab=made["vocab"], merges=merges, legacy=legacy, add_bos_token=True)


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
    tokenizer = llama_tokenizer(texts, legacy)
    config, model = LANGUAGES[language]
    decoder = config(
        **SIZES, vocab_size=len(tokenizer), num_hidden_layers=2, num_key_value_heads=2,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model(decoder).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    file = folder / "language" / "tokenizer_config.json"  # where transformers forgets to say it
    file.write_text(json.dumps(json.loads(file.read_text()) | {"legacy": legacy}))
    parts = {name: str(folder / name) for name in ("vision", "language")}
    settings = ModelConfig(backbone="pretrained", **parts, layers=2, **more)
    write_manifest(settings, folder / "backbone.json")
    return folder / "backbone.json"
