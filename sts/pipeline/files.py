"""Files: hashes of their bytes, JSON, and writing that leaves no half file.

What is read later is compared first with what was written: JSON with its seal, other files with the
hashes in a JSON file beside them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SEAL = "seal"  # key of a JSON file: the hash of all else in it


class SpoiltError(ValueError):
    """A file is missing or not as it was written; the message names it and what makes it again."""


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys. ValueError for NaN or infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hashes(folder: str | Path, files: Iterable[Path]) -> dict[str, str]:
    """Path relative to the folder -> SHA-256 of each file."""
    return {file.relative_to(folder).as_posix(): sha256_file(file) for file in sorted(files)}


def spoilt(folder: str | Path, expected: Mapping[str, str]) -> dict[Path, str]:
    """The files of a folder that are not as `hashes` found them, and what is wrong with each."""
    wrong = {}
    for name, digest in expected.items():
        file = Path(folder, name)
        if not file.is_file():
            wrong[file] = "missing"
        elif sha256_file(file) != digest:
            wrong[file] = "other bytes than were written"
    return wrong


def check_files(folder: str | Path, expected: Mapping[str, str], cure: str) -> None:
    """Raise SpoiltError for files that are `spoilt`; cure: what the user shall do."""
    if wrong := spoilt(folder, expected):
        raise SpoiltError(f"{'; '.join(f'{file}: {how}' for file, how in wrong.items())}. {cure}")


def listed_file(manifest: Path, name: str) -> Path:
    """A file beside the manifest that lists its hash. Raises SpoiltError."""
    digest = read_json(manifest).get("files", {}).get(name, "")
    check_files(manifest.parent, {name: digest}, f"Delete {manifest} and run snakemake again")
    return manifest.parent / name


def read_json(path: str | Path, cure: str = "Delete it and run snakemake again") -> Any:
    """A JSON file of ours, without its seal. Raises FileNotFoundError or, if it is not as it was
    written, SpoiltError, both naming it and what makes it again."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file. Run snakemake, which makes it") from None
    except ValueError as error:
        raise SpoiltError(f"{path}: not JSON ({error}). {cure}") from None
    seal = value.pop(SEAL, None) if isinstance(value, dict) else None
    if seal is not None and seal != sha256_json(value):
        raise SpoiltError(f"{path}: its values are not those that were written. {cure}")
    return value


def json_text(value: Any) -> str:
    """JSON whose keys are sorted, so that the same value gives the same text. ValueError for NaN or
    infinity: not JSON."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write JSON so that the same value gives the same bytes and no reader sees half a file; an
    object with a seal.

    Keys are sorted. Raises ValueError for NaN or infinity: not JSON.
    """
    try:
        if isinstance(value, dict):
            value = json.loads(json.dumps(value, allow_nan=False))  # keys are text
            value[SEAL] = sha256_json(value)
        text = json_text(value)
    except ValueError as error:
        raise ValueError(f"{path}: not written: {error}") from error
    write_text_atomic(path, text)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a file that has its name only when it is whole. Creates the folder; takes away what a
    write that was killed has left in it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{path.name}.*.part"):
        if not _is_alive(int(old.name.split(".")[-2])):
            old.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name with no bytes
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # of somebody else
    return True
