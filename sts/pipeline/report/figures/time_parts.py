"""Where the time of a training step goes, a bar for each method."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sts.pipeline.files import read_json
from sts.pipeline.report.figures._shared import COLOURS, Labels

INPUTS = ("bench",)


def draw(results: Path, labels: Labels) -> Figure:
    """Mean seconds of each part of a step (measure/parts.py), a panel for each stage.

    A timing of before there were parts, and a stage that a method has not, are n/a.
    """
    file = results / "bench" / "main.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such result; run snakemake first")
    timed = read_json(file)["variants"]
    stages = list(dict.fromkeys(stage for id in labels for stage in timed[id]["flops"]))
    size = (3.2 * len(stages) + 1.5, 0.3 * len(labels) + 1.3)
    page, panels = plt.subplots(1, len(stages), figsize=size, sharey=True, squeeze=False)
    for axes, stage in zip(panels[0], stages, strict=True):
        for place, id in enumerate(labels):
            parts, left = timed[id].get(stage, {}).get("parts_s"), 0.0
            if parts is None:
                axes.text(0, place, " n/a", va="center")
                continue
            for colour, (name, seconds) in zip(COLOURS[1:], parts.items(), strict=False):
                mean = float(np.mean(seconds))
                axes.barh(place, mean, left=left, color=colour, label=name)
                left += mean
        axes.set(title=stage.replace("_", " ").capitalize(), xlabel="seconds of a step")
        axes.set_yticks(range(len(labels)), labels.values())
    panels[0][0].invert_yaxis()
    page.suptitle("Where does the time of a step go?")
    handles = {}
    for axes in panels[0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        page.legend(handles.values(), handles, loc="outside lower center", ncols=5)
    return page
