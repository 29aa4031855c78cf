"""easy-VQA: questions about one coloured shape each, most of which can be guessed."""

import json
from pathlib import Path

from sts.pipeline.config import DataConfig
from sts.pipeline.data.registry import DataSet
from sts.pipeline.data.rows import Rows, conversation
from sts.pipeline.data.source import Source


def _rows(_: DataConfig, folder: Path) -> dict[str, Rows]:
    """Training rows hold all questions of an image, as LLaVA-1.5 joins those of VQAv2."""
    pairs: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in _questions(folder / "train"):
        pairs.setdefault(image, []).append((question, answer))
    train = [
        conversation(f"train-{image}", folder / f"train/images/{image}.png", of_image)
        for image, of_image in pairs.items()
    ]
    test = [
        {"id": f"test-{index:05d}", "image": folder / f"test/images/{image}.png",
         "question": question, "answer": answer, "form": _form(question)}
        for index, (question, answer, image) in enumerate(_questions(folder / "test"))
    ]  # fmt: skip
    return {"instruct": (len(train), train), "test_easy_vqa": (len(test), test)}


def _questions(folder: Path) -> list[tuple[str, str, int]]:
    return json.loads((folder / "questions.json").read_text(encoding="utf-8"))


def _form(question: str) -> str:
    if not question.startswith("what"):
        return "yes_no"
    return "colour" if "color" in question else "shape"


DATASET = DataSet(
    version="1.0",
    licence="MIT",
    homepage="https://github.com/vzhou842/easy-VQA",
    citation="Victor Zhou. easy-VQA: an easy visual question answering dataset. 2019.",
    load=_rows,
    source=Source(
        archive="https://github.com/vzhou842/easy-VQA/archive/"
        "3b553bb7ff42a868d5f4cbe8c88255d7333c3c31.tar.gz",
        folder="easy_vqa/data",
        mirror="easy_vqa",
        sha256="a6d905349c8badd9879a3c7f99ff99695da2bc32e851394a77f47b457b47eed7",
    ),
    tokens={"instruct": (198, 19)},  # the mini scale's, in batches of 32, not grouped by length
    longest={"instruct": 256},
    image_bytes=430,
)
