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
    try:
        heads = [pq.ParquetFile(file) for file in paths]
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"data set {name}: {error}. Delete {folder} and run again, or correct {key}.files"
        ) from error
    columns = heads[0].schema_arrow.names
    images = next((column for column in ("images", "image") if column in columns), None)
    texts = next((column for column in ("conversations", "texts") if column in columns), None)
    if not images or not texts:
        raise DataError(
            f"data set {name}: {paths[0]} has the columns {', '.join(columns)}, but needs images "
            f"or image, and texts or conversations. Correct {key}.files"
        )
    count = sum(head.metadata.num_rows for head in heads)
    rows = _stored(paths, [column for column in (images, texts, "id") if column in columns])
    return count, (_row(row, index, images, texts) for index, row in enumerate(rows))


def _stored(files: list[Path], columns: list[str]) -> Iterator[dict]:
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(CHUNK, columns=columns):
            yield from batch.to_pylist()


def _row(row: dict, index: int, images: str, texts: str) -> dict:
    pictures = [picture["bytes"] for picture in images_of(row) if picture]
    return {
        "id": str(row.get("id", f"{index:08d}")),
        **columns_of(pictures, images == "images"),
        "conversations": turns(row[texts], len(pictures)),
    }


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
