"""Tracking with a real sqlite MLflow store: statuses, resume, parallel first use, failures."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sts.__main__ import main
from sts.pipeline.cost.history import read_history
from sts.pipeline.files import read_json
from sts.pipeline.run import store, tracking

ROOT = Path(__file__).parents[2]
JOB = """
import sys, time
from pathlib import Path
from sts.pipeline.run import tracking
name = sys.argv[1]
rows = [{"step": 1, "loss": 0.5}]
with tracking.run(name, directory=name, params={"lr": 0.1}, rows=lambda: rows):
    Path(sys.argv[1], "ready").touch()
    time.sleep(float(sys.argv[2]))
"""

TRAINING = """
import os, signal, sys
from pathlib import Path
from configs import short
from sts.pipeline.train import train
from sts.pipeline.train.job import Job
data, backbone, out = map(Path, sys.argv[1:4])
take_step, steps = train.optimizer_step, iter(range(100))
def killed(*args):
    if next(steps) == last: os.kill(os.getpid(), signal.SIGKILL)
    return take_step(*args)
train.optimizer_step = killed
for last in map(int, sys.argv[4:]):
    if os.fork() == 0:  # with the imports of this process
        job = Job(short(steps=24, checkpoint_every=2), "dense", 0, "align", [data], backbone, out)
        train.train(job)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One working directory, and so one store, for all tests: creating a store takes a second."""
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(autouse=True)
def environment(place, monkeypatch):
    monkeypatch.chdir(place)
    ours = ("STS_TRACKING", "STS_INVOCATION", "RANK")
    for name in (*ours, "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)


def start(name: str, seconds: float = 0.0, **environment: str) -> subprocess.Popen:
    Path(name).mkdir()
    command = [sys.executable, "-c", JOB, name, str(seconds)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} never appeared"
        time.sleep(0.05)


def client():
    return store.load_mlflow().MlflowClient(store.uri())


def fetch(name: str):
    """The MLflow run of the job that worked in folder `name`."""
    return client().get_run(Path(name, tracking.RUN_ID_FILE).read_text().strip())


@pytest.mark.slow
def test_parallel_first_use_makes_one_whole_store_and_one_parent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [start(f"first{i}", STS_INVOCATION="call-1") for i in range(4)]
    errors = [job.communicate(timeout=300)[1] for job in jobs]
    assert errors == [""] * 4  # no traceback, no warning, no alembic noise
    runs = [fetch(f"first{i}") for i in range(4)]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.metrics["loss"] for run in runs} == {0.5}
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs}) == 1
    artifacts = (tmp_path / "results" / "mlflow-artifacts").as_uri()
    assert all(run.info.artifact_uri.startswith(artifacts) for run in runs)


def test_tags_say_what_ran_where():
    with tracking.run("tags", params={"a": {"b": 1}}, tags={"seed": 3}, directory="tags"):
        pass
    data = fetch("tags").data
    assert data.params == {"a.b": "1"}
    assert data.tags["seed"] == "3"
    assert data.tags["pid"] == str(os.getpid())
    assert {"git.commit", "git.dirty", "host", "hardware", "process.start"} <= set(data.tags)
    assert "mlflow.parentRunId" not in data.tags  # STS_INVOCATION is not set


@pytest.mark.slow
def test_killed_process_is_reaped_and_a_living_one_is_not():
    dead, living = start("dead", 300, STS_INVOCATION="call-2"), start("living", 300)
    wait_for(Path("dead/ready"))
    wait_for(Path("living/ready"))
    try:
        dead.kill()
        dead.communicate()
        assert fetch("dead").info.status == "RUNNING"
        # the parent goes too: none of its jobs runs
        assert sorted(store.reap()) == ["call-2", "dead"]
        assert fetch("dead").info.status == "KILLED"
        assert fetch("living").info.status == "RUNNING"
        assert store.reap() == []
    finally:
        living.send_signal(signal.SIGTERM)
        living.communicate()


def test_a_reused_process_number_counts_as_dead():
    with tracking.run("reused", directory="reused") as run:
        client().set_tag(run.id, "process.start", time.time() - 1e6)
        assert store.reap() == ["reused"]


@pytest.mark.slow
def test_sigterm_ends_as_killed_with_status_143():
    job = start("terminated", 300)
    wait_for(Path("terminated/ready"))
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=120)
    assert job.returncode == 143
    run = fetch("terminated")
    assert run.info.status == "KILLED"
    assert run.data.metrics["loss"] == 0.5  # what waited in memory was written


def test_the_old_sigterm_handler_comes_back(monkeypatch):
    monkeypatch.setenv("STS_TRACKING", "off")
    before = signal.getsignal(signal.SIGTERM)
    with tracking.run("handler", directory="handler"):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_exception_ends_as_failed_and_passes_through():
    with pytest.raises(ZeroDivisionError), tracking.run("failed", directory="failed"):
        raise ZeroDivisionError
    assert fetch("failed").info.status == "FAILED"


def test_an_interrupted_run_is_opened_again_with_its_first_params_and_a_finished_one_is_not():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    with (
        pytest.raises(KeyboardInterrupt),
        tracking.run("again", params={"lr": 1}, directory="again", rows=lambda: rows[:1]) as first,
    ):
        raise KeyboardInterrupt
    assert fetch("again").info.status == "KILLED"
    with tracking.run("again", params={"lr": 2}, directory="again", rows=lambda: rows) as second:
        assert fetch("again").info.status == "RUNNING"
    run = fetch("again")
    assert second.id == first.id
    assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "1"})
    assert run.data.metrics["loss"] == 1.0
    with tracking.run("again", params={"lr": 2}, directory="again") as third:
        pass
    assert third.id != first.id


@pytest.mark.slow
def test_a_training_goes_on_in_its_run_and_another_configuration_has_another(
    tmp_path, backbone, prepared, monkeypatch
):
    """As a value is changed after an interruption, and then changed back."""
    import torch
    from configs import short

    from sts.pipeline.train.job import Job
    from sts.pipeline.train.train import train

    def run(steps: int):
        out = tmp_path / "results/runs/dense/seed0/align.json"
        train(Job(short(steps=steps), "dense", 0, "align", [prepared], backbone, out))

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "changed values")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupt)  # at the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            run(steps=4)
    calls = []
    for steps in (6, 4):
        run(steps=steps)
        experiment = client().get_experiment_by_name("changed values").experiment_id
        runs = client().search_runs([experiment])
        calls.append({(r.data.params["steps"], r.info.status, r.info.run_id) for r in runs})
    ids = {steps: id for steps, _, id in calls[0]}
    assert calls == [
        {("4", "KILLED", ids["4"]), ("6", "FINISHED", ids["6"])},
        {("4", "FINISHED", ids["4"]), ("6", "FINISHED", ids["6"])},
    ]
    for steps in (4, 6):
        assert sorted(steps_of(ids[str(steps)], "loss")) == list(range(steps))


@pytest.mark.slow
def test_a_training_killed_ten_times_has_every_step_once(tmp_path, backbone, prepared):
    """Each time at a step drawn from a seed, after a checkpoint or before; then to the end."""
    out = tmp_path / "results/runs/dense/seed0/align.json"
    moments = [*random.Random(0).choices(range(5), k=10), 99]
    script = [sys.executable, "-c", TRAINING, *map(str, (prepared, backbone, out, *moments))]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ended = subprocess.run(
        script, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert ended.stdout.split() == [str(-signal.SIGKILL)] * 10 + ["0"], ended.stderr[-3000:]
    run = fetch(out.with_suffix("") / read_json(out)["key"])
    assert run.info.status == "FINISHED"
    history = read_history(read_json(out)["weights"])
    for name in ("loss", "tokens_per_s"):
        sent = client().get_metric_history(run.info.run_id, name)
        assert sorted(metric.step for metric in sent) == list(range(24))
        values = {metric.step: metric.value for metric in sent}
        if name == "loss":  # a step that was taken twice gives the same
            assert values == {row["step"]: row["loss"] for row in history}


def steps_of(run_id, name):
    return [metric.step for metric in client().get_metric_history(run_id, name)]


def test_what_the_run_lacks_is_sent_when_it_is_due_and_at_the_end(monkeypatch):
    rows = []
    with tracking.run("lacks", directory="lacks", rows=lambda: rows) as job:
        job.send()  # nothing yet
        rows.append({"step": 1, "loss": 1.0, "seconds": 0.0, "skipped": [1, 2]})
        monkeypatch.setattr(tracking, "COST", 1e-9)  # after one export none is due for years
        job._next_send = 0.0
        job.send()
        assert steps_of(job.id, "loss") == [1]
        assert "skipped" not in fetch("lacks").data.metrics  # a list is not a metric
        rows.append({"step": 2, "loss": 0.5, "seconds": 3.0})
        job.send()
        assert steps_of(job.id, "loss") == [1]
        rows.append({"step": 3, "loss": 0.4, "seconds": 3.0})
    assert sorted(steps_of(job.id, "loss")) == [1, 2, 3]
    *_, second, third = sorted(client().get_metric_history(job.id, "loss"), key=lambda m: m.step)
    assert third.timestamp - second.timestamp == pytest.approx(3000, abs=1)


def test_a_job_that_ends_before_its_first_result_warns_of_nothing(caplog):
    with tracking.run("early", directory="early", rows=lambda: open("no such history")):
        pass
    assert not caplog.records
    assert fetch("early").info.status == "FINISHED"


def test_artifacts_are_copied_and_a_missing_one_is_a_warning(caplog):
    Path("plot.svg").write_text("<svg/>")
    with tracking.run("artifact", directory="artifact") as run:
        run.artifact("plot.svg")
        run.artifact("nothing.svg")
    assert [file.path for file in client().list_artifacts(run.id)] == ["plot.svg"]
    assert len(caplog.records) == 1
    assert fetch("artifact").info.status == "FINISHED"


SECRET = [
    "http://me:s%40cret@127.0.0.1:9", "http://s%40cret@127.0.0.1:9",
    "postgresql://me:s%40cret@127.0.0.1:9/db", "mysql+odd://me:s%40cret/x@127.0.0.1:9/db",
    "odd://127.0.0.1:9/db?user=me&password=s%40cret",
]  # fmt: skip
BROKEN = ["http://127.0.0.1:9", "file:mlruns", "sqlite:////proc/no/such.db", *SECRET]


@pytest.mark.parametrize("uri", BROKEN)
def test_a_broken_store_gives_one_warning_and_the_job_goes_on(uri, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with tracking.run("broken", directory="broken", rows=lambda: [{"step": 1, "loss": 1.0}]) as run:
        run.send()
        run.artifact("plot.svg")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the job goes on" in caplog.text
    assert not re.search("s(%40|@)cret", caplog.text)
    assert ("***" in caplog.text) is (uri in SECRET)


def test_a_full_disk_costs_one_warning_and_no_metric(monkeypatch, caplog, capfd):
    monkeypatch.setattr(tracking, "COST", float("inf"))  # every call of send sends
    losses = {f"loss{number}": 1.0 for number in range(700)}  # one call of MLflow takes 1000
    rows = [{"step": 1, **losses}, {"step": 2, **losses}]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tracking.run("full", directory="full", rows=lambda: rows) as run:
        full = store.database().stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, limits[1]))  # no file grows beyond this
        try:
            run.send()
            run.send()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert capfd.readouterr().err == ""  # MLflow's own log has nothing to add
    for name in ("loss0", "loss699"):
        assert steps_of(run.id, name) == [1, 2]


def test_use_of_the_processor_is_sampled(monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with tracking.run("system", directory="system"):
        deadline = time.monotonic() + 120
        while "system/cpu_utilization_percentage" not in fetch("system").data.metrics:
            assert time.monotonic() < deadline


def test_the_experiment_says_what_its_tags_mean_and_keeps_what_a_user_wrote(monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "older")
    store.open_store()
    before = client().get_experiment_by_name("older")
    assert before.tags == store.EXPERIMENT_TAGS
    client().set_experiment_tag(before.experiment_id, "mlflow.note.content", "mine")
    client().delete_experiment_tag(before.experiment_id, "mlflow.experimentKind")
    store.open_store()
    assert client().get_experiment_by_name("older").tags == {
        **store.EXPERIMENT_TAGS,
        "mlflow.note.content": "mine",
    }


def test_parent_is_closed_by_name_keeps_the_tables_and_is_reopened_by_the_next_job(monkeypatch):
    monkeypatch.setenv("STS_INVOCATION", "call-3")
    with tracking.run("child1", directory="child1"):
        pass
    parent = fetch("child1").data.tags["mlflow.parentRunId"]
    Path("tables").mkdir()
    Path("tables/main.md").write_text("a table")
    store.close_invocation("FINISHED", ["tables", "never made"])
    assert client().get_run(parent).info.status == "FINISHED"
    kept = client().download_artifacts(parent, "tables/main.md")
    assert Path(kept).read_text() == "a table"
    with tracking.run("child2", directory="child2"):
        assert client().get_run(parent).info.status == "RUNNING"
    store.close_invocation("FAILED")
    assert client().get_run(parent).info.status == "FAILED"


def test_off_and_other_ranks_leave_no_trace(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in (("STS_TRACKING", "off"), ("RANK", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with tracking.run("off", directory="off") as run:
                run.send()
                run.artifact("missing")
    assert list(tmp_path.iterdir()) == []


def test_reap_and_close_create_no_store(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STS_INVOCATION", "call-4")
    assert store.reap() == []
    store.close_invocation("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_the_address_of_the_runs_is_that_of_the_experiment(monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    arguments, address = store.ui_command(5007)
    experiment = client().get_experiment_by_name("another").experiment_id
    assert address.startswith(f"http://127.0.0.1:5007/#/experiments/{experiment}/runs?")
    assert arguments == ["-m", "mlflow", "ui", "--port", "5007"], "the store is in the environment"
    name = address.partition("viewStateShareKey=")[2]
    view = json.loads(client().get_experiment(experiment).tags[f"mlflow.sharedViewState.{name}"])
    [section] = view["compareRunSections"]
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} == {section["uuid"]}


def test_a_folder_of_any_name_has_a_store(tmp_path, monkeypatch):
    folder = tmp_path / "a?b=c#d%20e*[f] {g}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("plot.svg").touch()
    with tracking.run("odd", directory="odd") as run:
        run.artifact("plot.svg")
    assert fetch("odd").info.status == "FINISHED"
    assert {file.name for file in Path("results").iterdir()} == {
        "mlflow.db", "mlflow.lock", "mlflow-artifacts",
    }  # fmt: skip
    assert [*Path("results").rglob("plot.svg")] and [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize("uri", SECRET)
@pytest.mark.parametrize("verb", ["ui", "reap"])
def test_a_verb_that_needs_the_store_ends_in_a_line_without_its_password(
    verb, uri, monkeypatch, capfd
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main([verb]) == 2
    line = "".join(capfd.readouterr())
    assert line.startswith("environment: MLFLOW_TRACKING_URI: ") and line.count("\n") == 1
    assert "***" in line and not re.search("s(%40|@)cret", line)


def test_the_pages_are_served_of_the_store_that_the_environment_names(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execv", lambda *call: calls.append(call))
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "elsewhere")
    main(["ui"])
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == store.uri()
    assert store.uri() not in str(calls)
