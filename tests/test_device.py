"""The GPU lease: one job a GPU, freed with its process. Locks are real; no GPU is needed."""

import os
import subprocess
import sys
import time

from sts.device import lease, visible_gpus

HOLD = """
import sys, time
from pathlib import Path
from sts.device import lease
with lease(["3", "5"], Path(sys.argv[1])) as gpu:
    print(gpu, flush=True)
    time.sleep(60)
"""


def hold(folder) -> tuple[subprocess.Popen, str]:
    job = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    return job, job.stdout.readline().strip()


def test_jobs_get_different_gpus_and_a_killed_job_frees_its_own(tmp_path):
    first, a = hold(tmp_path)
    second, b = hold(tmp_path)
    assert sorted([a, b]) == ["3", "5"]
    first.kill()
    first.wait()
    third, c = hold(tmp_path)
    assert c == a
    for job in (second, third):
        job.kill()
        job.wait()


def test_a_job_waits_while_all_are_taken(tmp_path):
    job, gpu = hold(tmp_path)
    started = time.monotonic()
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {job.pid}"])
    with lease([gpu], tmp_path) as mine:
        assert mine == gpu and time.monotonic() - started > 0.5
    job.wait()


def test_the_leased_gpu_is_the_only_visible_one_and_only_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert visible_gpus() == ["4", "6"]
    with lease(folder=tmp_path) as gpu:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu == "4"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"


def test_without_a_gpu_nothing_is_locked(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with lease(folder=tmp_path / "none") as gpu:
        assert gpu is None
    assert not (tmp_path / "none").exists()
