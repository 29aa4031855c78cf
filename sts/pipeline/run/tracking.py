"""MLflow as an exporter: a run for each job, under a parent run for each call of the pipeline.

    with tracking.run("sts/seed0/align", directory=d, rows=lambda: read_history(folder)) as job:
        job.send()  # at each checkpoint; the end does it by itself

The result files are the truth; MLflow is sent what it lacks of them, so that a run that was killed
and resumed has every step. Nothing here is needed for a result: whatever fails in MLflow gives one
warning and the job goes on. The store and the environment's variables are in store.py.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from numbers import Real
from pathlib import Path
from typing import Any

from sts.pipeline.run import store

COST = 0.01  # after an export of t seconds the next is t / COST seconds later or at the end
BATCH = 1000  # metrics that MLflow takes at once
RUN_ID_FILE = "mlflow_run_id"
TERMINATED = 128 + signal.SIGTERM  # exit status of a process that SIGTERM ended, as shells give it

Rows = Callable[[], Iterable[Mapping[str, Any]]]


@contextmanager
def run(
    name: str,
    *,
    directory: str | Path,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    rows: Rows = list,
) -> Iterator["Run"]:
    """Track the body of a `with` as one MLflow run.

    It ends as FINISHED, as KILLED on SIGTERM or Ctrl-C, else as FAILED. SIGTERM raises
    SystemExit(143) in the body, so that `finally` blocks run. Only rank 0 of a distributed job
    tracks. Lease the GPU first: naming it starts CUDA.

    Args:
        name: Name of the run.
        directory: Keeps the run's id. An interrupted run is opened again with its first params.
        params: Of the configuration; nested ones become dotted names.
        tags: What the job does; where it runs is added.
        rows: Reads all steps from the result files: a mapping each, with the same names, among
            them `step` and, if they are known, the `seconds` that it took.
    """
    with _terminable():
        job = Run(rows)
        status = "FAILED"
        try:
            if store.is_wanted():
                job._try(lambda: job._open(name, params or {}, tags or {}, Path(directory)))
            yield job
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except SystemExit as exit:
            status = {TERMINATED: "KILLED", None: "FINISHED", 0: "FINISHED"}.get(exit.code, status)
            raise
        finally:
            if job.id is not None:
                job._try(lambda: job._close(status))


class Run:
    """One tracked job. Get it from `run`; its methods never raise because of MLflow."""

    def __init__(self, rows: Rows) -> None:
        self.id: str | None = None
        self.rows = rows
        self._client: Any = None
        self._monitor: Any = None
        self._has_failed = False
        self._next_send = 0.0

    def send(self) -> None:
        """Send the steps that the MLflow run lacks.

        About 0.1 ms a metric. Where it is slow it is done more rarely: over a long job that is 1 %
        of its time at most. A store that comes back is sent every step.
        """
        if self.id is None or time.monotonic() < self._next_send:
            return
        started = time.monotonic()
        self._try(self._send)
        ended = time.monotonic()
        self._next_send = ended + (ended - started) / COST

    def artifact(self, path: str | Path) -> None:
        """Copy a file to the run's artifacts."""
        if self.id is not None:
            self._try(lambda: self._client.log_artifact(self.id, str(path)))

    def _try(self, action: Callable[[], Any]) -> None:
        self._has_failed |= not store.attempt(action, quiet=self._has_failed)  # one warning a run

    def _open(self, name: str, params: Mapping, tags: Mapping, directory: Path) -> None:
        client, experiment = store.open_store()  # sets up MLflow: its modules come after
        from mlflow.entities import Param, RunTag
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
        from pandas import json_normalize

        params = json_normalize(dict(params)).to_dict("records")[0]  # {"vtc.keep": 0.5}
        tags = {**store.process_tags(), **tags}
        if invocation := os.environ.get("STS_INVOCATION"):
            parent = store.parent_run(client, experiment, invocation)
            tags |= {"mlflow.parentRunId": parent, store.INVOCATION_TAG: invocation}
        unfinished = _unfinished(client, directory)
        self.id = unfinished or client.create_run(experiment, run_name=name).info.run_id
        self._client = client
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RUN_ID_FILE).write_text(self.id + "\n", encoding="utf-8")
        client.update_run(self.id, status="RUNNING")
        client.log_batch(
            self.id,
            tags=[RunTag(key, str(value)) for key, value in tags.items()],
            params=[] if unfinished else [Param(key, str(params[key])) for key in params],
        )
        address = store.uri()
        self._monitor = SystemMetricsMonitor(self.id, resume_logging=True, tracking_uri=address)
        self._monitor.start()

    def _send(self) -> None:
        from mlflow.entities import Metric

        try:
            metrics = [Metric(*values) for values in _timed(list(self.rows()))]
        except FileNotFoundError:  # the job ended before its first result
            return
        if not metrics:
            return
        sent = {m.step for m in self._client.get_metric_history(self.id, metrics[-1].key)}
        batch: list[Any] = []
        missing = (metric for metric in metrics if metric.step not in sent)
        for _, step in groupby(missing, key=lambda metric: metric.step):
            row = list(step)
            if len(batch) + len(row) > BATCH:  # a step is sent as a whole
                self._client.log_batch(self.id, metrics=batch)
                batch = []
            batch += row
        self._client.log_batch(self.id, metrics=batch)

    def _close(self, status: str) -> None:
        # the status first: if the store does not answer, the rest is not tried and costs no time
        self._client.set_terminated(self.id, status)
        self._send()
        if self._monitor is not None:
            self._monitor.finish()


def _timed(rows: list[Mapping[str, Any]]) -> Iterator[tuple[str, float, int, int]]:
    """(name, value, time in ms, step) of each number in the rows; the last row is of now."""
    milliseconds = 1000 * (time.time() - sum(row.get("seconds", 0.0) for row in rows))
    for row in rows:
        milliseconds += 1000 * row.get("seconds", 0.0)
        for key, value in row.items():
            if key != "step" and isinstance(value, Real):
                yield key, float(value), int(milliseconds), row["step"]


def _unfinished(client: Any, directory: Path) -> str | None:
    """The run that `directory` remembers, if the store knows it and it did not finish."""
    from mlflow.exceptions import MlflowException

    file = directory / RUN_ID_FILE
    if not file.exists():
        return None
    run_id = file.read_text(encoding="utf-8").strip()
    try:
        status = client.get_run(run_id).info.status
    except MlflowException:  # another store than last time
        return None
    return None if status == "FINISHED" else run_id


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit(143), once; the old handler comes back after."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the closing short
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
