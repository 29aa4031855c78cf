"""Leases of GPUs, with the text that `nvidia-smi -L` would give on a machine with two."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sts.pipeline.run import device

ROOT = Path(__file__).parents[2]
TWO = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa-1111)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb-2222)
"""
HOLD = """
import sys, time
from sts.pipeline.run import device
with device.lease(sys.argv[1], sys.argv[2]) as gpu:
    print(gpu, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", device.LEASE, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, ["GPU-aaaa-1111", "GPU-bbbb-2222"]),
        ("1", ["GPU-bbbb-2222"]),
        ("1,0", ["GPU-bbbb-2222", "GPU-aaaa-1111"]),
        ("GPU-bbbb", ["GPU-bbbb-2222"]),
        ("MIG-cccc", ["MIG-cccc"]),
        ("0,7,1", ["GPU-aaaa-1111"]),  # CUDA stops at the first invalid entry
        ("-1", []),
        ("", []),
    ],
)
def test_visible_gpus_follow_cuda_visible_devices(chosen, expected, monkeypatch):
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert device.visible_gpus(TWO) == expected
    assert device.gpu_count(TWO) == len(expected)


def test_without_nvidia_smi_cuda_visible_devices_is_believed(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert device.visible_gpus(listing="") == ["4", "6"]
    with device.lease("", tmp_path) as gpu:
        assert gpu == os.environ["CUDA_VISIBLE_DEVICES"] == "4"


def test_no_driver_means_no_gpu_and_an_empty_lease(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.gpu_count() == 0
    with device.lease(folder=tmp_path / "locks") as gpu:
        assert gpu is None
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert not (tmp_path / "locks").exists()


def test_a_failing_driver_means_no_gpu(monkeypatch, tmp_path):
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\necho 'GPU 0: x (UUID: GPU-x)'; exit 9\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert device.gpu_count() == 0


def test_lease_shows_one_gpu_and_restores_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    with device.lease(TWO, tmp_path) as gpu:
        assert gpu == os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb-2222"
        with device.lease(TWO, tmp_path) as inner:  # and so would a child process
            assert inner == gpu
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,0"
    assert device.LEASE not in os.environ


def test_processes_get_different_gpus_and_kill_gives_one_back(tmp_path):
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, TWO, str(tmp_path)]
    jobs = [
        subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        gpus = [job.stdout.readline().strip() for job in jobs]
        assert sorted(gpus) == ["GPU-aaaa-1111", "GPU-bbbb-2222"]
        threading.Timer(0.2, jobs[1].kill).start()
        started = time.monotonic()
        with device.lease(TWO, tmp_path) as gpu:  # both are taken: waits for the kill
            assert gpu == gpus[1]
            assert time.monotonic() - started > 0.15
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


def test_a_job_of_several_processes_leaves_gpus_to_its_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with device.lease(TWO, tmp_path) as gpu:
        assert gpu is None


def test_too_late_once_cuda_runs(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="before torch uses a GPU"), device.lease(TWO, tmp_path):
        pass
