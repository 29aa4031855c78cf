"""easy-VQA: questions about one coloured shape each, most of which can be guessed."""

import json
from pathlib import Path

from sts.pipeline.config import DataConfig
from sts.pipeline.data.registry import DataSet
from sts.pipeline.data.rows import Rows, conversation
from sts.pipeline.data.source import Questions, Source


def _read(folder: Path) -> Questions:
    questions = {}
    for split in ("train", "test"):
        triples = json.loads((folder / split / "questions.json").read_text(encoding="utf-8"))
        questions[split] = [
            {
                "id": f"{split}-{index:05d}",
                "image": folder / split / "images" / f"{image}.png",
                "question": question,
                "answer": answer,
            }
            for index, (question, answer, image) in enumerate(triples)
        ]
    return questions


def _rows(_: DataConfig, questions: Questions) -> dict[str, Rows]:
    """Training rows hold all questions of an image, as LLaVA-1.5 joins those of VQAv2."""
    by_image: dict[Path, list[dict]] = {}
    for item in questions["train"]:
        by_image.setdefault(item["image"], []).append(item)
    train = (
        conversation(f"train-{image.stem}", image, [(i["question"], i["answer"]) for i in items])
        for image, items in by_image.items()
    )
    test = ({**item, "form": _form(item["question"])} for item in questions["test"])
    return {
        "instruct": (len(by_image), train),
        "test_easy_vqa": (len(questions["test"]), test),
    }


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
        sha256="c5723668feb2e39a48a65f62ea7465a5a1517ad7c038a7a3117fc19f6b24ea7f",
        read=_read,
    ),
    tokens={"instruct": (198, 19)},  # the mini scale's, in batches of 32, not grouped by length
    image_bytes=430,
)
