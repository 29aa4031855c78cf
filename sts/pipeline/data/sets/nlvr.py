"""NLVR: is a sentence about a strip of three boxes true?"""

import json
from pathlib import Path

from PIL import Image, ImageOps

from sts.pipeline.config import DataConfig
from sts.pipeline.data.pictures import rgb
from sts.pipeline.data.registry import DataSet
from sts.pipeline.data.rows import Rows
from sts.pipeline.data.source import BROKEN_IMAGE, Source

CLIP_MEAN = (122, 116, 104)  # 255 x CLIP's mean colour; LLaVA-1.5 pads images to a square with it


def _rows(_: DataConfig, folder: Path) -> dict[str, Rows]:
    """The public layout (dev.json, images/<directory>/) or the mirror's (dev.jsonl with paths)."""
    public = folder / "dev.json"
    text = (public if public.exists() else folder / "dev.jsonl").read_text(encoding="utf-8")
    lines = text.splitlines()
    return {"test_nlvr": (len(lines), (_row(folder, json.loads(line)) for line in lines))}


def _row(folder: Path, example: dict) -> dict:
    """Asked as instruction data ask it, yes or no: a model that never answered "true" won't. Of the
    six orders of the boxes of each example, the first is used."""
    id = example["identifier"]
    image = example.get("image") or f"images/{example['directory']}/dev-{id}-0.png"
    return {
        "id": f"dev-{id}",
        "image": _squared(folder / image),
        "question": f"{example['sentence'].strip().rstrip('.')}. yes or no?",
        "answer": {"true": "yes", "false": "no"}[example["label"]],
        "form": "yes_no",
    }


def _squared(path: Path) -> Image.Image:
    """The image in the middle of a square: CLIP's centre crop would cut a wide strip's ends off."""
    try:
        with Image.open(path) as image:
            side = max(image.size)
            return ImageOps.pad(rgb(image), (side, side), color=CLIP_MEAN)
    except BROKEN_IMAGE as error:
        raise OSError(f"{path}: {error}") from error


DATASET = DataSet(
    version="1.0",
    licence="CC-BY-4.0",
    homepage="https://github.com/lil-lab/nlvr",
    citation="Alane Suhr, Mike Lewis, James Yeh, Yoav Artzi. A Corpus of Natural Language for "
    "Visual Reasoning. ACL 2017. doi:10.18653/v1/P17-2034",
    load=_rows,
    source=Source(
        archive="https://github.com/lil-lab/nlvr/archive/"
        "18924841aa96d519cfb8584f0945350f07a6d860.tar.gz",
        folder="nlvr/dev",
        mirror="nlvr_dev",
        sha256="1210d5d4e47987918740f25baa3668f7715512e6ca6ae0356bfdc7b62816a291",
    ),
    image_bytes=1_000,
)
