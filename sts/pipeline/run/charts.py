"""The page of MLflow that opens on charts of the trainings: a shared view, as its button *Share*
writes one into a tag of the experiment. Tried with MLflow 3.17; another version may show its own
charts instead."""

import json
from typing import Any

VIEW = "sts"  # name of the view in an address
METRICS = {
    "held_out_loss": "Held-out loss, nats per answer token",
    "loss": "Training loss",
    "tokens_per_s": "Tokens per second",
    "seconds": "Seconds of a step",
    "layers_run": "Decoder layers run",
    "keep_ratio": "Visual tokens kept",
}
COLUMNS = ("ablation", "seed", "stage")


def view_tag() -> dict[str, str]:
    """The tag of the experiment that holds the view."""
    return {f"mlflow.sharedViewState.{VIEW}": json.dumps(_view())}


def _view() -> dict[str, Any]:
    """All trainings, each a curve. Only an order that is not by date shows runs that are nested."""
    return {
        "searchFilter": "metrics.loss > 0",
        "orderByKey": "tags.`ablation`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*(f"tags.`{name}`" for name in COLUMNS), "attributes.`Duration`"],
        "compareRunSections": [
            {"uuid": VIEW, "name": "Training", "display": True, "isReordered": True}
        ],
        "compareRunCharts": [_chart(metric, title) for metric, title in METRICS.items()],
        "isAccordionReordered": True,  # else MLflow's own sections come first
        "hideEmptyCharts": True,
        "runsHiddenMode": "SHOWALL",
        "groupBy": None,
    }


def _chart(metric: str, title: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "uuid": f"{VIEW}-{metric}",
        "metricSectionId": VIEW,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "displayName": title,
        "xAxisKey": "step",
        "scaleType": "linear",
        "selectedXAxisMetricKey": "",
        "lineSmoothness": 0,
        "range": {},
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
        "ignoreOutliers": False,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
    }
