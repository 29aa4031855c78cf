"""Which GPU a job may use: a lease on one visible device, held by a file lock.

Snakemake counts GPUs but does not name them, so parallel jobs would all land on the first. The
kernel frees a lock with the process that held it, also after `kill -9`. Standard library only.
"""

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCKS = Path(".snakemake/gpus")


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use: CUDA_VISIBLE_DEVICES if set, else all there are."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i, _ in enumerate(listed.stdout.splitlines())]


@contextmanager
def lease(gpus: list[str] | None = None, folder: Path = LOCKS) -> Iterator[str | None]:
    """Hold one of `gpus` (default: the visible ones) and make it the only visible one.

    Yields its id, or None where there is no GPU, or where a launcher has given this process its own
    (LOCAL_RANK). Waits while all are taken. Call before torch starts CUDA.
    """
    gpus = visible_gpus() if gpus is None else gpus
    if not gpus or "LOCAL_RANK" in os.environ:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    while True:
        for gpu in gpus:
            with (folder / f"{gpu}.lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu
                try:
                    yield gpu
                finally:
                    if before is None:
                        del os.environ["CUDA_VISIBLE_DEVICES"]
                    else:
                        os.environ["CUDA_VISIBLE_DEVICES"] = before
                return
        time.sleep(1.0)
