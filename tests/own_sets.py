"""Data sets that tests write, prepare and read."""

import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import ProcessorMixin

from sts.pipeline.config import MINI, Config, deep_merge, load_yaml, validate
from sts.pipeline.data.collator import Conversations


def config(**data) -> Config:
    """The mini scale with other values of `data`."""
    return validate(deep_merge(load_yaml(MINI), {"data": data}), "test.yaml")


def rows_of(manifest: Path, split: str) -> Dataset:
    return Dataset.from_file(str(manifest.parent / f"{split}.arrow"))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def samples_of(
    files: list[Path], processor: ProcessorMixin, max_length: int = 2048
) -> Conversations:
    """Samples whose tokens are made anew."""
    tokens = Path(tempfile.mkdtemp()) / "tokens.arrow"
    return Conversations(files, processor, max_length, tokens)
