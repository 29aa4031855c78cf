"""Verbs of MLflow's store: its pages, and runs that are to be closed."""

import os
import sys
from typing import Annotated, Literal

from sts.pipeline.command import option
from sts.pipeline.run import store


def ui(port: int = 5000) -> None:
    """Serve MLflow's pages, and say at which address the charts of the trainings are."""
    arguments, address = store.ui_command(port)
    print(f"The trainings: {address}", flush=True)
    if arguments:  # every user of the machine may read a command line
        os.environ["MLFLOW_BACKEND_STORE_URI"] = store.uri()
        os.execv(sys.executable, [sys.executable, *arguments])


def reap() -> None:
    """Close MLflow runs whose process has died."""
    for name in store.reap():
        print(name)


def close(
    status: Annotated[Literal["FINISHED", "FAILED", "KILLED"], option("how the call ended")],
    artifacts: Annotated[list[str], option("folders that the parent run keeps", "FOLDER ...")] = (),
) -> None:
    """End the MLflow run of this call of the pipeline (STS_INVOCATION)."""
    store.close_invocation(status, artifacts)
