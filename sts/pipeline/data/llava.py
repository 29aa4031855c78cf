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
SOLID = re.compile(r"\S")


def llava_rows(name: str, file: str | Path, images: str | Path, key: str = "") -> Rows:
    """The rows of a JSON list of {id, image, conversations}, with paths below the folder `images`;
    an image may be a list, and is then one in all rows.

    Args:
        name: of the data set.
        file: the JSON file.
        images: the folder.
        key: what the configuration calls the two, for the message.

    Raises:
        DataError: something is wrong with the file or the folder.
    """
    file, images = Path(file), Path(images)
    try:
        count, several = 0, False
        for row in objects(file):
            count += 1
            several = several or (isinstance(row, dict) and isinstance(row.get("image"), list))
    except (OSError, ValueError) as error:
        message = f"data set {name}: {file} can't be read: {error}. {_fix(key, 'json')}"
        raise DataError(message) from error
    if not images.is_dir():
        raise DataError(f"data set {name}: {images} is not a folder. {_fix(key, 'images')}")
    return count, (_row(row, i, images, several) for i, row in enumerate(objects(file)))


def _fix(key: str, which: str) -> str:
    return (
        f"Correct {key}.{which}" if key else "Delete its folder and run again, or lay it out anew"
    )


def objects(file: Path) -> Iterator[Any]:
    """The items of a JSON list in a file, one at a time.

    Raises OSError, and ValueError for a file that is no whole JSON list.
    """
    decode = json.JSONDecoder().raw_decode
    with file.open(encoding="utf-8") as stream:
        text, place = "", 0

        def more() -> bool:
            """Read on; whether there was something."""
            nonlocal text, place
            added = stream.read(READ)
            text, place = text[place:] + added, 0
            return bool(added)

        def following() -> str:
            """The next character that is not white space, where `place` then is; "" at the end."""
            nonlocal place
            while True:
                match = SOLID.search(text, place)
                if match:
                    place = match.start()
                    return match.group()
                if not more():
                    return ""

        if following() != "[":
            raise ValueError("it holds no list of {id, image, conversations}")
        place += 1
        if following() == "]":
            return
        while True:
            try:
                following()
                item, place = decode(text, place)
            except json.JSONDecodeError:
                if len(text) - place > LONGEST or not more():
                    raise
                continue
            yield item
            after = following()
            if after == "]":
                return
            if after != ",":
                raise ValueError(f"neither , nor ] after an item: {text[place : place + 40]!r}")
            place += 1


def _row(row: Any, index: int, images: Path, several: bool) -> dict:
    """A row as it stands, malformed or not: `prepare` judges it and reports the index."""
    row = row if isinstance(row, dict) else {}
    image = row.get("image")
    names = image if isinstance(image, list) else [] if image is None else [image]
    paths = [images / str(name) for name in names]
    return {
        "id": str(row.get("id", index)),
        **columns_of(paths, several),
        "conversations": row.get("conversations"),
    }
