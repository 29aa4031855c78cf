"""Rows of a LLaVA-style JSON file, read one at a time: all of a real set take gigabytes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sts.pipeline.data.rows import Rows, columns_of
from sts.pipeline.data.source import DataError

READ = 2**20  # characters read at a time
LONGEST = 2**26  # characters of an item


def llava_rows(name: str, file: str | Path, images: str | Path, key: str = "") -> Rows:
    """The rows of a JSON list of {id, image, conversations}, with paths below the folder `images`;
    an image may be a list, and is then one in all rows. `key` is what the configuration calls the
    file and the folder. Raises DataError if something is wrong with either.
    """
    file, images = Path(file), Path(images)
    fix = "Lay it out anew: docs/data.md says how"
    try:
        count, several = 0, False
        for row in objects(file):
            count += 1
            several = several or (isinstance(row, dict) and isinstance(row.get("image"), list))
    except (OSError, ValueError, RecursionError) as error:
        fix = f"Correct {key}.json" if key else fix
        raise DataError(f"data set {name}: {file} can't be read: {error}. {fix}") from error
    if not images.is_dir():
        fix = f"Correct {key}.images" if key else fix
        raise DataError(f"data set {name}: {images} is not a folder. {fix}")
    return count, (_row(row, i, images, several) for i, row in enumerate(objects(file)))


def objects(file: Path) -> Iterator[Any]:
    """The items of a JSON list in a file, one at a time.

    Raises OSError, and ValueError for a file that is not one whole JSON list in UTF-8.
    """
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    with file.open(encoding="utf-8-sig") as stream:
        text, place, is_first = stream.read(READ).lstrip(), 1, True
        if not text.startswith("["):
            raise ValueError("it holds no list of {id, image, conversations}")
        while True:
            try:
                item, end = decode(text, space.match(text, place).end())
                end = space.match(text, end).end()
                after = text[end]
            except (json.JSONDecodeError, IndexError) as error:
                more = stream.read(READ)
                if is_first and not more and text[place:].strip() == "]":
                    return  # an empty list
                if not more or len(text) - place > LONGEST:
                    ends = isinstance(error, IndexError)
                    reason = "it ends after an item" if ends else error
                    raise ValueError(f"it holds no whole list: {reason}") from error
                text, place = text[place:] + more, 0
                continue
            yield item
            if after == "]":
                while not (rest := text[end + 1 :].strip()) and (more := stream.read(READ)):
                    text, end = more, -1
                if rest:
                    raise ValueError(f"more after its list: {rest[:40]!r}; it must hold one list")
                return
            if after != ",":
                raise ValueError(f"neither , nor ] after an item: {text[end : end + 40]!r}")
            place, is_first = end + 1, False


def _row(row: Any, index: int, images: Path, several: bool) -> dict:
    """A row as it stands, malformed or not: `prepare` judges it and reports the index."""
    row = row if isinstance(row, dict) else {}
    image = row.get("image")
    names = image if isinstance(image, list) else [] if image is None else [image]
    paths = [images / str(name) for name in names]
    return {
        "id": str(index if row.get("id") is None else row["id"]),
        **columns_of(paths, several),
        "conversations": row.get("conversations"),
    }
