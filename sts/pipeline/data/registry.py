"""What a data set is: one file of its name with its `DATASET`, in one of the folders `SETS` of
sts/pipeline/config/__init__.py. A user's own is an entry of `data.custom`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from sts.pipeline.config import CODE, Config, CustomConfig, DataConfig, datasets
from sts.pipeline.data import fetch, source
from sts.pipeline.data.fetch import File
from sts.pipeline.data.hub import hub_folder, hub_rows
from sts.pipeline.data.llava import llava_rows
from sts.pipeline.data.rows import Rows
from sts.pipeline.data.source import DataError, Source


@dataclass(frozen=True)
class DataSet:
    """A data set: facts, and the function that reads it."""

    version: str
    licence: str
    homepage: str
    citation: str
    load: Callable[[DataConfig, Path | None], dict[str, Rows]]
    """Split -> rows, from the configuration and the folder of its files, if it has any."""
    source: Source | None = None
    files: tuple[File, ...] = ()
    """Those of a large set, which may lie in a folder of the user's."""
    embed: bool = True
    """Image files are copied into the prepared data; else these hold their paths."""
    tokens: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Training split -> (text, answer) tokens of a sample, text with the padding of its batch; for
    the estimate, which guesses without."""
    longest: Mapping[str, int] = field(default_factory=dict)
    """Training split -> text tokens that no sample has more of; for the estimate of memory, which
    takes the stage's max_length without."""
    image_bytes: int = 0
    """Of an image in the prepared data; for the estimate."""


def dataset(name: str, data: DataConfig) -> DataSet:
    """The data set of a name: of a file of the package, or the user's own in `data.custom`. Raises
    DataError if there is none."""
    files = datasets()
    if name in files:
        module = files[name].relative_to(CODE.parent).with_suffix("")
        return import_module(".".join(module.parts)).DATASET
    if name not in data.custom:
        raise DataError(
            f"no data set {name!r}. There are: {', '.join([*files, *data.custom])}. "
            "Your own is an entry of data.custom in the scale file"
        )
    return _custom(name, data.custom[name])


def _custom(name: str, spec: CustomConfig) -> DataSet:
    """A user's own data: a file of rows and a folder of images, or a set of the hub."""
    key, file = spec.table

    def load(_: DataConfig, folder: Path | None) -> dict[str, Rows]:
        if folder:
            return {spec.split: hub_rows(name, folder, spec)}
        key_of_file = f"data.custom.{name}.{key}"
        return {spec.split: llava_rows(name, file, spec.images, key_of_file, spec.outside)}

    version, homepage = (spec.revision, spec.hub) if spec.hub else ("custom", file)
    return DataSet(version, "not stated", homepage, "", load, embed=bool(spec.hub))


def load(config: Config, name: str) -> tuple[DataSet, dict[str, Rows], list[Path]]:
    """The entry of a data set, its rows by split, and the files that hold their texts; all are
    fetched and checked first. Raises DataError if the name is unknown, or files can't be had or are
    damaged."""
    data, folder, tables = config.data, None, []
    entry, spec = dataset(name, data), data.custom.get(name)
    if entry.source:
        folder = source.folder_of(name, entry.source, data.folders, data.mirror)
        source.check(name, entry.source.sha256, folder, lambda: entry.load(data, folder))
    elif entry.files:
        folder = fetch.folder_of(name, entry.files, data.folders, data.mirror)
        tables = [folder / file.place for file in entry.files if (folder / file.place).is_file()]
    elif spec and spec.hub:
        folder = hub_folder(name, spec)
        tables = sorted(folder.glob(spec.files))
    elif spec:
        tables = [Path(spec.table[1])]
    return entry, entry.load(data, folder), tables
