"""Visual token compression (VTC): fewer visual tokens, on tensors of [batch, tokens, dim].

Pure functions and a registry. A new kind is one function with the signature of those below and one
entry in COMPRESSORS. Formulas of the peers: average pooling (DeCo, M3 arXiv 2405.17430), random
(a strong baseline in UniPruneBench), attention to the class token (VisionZip arXiv 2412.04467).
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sts.schedule import annealing, expect, ramp


class Kind(NamedTuple):
    """How to compress: `function(tokens, keep, *, grid, scores, generator) -> (out, positions)`."""

    function: Callable[..., tuple[Tensor, Tensor]]
    needs_scores: bool = False  # a score per token, such as the attention the class token pays it
    averages: bool = False  # an output stands for several tokens, not for the one at its position


@lru_cache
def pooled_grid(height: int, width: int, keep: float) -> tuple[int, int]:
    """The (rows, columns) that [height, width] is pooled to so that about `keep` of it remains.

    Minimises the log error of the count plus a little (0.15) of the log distortion of the cells:
    12x12 of 24x24 at 1/4, and 2x3 rather than strips of 1x7 where 7 of 8x8 are asked for.
    """

    def cost(shape: tuple[int, int]) -> float:
        rows, columns = shape
        count = abs(math.log(rows * columns / (keep * height * width)))
        return count + 0.15 * abs(math.log(rows * width / (columns * height)))

    shapes = [(r, c) for r in range(1, height + 1) for c in range(1, width + 1)]
    return min(shapes, key=cost)


def _cell_centres(size: int, cells: int) -> Tensor:
    """The index nearest the middle of each adaptive pooling cell (the lower of two), [cells]."""
    cell = torch.arange(cells)
    start, end = cell * size // cells, -(-(cell + 1) * size // cells)
    return (start + end - 1) // 2


def avgpool2d(tokens: Tensor, keep: float, *, grid: tuple[int, int], **_) -> tuple[Tensor, Tensor]:
    """Adaptive 2-D average pooling; cells overlap by a row or column where the grid doesn't divide.

    A position is the original token nearest the centre of its cell.
    """
    (height, width), (rows, columns) = grid, pooled_grid(*grid, keep)
    image = tokens.transpose(1, 2).unflatten(2, (height, width))
    out = F.adaptive_avg_pool2d(image, (rows, columns)).flatten(2).transpose(1, 2)
    centres = _cell_centres(height, rows)[:, None] * width + _cell_centres(width, columns)
    return out, centres.flatten().to(tokens.device).expand(len(tokens), -1)


def _select(tokens: Tensor, keep: float, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of the highest scores [B, N], in their original order."""
    count = max(1, round(keep * tokens.shape[1]))
    positions = scores.topk(count, dim=1).indices.sort(dim=1).values.to(tokens.device)
    return tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[2])), positions


def random(
    tokens: Tensor, keep: float, *, generator: torch.Generator | None, **_
) -> tuple[Tensor, Tensor]:
    """A uniform sample without replacement, another one for each row, from `generator`."""
    expect(generator is not None, "generator", generator, "a torch.Generator for kind 'random'")
    device = generator.device  # drawn where the generator lives: a CPU one is the same everywhere
    return _select(tokens, keep, torch.rand(tokens.shape[:2], generator=generator, device=device))


def cls_topk(tokens: Tensor, keep: float, *, scores: Tensor, **_) -> tuple[Tensor, Tensor]:
    """The tokens that the class token attends to most."""
    return _select(tokens, keep, scores)


def none(tokens: Tensor, keep: float, **_) -> tuple[Tensor, Tensor]:
    """All tokens, whatever `keep` says."""
    everything = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens, everything.expand(len(tokens), -1)


COMPRESSORS: dict[str, Kind] = {
    "none": Kind(none),
    "avgpool2d": Kind(avgpool2d, averages=True),
    "random": Kind(random),
    "cls_topk": Kind(cls_topk, needs_scores=True),
}


def compress(
    kind: str,
    tokens: Tensor,
    keep: float,
    grid: tuple[int, int],
    *,
    scores: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Compress `tokens` [B, N, D] of a grid (h, w), N = h * w, to about `keep` of them.

    `scores` [B, N] where the kind needs them. Returns (out [B, k, D], positions [B, k]): positions
    are the original indices (long, ascending) that the outputs stand at. 1 <= k <= N; keep = 1
    returns `tokens` itself. Raises ValueError for an unknown kind, a keep outside (0, 1], a grid
    that is not N tokens, or scores that are missing or of another shape.
    """
    expect(kind in COMPRESSORS, "kind", kind, f"one of {', '.join(COMPRESSORS)}")
    expect(0 < keep <= 1, "keep", keep, "a number in (0, 1]")
    expect(
        tokens.ndim == 3 and grid[0] * grid[1] == tokens.shape[1],
        "grid",
        tuple(grid),
        f"height * width = tokens of [batch, tokens, dim] = {list(tokens.shape)}",
    )
    if keep == 1:
        return none(tokens, keep)
    if COMPRESSORS[kind].needs_scores:
        given = None if scores is None else list(scores.shape)
        expected = f"[batch, tokens] = {list(tokens.shape[:2])} for kind {kind!r}"
        expect(given == list(tokens.shape[:2]), "scores.shape", given, expected)
    return COMPRESSORS[kind].function(tokens, keep, grid=grid, scores=scores, generator=generator)


def keep_at(fraction: float, keep: float, schedule: str, anneal: float = 0.0) -> float:
    """The keep ratio in (0, 1] at a fraction of the stage: from `keep` to 1 by the schedule, or
    `keep` throughout (constant); 1 in the last `anneal` share."""
    expect(0 < keep <= 1, "keep", keep, "a number in (0, 1]")
    strength = ramp(fraction, schedule, constant=0.0)
    return 1.0 if annealing(fraction, anneal) else min(1.0, keep + (1 - keep) * strength)
