"""Files: hashes of their bytes, JSON, and writing that leaves no half file."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys. ValueError for NaN or infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file. Raises FileNotFoundError or, if it is broken, ValueError, both naming it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it and run snakemake again") from None


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write JSON so that the same value gives the same bytes and no reader sees half a file.

    Keys are sorted. Raises ValueError for NaN or infinity: not JSON.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
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
