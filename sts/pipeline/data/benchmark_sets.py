"""Data sets of the hub that benchmarks ask: had once, and noted in a manifest, which is what an
evaluation reads and follows."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from sts.pipeline.data.hub import commit_of
from sts.pipeline.data.origins import LIST, is_same, origin, state
from sts.pipeline.data.source import DOWNLOADS, NOT_HAD, DataError, mirror_folder
from sts.pipeline.files import read_json, sha256_json, write_json_atomic, write_text_atomic
from sts.pipeline.tasks import registry as benchmarks
from sts.pipeline.tasks.parquet import patterns_of, split_files

FETCHED = "fetched.json"  # in a folder that was fetched: its commit, and which splits are whole
FORMER = "lmms-lab"  # owner of the sets until July 2026, under whom a mirror may have them
HOW = (
    "Go online; or copy it with `hf download {path} --repo-type dataset --local-dir MIRROR/{path}` "
    "and set STS_DATA_MIRROR (or data.mirror) to that MIRROR; or take it out of evaluate.benchmarks"
)


def folder_of(name: str, mirror: str | None, split: str | None = None) -> Path:
    """The folder with the data set of a benchmark of ours on the hub: that of the mirror, else
    data/raw/hub/<owner>/<set>/<revision>, where the files of its split are fetched if they are not
    there. Raises DataError if they can't be had.

    split: instead of the one that its task file says.
    """
    hub_set = benchmarks.hub_set_of(name)
    path, revision = hub_set["path"], hub_set.get("revision", "main")
    root = mirror_folder(mirror)
    for place in (path, f"{FORMER}/{path.partition('/')[2]}"):
        if root and (root / place).is_dir():
            return root / place
    folder = DOWNLOADS / "hub" / path / revision
    split = split or hub_set["split"]
    parts = [(part, split) for part in (hub_set.get("name"), hub_set.get("images"))]
    try:
        for part in dict.fromkeys(part for part in parts if part[0] or part is parts[0]):
            _fetch(path, revision, folder, *part)
    except NOT_HAD as error:
        how = HOW.format(path=path)
        raise DataError(
            f"benchmark {name}: its data set {path}, revision {revision}, can't be had: {error}. "
            f"{how}"
        ) from error
    return folder


def _fetch(path: str, revision: str, folder: Path, name: str | None, split: str) -> None:
    """Fetch the files of a split, and no others; what is noted as whole is not asked for again. The
    commit of a branch is that of the first call."""
    file, part = folder / FETCHED, f"{name or 'default'}/{split}"
    note = read_json(file) if file.exists() else {"parts": []}
    if part in note["parts"]:
        return
    if "commit" not in note:
        note["commit"] = commit_of(path, revision)
    options = {"repo_type": "dataset", "revision": note["commit"], "local_dir": folder}
    snapshot_download(path, allow_patterns="README.md", **options)
    snapshot_download(
        path, allow_patterns=patterns_of(folder / "README.md", name, split), **options
    )
    split_files(folder, name, split)
    write_json_atomic(file, note | {"parts": [*note["parts"], part]})


def mirrored_files(root: Path, path: str) -> list[Path]:
    """All files of a set in a mirror, but for the notes of the client that fetched them."""
    files = filter(Path.is_file, sorted((root / path).rglob("*")))
    return [file for file in files if "/." not in str(file.relative_to(root))]


def files_of(name: str, folder: Path) -> list[Path]:
    """The files in the folder of its data set that hold a benchmark's questions and pictures.
    Raises DataError where the folder's card can't be read."""
    hub_set = benchmarks.hub_set_of(name)
    parts = dict.fromkeys((hub_set.get("name"), hub_set.get("images") or hub_set.get("name")))
    try:
        return [file for part in parts for file in split_files(folder, part, hub_set["split"])]
    except ValueError as error:
        raise DataError(f"benchmark {name}: {error}") from error


def version(folder: Path, files: Iterable[Path]) -> str:
    """A hash of the names of files below a folder and of their bytes."""
    return _version(folder, map(origin, files))


def _version(folder: Path, origins: Iterable[dict[str, Any]]) -> str:
    return sha256_json({str(Path(o["path"]).relative_to(folder)): o["sha256"] for o in origins})


def write_note(name: str, folder: Path, files: Iterable[Path], out: str | Path) -> None:
    """Write the manifest of a benchmark's data in a folder, with the list of the files as they are
    (origins.py) beside it."""
    out = Path(out)
    word, origins = state(out), [origin(file) for file in files]
    lines = "".join(f"{json.dumps(line)}\n" for line in (word, *origins))
    write_text_atomic(out.with_name(LIST), lines)
    fetched = folder / FETCHED  # not in a mirror
    commit = read_json(fetched)["commit"] if fetched.exists() else None
    manifest = {"dataset": name, "folder": str(folder), "commit": commit, "splits": {}, "files": {}}
    write_json_atomic(out, manifest | {"sha256": _version(folder, origins)})


def noted(name: str, manifests: Sequence[str | Path]) -> dict[str, Any] | None:
    """The manifest of a benchmark's data, if it is among these. Raises DataError if a file is not
    as it was when it was noted."""
    for file in map(Path, manifests):
        manifest = read_json(file)
        if manifest["dataset"] != name or "folder" not in manifest:
            continue
        with file.with_name(LIST).open(encoding="utf-8") as lines:
            changed = [o["path"] for o in [*map(json.loads, lines)][1:] if not is_same(o)]
        if changed:
            raise DataError(
                f"benchmark {name}: {changed[0]} is not as it was when {file} was written. Give "
                "the same command of the workflow again, or run `python -m sts prepare` for it"
            )
        return manifest
    return None
