"""Data sets of the hub as their Parquet files lie in a folder: nothing is copied, and no cache can
hold others."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Features
from datasets.data_files import sanitize_patterns
from huggingface_hub import metadata_load
from pyarrow import Table
from yaml import YAMLError

GROUPS = 4  # parts of files, of a hundred rows or a thousand, that are in memory together
OF = re.compile(r"-\*-of-(\d+)\.")  # in the name of a part of a split, how many there are


def patterns_of(card: Path, name: str | None, split: str) -> list[str]:
    """The patterns of the files of a split, which the card of a set lists for each configuration;
    without a list the files that are named as the split. Raises ValueError for a broken card."""
    try:
        content = (metadata_load(card) if card.exists() else None) or {}
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{card}: its YAML can't be read: {reason}. Put a good copy there"
        ) from error
    for configuration in content.get("configs") or ():
        if configuration["config_name"] == (name or "default") and "data_files" in configuration:
            listed = sanitize_patterns(configuration["data_files"])
            if split in listed:
                return listed[split]
    file = f"{split}-*.parquet"
    return [f"{name}/{file}"] if name else [file, f"**/{file}"]


def split_files(folder: str | Path, name: str | None, split: str) -> list[Path]:
    """The files of a split in the folder of a set. Raises FileNotFoundError if there are none, or
    fewer than their names say (`-00000-of-00003`)."""
    folder = Path(folder)
    patterns = patterns_of(folder / "README.md", name, split)
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    parts = Counter(re.sub(r"-\d+-of-", "-*-of-", str(file.relative_to(folder))) for file in files)
    lacks = [of for of, n in parts.items() if (whole := OF.search(of)) and n < int(whole[1])]
    if lacks or not files:
        raise FileNotFoundError(
            f"{folder}: {'not all' if lacks else 'no'} files {', '.join(lacks or patterns)} of the "
            f"split {split}"
        )
    return files


class ParquetRows:
    """Rows of files, as lm-eval asks a `datasets.Dataset` for them: one by its place, with images
    decoded, or a column by its name.

    places: which rows there are; all by default. pictures: rows that hold the `image` by `id`,
    where the rows name it by `imageId`.
    """

    def __init__(self, files: Sequence[str | Path], without: str = "") -> None:
        self.files = files
        self._readers = [pq.ParquetFile(file) for file in files]
        self._parts = [
            (reader, i) for reader in self._readers for i in range(reader.num_row_groups)
        ]
        counts = (reader.metadata.row_group(i).num_rows for reader, i in self._parts)
        self._starts = [*accumulate(counts, initial=0)]
        features = Features.from_arrow_schema(self._readers[0].schema_arrow)
        self.features = Features({key: features[key] for key in features if key != without})
        self.places: Sequence[int] = range(self._starts[-1])
        self.pictures: ParquetRows | None = None
        self._part = lru_cache(GROUPS)(self._read)
        self._picture_at = cache(lambda: {id: i for i, id in enumerate(self.pictures["id"])})

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            values = [x for reader in self._readers for x in reader.read([key])[key].to_pylist()]
            return [values[place] for place in self.places]
        place = self.places[key]
        part = bisect_right(self._starts, place) - 1
        [row] = self._part(part).slice(place - self._starts[part], 1).to_pylist()
        row = self.features.decode_example(row)
        if self.pictures:
            row["image"] = self.pictures[self._picture_at()[row["imageId"]]]["image"]
        return row

    def _read(self, part: int) -> Table:
        reader, group = self._parts[part]
        return reader.read_row_group(group, columns=[*self.features])

    def remove_columns(self, name: str) -> "ParquetRows":
        """The same rows without a column."""
        rows = ParquetRows(self.files, without=name)
        rows.places = self.places
        return rows
