"""The test questions of a benchmark, as lm-eval asks for them (`custom_dataset` in _base.yaml)."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset
from PIL import Image

GREY = (128, 128, 128)


def find(benchmark: str, manifests: list[str]) -> Path:
    """Parquet file of the split `test_<benchmark>`, looked for in the data manifests in order.

    Raises FileNotFoundError that names the split, the manifests and the fix.
    """
    split = f"test_{benchmark}"
    for manifest in map(Path, manifests):
        if not manifest.is_file():
            raise FileNotFoundError(
                f"{manifest}: no such data manifest; make it with `python -m sts prepare`"
            )
        described = json.loads(manifest.read_text(encoding="utf-8"))["splits"].get(split)
        if described is None:
            continue
        parquet = manifest.parent / described["file"]
        if not parquet.is_file():
            raise FileNotFoundError(
                f"{parquet}: missing although {manifest} lists it; prepare the data set again"
            )
        return parquet
    searched = ", ".join(map(str, manifests)) or "no data manifest at all"
    raise FileNotFoundError(
        f"no split '{split}' in {searched}; pass the manifest of the data set that has it, or take "
        f"'{benchmark}' out of evaluate.benchmarks"
    )


def load(
    benchmark: str, data: str | list[str] = (), blind: bool = False, **_: object
) -> dict[str, Dataset]:
    """{"test": rows with id, image (PIL), question, answer, form}.

    data: path(s) of data manifests, from lm-eval's metadata. blind: every image is replaced by a
    mid-grey one of the same size. lm-eval passes more metadata (version, model), which is ignored.
    """
    parquet = find(benchmark, [data] if isinstance(data, str) else list(data))
    rows = Dataset(pq.read_table(parquet))  # in memory: `load_dataset` would copy it to a cache
    return {"test": rows.with_transform(_grey) if blind else rows}


def prompt(row: dict) -> str:
    """The user's turn: the image first, as in LLaVA's conversations.

    A function because lm-eval compiles a template anew for every question.
    """
    return f"<image>\n{row['question']}"


def _grey(batch: dict) -> dict:
    return batch | {"image": [Image.new("RGB", image.size, GREY) for image in batch["image"]]}
