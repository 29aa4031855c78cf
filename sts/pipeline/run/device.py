"""What this machine computes on and in: one GPU per job, bf16 where the hardware has it.

Snakemake counts GPUs but doesn't say which one a job gets, so all would take the first. A job that
trains or evaluates takes a lease: a lock on one GPU's file, which the kernel gives back even when
the process is killed. Standard library only: the Snakefile asks `gpu_count` in a bare environment.
"""

import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.5
LEASE = "STS_GPU_LEASE"  # tells a child process that its parent holds the lease for it

log = logging.getLogger(__name__)


def gpu_count(listing: str | None = None) -> int:
    """Number of GPUs that this process may use; 0 without NVIDIA's driver."""
    return len(visible_gpus(listing))


def visible_gpus(listing: str | None = None) -> list[str]:
    """UUIDs (`GPU-...`) of the GPUs that CUDA_VISIBLE_DEVICES leaves this process, in order.

    `listing` is the text of `nvidia-smi -L`, by default asked for. UUIDs, because the number 0
    means different GPUs to two jobs that a scheduler has confined to one each. Without nvidia-smi,
    as in some containers, CUDA_VISIBLE_DEVICES is taken by its word.
    """
    listing = _nvidia_smi() if listing is None else listing
    installed = re.findall(r"^GPU \d+: .*\(UUID: (.+)\)", listing, flags=re.MULTILINE)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return installed
    gpus = []
    for token in map(str.strip, chosen.split(",")):
        if token.isdigit() and not installed:
            gpus.append(token)
        elif token.isdigit() and int(token) < len(installed):
            gpus.append(installed[int(token)])
        elif token.startswith(("GPU-", "MIG-")):  # may be abbreviated
            gpus.append(next((gpu for gpu in installed if gpu.startswith(token)), token))
        else:
            break  # as CUDA does: what follows an invalid entry is not visible
    return gpus


def _nvidia_smi() -> str:
    how = {"capture_output": True, "text": True, "timeout": 60, "check": True}
    with suppress(FileNotFoundError, subprocess.SubprocessError):
        return subprocess.run(["nvidia-smi", "-L"], **how).stdout
    return ""


@contextmanager
def lease(listing: str | None = None, folder: str | Path | None = None) -> Iterator[str | None]:
    """Hold one GPU for the body of a `with`; gives its UUID, None where there is no GPU.

    Waits until one is free, then makes it the only one that CUDA shows to this process. Does
    nothing inside another lease and in a job of several processes, whose launcher deals out GPUs.
    `folder` holds the locks, by default one per user in the host's temporary folder. Raises
    RuntimeError if torch has started CUDA already: then it is too late to choose.
    """
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    gpus = [] if distributed or LEASE in os.environ else visible_gpus(listing)
    if not gpus:
        yield os.environ.get(LEASE)
        return
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError(
            "CUDA runs already: enter sts.pipeline.run.device.lease() before torch uses a GPU"
        )
    folder = Path(folder or Path(tempfile.gettempdir()) / f"sts-gpu-{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True)
    gpu, lock = _lock_any(gpus, folder)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ |= {"CUDA_VISIBLE_DEVICES": gpu, LEASE: gpu}
    try:
        yield gpu
    finally:
        del os.environ[LEASE], os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        lock.release()


def _lock_any(gpus: list[str], folder: Path) -> tuple[str, Any]:
    """The first free GPU and the lock that holds it; waits while all are taken."""
    from filelock import FileLock, Timeout  # here: the Snakefile reads this file without it

    is_waiting = False
    while True:
        for gpu in gpus:
            lock = FileLock(folder / f"{gpu}.lock")
            with suppress(Timeout):
                lock.acquire(timeout=0)
                return gpu, lock
        if not is_waiting:
            log.warning("All %d GPUs are in use by other jobs; waiting for one.", len(gpus))
            is_waiting = True
        time.sleep(POLL_SECONDS)


def precision_here(precision: str) -> str:
    """What a forward pass is computed in where the configuration says `fp32` or `bf16`: bf16 only
    where the hardware computes in it, else fp32. The key of the weights holds it."""
    import torch  # here: the workflow asks for GPUs without it

    return precision if torch.cuda.is_available() or bf16_is_native() else "fp32"


def attention_here(precision: str) -> str:
    """Transformers' name of the attention of a training of this precision: `sdpa`, torch's fused
    one, or `eager`. In bf16 on a CPU the fused backward (torch 2.13, 32 channels a head) takes
    longer than all the rest of the step. The key of the weights holds it too."""
    import torch  # here: the workflow asks for GPUs without it

    fused = torch.cuda.is_available() or precision_here(precision) == "fp32"
    return "sdpa" if fused else "eager"


def bf16_is_native() -> bool:
    """Whether this processor computes in bf16, as far as torch can tell.

    One without AVX-512 (or Arm's bf16) emulates it, 100 times slower than fp32.
    """
    import torch  # here: the workflow asks for GPUs without it

    can_tell = torch.backends.mkldnn.is_available()
    return not can_tell or torch.ops.mkldnn._is_mkldnn_bf16_supported()
