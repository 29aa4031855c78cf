"""A user's own data: a LLaVA-style JSON file and a folder of images, one or a list in a row."""

import json
from functools import partial
from pathlib import Path

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
    rows = [row if isinstance(row, dict) else {} for row in rows]
    several = any(isinstance(row.get("image"), list) for row in rows)
    found = (_row(row, index, images, several) for index, row in enumerate(rows))
    return {spec.split: (len(rows), found)}


def _row(row: dict, index: int, images: Path, several: bool) -> dict:
    """A row as it stands, malformed or not: `prepare` judges it and reports the index."""
    image = row.get("image")
    listed = image if isinstance(image, list) else [] if image is None else [image]
    paths = [images / str(one) for one in listed]
    return {
        "id": str(row.get("id", index)),
        **({"images": paths} if several else {"image": paths[0] if paths else None}),
        "conversations": row.get("conversations"),
    }
