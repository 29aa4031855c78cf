"""What a training keeps on disk: two states to go on from, and at the end a plain checkpoint.

A state is a folder of torch.distributed.checkpoint with tensors in safetensors: its own format is
read by pickle, which runs what a file says. Whatever the number of processes that wrote it, another
can read it. Each process hashes what it wrote, for the format itself does not notice a
broken file.
"""

import logging
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

from sts.pipeline.config import Config, config_hash
from sts.pipeline.files import hashes, sha256_file, sha256_json, write_json_atomic
from sts.pipeline.run import provenance
from sts.pipeline.run.weights import DONE, HISTORY
from sts.pipeline.train.masters import master_of, take_over, with_masters
from sts.pipeline.train.parallel import everywhere, of_first, rank, wait, world
from sts.scheme import Scheme

KEPT = 2  # states of a training: the last one may be broken
ASK_SECONDS = 30  # the first process says so often that it still waits: the others' patience ends

PROCESS, SUMS = "process-{}.pt", "process-{}.sha256"  # state of a process; hashes of its files
SHARD = "shard-{:05}-*.safetensors"  # of a process's tensors, by torch counted from 1

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder of weights: only one training at a time works on it; another waits,
    and then the weights are finished.

    The kernel gives the lock back when the process ends, however that is. Of several processes of
    one training the first holds it for all; none begins before.
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
    time for a last checkpoint. Yields the function that says whether it has come."""
    signals: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # no other gets signals
    before = is_main and signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        yield lambda: bool(signals)
    finally:
        if is_main:
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
            shutil.copy(folder / HISTORY, part)
        wait()
        with warnings.catch_warnings(action="ignore"):  # that there is one process
            writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
            dcp.save(tensors(model, optimizer), storage_writer=writer)
        state = {"step": step, "scheme": scheme.state_dict(), "cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["gpu"] = torch.cuda.get_rng_state()
        torch.save(state, part / PROCESS.format(rank()))
        files = [part / PROCESS.format(rank()), *part.glob(SHARD.format(rank() + 1))]
        files += [part / HISTORY] if rank() == 0 else []
        lines = "".join(f"{digest}  {name}\n" for name, digest in hashes(part, files).items())
        (part / SUMS.format(rank())).write_text(lines)
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
        if not everywhere(_is_unbroken(target)):
            log.warning("%s: broken, the checkpoint before it is taken", target)
            continue
        with warnings.catch_warnings(action="ignore"):
            reader = HuggingFaceStorageReader(str(target))
            dcp.load(tensors(model, optimizer), storage_reader=reader)
        take_over(with_masters(model))
        if rank() == 0:
            shutil.copy(target / HISTORY, folder)
        files = [target / PROCESS.format(number) for number in (rank(), 0)]
        state = torch.load(next(filter(Path.exists, files)), weights_only=True)
        scheme.load_state_dict(state["scheme"])
        torch.set_rng_state(state["cpu"])
        if "gpu" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["gpu"])
        log.info("going on from step %d: %s", state["step"], target)
        return state["step"]
    return 0


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a training, the last first."""
    return sorted((folder / "state").glob("[0-9]*[0-9]"), reverse=True)


def tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The very tensors that are stepped on, masters where there are any: {"model": name -> weight,
    "optimizer": name -> AdamW's state of it}. A weight that took no step yet, of a layer that was
    always skipped, gets the zeros that AdamW would begin with."""
    trained = {name: master_of(p) for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")},
            }
    return {
        "model": {name: p.detach() for name, p in trained.items()},
        "optimizer": {name: optimizer.state[p] for name, p in trained.items()},
    }


def _is_unbroken(target: Path) -> bool:
    """Whether the files of a checkpoint, of which every process looks at some, are as they were
    written."""
    try:
        lists = sorted(target.glob(SUMS.format("*")))
        lines = [line for file in lists for line in file.read_text().splitlines()]
        pairs = [line.split("  ") for line in lines[rank() :: world()]]
        return bool(lines) and all(sha256_file(target / name) == digest for digest, name in pairs)
    except Exception as error:  # whatever a broken file gives
        log.warning("%s: %r", target, error)
        return False


def _sync(folder: Path) -> None:
    """Wait until a folder and the files in it are on the disk."""
    for path in (*filter(Path.is_file, folder.iterdir()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def finish(folder: Path, model: PreTrainedModel, processor: Any, config: Config) -> None:
    """Save the plain model and its processor; the last file, `done.json`, says that they are, and
    the hashes of all that a reader uses."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    facts = provenance.collect(config_hash(config))
    facts["trust_remote_code"] = config.model.trust_remote_code
    write_json_atomic(folder / "provenance.json", facts)
    _sync(folder)
    paths = set(folder.rglob("*")) - set((folder / "state").rglob("*"))
    files = hashes(folder, filter(Path.is_file, paths))
    write_json_atomic(folder / DONE, {"weights_sha256": weights_sha256(files), "files": files})
    forget_states(folder)


def forget_states(folder: Path) -> None:
    """Take the checkpoints away: finished weights need none."""
    shutil.rmtree(folder / "state", ignore_errors=True)


def weights_sha256(files: Mapping[str, str]) -> str:
    """One hash of all safetensors files among `hashes`; for one file what sha256sum says."""
    digests = [digest for name, digest in files.items() if name.endswith(".safetensors")]
    return digests[0] if len(digests) == 1 else sha256_json(digests)
