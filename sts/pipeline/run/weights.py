"""The files of a training: whether those of finished weights are as they were written, and how they
are made again.

`done.json` is the last file of a finished folder and lists the hashes of all others.
"""

import json
from pathlib import Path
from typing import Any

from sts.pipeline.files import SpoiltError, check_files, read_json

DONE, HISTORY, HELD_OUT = "done.json", "history.jsonl", "held_out.jsonl"
CURE = "`python -m sts verify` says how it is made again"


def check_weights(folder: Path, cure: str) -> dict[str, Any]:
    """What `done.json` says of finished weights, all of whose files are as they were written.
    Raises SpoiltError with what the user shall do, `cure`."""
    if not (folder / DONE).exists():
        raise SpoiltError(f"{folder / DONE}: missing. {cure}")
    done = read_json(folder / DONE, cure)
    check_files(folder, done["files"], cure)
    return done


def weights_of(manifest: str | Path) -> Path:
    """The folder of the weights that a run manifest names. Raises SpoiltError if they are not those
    whose hash it holds, byte for byte."""
    run = read_json(manifest)
    folder = Path(run["weights"])
    trained_as = f"runs/{run['ablation']}/seed{run['seed']}/{run['stage']}.json"
    cure = f"Delete {folder.parents[1] / trained_as} and run snakemake again: it trains anew"
    if check_weights(folder, cure)["weights_sha256"] != run["weights_sha256"]:
        raise SpoiltError(f"{folder}: other weights than {manifest} names. {cure}")
    return folder


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a training's `history.jsonl`, one an optimizer step. Raises SpoiltError if the
    training is finished and the file not as it was then."""
    return _read_lines(Path(folder), HISTORY)


def read_held_out(folder: str | Path) -> list[dict[str, Any]]:
    """The held-out losses of a training (sts/pipeline/train/held_out.py) by the number of steps
    taken; empty if none was measured. Raises as `read_history`."""
    folder = Path(folder)
    return _read_lines(folder, HELD_OUT) if (folder / HELD_OUT).exists() else []


def _read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    if (folder / DONE).exists():
        digest = read_json(folder / DONE, CURE)["files"][name]
        check_files(folder, {name: digest}, CURE)
    text = (folder / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
