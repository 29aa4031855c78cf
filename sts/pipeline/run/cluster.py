"""What a call of the pipeline on a cluster has to know of Slurm and of shared folders.

Only what Snakemake depends on is imported: the Snakefile asks in any environment.
"""

import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil

from sts.pipeline.config import StageConfig
from sts.pipeline.files import read_json

# Snakemake's plugin names all jobs of a call by a random UUID, after a prefix if it has one
OURS = re.compile(r"(\S+_)?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Mount options (NFS, Lustre) with which a lock holds between processes of one host only
OWN_LOCKS = {"nolock", "local_lock=all", "local_lock=flock", "localflock"}
# What a job asks for of which the estimate says nothing: MB of host memory, minutes
UNKNOWN = {"mem_mb": 32_000, "runtime": 480}


def request(file: str | Path, job: str) -> dict[str, int]:
    """Host memory (`mem_mb`) and minutes (`runtime`) that a job asks for, by the file that
    `python -m sts requests` wrote; `UNKNOWN` if that is missing or doesn't name the job."""
    requests = read_json(file) if Path(file).exists() else {}
    return requests.get(job, UNKNOWN)


def cores(stage: StageConfig) -> int:
    """CPU cores of a training, on each of its nodes."""
    return stage.threads * stage.processes // stage.nodes


def launch(stage: StageConfig) -> str:
    """How a verb is started for a stage: one process, or one for each GPU. On several nodes, Slurm
    starts a torchrun on each; they meet on the first, where the job's script runs. Without `--`
    torchrun takes the verb's --run for one of its own."""
    here = stage.processes // stage.nodes
    if stage.processes == 1:
        return "python -m sts"
    if stage.nodes == 1:
        return f"torchrun --standalone --nproc-per-node {here} -m -- sts"
    return (
        f"srun --nodes {stage.nodes} --ntasks {stage.nodes} --cpus-per-task {cores(stage)}"
        f" --kill-on-bad-exit torchrun --nnodes {stage.nodes} --nproc-per-node {here}"
        " --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID"
        " --rdzv-endpoint $(hostname):$((20000 + SLURM_JOB_ID % 10000)) -m -- sts"
    )


def left_jobs(folder: str | Path, listing: str | None = None) -> list[str]:
    """Ids of this user's jobs that wait or run and were submitted by a call in `folder`.

    listing: lines `id|folder|name`, by default squeue's; none without Slurm.
    """
    if listing is None:
        has_slurm = shutil.which("squeue")
        listing = _slurm("squeue", "--me", "--noheader", "--format=%i|%Z|%j") if has_slurm else ""
    jobs = [line.split("|", 2) for line in listing.splitlines()]
    here = Path(folder).resolve()
    return [
        id for id, place, name in jobs if OURS.fullmatch(name) and Path(place).resolve() == here
    ]


def cancel_left_jobs(folder: str | Path, patience: float = 300) -> list[str]:
    """Cancel the jobs of `left_jobs` and wait until they are over; returns their ids.

    Whoever calls must be the only call alive in `folder`: then these jobs are of one that was
    killed, and would keep their GPUs while the same jobs of this call wait for them.

    Raises:
        RuntimeError: Some are not over after `patience` seconds, or Slurm does not answer.
    """
    left = jobs = left_jobs(folder)
    if jobs:
        _slurm("scancel", *jobs)
    until = time.monotonic() + patience
    while left:
        if time.monotonic() > until:
            raise RuntimeError(f"Slurm jobs {', '.join(left)} were cancelled and are not over")
        time.sleep(1)
        left = [id for id in left_jobs(folder) if id in jobs]
    return jobs


def _slurm(*command: str) -> str:
    """What a command of Slurm prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def locks_reach_other_hosts(folder: str | Path) -> bool:
    """Whether a host that sees `folder` too would see a lock on a file in it, by how the folder is
    mounted."""
    mounts = [
        mount
        for mount in psutil.disk_partitions(all=True)
        if Path(folder).resolve().is_relative_to(mount.mountpoint)
    ]
    innermost = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return innermost is None or not OWN_LOCKS & set(innermost.opts.split(","))
