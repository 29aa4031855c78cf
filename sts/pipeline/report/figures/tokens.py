"""The visual tokens that each compressor keeps, over a sample image."""

import base64
import io
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from sts.pipeline.files import read_json
from sts.pipeline.report.figures._shared import COLOURS, Labels

INPUTS = ("tokens",)


def draw(results: Path, labels: Labels) -> Figure:
    """Each compressor's tokens over a picture (tokens.json, see measure/kept_tokens.py).

    Averaging kinds show the area of each output, selecting kinds the patches that are left.
    """
    file = results / "tokens.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such result; run snakemake first")
    result = read_json(file)
    with Image.open(io.BytesIO(base64.b64decode(result["picture"]))) as image:
        picture = np.asarray(image) / 255
    kinds, grid = result["kinds"], result["grid"]
    columns = -(-len(kinds) // 2)
    page, panels = plt.subplots(2, columns, figsize=(1.8 * columns, 4.4))
    for axes in panels.flat[len(kinds) :]:
        axes.remove()
    for axes, (kind, outputs) in zip(panels.flat, kinds.items(), strict=False):
        weights = np.zeros((len(outputs), *grid))
        for of_output, output in zip(weights, outputs, strict=True):
            for token, weight in output:
                of_output.flat[token] = weight
        _draw_tokens(axes, picture, weights)
        axes.set_title(f"{kind}: {len(outputs)} tokens", fontsize=8)
        axes.set_axis_off()
    page.suptitle("Which visual tokens does each kind of VTC keep?")
    return page


def _draw_tokens(axes: Axes, picture: np.ndarray, weights: np.ndarray) -> None:
    """Draw a picture with a line around the area of each token; a patch in no output is faded.

    Args:
        axes: Where to draw.
        picture: [height, width, 3], 0 to 1.
        weights: [outputs, rows, columns], how much of each patch is in an output.
    """
    rows, columns = weights.shape[1:]
    owner = np.where(weights.any(axis=0), weights.argmax(axis=0), -1)  # [rows, columns]
    tall, wide = picture.shape[0] // rows, picture.shape[1] // columns
    is_kept = np.kron(owner >= 0, np.ones((tall, wide)))[..., None]
    axes.imshow(np.where(is_kept, picture, 0.15 * picture + 0.85), interpolation="nearest")
    framed = np.pad(owner, 1, constant_values=-1)
    above = np.argwhere(np.diff(framed[:, 1:-1], axis=0)) * (tall, wide)  # patches with a line
    left = np.argwhere(np.diff(framed[1:-1], axis=1)) * (tall, wide)
    lines = [[(x, y), (x + wide, y)] for y, x in above - 0.5]
    lines += [[(x, y), (x, y + tall)] for y, x in left - 0.5]
    axes.add_collection(LineCollection(lines, colors=COLOURS[3], linewidths=0.9))
