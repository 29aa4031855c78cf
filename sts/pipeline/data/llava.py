"""Rows of a LLaVA-style JSON file, or of one with questions and answers in JSON, CSV or TSV; read
one at a time: all of a real set take gigabytes."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sts.pipeline.data.rows import Rows, as_llava, columns_of, picture_path, turns
from sts.pipeline.data.source import DataError

READ = 2**20  # characters read at a time
LONGEST = 2**26  # characters of an item


def llava_rows(
    name: str, file: str | Path, images: str | Path, key: str = "", outside: bool = False
) -> Rows:
    """The rows of a file of {id, image, conversations}, or question and answer, with paths below
    the folder `images`; an image may be a list, and is then one in all rows. `key` is what the
    configuration calls the file, and `outside` whether paths may lead out of the folder. Raises
    DataError if something is wrong with either.
    """
    file, images = Path(file), Path(images)
    read = {".jsonl": lines, ".csv": table}.get(".csv" if key.endswith(".csv") else file.suffix)
    read, fix = (
        read or objects,
        f"Correct {key}" if key else "Lay it out anew: docs/data.md says how",
    )
    count, several = 0, False
    try:
        for row in read(file):
            count += 1
            several = several or (isinstance(row, dict) and isinstance(row.get("image"), list))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(
            f"data set {name}: {file} can't be read: {error} (after {count} rows). {fix}"
        ) from error
    if not images.is_dir():
        fix = f"Correct {key.rpartition('.')[0]}.images" if key else fix
        raise DataError(f"data set {name}: {images} is not a folder. {fix}")

    def path(image: Any) -> Any:
        return picture_path(image, images, outside, links=not key)

    return count, (_row(row, index, path, several) for index, row in enumerate(read(file)))


def lines(file: Path) -> Iterator[Any]:
    """The items of a file with a JSON value a line. Raises OSError and ValueError."""
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is no JSON: {error}") from error


def table(file: Path) -> Iterator[dict]:
    """The rows of a file with a line of names, and values between commas, semicolons or tabs.
    Raises OSError, ValueError and csv.Error."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        separator = max(",;\t", key=stream.readline().count)
        stream.seek(0)
        rows = csv.DictReader(stream, delimiter=separator, strict=True)
        names = rows.fieldnames or []
        if not {"question", "answer"} <= {*names}:
            raise ValueError(f"its first line names {names}, without question and answer")
        for row in rows:  # more values than names: an unquoted separator, which cuts a text
            yield {} if None in row else {name: row[name] or None for name in names}


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


def _row(row: Any, index: int, path: Callable[[Any], Any], several: bool) -> dict:
    """A row as it stands, malformed or not: `prepare` judges it and reports the index."""
    row = row if isinstance(row, dict) else {}
    image = row.get("image")
    names = image if isinstance(image, list) else [] if image is None else [image]
    is_llava = "conversations" in row
    texts = as_llava(row["conversations"], len(names)) if is_llava else turns(row, len(names))
    return {
        "id": str(index if row.get("id") is None else row["id"]),
        **columns_of([path(name) for name in names], several),
        "conversations": texts,
    }
