"""A user's own data: a LLaVA-style JSON file and a folder of images."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from sts.pipeline.config import CustomConfig, DataConfig
from sts.pipeline.data.registry import DataSet
from sts.pipeline.data.rows import Rows
from sts.pipeline.data.source import DataError


def dataset(name: str, spec: CustomConfig) -> DataSet:
    """The entry of `data.custom.<name>`."""
    return DataSet(
        version="custom",
        licence="not stated",
        homepage=spec.json_file,
        citation="",
        load=partial(_rows, name, spec),
        embed=False,
    )


def _rows(name: str, spec: CustomConfig, _: DataConfig, __: None) -> dict[str, Rows]:
    file = Path(spec.json_file)
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"data set {name}: {file} can't be read: {error}. Correct data.custom.{name}.json"
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"data set {name}: {file} holds a {type(rows).__name__}, not a list of "
            "{id, image, conversations}"
        )
    images = Path(spec.images)
    if not images.is_dir():
        raise DataError(
            f"data set {name}: {images} is not a folder. Correct data.custom.{name}.images"
        )
    return {spec.split: (len(rows), (_row(row, i, images) for i, row in enumerate(rows)))}


def _row(row: Any, index: int, images: Path) -> dict:
    """A row as it stands, malformed or not: `prepare` judges it and reports the index."""
    row = row if isinstance(row, dict) else {}
    image = row.get("image")
    return {
        "id": str(row.get("id", index)),
        "image": images / str(image) if image is not None else None,
        "conversations": row.get("conversations"),
    }
