"""The models of the hub that runs start from, in the hub's own cache: nothing is fetched again, and
later jobs read them without the network."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from sts.pipeline.config import model_folder
from sts.pipeline.data.source import NOT_HAD, DataError

SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")  # all but weights
WEIGHTS = ("*.safetensors", "*.bin")  # the first of them that a model has
NAMES = ("checkpoint", "vision", "language")  # of a model, in a backbone manifest


def fetch_model(source: str, patterns: tuple[str, ...] = SMALL) -> str:
    """Fetch files of a hub id, `<owner>/<name>` or `<owner>/<name>@<revision>`.

    Returns what names the same files for good: `<owner>/<name>@<commit>`, or a folder itself.
    Raises DataError if they can't be had and are not in the cache.
    """
    if os.path.isdir(source):
        return source
    name, _, revision = source.partition("@")
    try:
        options = {"revision": revision or None, "allow_patterns": [*patterns]}
        return f"{name}@{os.path.basename(snapshot_download(name, **options))}"
    except NOT_HAD as error:
        raise DataError(
            f"model {source} can't be had: {error}. Go online, or set HF_HOME to the folder of a "
            "cache that has it, or give a folder that is there instead (model.checkpoint, "
            "model.vision, model.language)"
        ) from error


def fetch_weights(source: str) -> None:
    """Fetch the weights of what `fetch_model` named. Raises DataError if there are none."""
    folder = cached_folder(source)
    for pattern in WEIGHTS:
        if not os.path.isdir(source):
            fetch_model(source, (pattern,))
        if any(folder.glob(pattern)):
            return
    raise DataError(f"model {source}: {folder} has no weights: no {' and no '.join(WEIGHTS)}")


def cached_folder(source: str) -> Path:
    """The folder of what `fetch_model` named. Raises DataError if it isn't on this machine."""
    folder = model_folder(source)
    if folder is None:
        raise DataError(
            f"model {source} is not in the hub's cache here. Where the internet is, `snakemake "
            "--cores all data` fetches it; HF_HOME must name the same folder in all jobs"
        )
    return folder


def in_folders(start: dict[str, Any]) -> dict[str, Any]:
    """A backbone manifest with the folder of each model in the place of its name."""
    return start | {name: str(cached_folder(start[name])) for name in NAMES if name in start}
