"""The files that prepared data come from, of rows and pictures, as `prepare` read them, and whether
they still are so.

Standard library alone, so that the workflow can ask in any environment.
"""

import json
import os
from pathlib import Path
from typing import Any

from sts.pipeline.files import sha256_file, sha256_json

LIST = "origins.jsonl"  # beside a manifest: its state, then an origin a line


def origin(path: str | Path) -> dict[str, Any]:
    """A file as it is now, {path, size, mtime_ns, sha256}; None for what can't be had of it."""
    size, mtime_ns = stamp(path)
    try:
        sha256 = sha256_file(path)
    except (OSError, ValueError):  # a folder, a closed file, a name that none can have
        sha256 = None
    return {"path": str(path), "size": size, "mtime_ns": mtime_ns, "sha256": sha256}


def is_same(entry: dict[str, Any]) -> bool:
    """Whether a file is what its `origin` says: by size and date, else by its bytes."""
    now = stamp(entry["path"])
    if now == (entry["size"], entry["mtime_ns"]):
        return True
    has_size = now[0] is not None and now[0] == entry["size"]
    return has_size and origin(entry["path"])["sha256"] == entry["sha256"]


def state(manifest: str | Path) -> str:
    """A word for what the data of a manifest come from: that which their list begins with while all
    files are the same, and another as soon as one differs, with which the next list then begins.
    "" without a list."""
    file = Path(manifest).with_name(LIST)
    if not file.exists():
        return ""
    try:
        with file.open(encoding="utf-8") as lines:
            word = json.loads(next(lines))
            paths = [entry["path"] for entry in map(json.loads, lines) if not is_same(entry)]
    except (ValueError, KeyError, StopIteration):
        return "unreadable"
    return sha256_json([word, [[path, *stamp(path)] for path in paths]])[:16] if paths else word


def stamp(path: str | Path) -> tuple[int | None, int | None]:
    """Size and date; None if there is no such file."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None, None
    return stat.st_size, stat.st_mtime_ns
