"""NLVR: is a sentence about a strip of three boxes true?"""

import json
from pathlib import Path

from PIL import Image, ImageOps

from sts.pipeline.config import DataConfig
from sts.pipeline.data.registry import DataSet
from sts.pipeline.data.rows import Rows
from sts.pipeline.data.source import Questions, Source

CLIP_MEAN = (122, 116, 104)  # 255 x CLIP's mean colour; LLaVA-1.5 pads images to a square with it


def _read(folder: Path) -> Questions:
    """The public layout (dev.json, images/<directory>/) or the mirror's (dev.jsonl with paths).

    Of the six orders of the boxes of each example, the first is used.
    """
    public = folder / "dev.json"
    lines = (public if public.exists() else folder / "dev.jsonl").read_text(encoding="utf-8")
    questions = []
    for example in map(json.loads, lines.splitlines()):
        id = example["identifier"]
        image = example.get("image") or f"images/{example['directory']}/dev-{id}-0.png"
        question = f"{example['sentence'].strip().rstrip('.')}. true or false?"
        item = {"id": f"dev-{id}", "image": folder / image, "question": question}
        questions.append(item | {"answer": example["label"]})
    return {"dev": questions}


def _rows(_: DataConfig, questions: Questions) -> dict[str, Rows]:
    """Asked as instruction data ask it, yes or no: a model that never answered "true" won't."""
    answers = {"true": "yes", "false": "no"}
    rows = (
        {
            **item,
            "question": item["question"].replace("true or false?", "yes or no?"),
            "answer": answers[item["answer"]],
            "image": _squared(item["image"]),
            "form": "yes_no",
        }
        for item in questions["dev"]
    )
    return {"test_nlvr": (len(questions["dev"]), rows)}


def _squared(path: Path) -> Image.Image:
    """The image in the middle of a square: CLIP's centre crop would cut a wide strip's ends off."""
    with Image.open(path) as image:
        side = max(image.size)
        return ImageOps.pad(image.convert("RGB"), (side, side), color=CLIP_MEAN)


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
        sha256="6f051918e9c20e18afb6844535166d6e0338cf938960d5939b882d041434f98f",
        read=_read,
    ),
    image_bytes=1_000,
)
