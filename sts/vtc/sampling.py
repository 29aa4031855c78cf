"""Kinds that select tokens and leave them as they are.

The paper (arXiv 2509.18150) names `uniform` and `random`; `cls_topk` and `diverse` are
alternatives.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from sts.vtc import Outputs
from sts.vtc._shared import DISTORTION, count_of, crossings, directions, products, select


def uniform(tokens: Tensor, keep: float, *, grid: tuple[int, int]) -> Outputs:
    """Every r-th row and every c-th column of the grid, by fixed strides: the paper's "Uniform".

    The first kept row is the middle one of the first r rows. Of a grid of one row, a sequence,
    every c-th token stays. Strides are whole numbers, so the keep ratio is about 1 / (r c): of
    24x24 tokens 1/2, 1/4, 1/6 or 1/9 can stay, and 0.4 keeps 1/2. Report the keep ratio of the
    outputs.
    """
    rows, columns = (
        torch.arange(_first(stride), size, stride)
        for size, stride in zip(grid, strides(*grid, keep), strict=True)
    )
    return select(crossings(tokens, grid[1], rows, columns))


@lru_cache(maxsize=4096)
def strides(height: int, width: int, keep: float) -> tuple[int, int]:
    """The strides (of rows, of columns) that keep about `keep` of a grid's tokens.

    Minimises |log of the count's error| + DISTORTION * |log of the strides' ratio|.
    """

    def cost(stride: tuple[int, int]) -> float:
        rows, columns = (
            len(range(_first(s), size, s)) for size, s in zip((height, width), stride, strict=True)
        )
        count = abs(math.log(rows * columns / (keep * height * width)))
        return count + DISTORTION * abs(math.log(stride[0]) - math.log(stride[1]))

    candidates = [(r, c) for r in range(1, height + 1) for c in range(1, width + 1)]
    return min(candidates, key=cost)


def _first(stride: int) -> int:
    """The middle (the lower of two) of the first `stride` indexes."""
    return (stride - 1) // 2


def random(tokens: Tensor, keep: float, *, generator: torch.Generator) -> Outputs:
    """A uniform sample without replacement, drawn anew for each row: the paper's "Random"."""
    device = generator.device  # a draw of a CPU generator is the same on every machine
    draws = torch.rand(tokens.shape[:2], generator=generator, device=device).to(tokens.device)
    return select(draws.topk(count_of(tokens, keep), dim=1).indices)


def cls_topk(tokens: Tensor, keep: float, *, scores: Tensor) -> Outputs:
    """The tokens that the class token attends to most."""
    return select(scores.topk(count_of(tokens, keep), dim=1).indices)


def diverse(tokens: Tensor, keep: float) -> Outputs:
    """The tokens least like each other: greedy max-min of the distance 1 - cosine.

    DivPrune (arXiv 2503.02175): begin with the token farthest from its nearest neighbour, then
    always add the token farthest from all that are chosen.
    """
    unit = directions(tokens)
    distance = 1 - products(unit, unit)
    length = tokens.shape[1]
    nearest = distance + torch.diag(torch.full((length,), math.inf)).to(distance)
    chosen = [nearest.amin(2).argmax(1)]
    best = distance.new_full(distance.shape[:2], math.inf)
    for _step in range(1, count_of(tokens, keep)):
        newest = chosen[-1][:, None]
        best = torch.minimum(best, distance.take_along_dim(newest[..., None], 1)[:, 0])
        best = best.scatter(1, newest, -math.inf)  # never twice
        chosen.append(best.argmax(1))
    return select(torch.stack(chosen, 1))
