"""MLflow's store: where it is, the experiment in it, and the run of each call of the pipeline.

    MLFLOW_TRACKING_URI     the store; default sqlite, `results/mlflow.db` in the working directory
    MLFLOW_EXPERIMENT_NAME  the experiment; default `sts`
    STS_INVOCATION          name of this call of the pipeline; jobs that share it share a parent run
    STS_TRACKING=off        no tracking at all

MLflow takes seconds to import, so functions import it when they need it.
"""

import logging
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from filelock import FileLock

from sts.pipeline.config import ConfigError
from sts.pipeline.run import provenance
from sts.pipeline.run.charts import VIEW, view_tag

INVOCATION_TAG = "sts.invocation"

log = logging.getLogger(__name__)

NOTE = """\
A row is one call of the pipeline: + beside it shows its jobs. Columns chooses what is shown;
docs/tracking.md says what the tags mean.

To compare methods, filter by `tags.stage = 'evaluate'` and show the tags `ablation` and `seed` and
the metrics `<benchmark>.score` and `<benchmark>.blind`. Of a training show `loss`, `tokens_per_s`,
`mfu` (of known GPUs), `keep_ratio`, `layers_run`, `flops` and `peak_mem_mb`.
"""
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": NOTE,
    **view_tag(),
}


def is_wanted() -> bool:
    """Whether this process tracks: the first of its job does, unless it is switched off."""
    return os.environ.get("STS_TRACKING") != "off" and os.environ.get("RANK", "0") == "0"


def uri() -> str:
    """Address of the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _sqlite(Path.cwd() / "results" / "mlflow.db")


def _sqlite(file: Path) -> str:
    """Address of a database. What follows a ? would be taken for options."""
    return f"sqlite:///{os.path.relpath(file) if '?' in str(file) else file}"


def database() -> Path | None:
    """The file of an sqlite store, None for any other store."""
    kind, _, path = uri().partition(":///")
    return Path(path).absolute() if kind == "sqlite" else None


def attempt(action: Callable[[], Any], quiet: bool = False) -> bool:
    """Whether `action` went through. Whatever a store or a server does, the job goes on; it is
    warned of unless `quiet`."""
    try:
        action()
        return True
    except Exception as error:
        if not quiet:
            text = "MLflow at %s failed, the job goes on without it: %s"
            log.warning(text, without_secrets(uri()), _reason(error))
        return False


def insist(action: Callable[[], Any]) -> Any:
    """What `action` returns; for verbs that are of no use without a store. Raises ConfigError."""
    try:
        return action()
    except Exception as error:
        accepted = f"a store that answers ({_reason(error)})"
    raise ConfigError("environment", "MLFLOW_TRACKING_URI", without_secrets(uri()), accepted)


def _reason(error: Exception) -> str:
    return without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])


def without_secrets(text: str) -> str:
    """A text in which *** stands for the password, or the token, of the store's address."""
    address, _, query = uri().partition("?")
    user, _, password = address.partition("//")[2].rpartition("@")[0].partition(":")
    values = re.findall("(?:pass|token|secret)[^=&]*=([^&]*)", query)
    values += [password or (user if address.startswith("http") else "")]
    for value in filter(None, [*values, *map(unquote, values)]):
        text = text.replace(value, "***")
    return text


def load_mlflow() -> Any:
    """Import MLflow with its log, usage reports and long retries off.

    One retry opens a connection anew that the server has dropped. What the libraries tell of a
    failure, at length and more than once, is left to `attempt`.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    import mlflow

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(os.environ.get("MLFLOW_LOGGING_LEVEL", "CRITICAL"))
    return mlflow


def open_store() -> tuple[Any, str]:
    """Client and experiment id; makes what is missing of database, experiment and its tags.

    One process at a time: MLflow corrupts an sqlite store that two processes create together. The
    database is made under another name, so that it is either whole or not there.
    """
    mlflow, file = load_mlflow(), database()
    with _lock():
        if file and not file.exists():
            part = file.with_name(f"{file.name}.part")
            part.unlink(missing_ok=True)
            mlflow.MlflowClient(_sqlite(part)).search_experiments()
            part.rename(file)
        client = mlflow.MlflowClient(uri())
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "sts")
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            artifacts = (file.parent / "mlflow-artifacts").as_uri() if file else None
            experiment = client.get_experiment(client.create_experiment(name, artifacts))
        for key in EXPERIMENT_TAGS.keys() - experiment.tags.keys():  # what a user wrote stays
            client.set_experiment_tag(experiment.experiment_id, key, EXPERIMENT_TAGS[key])
        return client, experiment.experiment_id


def _lock() -> FileLock:
    file = database()
    folder = file.parent if file else Path.cwd() / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "mlflow.lock", timeout=120)


def parent_run(client: Any, experiment: str, invocation: str) -> str:
    """Id of the run of this call of the pipeline, made or opened again."""
    with _lock():
        for parent in _parents(client, experiment, invocation):
            if parent.info.status != "RUNNING":
                client.update_run(parent.info.run_id, status="RUNNING")
            return parent.info.run_id
        tags = {INVOCATION_TAG: invocation, "sts.parent": "true", **git_tags()}
        return client.create_run(experiment, run_name=invocation, tags=tags).info.run_id


def _parents(client: Any, experiment: str, invocation: str) -> list[Any]:
    tags = f"tags.`{INVOCATION_TAG}` = '{invocation}' and tags.`sts.parent` = 'true'"
    return client.search_runs([experiment], tags)


def git_tags() -> dict[str, Any]:
    """The code, as tags of a run."""
    git = provenance.git()
    commit = git["commit"] or "unknown"
    return {"mlflow.source.git.commit": commit, "git.commit": commit, "git.dirty": git["dirty"]}


def process_tags() -> dict[str, Any]:
    """This process, its machine and its code, as tags of a run."""
    import psutil

    hardware = provenance.hardware()
    return {
        **git_tags(),
        "hardware": ", ".join(hardware["gpus"] or [f"{hardware['cores']} x {hardware['cpu']}"]),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process.start": psutil.Process().create_time(),
    }


def _is_dead(tags: Mapping[str, str]) -> bool:
    """Whether the process with these tags was one of this host and has ended."""
    import psutil

    if tags["host"] != socket.gethostname():
        return False
    try:
        started = psutil.Process(int(tags["pid"])).create_time()
    except psutil.NoSuchProcess:
        return True
    return abs(started - float(tags["process.start"])) > 2  # another process has the number now


def _is_there() -> bool:
    file = database()
    return is_wanted() and (file is None or file.exists())


def reap() -> list[str]:
    """Set runs that say RUNNING though their process died to KILLED; return their names.

    Looks at processes of this host only. A parent is closed once none of its jobs runs; the next
    job of the same call, if there is one, opens it again. Raises ConfigError if the store fails.
    """
    return insist(_reaped) if _is_there() else []


def _reaped() -> list[str]:
    client, experiment = open_store()
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=50_000)
    jobs = [run for run in running if "host" in run.data.tags]  # which a parent has not
    dead = [run for run in jobs if _is_dead(run.data.tags)]
    alive = {run.data.tags.get("mlflow.parentRunId") for run in jobs if run not in dead}
    dead += [run for run in running if run not in jobs and run.info.run_id not in alive]
    for run in dead:
        client.set_terminated(run.info.run_id, "KILLED")
    return [run.info.run_name for run in dead]


def close_invocation(status: str, artifacts: Sequence[str | Path] = ()) -> None:
    """End this call's parent run: FINISHED, FAILED or KILLED, with copies of the folders
    `artifacts` that exist. Does nothing if no job opened it."""
    invocation = os.environ.get("STS_INVOCATION")

    def close() -> None:
        client, experiment = open_store()
        for parent in _parents(client, experiment, invocation):
            for folder in filter(Path.is_dir, map(Path, artifacts)):
                client.log_artifacts(parent.info.run_id, str(folder), folder.name)
            client.set_terminated(parent.info.run_id, status)

    if invocation and _is_there():
        attempt(close)


def ui_command(port: int) -> tuple[list[str], str]:
    """The arguments of `python` that serve MLflow's pages of the store, by the variable
    MLFLOW_BACKEND_STORE_URI, and the address of charts of our trainings there. Raises ConfigError.

    A store that is a server has its pages: there are no arguments. MLflow 3.17 opens an experiment
    on an empty page of GenAI traces, whatever its kind says, unless the address names the runs or
    "Model training" was chosen in this browser.
    """
    _, experiment = insist(open_store)
    page = f"#/experiments/{experiment}/runs?workflowType=machine_learning"
    page += f"&compareRunsMode=CHART&viewStateShareKey={VIEW}"
    if uri().startswith("http"):
        return [], f"{without_secrets(uri()).rstrip('/')}/{page}"
    return ["-m", "mlflow", "ui", "--port", str(port)], f"http://127.0.0.1:{port}/{page}"
