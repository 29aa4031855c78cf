"""Small data sets with the files, columns and splits of those of the hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import yaml
from asking import picture, write_parquet

TEXT, IMAGE, NUMBER = datasets.Value("string"), datasets.Image(), datasets.Value("int64")
TEXTS = datasets.List(TEXT)


def people_of(*answers):
    return [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]


QUESTION = {"question_id": TEXT, "question": TEXT, "image": IMAGE}
LETTERED = {"A": TEXT, "B": TEXT, "C": TEXT, "D": TEXT}
# data set -> configuration -> split -> (columns, rows)
OFFICIAL = {
    "lmms-lab-encoder/POPE": {"default": {"test": (
        QUESTION | {"answer": TEXT, "category": TEXT},
        [{"question": f"Is there a {thing}?", "answer": right, "category": kind}
         for kind in ("random", "popular", "adversarial")
         for thing, right in (("yes", "yes"), ("no", "no"))],
    )}},
    "lmms-lab/GQA": {
        "testdev_balanced_instructions": {"testdev": (
            {"id": TEXT, "imageId": TEXT, "question": TEXT, "answer": TEXT},
            [{"id": str(i), "imageId": f"n{i % 2}", "question": f"say {w}", "answer": w}
             for i, w in enumerate(["red", "blue", "left"])],
        )},
        "testdev_balanced_images": {"testdev": (
            {"id": TEXT, "image": IMAGE}, [{"id": "n1"}, {"id": "n0"}],
        )},
    },
    "lmms-lab/ScienceQA": {"ScienceQA-IMG": {"test": (
        {"image": IMAGE, "question": TEXT, "choices": TEXTS, "answer": NUMBER, "hint": TEXT},
        [{"question": "say B", "choices": ["x", "y"], "answer": 1, "hint": "Look."},
         {"question": "say A", "choices": ["x", "y", "z"], "answer": 0, "hint": ""}],
    )}},
    "lmms-lab/textvqa": {"default": {"validation": (
        QUESTION | {"answers": TEXTS, "ocr_tokens": TEXTS},
        [{"question": "say stop", "answers": ["stop"] * 10, "ocr_tokens": ["STOP", "ALL"]}],
    )}},
    "lmms-lab/VizWiz-VQA": {"default": {"val": (
        QUESTION | {"answers": TEXTS},
        [{"question": "say unanswerable", "answers": ["unanswerable"] * 10}],
    )}},
    "lmms-lab/VQAv2": {"default": {"validation": (
        QUESTION | {"answers": datasets.List({"answer": TEXT, "answer_id": NUMBER}),
                    "multiple_choice_answer": TEXT},
        [{"question": "say two", "answers": people_of(*["2"] * 9, "three"),
          "multiple_choice_answer": "2"}],
    )}},
    "lmms-lab/MME": {"default": {"test": (
        QUESTION | {"answer": TEXT, "category": TEXT},
        [{"question_id": kind, "question": f"say {right} Please answer yes or no.",
          "answer": right, "category": kind}
         for kind in ("count", "scene", "code_reasoning") for right in ("Yes", "No")],
    )}},
    "lmms-lab-encoder/ChartQA": {"default": {"test": (
        {"type": TEXT, "question": TEXT, "answer": TEXT, "image": IMAGE},
        [{"type": "human_test", "question": "say 14", "answer": "14"},
         {"type": "augmented_test", "question": "say Peru", "answer": "Peru"}],
    )}},
    "lmms-lab/SEED-Bench": {"default": {"test": (
        {"question_id": TEXT, "question": TEXT, "image": datasets.List(IMAGE), "answer": TEXT,
         "data_type": TEXT, **{f"choice_{letter}": TEXT for letter in "abcd"}},
        [{"question": "say C", "answer": "C", "data_type": kind, "image": [None] * n}
         for kind, n in (("image", 1), ("video", 3))],
    )}},
    "lmms-lab/MMBench": {name: {"dev": (
        {"index": NUMBER, "question": TEXT, "hint": TEXT, "answer": TEXT, "image": IMAGE,
         "category": TEXT, **LETTERED},
        [{"index": 3, "question": "say A", "hint": "nan", "answer": "A", "A": "x", "B": "y"},
         {"index": 1_000_003, "question": "say B", "hint": "Look.", "answer": "B", "A": "y",
          "B": "x"}],
    )} for name in ("en", "cn")},
}  # fmt: skip
ART = ("Art", "Art_Theory", "Design", "Music")  # subjects of MMMU's art and design


def write_sets(root: Path, sets: Mapping[str, Any], words: bool = True) -> Path:
    """Write data set -> configuration -> split -> (columns, rows) below a folder, as a mirror has
    them; the folder. words: a text that a row does not say is made up, and not empty."""
    for path, configurations in sets.items():
        card = []
        for name, splits in configurations.items():
            files = []
            for split, (columns, rows) in splits.items():
                filled = [
                    {
                        key: _filled(key, kind, row.get(key), i, words)
                        for key, kind in columns.items()
                    }
                    for i, row in enumerate(rows)
                ]
                write_parquet(filled, columns, root / path / name / f"{split}-0.parquet")
                files.append({"split": split, "path": f"{name}/{split}-*"})
            card.append({"config_name": name, "data_files": files})
        _card(root / path, card)
    return root


def _card(folder: Path, configurations: list[dict]) -> None:
    text = yaml.safe_dump({"configs": configurations})
    (folder / "README.md").write_text(f"---\n{text}---\n")


def _filled(key: str, kind: Any, value: Any, place: int, words: bool) -> Any:
    """What a row does not say: another picture each, words that mean nothing."""
    if kind == IMAGE:
        return picture(place)
    if isinstance(kind, datasets.List) and kind.feature == IMAGE:
        return [picture(10 * place + i) for i in range(len(value))]
    return f"{key} {place}" if words and value is None and kind == TEXT else value


def write_chartqa(root: Path) -> None:
    """All columns of ChartQA, four questions."""
    chartqa = {
        "image": IMAGE,
        "query": TEXT,
        "label": TEXTS,
        "human_or_machine": datasets.ClassLabel(names=["human", "machine"]),
    }
    rows = [
        {"image": picture(i, mode), "query": f"value {i}?", "label": [f"{100 + i}"],
         "human_or_machine": 0}
        for i, mode in enumerate(["RGB", "RGBA", "P", "L"])
    ]  # fmt: skip
    write_parquet(rows, chartqa, root / "HuggingFaceM4/ChartQA/data/test-0.parquet")


def write_mmmu(root: Path, subjects: Sequence[str], times: int = 1) -> None:
    """All columns of subjects of MMMU, three questions each, so many times."""
    names = "id question options explanation {} img_type answer topic_difficulty question_type"
    images = [f"image_{i}" for i in range(1, 8)]
    columns = f"{names} subfield".format(" ".join(images)).split()
    mmmu = {name: IMAGE if name in images else TEXT for name in columns}
    empty = {name: None if name in images else "" for name in columns}
    parts = []
    for subject in subjects:
        choice = {"question": "<image 1> or <image 2>?", "options": "['red', 'blue']",
                  "answer": "B", "question_type": "multiple-choice", "image_1": picture(1),
                  "image_2": picture(2, "RGBA", (50, 60))}  # fmt: skip
        open_question = {"question": "what is <image 1>?", "options": "[]", "answer": "seven",
                         "question_type": "open", "image_1": picture(3)}  # fmt: skip
        rows = [
            {**empty, **row, "id": f"validation_{subject}_{i}"}
            for i, row in enumerate(times * [choice, open_question, open_question])
        ]
        write_parquet(rows, mmmu, root / f"MMMU/MMMU/{subject}/validation-0.parquet")
        files = [{"split": "validation", "path": f"{subject}/validation-*"}]
        parts.append({"config_name": subject, "data_files": files})
    _card(root / "MMMU/MMMU", parts)
