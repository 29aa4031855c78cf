"""What a training keeps on disk: one state to go on from, and at the end a plain checkpoint."""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from sts.pipeline import provenance
from sts.pipeline.config import Config, config_hash
from sts.pipeline.lora import merge_adapters
from sts.pipeline.provenance import write_json_atomic
from sts.scheme import Scheme, unsparsify

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one training at a time works on a key; another waits and then finds it finished.

    The lock goes with the process, however it ends. Of several processes of one training the first
    holds it for all.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another training makes %s: waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def save_state(
    folder: Path,
    history: Any,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scheme: Scheme,
    step: int,
) -> None:
    """Checkpoint before `step`: one file, whole or not at all; the one before stays until then.

    Raises OSError, naming the file, if it can't be written.
    """
    history.flush()
    os.fsync(history.fileno())
    state = {
        "step": step,
        "model": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "scheme": scheme.state_dict(),
        "rng": torch.get_rng_state(),
    }
    target = folder / "state" / "checkpoint.pt"
    target.parent.mkdir(exist_ok=True)
    part = target.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except (OSError, RuntimeError) as error:  # torch wraps what the file system says
        raise OSError(
            f"{target}: the checkpoint before step {step} was not written ({error}). Is the disk "
            "full? The one before is kept: make room and start again"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def load_state(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, scheme: Scheme
) -> int:
    """Take up the checkpoint in `folder`, if there is one; the step to go on with."""
    file = folder / "state" / "checkpoint.pt"
    if not file.exists():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state["model"].items():
            own[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    scheme.load_state_dict(state["scheme"])
    torch.set_rng_state(state["rng"])
    log.info("going on from step %d: %s", state["step"], file)
    return state["step"]


def finish(
    folder: Path, model: PreTrainedModel, adapters: Any, processor: Any, config: Config
) -> None:
    """Save the plain model and its processor; `done.json`, the last file, says that it is whole."""
    unsparsify(model)
    if adapters is not None:
        merge_adapters(adapters)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_json_atomic(folder / "provenance.json", provenance.collect(config_hash(config)))
    write_json_atomic(folder / "done.json", {"weights_sha256": weights_sha256(folder)})
    shutil.rmtree(folder / "state", ignore_errors=True)


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the safetensors files of a checkpoint; for one file what sha256sum says."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as part:
            while chunk := part.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
