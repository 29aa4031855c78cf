"""The Slurm profile on a real Slurm: started here (slurm_here.py) where it is installed."""

import json
import os
import re
import shutil
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import slurm_here
from project import BIN, ROOT, SMOKE, edit, environment, wait_for

PLUGIN = "snakemake_executor_plugin_slurm"
LACKING = slurm_here.missing() + [PLUGIN] * (find_spec(PLUGIN) is None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f"no Slurm here: {', '.join(LACKING)}"),
]
ALIGN = "results/smoke/runs/vtc/seed0/align.json"


@pytest.fixture(scope="module", autouse=True)
def slurm():
    with slurm_here.slurm():
        yield


OFTEN = ("--slurm-init-seconds-before-status-checks", "5")  # instead of 40


def command(*arguments: str, profile: str = "slurm") -> list[str]:
    """A call through a profile."""
    flags = ["--configfile", SMOKE, "--workflow-profile", f"workflow/profiles/{profile}"]
    own = OFTEN if profile == "slurm" else ()
    return [str(BIN / "snakemake"), *flags, *own, "--nocolor", "--jobs", "3", *arguments]


def run(folder: Path, *arguments: str, ok: bool = True, profile: str = "slurm", **env: str) -> str:
    done = subprocess.run(
        command(*arguments, profile=profile), cwd=folder, env=environment(**env),
        capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert (done.returncode == 0) is ok, output
    return output


def queue(form: str = "%T %k") -> list[str]:
    """Jobs that wait or run."""
    ask = ["squeue", "--noheader", f"--format={form}"]
    answer = subprocess.run(ask, capture_output=True, text=True, check=True)
    return answer.stdout.splitlines()


def test_a_killed_call_leaves_no_second_job_of_a_training(project):
    (project / "slow").touch()
    began = subprocess.Popen(
        command(ALIGN), cwd=project, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log = project / "results/smoke/logs/runs/vtc/seed0/align.log"
    wait_for(lambda: log.exists() and "training vtc" in log.read_text(), 300)
    os.killpg(began.pid, signal.SIGKILL)
    began.wait()
    (id,) = queue("%i")
    assert queue() == ["RUNNING rule_train_wildcards_vtc_0_align"]
    (project / "slow").unlink()

    output = run(project, ALIGN)
    assert f"Cancelled what a killed call left in Slurm: {id}" in output
    assert not queue()
    done = (project / "done.txt").read_text().split()
    assert done.count(ALIGN) == 1
    assert "Nothing to be done" in run(project, ALIGN)


def test_the_log_of_a_job_that_failed_elsewhere_is_shown(project):
    (project / "broken").touch()
    output = run(project, ALIGN, "--retries", "0", ok=False)
    assert re.search(r"^--- results/smoke/logs/runs/vtc/seed0/align.log$", output, re.MULTILINE)
    assert re.search(r"^vtc: out of memory$", output, re.MULTILINE)
    assert re.search(r"^--- .*slurm_logs/.*\.log$", output, re.MULTILINE)


def test_a_job_that_is_cancelled_ends_the_call(project):
    (project / "slow").touch()
    began = subprocess.Popen(
        command(ALIGN, "--retries", "0"), cwd=project, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(lambda: any("rule_train" in job for job in queue()), 300)
    (id,) = queue("%i")
    subprocess.run(["scancel", id], check=True)
    output, _ = began.communicate(timeout=300)
    assert began.returncode and "SLURM status is: 'CANCELLED'" in output


def test_jobs_have_the_environment_of_conda(project, conda):
    run(project, "--use-conda", "data/smoke/scenes/manifest.json", **conda)
    (calls,) = (project / ".snakemake/conda").glob("*/asked")
    assert "-m sts prepare" in calls.read_text()


GENERIC = "snakemake_executor_plugin_cluster_generic"


@pytest.mark.skipif(find_spec(GENERIC) is None, reason=f"no {GENERIC}")
def test_another_scheduler_is_a_matter_of_its_commands(project):
    """Here Slurm's, in the place of PBS's."""
    resources = "--cpus-per-task={threads} --gpus={resources.gpu} --mem={resources.mem_mb}"
    submit = f"sbatch --parsable --output=/dev/null --time={{resources.runtime}} {resources}"
    target = "results/smoke/runs/dense/seed0/align.json"
    output = run(project, target, "--cluster-generic-submit-cmd", submit, profile="generic")
    assert output.count("with external jobid") == 3, "data, backbone, training"
    assert (project / target).exists()


def test_the_smoke_scale_runs_to_the_end_with_several_processes_and_nodes(tmp_path):
    """Nothing is cut short: two processes on one node in align, one on each of two in instruct."""
    for name in ("sts", "workflow", "envs", "data/backbones"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "Snakefile", tmp_path)
    more = {"align": "processes: 2", "instruct": "processes: 2, nodes: 2"}
    for stage, values in more.items():
        edit(tmp_path / SMOKE, f"{stage}: {{", f"{stage}: {{{values}, ")
    output = run(tmp_path)
    assert "No estimate" not in output
    results = tmp_path / "results/smoke"
    assert (results / "tables/main.md").exists() and (results / "figures/pareto.svg").exists()
    requests = json.loads((results / "requests.json").read_text())
    assert {"train/dense/align", "evaluate/sts", "timing/main"} <= requests.keys()
    assert "Nothing to be done" in run(tmp_path)
