"""The stand-ins trained from nothing; what is shipped in data/backbones/mini came from here.

python -m sts backbone --rebuild --config workflow/config/mini.yaml --out backbone.json
"""

from pathlib import Path

import torch

from sts.mini.language import reading, train_language
from sts.mini.vision import seeing, train_vision
from sts.mini.words import make_processor, make_tokenizer
from sts.pipeline.config import ModelConfig
from sts.pipeline.provenance import fingerprint, sha256_json, write_json_atomic


def rebuilt(model: ModelConfig, beside: Path) -> Path:
    """The folder with the backbones of these settings and of the recipe as it is, which is all of
    this room; trained now if it is not there yet."""
    recipe = fingerprint(*Path(__file__).parent.glob("*.py"))
    folder = beside / f"rebuilt-{sha256_json([model.model_dump(), recipe])[:8]}"
    if not (folder / "language" / "config.json").exists():
        rebuild(folder, model.layers, model.vision_steps, model.language_steps, model.threads)
    return folder


def rebuild(
    folder: Path, layers: int, vision_steps: int, language_steps: int, threads: int
) -> None:
    """Train both backbones and save them, in half precision as CLIP and Vicuna are shipped, with
    what they can do in `quality.json`."""
    torch.set_num_threads(threads)
    tokenizer = make_tokenizer()
    make_processor(tokenizer).save_pretrained(folder / "processor")
    vision = train_vision(vision_steps)
    language = train_language(tokenizer, language_steps, layers)
    quality = {"seeing": seeing(vision), "reading": reading(language, tokenizer)}
    write_json_atomic(folder / "quality.json", quality)
    vision.half().save_pretrained(folder / "vision")
    language.half().save_pretrained(folder / "language")
