"""What a training keeps on disk: two states to go on from, and at the end a plain checkpoint.

A state is a folder of torch.distributed.checkpoint: whatever the number of processes that wrote it,
another can read it. Each process hashes what it wrote, for the format itself does not notice a
broken file.
"""

import hashlib
import logging
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

from sts.pipeline.config import Config, config_hash
from sts.pipeline.files import sha256_file, write_json_atomic
from sts.pipeline.run import provenance
from sts.pipeline.train.parallel import everywhere, of_first, rank, wait, world
from sts.scheme import Scheme

KEPT = 2  # states of a training: the last one may be broken
ASK_SECONDS = 30  # between two words of the first process to others, which wait for some minutes

OWN, SUMS = "process-{}.pt", "process-{}.sha256"  # what no other has; hashes of all it wrote

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one training at a time works on a key; another waits and then finds it finished.

    The lock goes with the process, however it ends. Of several processes of one training the first
    holds it for all; none begins before.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock, seconds = FileLock(folder.with_suffix(".lock")), 0
    while not of_first(rank() == 0 and _acquired(lock, seconds)):
        if rank() == 0 and not seconds:
            log.info("another training makes %s: waiting for it", folder)
        seconds = ASK_SECONDS
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


@contextmanager
def sigterm_put_off() -> Iterator[Callable[[], bool]]:
    """SIGTERM, which a scheduler sends some seconds before it kills, does nothing at once. The
    function that is given says whether it has come: time for a last checkpoint."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # Python gives signals to the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def save_state(
    folder: Path,
    history: Any,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scheme: Scheme,
    step: int,
) -> None:
    """Checkpoint before `step`: a folder, whole or not there at all, in which every process has
    written its part and the hash of it. The one before stays. All processes call this; `history` is
    the first one's, None elsewhere.

    Raises OSError, naming the folder, if it can't be written.
    """
    target = folder / "state" / f"{step:08d}"
    part = target.with_suffix(".part")
    try:
        if rank() == 0:
            history.flush()
            os.fsync(history.fileno())
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        wait()
        with warnings.catch_warnings(action="ignore"):  # that there is one process
            dcp.save(tensors(model, optimizer), checkpoint_id=part)
        own = part / OWN.format(rank())
        torch.save({"step": step, "scheme": scheme.state_dict(), **_draws()}, own)
        shared = [part / ".metadata"] if rank() == 0 else []
        files = [own, *shared, *sorted(part.glob(f"__{rank()}_*"))]
        hashes = "".join(f"{sha256_file(file)}  {file.name}\n" for file in files)
        (part / SUMS.format(rank())).write_text(hashes)
        wait()
        if rank() == 0:
            _sync(part)
            shutil.rmtree(target, ignore_errors=True)  # a broken one
            os.replace(part, target)
            _sync(target.parent)
            for old in saved(folder)[KEPT:]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, CheckpointException):  # of each process what the disk said
            error = next(iter(error.failures.values()))[0]
        if not isinstance(error, Exception):  # Ctrl-C or SIGTERM came meanwhile
            raise error from None
        raise OSError(
            f"{target}: the checkpoint before step {step} was not written ({error}). Is the disk "
            "full? The one before is kept: make room and start again"
        ) from error


def load_state(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, scheme: Scheme
) -> int:
    """Take up the last checkpoint in `folder` that is whole, if there is one; the step to go on
    with. The number of processes may be another than that which wrote it."""
    for target in saved(folder):
        if not everywhere(_unbroken(target)):
            log.warning("%s: broken, the checkpoint before it is taken", target)
            continue
        state = tensors(model, optimizer, _names(target))
        with warnings.catch_warnings(action="ignore"):
            dcp.load(state, checkpoint_id=target)
        for name, parameter in model.named_parameters():
            if name in state["optimizer"]:
                optimizer.state[parameter] = state["optimizer"][name]
        own = target / OWN.format(rank())
        own = torch.load(own if own.exists() else target / OWN.format(0), weights_only=True)
        scheme.load_state_dict(own["scheme"])
        torch.set_rng_state(own["cpu"])
        if "gpu" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["gpu"])
        log.info("going on from step %d: %s", own["step"], target)
        return own["step"]
    return 0


def _draws() -> dict[str, torch.Tensor]:
    """Where torch's generators stand, which dropout draws from."""
    gpu = {"gpu": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **gpu}


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a training, the last first."""
    return sorted((folder / "state").glob("[0-9]*[0-9]"), reverse=True)


def tensors(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, moved: Collection[str] | None = None
) -> dict[str, dict]:
    """{"model": name -> trained weight, "optimizer": name -> AdamW's state of it}, the very tensors
    that are trained. moved: names that AdamW shall have a state of, zeros where it has none yet;
    default: those that it has one of. A layer that was always skipped has none."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if moved is None:
        moved = [name for name, p in trained.items() if optimizer.state.get(p)]
    return {
        "model": {name: p.detach() for name, p in trained.items()},
        "optimizer": {
            name: optimizer.state.get(trained[name]) or _zeros(trained[name]) for name in moved
        },
    }


def _zeros(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """What AdamW (fused) holds of a parameter before its first step."""
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _names(target: Path) -> list[str]:
    """Names of the parameters that a checkpoint has AdamW's state of."""
    paths = dcp.FileSystemReader(target).read_metadata().planner_data.values()
    return list(dict.fromkeys(path[1] for path in paths if path[0] == "optimizer"))


def _unbroken(target: Path) -> bool:
    """Whether the files of a checkpoint, of which every process looks at some, are as they were
    written."""
    try:
        lists = sorted(target.glob(SUMS.format("*")))
        lines = [line for one in lists for line in one.read_text().splitlines()]
        pairs = [line.split("  ") for line in lines[rank() :: world()]]
        same = all(sha256_file(target / name) == said for said, name in pairs)
        return same and bool(lines) and bool(_names(target))
    except Exception as error:  # whatever a broken file gives
        log.warning("%s: %r", target, error)
        return False


def _sync(path: Path) -> None:
    """What a folder, or the files in it, are to hold is on the disk."""
    for one in (*path.glob("*"), path):
        if one.is_file() or one == path:
            handle = os.open(one, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def finish(folder: Path, model: PreTrainedModel, processor: Any, config: Config) -> None:
    """Save the plain model and its processor; `done.json`, the last file, says that it is whole."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_json_atomic(folder / "provenance.json", provenance.collect(config_hash(config)))
    write_json_atomic(folder / "done.json", {"weights_sha256": weights_sha256(folder)})
    forget_states(folder)


def forget_states(folder: Path) -> None:
    """Finished weights need no states any more. Also where a kill came between the two."""
    shutil.rmtree(folder / "state", ignore_errors=True)


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the safetensors files of a checkpoint; for one file what sha256sum says."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as part:
            while chunk := part.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
