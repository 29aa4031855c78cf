"""The stand-ins trained from nothing; what is shipped in data/backbones came from here.

python -m sts backbone --rebuild --config workflow/config/mini.yaml --out backbone.json
python -m sts backbone --rebuild idefics3 --config ... --out backbone.json
"""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from sts.checks import expect
from sts.mini.families import FAMILIES, assemble
from sts.mini.language import reading, reading_without, train_language
from sts.mini.vision import seeing, train_vision
from sts.mini.words import make_tokenizer
from sts.pipeline.config import ModelConfig
from sts.pipeline.data.conversation import CHAT_TEMPLATE
from sts.pipeline.files import sha256_json, write_json_atomic
from sts.pipeline.run.provenance import fingerprint
from sts.pipeline.train.model import SHIPPED

# steps of the towers of whole checkpoints; LLaVA's two parts have theirs in the scale's file
TOWER_STEPS = {"llava_next": 3000, "idefics3": 2100, "qwen2_5_vl": 2100}


def rebuilt(model: ModelConfig, beside: Path, family: str) -> tuple[ModelConfig, Path]:
    """The settings that take a family's stand-in, and the folder with it: the two parts of LLaVA, a
    whole checkpoint of another, of the recipe as it is, which is all of this room; trained now if
    it is not there yet."""
    known = ["llava", *TOWER_STEPS]
    expect(family in known, "--rebuild", family, f"one of {', '.join(known)}")
    recipe = fingerprint(*Path(__file__).parent.glob("*.py"))
    key = sha256_json([model.model_dump(), recipe, family])[:8]
    folder = beside / f"rebuilt-{key}"
    if not (folder / "quality.json").exists():
        torch.set_num_threads(model.threads)
        if family in TOWER_STEPS:
            rebuild_whole(family, folder, TOWER_STEPS[family])
        else:
            rebuild(folder, model.layers, model.vision_steps, model.language_steps)
    start: dict[str, Any] = {"backbone": "rebuild"}
    if family in TOWER_STEPS:
        start = {"family": "whole", "checkpoint": str(folder), "fresh": ["projector"]}
    return model.model_copy(update=start), folder


def rebuild(folder: Path, layers: int, vision_steps: int, language_steps: int) -> None:
    """Train both backbones and save them, in half precision as CLIP and Vicuna are shipped, with
    what they can do in `quality.json`, the last file to be written."""
    tokenizer = make_tokenizer()
    processor = FAMILIES["llava"].processor(tokenizer, CHAT_TEMPLATE)
    processor.save_pretrained(folder / "processor")
    processor.image_processor.save_pretrained(folder / "vision")  # a tower goes with its own
    vision = train_vision("llava", vision_steps)
    language = train_language(tokenizer, language_steps, layers)
    quality = {
        "seeing": seeing("llava", vision),
        "reading": reading(language, tokenizer),
        "reading_without": reading_without(language, tokenizer),
    }
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
