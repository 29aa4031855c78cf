"""Data sets of the hub: any whose Parquet files have `images` or `image` and `texts` (the_cauldron)
or `conversations` (LLaVA-OneVision), by one entry of the configuration."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from sts.pipeline.data.rows import IMAGE_TOKEN, Rows, columns_of, images_of, turns_of
from sts.pipeline.data.source import DOWNLOADS, DataError

CHUNK = 100  # rows read at a time, with their images


def hub_rows(name: str, source: str, files: str, revision: str) -> Rows:
    """The rows of the entry `name` of data.custom: of the Parquet files of a pattern, in a set of
    the hub or a folder that holds them. What was fetched is not fetched again, and what was
    interrupted goes on. Raises DataError if files can't be had, or have other columns."""
    key = f"data.custom.{name}"
    folder = Path(source)
    if not folder.is_dir():
        folder = DOWNLOADS / name
        try:
            options = {"repo_type": "dataset", "revision": revision, "allow_patterns": files}
            snapshot_download(source, **options, local_dir=folder)
        except (OSError, HfHubHTTPError, ValueError) as error:
            raise DataError(
                f"data set {name}: {source} of the hub, revision {revision}, can't be had: {error} "
                f"Go online, correct {key}.hub, or give a folder that holds its files"
            ) from error
    paths = sorted(folder.glob(files))
    if not paths:
        raise DataError(f"data set {name}: {folder} has no files {files}. Correct {key}.files")
    is_fetched = folder.is_relative_to(DOWNLOADS)  # else it is the user's, and stays
    cure = f"{'Delete it' if is_fetched else 'Put a good copy there'} and run again"
    columns: list[str] = []
    count = 0
    for file in paths:
        try:
            head = pq.ParquetFile(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"data set {name}: {file} can't be read: {error}. {cure}, or correct {key}.files"
            ) from error
        columns = columns or head.schema_arrow.names
        images = next((column for column in ("images", "image") if column in columns), None)
        texts = next((column for column in ("conversations", "texts") if column in columns), None)
        if not {images, texts} <= {*head.schema_arrow.names}:
            needed = (images or "images or image", texts or "texts or conversations")
            raise DataError(
                f"data set {name}: {file} has the columns {', '.join(head.schema_arrow.names)}, "
                f"but needs {' and '.join(needed)}. Correct {key}.files"
            )
        count += head.metadata.num_rows
    rows = _stored(paths, [images, texts])
    return count, (_row(row, index, images, texts, folder) for index, row in enumerate(rows))


def _stored(files: list[Path], columns: list[str]) -> Iterator[dict]:
    for file in files:
        parquet = pq.ParquetFile(file)
        ids = {"id"} & {*parquet.schema_arrow.names}
        for batch in parquet.iter_batches(CHUNK, columns=[*columns, *ids]):
            yield from batch.to_pylist()


def _row(row: dict, index: int, images: str, texts: str, folder: Path) -> dict:
    pictures = [_picture(cell, folder) for cell in images_of(row) if cell]
    id = row.get("id")
    return {
        "id": f"{index:08d}" if id is None else str(id),
        **columns_of(pictures, images == "images"),
        "conversations": turns(row[texts], len(pictures)),
    }


def _picture(cell: Any, folder: Path) -> bytes | Path:
    """An image as bytes, or its place below the folder of the files: a cell is {bytes, path} or one
    of the two."""
    content, path = (
        (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    )
    return content if isinstance(content, bytes) else folder / str(path)


def turns(texts: Any, images: int) -> Any:
    """LLaVA's turns {from, value} of either form: those themselves, or pairs {user, assistant}.
    Where no text says where the images stand, they come first."""
    if not isinstance(texts, list) or not all(isinstance(text, dict) for text in texts):
        return texts  # `prepare` judges it
    if texts and "user" in texts[0]:
        texts = turns_of((pair.get("user"), pair.get("assistant")) for pair in texts)
    else:
        texts = [{"from": turn.get("from"), "value": turn.get("value")} for turn in texts]
    values = [turn["value"] or "" for turn in texts]
    if texts and values[0] and not any(IMAGE_TOKEN in value for value in values):
        texts[0]["value"] = f"{IMAGE_TOKEN}\n" * images + values[0]
    return texts
