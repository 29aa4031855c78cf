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
ASK_SECONDS = 30  # the first process says so often that it still waits: the others' patience ends

PROCESS, SUMS = "process-{}.pt", "process-{}.sha256"  # state of a process; hashes of its files

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a key: only one training at a time works on it; another waits, and then the
    weights are finished.

    The kernel gives the lock back when the process ends, however that is. Of several processes of
    one training the first holds it for all; none begins before.

    Args:
        folder: Of the weights.
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
    """SIGTERM, which a scheduler sends some seconds before it kills, does nothing at once: there is
    time for a last checkpoint.

    Yields:
        The function that says whether it has come.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # Python gives signals to the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        yield lambda: bool(signals)
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
    """Write a checkpoint. All processes call this, and each writes its part and the hashes of it.
    The folder of the checkpoint is complete or not there; the one before it stays.

    Args:
        folder: Of the weights.
        history: The open history on the first process, else None.
        model, optimizer, scheme: What is trained.
        step: The step that the checkpoint comes before.

    Raises:
        OSError: It can't be written; the message names the folder.
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
        state = part / PROCESS.format(rank())
        torch.save({"step": step, "scheme": scheme.state_dict(), **_draws()}, state)
        shared = [part / ".metadata"] if rank() == 0 else []
        files = [state, *shared, *sorted(part.glob(f"__{rank()}_*"))]
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
    """Take up the last unbroken checkpoint, if there is one. The number of processes may be another
    than that which wrote it.

    Returns:
        The step to go on with.
    """
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
        file = target / PROCESS.format(rank())
        of_process = torch.load(
            file if file.exists() else target / PROCESS.format(0), weights_only=True
        )
        scheme.load_state_dict(of_process["scheme"])
        torch.set_rng_state(of_process["cpu"])
        if "gpu" in of_process and torch.cuda.is_available():
            torch.cuda.set_rng_state(of_process["gpu"])
        log.info("going on from step %d: %s", of_process["step"], target)
        return of_process["step"]
    return 0


def _draws() -> dict[str, torch.Tensor]:
    """Where torch's generators stand, which dropout draws from."""
    gpu = {"gpu": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **gpu}


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a training, the last first."""
    return sorted((folder / "state").glob("[0-9]*[0-9]"), reverse=True)


def tensors(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, names: Collection[str] | None = None
) -> dict[str, dict]:
    """The very tensors that are trained.

    Args:
        model, optimizer: What is trained.
        names: Parameters that AdamW shall have a state of, zeros where it has none yet. Default:
            those that it has one of; a layer that was always skipped has none.

    Returns:
        {"model": name -> trained weight, "optimizer": name -> AdamW's state of it}.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if names is None:
        names = [name for name, p in trained.items() if optimizer.state.get(p)]
    return {
        "model": {name: p.detach() for name, p in trained.items()},
        "optimizer": {
            name: optimizer.state.get(trained[name]) or _zeros(trained[name]) for name in names
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
        lines = [line for file in lists for line in file.read_text().splitlines()]
        pairs = [line.split("  ") for line in lines[rank() :: world()]]
        is_same = all(sha256_file(target / name) == expected for expected, name in pairs)
        return is_same and bool(lines) and bool(_names(target))
    except Exception as error:  # whatever a broken file gives
        log.warning("%s: %r", target, error)
        return False


def _sync(path: Path) -> None:
    """Wait until a folder and the files in it are on the disk."""
    for entry in (*path.glob("*"), path):
        if entry.is_file() or entry == path:
            handle = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def finish(folder: Path, model: PreTrainedModel, processor: Any, config: Config) -> None:
    """Save the plain model and its processor; the last file, `done.json`, says that they are."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_json_atomic(folder / "provenance.json", provenance.collect(config_hash(config)))
    write_json_atomic(folder / "done.json", {"weights_sha256": weights_sha256(folder)})
    forget_states(folder)


def forget_states(folder: Path) -> None:
    """Take the checkpoints away: finished weights need none."""
    shutil.rmtree(folder / "state", ignore_errors=True)


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the safetensors files of a checkpoint; for one file what sha256sum says."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as part:
            while chunk := part.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
