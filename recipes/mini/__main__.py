"""Train the toy backbones of `data/backbones` from nothing.

    python -m recipes.mini llava --out results/mini/backbone_rebuilt/llava
    python -m recipes.mini idefics3 --out results/mini/backbone_rebuilt/idefics3

LLaVA's are two folders, `vision` and `language`, which a run takes as `model.backbone: pretrained`.
Those of another family are a whole checkpoint: `model.family: whole`. What they can do is written
to `quality.json` there, the last file.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from recipes.mini.families import FAMILIES, assemble
from recipes.mini.language import reading, reading_without, train_language
from recipes.mini.vision import seeing, train_vision
from recipes.mini.words import make_tokenizer
from sts.pipeline.data.templates import CHAT_TEMPLATE
from sts.pipeline.files import write_json_atomic

SHIPPED = Path("data/backbones/mini")
LAYERS = 12  # of the decoder
LANGUAGE_STEPS = 6300
TOWER_STEPS = {"llava": 3900, "llava_next": 3000, "idefics3": 2100, "qwen2_5_vl": 2100}


def train_parts(folder: Path, layers: int, tower_steps: int, language_steps: int) -> None:
    """Train LLaVA's tower and decoder and save them."""
    tokenizer = make_tokenizer()
    tower = train_vision("llava", tower_steps)
    language = train_language(tokenizer, language_steps, layers)
    quality = {
        "seeing": seeing("llava", tower),
        "reading": reading(language, tokenizer),
        "reading_without": reading_without(language, tokenizer),
    }
    save_parts(folder, tower, language, tokenizer)
    write_json_atomic(folder / "quality.json", quality)


def save_parts(
    folder: Path,
    tower: PreTrainedModel,
    language: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Save LLaVA's two parts, in half precision as CLIP and Vicuna are shipped, each with its
    processor or tokenizer, and the processor of both."""
    processor = FAMILIES["llava"].processor(tokenizer, CHAT_TEMPLATE)
    processor.save_pretrained(folder / "processor")
    processor.image_processor.save_pretrained(folder / "vision")
    tokenizer.save_pretrained(folder / "language")
    tower.half().save_pretrained(folder / "vision")
    language.half().save_pretrained(folder / "language")


def train_checkpoint(family: str, folder: Path, tower_steps: int) -> None:
    """Train a family's tower and save its whole checkpoint with the decoder that is shipped."""
    language = LlamaForCausalLM.from_pretrained(SHIPPED / "language", dtype=torch.float32)
    tower = train_vision(family, tower_steps)
    quality = {"seeing": seeing(family, tower)}
    assemble(family, tower, language, make_tokenizer(), folder)
    write_json_atomic(folder / "quality.json", quality)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.mini", description=__doc__)
    parser.add_argument("family", choices=TOWER_STEPS)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tower-steps", type=int, help="default: as those that are shipped")
    parser.add_argument("--language-steps", type=int, default=LANGUAGE_STEPS, help="LLaVA's alone")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of LLaVA's decoder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; weights depend on it")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(args.threads)
    tower_steps = args.tower_steps or TOWER_STEPS[args.family]
    if args.family == "llava":
        train_parts(args.out, args.layers, tower_steps, args.language_steps)
    else:
        train_checkpoint(args.family, args.out, tower_steps)


if __name__ == "__main__":
    main()
