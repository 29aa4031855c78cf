"""The stand-ins trained from nothing; what is shipped in data/backbones came from here.

python -m sts backbone --rebuild --config workflow/config/mini.yaml --out backbone.json
python -m sts backbone --rebuild --family idefics3 --config ... --out backbone.json
"""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from sts.checks import expect
from sts.mini.families import FAMILIES, assemble
from sts.mini.language import reading, train_language
from sts.mini.vision import seeing, train_vision
from sts.mini.words import make_tokenizer
from sts.pipeline.config import ModelConfig
from sts.pipeline.data.conversation import CHAT_TEMPLATE
from sts.pipeline.model import SHIPPED
from sts.pipeline.provenance import fingerprint, sha256_json, write_json_atomic


def rebuilt(model: ModelConfig, beside: Path, family: str | None = None) -> Path:
    """The folder with the backbones of these settings, or with a family's whole checkpoint, of the
    recipe as it is, which is all of this room; trained now if it is not there yet."""
    expect(family in [None, *FAMILIES], "--family", family, f"one of {', '.join(FAMILIES)}")
    recipe = fingerprint(*Path(__file__).parent.glob("*.py"))
    key = sha256_json([model.model_dump(), recipe, family])[:8]
    folder = beside / f"rebuilt-{key}"
    if not (folder / "quality.json").exists():
        torch.set_num_threads(model.threads)
        if family:
            rebuild_whole(family, folder, FAMILIES[family].steps)
        else:
            rebuild(folder, model.layers, model.vision_steps, model.language_steps)
    return folder


def rebuild(folder: Path, layers: int, vision_steps: int, language_steps: int) -> None:
    """Train both backbones and save them, in half precision as CLIP and Vicuna are shipped, with
    what they can do in `quality.json`, the last file to be written."""
    tokenizer = make_tokenizer()
    processor = FAMILIES["llava"].processor(tokenizer, CHAT_TEMPLATE)
    processor.save_pretrained(folder / "processor")
    processor.image_processor.save_pretrained(folder / "vision")  # a tower goes with its own
    vision = train_vision("llava", vision_steps)
    language = train_language(tokenizer, language_steps, layers)
    quality = {"seeing": seeing("llava", vision), "reading": reading(language, tokenizer)}
    vision.half().save_pretrained(folder / "vision")
    language.half().save_pretrained(folder / "language")
    write_json_atomic(folder / "quality.json", quality)


def rebuild_whole(family: str, folder: Path, steps: int) -> None:
    """Train a family's tower and save its checkpoint with the decoder that is shipped, whatever the
    class; what its tower sees is in `quality.json`, the last file to be written."""
    language = LlamaForCausalLM.from_pretrained(SHIPPED / "language", dtype=torch.float32)
    tower = train_vision(family, steps)
    quality = {"seeing": seeing(family, tower)}
    assemble(family, tower, language, make_tokenizer(), folder)
    write_json_atomic(folder / "quality.json", quality)
