"""Data sets of the hub, by one entry each: any whose Parquet files have `images` or `image`, and
`texts` (the_cauldron), `conversations` (LLaVA-OneVision) or `question` and `answer`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, snapshot_download

from sts.pipeline.config import CustomConfig
from sts.pipeline.data.rows import BadRow, Rows, columns_of, images_of, picture_path, turns
from sts.pipeline.data.source import DOWNLOADS, NOT_HAD, DataError
from sts.pipeline.files import read_json, write_json_atomic

CHUNK = 100  # rows read at a time, with their images
TEXTS = (["conversations"], ["texts"], ["question", "answer"])  # columns


def hub_folder(name: str, spec: CustomConfig) -> Path:
    """The folder with the files of the entry `name` of data.custom: the user's, or data/raw/<name>/
    <commit>. The commit of a branch is noted at the first call, and taken ever after; what was
    fetched is not fetched again, and what was interrupted goes on. Raises DataError if files can't
    be had."""
    if Path(spec.hub).is_dir():
        return Path(spec.hub)
    note = DOWNLOADS / name / "commits.json"
    try:
        commits = read_json(note) if note.exists() else {}
        branch = f"{spec.hub}@{spec.revision}"
        if branch not in commits:
            commits[branch] = commit_of(spec.hub, spec.revision)
        folder = DOWNLOADS / name / commits[branch]
        options = {"repo_type": "dataset", "allow_patterns": spec.files, "local_dir": folder}
        snapshot_download(spec.hub, revision=commits[branch], **options)
        write_json_atomic(note, commits)
    except NOT_HAD as error:
        key = f"data.custom.{name}.hub"
        raise DataError(
            f"data set {name}: {spec.hub} of the hub, revision {spec.revision}, can't be had: "
            f"{error} Go online, correct {key}, or give a folder that holds its files"
        ) from error
    return folder


def commit_of(path: str, revision: str) -> str:
    """The commit of a data set's branch on the hub, which is asked; a commit is its own."""
    is_commit = re.fullmatch("[0-9a-f]{40}", revision)
    return revision if is_commit else HfApi().dataset_info(path, revision=revision).sha


def hub_rows(name: str, folder: Path, spec: CustomConfig) -> Rows:
    """The rows of the entry `name` of data.custom: of the Parquet files of a pattern in a folder.
    Raises DataError if there are none, or they have other columns."""
    key, paths = f"data.custom.{name}", sorted(folder.glob(spec.files))
    if not paths:
        raise DataError(f"data set {name}: {folder} has no files {spec.files}. Correct {key}.files")
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
        texts = next((names for names in TEXTS if {*names} <= {*columns}), [None])
        if not {images, *texts} <= {*head.schema_arrow.names}:
            wanted = "texts, conversations, or question and answer"
            needed = (images or "images or image", *(texts if texts[0] else [wanted]))
            raise DataError(
                f"data set {name}: {file} has the columns {', '.join(head.schema_arrow.names)}, "
                f"but needs {' and '.join(needed)}. Correct {key}.files"
            )
        count += head.metadata.num_rows
    rows = _stored(paths, [images, *texts])
    is_several, outside = images == "images", spec.outside
    return count, (_row(row, i, is_several, folder, outside) for i, row in enumerate(rows))


def _stored(files: list[Path], columns: list[str]) -> Iterator[dict]:
    for file in files:
        parquet = pq.ParquetFile(file)
        ids = {"id"} & {*parquet.schema_arrow.names}
        for batch in parquet.iter_batches(CHUNK, columns=[*columns, *ids]):
            yield from batch.to_pylist()


def _row(row: dict, index: int, is_several: bool, folder: Path, outside: bool) -> dict:
    pictures = [_picture(cell, folder, outside) for cell in images_of(row) if cell]
    id = row.get("id")
    return {
        "id": f"{index:08d}" if id is None else str(id),
        **columns_of(pictures, is_several),
        "conversations": turns(row, len(pictures)),
    }


def _picture(cell: Any, folder: Path, outside: bool) -> bytes | Path | BadRow:
    """An image as bytes, or its place below the folder of the files: a cell is {bytes, path} or one
    of the two."""
    content, path = (
        (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    )
    return content if isinstance(content, bytes) else picture_path(path, folder, outside)
