"""What a call on a cluster asks for, and what it makes of what another has left, without a cluster.

test_slurm.py has a real one.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from project import ROOT, SMOKE, run
from torch.distributed.run import parse_args

from sts.pipeline.config import load_ablations, load_scale, resolve
from sts.pipeline.files import read_json
from sts.pipeline.measure import requests as needs
from sts.pipeline.plan import Plan, make_plan
from sts.pipeline.run import cluster

PAPER = "workflow/config/paper.yaml"


ALIGN = "results/smoke/runs/dense/seed0/align.json"


def resources_of(project, *arguments: str, **env: str) -> dict[str, dict]:
    """A job of each rule -> its threads and resources, as a dry run says them; of trainings that of
    `ALIGN`."""
    for file in (project / "workflow/rules").glob("*.smk"):  # of a rule with a message it doesn't
        text = re.sub(r"\n +message:\n.*", "", file.read_text())
        file.write_text(text)
    output = run(project, SMOKE, "-n", "--cores", "512", *arguments, **env)
    jobs = {}
    for rule, text in re.findall(r"^(?:local)?rule (\w+):\n((?: +.*\n)+)", output, re.MULTILINE):
        values = re.findall(r"(\w+)=([^,\n]+)", text.partition("resources: ")[2])
        (threads,) = re.findall(r"threads: (\d+)", text) or ["1"]
        if rule not in jobs or f"output: {ALIGN}" in text:
            jobs[rule] = {"threads": threads, **dict(values)}
    return jobs


def write_requests(project, **requests: dict) -> None:
    """What the estimate said."""
    folder = project / "results/smoke"
    folder.mkdir(parents=True)
    named = {name.replace("__", "/"): values for name, values in requests.items()}
    (folder / "requests.json").write_text(json.dumps(named))


def test_jobs_of_a_cluster_ask_by_the_configuration_and_the_estimate(project):
    write_requests(project, train__dense__align={"mem_mb": 1234, "runtime": 56})
    more = (
        "stages={align: {processes: 4, threads: 3}, instruct: {processes: 4, nodes: 2, threads: 3}}"
    )
    questions = "evaluate={processes: 3}"
    jobs = resources_of(project, "--jobs", "9", "--config", more, questions)
    train = jobs["train"]
    assert (train["threads"], train["gpu"], train["nodes"]) == ("12", "4", "1")
    assert (train["mem_mb"], train["runtime"]) == ("1234", "56")
    assert "mpi" not in train
    assert (jobs["evaluate"]["gpu"], jobs["timing"]["gpu"]) == ("3", "4")
    assert jobs["evaluate"]["threads"] == "9", "of the last stage, each"
    assert jobs["evaluate"]["runtime"] == str(cluster.UNKNOWN["runtime"]), "of no estimate"
    assert jobs["timing"]["threads"] == "12", "what a training has, not what the login node has"
    assert "gpu" not in jobs["table"]


@pytest.mark.slow
def test_the_gpus_of_the_login_node_are_not_those_of_the_cluster(project):
    more = (ALIGN, "--config", "stages={align: {processes: 4}}")
    on_cluster = resources_of(project, *more, "--jobs", "9", CUDA_VISIBLE_DEVICES="0")["train"]
    here = resources_of(project, *more, CUDA_VISIBLE_DEVICES="0")["train"]
    assert (on_cluster["gpu"], here["gpu"]) == ("4", "1")
    assert "mem_mb" not in here and "runtime" not in here


@pytest.mark.slow
def test_a_training_on_several_nodes_is_started_on_each_by_slurm(project):
    more = (ALIGN, "--config", "stages={align: {processes: 6, nodes: 3, threads: 2}}")
    train = resources_of(project, *more, "--jobs", "9")["train"]
    expected = {"threads": "4", "gpu": "6", "nodes": "3", "tasks": "3", "mpi": "srun"}
    assert (expected | {"gres": "gpu:2", "tasks_per_gpu": "0"}).items() <= train.items()
    without_gpus = resources_of(project, *more, "--jobs", "9", "--resources", "gpu=0")["train"]
    assert without_gpus["gpu"] == "0" and "gres" not in without_gpus
    output = run(project, SMOKE, "-n", "-p", *more)
    assert "srun --nodes 3 --ntasks 3 --cpus-per-task 4" in output
    assert "torchrun --nnodes 3 --nproc-per-node 2 --rdzv-backend c10d" in output


def test_several_nodes_are_refused_where_there_is_no_slurm(project):
    more = ("--config", "stages={align: {processes: 2, nodes: 2}}")
    output = run(project, SMOKE, ALIGN, *more, ok=False)
    assert "dense: stages.align.nodes: 2 is not accepted without Slurm: 1" in output
    assert not (project / "done.txt").exists()


def test_the_nodes_of_a_stage_change_no_weights():
    block = load_scale(ROOT / PAPER).stage("align")
    assert block.model_copy(update={"nodes": 4}).identity() == block.identity()


def requests(out: Path, gpus: bool, scale: str = PAPER, **align) -> dict[str, dict[str, int]]:
    table = load_ablations(ROOT / "workflow/ablations.yaml")
    config = resolve(load_scale(ROOT / scale), table["dense"])
    align = config.stage("align").model_copy(update=align)
    configs = {"dense": config.model_copy(update={"stages": config.stages | {"align": align}})}
    return needs.requests(Plan(configs, table), gpus, out)


@pytest.mark.slow
def test_requests_come_from_the_estimate(tmp_path):
    """Of LLaVA-1.5-7B: published are 3.5 and 10 hours on 8 A100, and float32 weights are 28 GB."""
    requested = requests(tmp_path / "new/requests.json", gpus=True)
    assert requested == read_json(tmp_path / "new/requests.json")
    align, instruct = (requested[f"train/dense/{stage}"] for stage in ("align", "instruct"))
    assert 3.5 * 60 < align["runtime"] < 3.5 * 60 * 4
    assert 10 * 60 < instruct["runtime"] < 10 * 60 * 4
    assert 2 * 28_000 < align["mem_mb"] < 8 * 28_000, "shards: not a copy in each process"
    copies = requests(tmp_path / "ddp.json", gpus=True, parallel="ddp")["train/dense/align"]
    assert copies["mem_mb"] > 8 * 28_000
    spread = requests(tmp_path / "nodes.json", gpus=True, parallel="ddp", nodes=4)
    assert 4 * spread["train/dense/align"]["mem_mb"] == pytest.approx(copies["mem_mb"], abs=4)
    assert requested["evaluate/dense"]["mem_mb"] > 28_000
    assert 0 < requested["timing/main"]["runtime"] < align["runtime"]


def test_without_gpus_the_hosts_memory_holds_the_training(tmp_path):
    one, four = (
        requests(tmp_path / f"{n}.json", False, "workflow/config/mini.yaml", processes=n)
        for n in (1, 4)
    )
    of_one, of_four = (requested["train/dense/align"]["mem_mb"] for requested in (one, four))
    assert of_four == pytest.approx(4 * of_one, rel=0.01)


def test_a_model_of_unknown_size_asks_for_what_is_usual(tmp_path, caplog):
    scale = load_scale(ROOT / PAPER)
    unknown = scale.model.model_copy(update={"language": "no/such-language"})
    plan = make_plan(
        scale.model_copy(update={"model": unknown}),
        {"dense": load_ablations(ROOT / "workflow/ablations.yaml")["dense"]},
        PAPER,
    )
    assert needs.requests(plan, True, tmp_path / "none.json") == {}
    assert "no/such-language" in caplog.text
    assert cluster.request(tmp_path / "none.json", "train/dense/align") == cluster.UNKNOWN


RUN = "0f3e5c1a-9c1d-4b7e-8a4f-1234567890ab"


def test_left_jobs_are_those_that_a_call_in_this_folder_submitted(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "here")
    (tmp_path / "here").mkdir()
    jobs = [
        (11, "here", RUN), (12, "link", f"mine_{RUN}"), (13, "elsewhere", RUN),
        (14, "here", "interactive"), (15, "here", f"{RUN}-and-more"), ("16_2", "here", RUN),
    ]  # fmt: skip
    listing = "".join(f"{id}|{tmp_path / folder}|{name}\n" for id, folder, name in jobs)
    assert cluster.left_jobs(tmp_path / "here", listing) == ["11", "12", "16_2"]


@pytest.mark.parametrize(
    ("options", "reaches"),
    [
        ("rw,vers=4.2,local_lock=none", True),
        ("rw,vers=3,nolock,local_lock=all", False),
        ("rw,local_lock=flock", False),
        ("rw,flock,lazystatfs", True),
        ("rw,localflock,lazystatfs", False),
    ],
)
def test_a_lock_is_no_proof_where_the_mount_keeps_it_on_one_host(
    tmp_path, monkeypatch, options, reaches
):
    mounts = [
        SimpleNamespace(mountpoint="/", opts="rw,nolock"),
        SimpleNamespace(mountpoint=str(tmp_path / "shared"), opts=options),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert cluster.locks_reach_other_hosts(tmp_path / "shared/project") is reaches
    assert not cluster.locks_reach_other_hosts(tmp_path), "another mount is below"


@pytest.mark.parametrize("shape", [{"processes": 2}, {"processes": 4, "nodes": 2}])
def test_torchrun_leaves_a_verb_its_options(shape):
    stage = load_scale(ROOT / PAPER).stage("align").model_copy(update={"nodes": 1} | shape)
    _, _, command = cluster.launch(stage).partition("torchrun ")
    words = [*command.replace("$((20000 + SLURM_JOB_ID % 10000))", "1").split(), "evaluate"]
    started = parse_args([*words, "--run", "a.json", "--out", "b.json"])
    assert (started.training_script, started.module) == ("sts", True)
    assert started.training_script_args == ["evaluate", "--run", "a.json", "--out", "b.json"]
