"""Rows of a LLaVA-style JSON file, read one at a time: all of a real set take gigabytes."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sts.pipeline.data.rows import Rows
from sts.pipeline.data.source import DataError

READ = 2**20  # characters read at a time


def llava_rows(name: str, file: str | Path, images: str | Path, key: str = "") -> Rows:
    """The rows of a JSON list of {id, image, conversations}, with paths below the folder `images`;
    an image may be a list, and is then one in all rows.

    key: what the configuration calls the two, for the message. Raises DataError that says what is
    wrong with the file or the folder.
    """
    file, images = Path(file), Path(images)
    correct = f"Correct {key}" if key else "Delete that folder and run again, or lay it out anew"
    if not images.is_dir():
        raise DataError(f"data set {name}: {images} is not a folder. {correct}.images")
    try:
        count, several = 0, False
        for row in objects(file):
            count += 1
            several = several or (isinstance(row, dict) and isinstance(row.get("image"), list))
    except (OSError, ValueError) as error:
        raise DataError(
            f"data set {name}: {file} can't be read: {error}. {correct}.json"
        ) from error
    found = (_row(row, index, images, several) for index, row in enumerate(objects(file)))
    return count, found


def objects(file: Path) -> Iterator[Any]:
    """The items of a JSON list in a file, one at a time.

    Raises OSError, and ValueError for a file that is no whole JSON list.
    """
    decode = json.JSONDecoder().raw_decode
    with file.open(encoding="utf-8") as stream:
        text, more = stream.read(READ).lstrip(), True
        if not text.startswith("["):
            raise ValueError("it holds no list of {id, image, conversations}")
        place = 1
        while True:
            while more and len(text) - place < READ:  # so much is one item at most, mostly
                added = stream.read(READ)
                text, place, more = text[place:] + added, 0, bool(added)
            place = _after(text, place)
            if text.startswith("]", place):
                return
            try:
                item, place = decode(text, place)
            except json.JSONDecodeError:
                added = stream.read(READ)
                if not added:
                    raise
                text, place = text[place:] + added, 0
                continue
            yield item
            place = _after(text, place)
            if text.startswith(",", place):
                place += 1
            elif not text.startswith("]", place):
                raise ValueError(f"neither , nor ] after an item: {text[place : place + 40]!r}")


def _after(text: str, place: int) -> int:
    """Where what is not white space begins."""
    return place + next(
        (n for n, one in enumerate(islice(text, place, None)) if not one.isspace()), 0
    )


def _row(row: Any, index: int, images: Path, several: bool) -> dict:
    """A row as it stands, malformed or not: `prepare` judges it and reports the index."""
    row = row if isinstance(row, dict) else {}
    image = row.get("image")
    listed = image if isinstance(image, list) else [] if image is None else [image]
    paths = [images / str(one) for one in listed]
    return {
        "id": str(row.get("id", index)),
        **({"images": paths} if several else {"image": paths[0] if paths else None}),
        "conversations": row.get("conversations"),
    }
