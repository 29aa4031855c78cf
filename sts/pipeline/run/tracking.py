"""MLflow: one run per job, under one parent run per call of the pipeline.

    with tracking.run("train sts seed 0", params=config, tags={"stage": "align"}, directory=d) as r:
        r.log({"loss": 1.2}, step=10)
        r.artifact("loss.png")

Nothing here is needed for a result: whatever fails in MLflow gives one warning and the job goes
on. What the environment says:

    MLFLOW_TRACKING_URI     the store; default sqlite, `results/mlflow.db` in the working directory
    MLFLOW_EXPERIMENT_NAME  the experiment; default `sts`
    STS_INVOCATION          name of this call of the pipeline; jobs that share it share a parent run
    STS_TRACKING=off        no tracking at all

MLflow takes seconds to import, so functions import it when they need it: a job with tracking
switched off, or the command line's help, should not wait.

MLflow's own asynchronous logging is not used, for it drops what it could not write: of 2121 steps
980 were left after a server was away for a while, where the batches here kept all. It also wrote
33 lines of errors, 315 on a full disk, and waited as long for a server that hangs.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from filelock import FileLock

from sts.pipeline.run import provenance

FLUSH_SECONDS = 10.0
COST = 0.01  # a write that took t seconds is followed by t / COST seconds without one
RUN_ID_FILE = "mlflow_run_id"
INVOCATION_TAG = "sts.invocation"
TERMINATED = 128 + signal.SIGTERM  # exit status of a process that SIGTERM ended, as shells give it

log = logging.getLogger(__name__)

NOTE = """\
A row is one call of the pipeline: + beside it shows its jobs. Columns chooses what is shown.

| tag | what it says of a job |
|---|---|
| `ablation`, `seed`, `stage` | what it did; `evaluate` is a stage, too |
| `config` | hash of the whole configuration |
| `data`, `weights` | the data sets it trained on, hash of the weights it measured |
| `key` | hash of all that a training depends on |
| `reused` | `True` if weights of that key were there and nothing was trained |
| `git.commit`, `git.dirty` | the code, and whether files differed from the commit |
| `hardware`, `host`, `pid`, `process.start` | where it ran |
| `sts.invocation` | the call of the pipeline; its own run has `sts.parent` |

To compare methods, filter by `tags.stage = 'evaluate'` and show the tags `ablation` and `seed` and
the metrics `<benchmark>.score` and `<benchmark>.blind`. Of a training show `loss`, `tokens_per_s`,
`keep_ratio`, `layers_run`, `flops` and `peak_mem_mb`.
"""
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": NOTE,
}


@contextmanager
def run(
    name: str,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    directory: str | Path,
) -> Iterator["Run"]:
    """Track the body of a `with` as one MLflow run.

    The run's id is kept in `directory`; an interrupted run found there is opened again, with the
    params it began with. Nested params become dotted names. It ends as FINISHED, as KILLED on
    SIGTERM or Ctrl-C, else as FAILED. SIGTERM raises SystemExit(143) in the body, so that `finally`
    blocks run. Only rank 0 of a distributed job tracks. Lease the GPU first: naming it starts CUDA.
    """
    with _terminable():
        tracked = Run()
        status = "FAILED"
        try:
            if _wanted():
                tracked._try(lambda: tracked._open(name, params or {}, tags or {}, Path(directory)))
            yield tracked
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except SystemExit as exit:
            status = {TERMINATED: "KILLED", None: "FINISHED", 0: "FINISHED"}.get(exit.code, status)
            raise
        finally:
            if tracked.id is not None:
                tracked._try(lambda: tracked._close(status))


class Run:
    """One tracked job. Get it from `run`; its methods never raise because of MLflow."""

    def __init__(self) -> None:
        self.id: str | None = None
        self._client: Any = None
        self._monitor: Any = None
        self._metrics: list[tuple[str, float, int, int]] = []
        self._failed = False
        self._next_flush = time.monotonic() + FLUSH_SECONDS

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Note metrics of an optimizer step; what is not a number is left out.

        They are written in batches, about 0.1 ms a metric, rarer where writing is slow: over a long
        job that is 1 % of its time at most. What could not be written waits in memory for the next
        batch, so a store that comes back gets every metric.
        """
        if self.id is None:
            return
        now = int(time.time() * 1000)
        for key, value in metrics.items():
            if isinstance(value, Real):
                self._metrics.append((key, float(value), now, step))
        if time.monotonic() > self._next_flush:
            started = time.monotonic()
            self._try(self._flush)
            ended = time.monotonic()
            self._next_flush = ended + max(FLUSH_SECONDS, (ended - started) / COST)

    def artifact(self, path: str | Path) -> None:
        """Copy a file to the run's artifacts."""
        if self.id is not None:
            self._try(lambda: self._client.log_artifact(self.id, str(path)))

    def _try(self, action: Callable[[], Any]) -> None:
        self._failed |= not _attempt(action, quiet=self._failed)  # one warning a run

    def _open(self, name: str, params: Mapping, tags: Mapping, directory: Path) -> None:
        client, experiment = _store()  # sets up MLflow: its modules come after
        from mlflow.entities import Param, RunTag
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        tags = {**_process_tags(), **tags}
        if invocation := os.environ.get("STS_INVOCATION"):
            parent = _parent(client, experiment, invocation)
            tags |= {"mlflow.parentRunId": parent, INVOCATION_TAG: invocation}
        known = _interrupted(client, directory)
        self.id = known or client.create_run(experiment, run_name=name).info.run_id
        self._client = client
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RUN_ID_FILE).write_text(self.id + "\n", encoding="utf-8")
        client.update_run(self.id, status="RUNNING")
        client.log_batch(
            self.id,
            tags=[RunTag(key, str(value)) for key, value in tags.items()],
            params=[] if known else [Param(k, str(value)) for k, value in _flat(params).items()],
        )
        self._monitor = SystemMetricsMonitor(self.id, resume_logging=True, tracking_uri=_uri())
        self._monitor.start()

    def _flush(self) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self.id, metrics=[Metric(*metric) for metric in self._metrics])
        self._metrics.clear()

    def _close(self, status: str) -> None:
        # the status first: if the store does not answer, the rest is not tried and costs no time
        self._client.set_terminated(self.id, status)
        self._flush()
        if self._monitor is not None:
            self._monitor.finish()


def _attempt(action: Callable[[], Any], quiet: bool = False) -> bool:
    """Whether `action` went through; whatever a store or a server does, the job goes on."""
    try:
        action()
    except Exception as error:
        if not quiet:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            store = _uri().rpartition("@")[2]  # without a password
            log.warning("MLflow at %s failed, the job goes on without it: %s", store, reason)
        return False
    return True


def ui_command(port: int) -> tuple[list[str], str]:
    """The command that serves MLflow's pages of the store, and the address of our runs there.

    A store that is a server has its pages: the command is empty. MLflow 3.17 opens an experiment on
    an empty page of GenAI traces, whatever its kind says, unless the address names the runs or
    "Model training" was chosen in this browser.
    """
    _, experiment = _store()
    page = f"#/experiments/{experiment}/runs?workflowType=machine_learning"
    if _uri().startswith("http"):
        return [], f"{_uri().rstrip('/')}/{page}"
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", _uri()]
    return [*command, "--port", str(port)], f"http://127.0.0.1:{port}/{page}"


def reap() -> list[str]:
    """Set runs that say RUNNING though their process died to KILLED; return their names.

    Looks at processes of this host only. A parent is closed once none of its jobs runs; the next
    job of the same call, if there is one, opens it again.
    """
    if not _wanted() or not _exists():
        return []
    client, experiment = _store()
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=50_000)
    jobs = [r for r in running if "host" in r.data.tags]
    dead = [r for r in jobs if _is_dead(r.data.tags)]
    alive = {r.data.tags.get("mlflow.parentRunId") for r in jobs if r not in dead}
    parents = [r for r in running if "host" not in r.data.tags and r.info.run_id not in alive]
    for gone in dead + parents:
        client.set_terminated(gone.info.run_id, "KILLED")
    return [gone.info.run_name for gone in dead + parents]


def close_invocation(status: str, artifacts: Sequence[str | Path] = ()) -> None:
    """End this call's parent run: FINISHED, FAILED or KILLED, with copies of the folders
    `artifacts` that exist. Does nothing if no job opened it."""
    invocation = os.environ.get("STS_INVOCATION")
    if not invocation or not _wanted() or not _exists():
        return

    def close() -> None:
        client, experiment = _store()
        for parent in _parents(client, experiment, invocation):
            for folder in filter(Path.is_dir, map(Path, artifacts)):
                client.log_artifacts(parent.info.run_id, str(folder), folder.name)
            client.set_terminated(parent.info.run_id, status)

    _attempt(close)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) in the main thread, once; the old handler comes back after."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread only
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the closing short
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wanted() -> bool:
    return os.environ.get("STS_TRACKING") != "off" and os.environ.get("RANK", "0") == "0"


def _uri() -> str:
    default = f"sqlite:///{Path.cwd() / 'results' / 'mlflow.db'}"
    return os.environ.get("MLFLOW_TRACKING_URI") or default


def _database() -> Path | None:
    """The file of an sqlite store, None for any other store."""
    kind, _, path = _uri().partition(":///")
    return Path(path).absolute() if kind == "sqlite" else None


def _folder() -> Path:
    """Where the lock lies, and the artifacts of an sqlite store."""
    database = _database()
    return database.parent if database else Path.cwd() / "results"


def _exists() -> bool:
    database = _database()
    return database is None or database.exists()


def _lock() -> FileLock:
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "mlflow.lock", timeout=120)


def _store() -> tuple[Any, str]:
    """Client and experiment id; makes what is missing of database, experiment and its tags.

    One process at a time: MLflow corrupts an sqlite store that two processes create together. The
    database is made under another name, so that it is either whole or not there.
    """
    mlflow = _mlflow()
    database = _database()
    with _lock():
        if database and not database.exists():
            part = database.with_name(f"{database.name}.part")
            part.unlink(missing_ok=True)
            mlflow.MlflowClient(f"sqlite:///{part}").search_experiments()
            part.rename(database)
        client = mlflow.MlflowClient(_uri())
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "sts")
        known = client.get_experiment_by_name(name)
        artifacts = str(_folder() / "mlflow-artifacts") if database else None
        experiment = known.experiment_id if known else client.create_experiment(name, artifacts)
        for key, value in EXPERIMENT_TAGS.items():
            if known is None or key not in known.tags:  # what a user wrote stays
                client.set_experiment_tag(experiment, key, value)
        return client, experiment


def _parent(client: Any, experiment: str, invocation: str) -> str:
    """Id of the run of this call of the pipeline, made or opened again."""
    with _lock():
        for found in _parents(client, experiment, invocation):
            if found.info.status != "RUNNING":
                client.update_run(found.info.run_id, status="RUNNING")
            return found.info.run_id
        tags = {INVOCATION_TAG: invocation, "sts.parent": "true", **_git_tags()}
        return client.create_run(experiment, run_name=invocation, tags=tags).info.run_id


def _parents(client: Any, experiment: str, invocation: str) -> list[Any]:
    tags = f"tags.`{INVOCATION_TAG}` = '{invocation}' and tags.`sts.parent` = 'true'"
    return client.search_runs([experiment], tags)


def _mlflow() -> Any:
    """Import MLflow with its log, usage reports and long retries off.

    One retry opens a connection anew that the server has dropped. What the libraries tell of a
    failure, at length and more than once, is left to `_attempt`.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    import mlflow

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(os.environ.get("MLFLOW_LOGGING_LEVEL", "CRITICAL"))
    return mlflow


def _interrupted(client: Any, directory: Path) -> str | None:
    """The run that `directory` remembers, if the store knows it and it did not finish."""
    from mlflow.exceptions import MlflowException

    file = directory / RUN_ID_FILE
    if not file.exists():
        return None
    run_id = file.read_text(encoding="utf-8").strip()
    try:
        known = client.get_run(run_id)
    except MlflowException:  # another store than last time
        return None
    return None if known.info.status == "FINISHED" else run_id


def _flat(params: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level: {"vtc": {"keep": 0.5}} gives {"vtc.keep": 0.5}."""
    flat = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _git_tags() -> dict[str, Any]:
    git = provenance.git()
    commit = git["commit"] or "unknown"
    return {"mlflow.source.git.commit": commit, "git.commit": commit, "git.dirty": git["dirty"]}


def _process_tags() -> dict[str, Any]:
    import psutil

    hardware = provenance.hardware()
    return {
        **_git_tags(),
        "hardware": ", ".join(hardware["gpus"] or [f"{hardware['cores']} x {hardware['cpu']}"]),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process.start": psutil.Process().create_time(),
    }


def _is_dead(tags: Mapping[str, str]) -> bool:
    import psutil

    if tags["host"] != socket.gethostname():
        return False
    try:
        started = psutil.Process(int(tags["pid"])).create_time()
    except psutil.NoSuchProcess:
        return True
    return abs(started - float(tags["process.start"])) > 2  # another process has the number now
