"""Figures from result files, as SVG and PNG; a figure is a file of this folder.

    python -m sts figure --name pareto --results results/mini --ablations dense vtc lds sts \
        --out-stem results/mini/figures/pareto

A new figure is a file with

    INPUTS = ("runs",)      the results that it reads, as the workflow names them: `runs` (the
                            histories of the trainings), `eval`, `bench`, `tokens`
    def draw(results: Path, labels: Labels) -> Figure

The same results give the same SVG, byte by byte.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from matplotlib import pyplot as plt

from sts.pipeline.plan import figures
from sts.pipeline.report.figures._shared import STYLE
from sts.pipeline.report.labels import Labels, label_by_id, of_figure


def figure(
    name: str,
    results: str | Path,
    ablations: Sequence[str],
    out_stem: str | Path,
    labels: Labels | None = None,
) -> None:
    """Draw a figure and write `out_stem`.svg and .png.

    Args:
        name: A file of this folder.
        results: Folder of a scale's results.
        ablations: The methods to show, in this order.
        labels: Their names, by default their ids.

    Raises:
        KeyError: There is no such figure.
        FileNotFoundError: A result is missing; the message names it.
    """
    if name not in figures():
        raise KeyError(f"figure {name!r}: expected one of {', '.join(figures())}")
    stem = Path(out_stem)
    names = {id: of_figure(label) for id, label in label_by_id(ablations, labels).items()}
    stem.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        page = import_module(f"{__name__}.{name}").draw(Path(results), names)
        page.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        page.savefig(stem.with_suffix(".png"), metadata={"Software": None})
        plt.close(page)
