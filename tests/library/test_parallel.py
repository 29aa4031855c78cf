"""Several processes: the same losses as one, the same layers on all, and a saving that is real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parents[1]
STEPS = 100


def train(mode: str, processes: int, folder: Path, steps: int = STEPS) -> dict:
    out = folder / f"{mode}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(HERE / "parallel_worker.py"), mode]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, str(out), str(steps)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,  # a hang is a failure
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text()) | {"stderr": done.stderr}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train("alone", 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(mode, alone, tmp_path):
    result = train(mode, 2, tmp_path)
    assert len({tuple(step) for step in result["skips"]}) == 4  # all sets of the middle two layers
    assert result["skips"] == alone["skips"] and result["same_on_all"]
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert result["grad_where_not_skipped_alone"] and result["ran_only_what_was_not_skipped"]
    if mode == "ddp":
        assert "skipped layers are not computed, but" in result["stderr"]
    else:  # a skipped layer's weights are neither gathered nor its gradients scattered
        (fewer, skipped), (dense, none) = result["gathers"]["skipping"], result["gathers"]["dense"]
        assert none == 0 and fewer == dense - 3 * skipped
        assert "skipped layers are not computed, but" not in result["stderr"]


def test_with_samples_every_layer_is_trained_in_every_step_and_ddp_need_not_look(tmp_path):
    alone, result = train("alone_samples", 1, tmp_path), train("ddp_samples", 2, tmp_path)
    assert result["skips"] == alone["skips"]
    assert {share for step in result["skips"] for share in step} == {0.0, 0.25, 0.5}
    assert not result["same_on_all"]  # other samples draw otherwise
    assert result["counted"] == pytest.approx(alone["counted"]), "of all processes, not the first"
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert result["grad_where_not_skipped_alone"] and result["ran_only_what_was_not_skipped"]
    assert "skipped layers are not computed, but" not in result["stderr"]


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process_does(stage, alone, tmp_path):
    pytest.importorskip("deepspeed", reason="not in the lock; see docs/library.md")
    result = train(f"zero{stage}", 2, tmp_path)
    assert result["skips"] == alone["skips"] and result["same_on_all"]
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-2)
    assert result["ran_only_what_was_not_skipped"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_rank_whose_samples_have_no_picture_is_shown_that_of_another(mode, tmp_path):
    """Nothing hangs, in any unit of LDS. Without it even the plain model fails under FSDP2."""
    losses = train(f"{mode}_mixed", 2, tmp_path, steps=4)
    del losses["stderr"]
    assert list(losses) == ["layer", "samples", "tokens", "backward"]
    assert all(of_unit[-1] < of_unit[0] for of_unit in losses.values())
