"""Kinds that select tokens and leave them as they are.

The paper (arXiv 2509.18150) names `uniform` and `random`; `cls_topk` and `diverse` are alternatives
beside them.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from sts.vtc import Outputs
from sts.vtc._shared import DISTORTION, count_of, crossings, directions, products, select


def uniform(tokens: Tensor, keep: float, *, grid: tuple[int, int]) -> Outputs:
    """Every r-th row and c-th column of the grid, by fixed strides: the paper's "Uniform".

    A grid of one row is a sequence, of which every c-th token remains. The first kept row is the
    middle one of the first r. Strides are whole, so about 1 / (r c) of the tokens remain, whatever
    lies between: 1/4, 1/2, 1/6 and 1/9 of 24x24 can be had, and 0.4 gives 1/2. The ratio to
    report is the one of the outputs.
    """
    rows, columns = (
        torch.arange(_first(stride), size, stride)
        for size, stride in zip(grid, strides(*grid, keep), strict=True)
    )
    return select(crossings(tokens, grid[1], rows, columns))


@lru_cache(maxsize=4096)
def strides(height: int, width: int, keep: float) -> tuple[int, int]:
    """The strides (of rows, of columns) that leave about `keep` of a grid.

    Minimises the log error of the count plus a little of the log of how unlike the two strides are.
    """

    def cost(stride: tuple[int, int]) -> float:
        rows, columns = (
            len(range(_first(s), size, s)) for size, s in zip((height, width), stride, strict=True)
        )
        count = abs(math.log(rows * columns / (keep * height * width)))
        return count + DISTORTION * abs(math.log(stride[0]) - math.log(stride[1]))

    every = [(r, c) for r in range(1, height + 1) for c in range(1, width + 1)]
    return min(every, key=cost)


def _first(stride: int) -> int:
    """The middle one of the first `stride` (the lower of two)."""
    return (stride - 1) // 2


def random(tokens: Tensor, keep: float, *, generator: torch.Generator) -> Outputs:
    """A uniform sample without replacement, another one for each row, from `generator`: the paper's
    "Random", and a strong baseline in UniPruneBench."""
    device = generator.device  # drawn where the generator lives: a CPU one is the same everywhere
    draws = torch.rand(tokens.shape[:2], generator=generator, device=device).to(tokens.device)
    return select(draws.topk(count_of(tokens, keep), dim=1).indices)


def cls_topk(tokens: Tensor, keep: float, *, scores: Tensor) -> Outputs:
    """The tokens that the class token attends to most."""
    return select(scores.topk(count_of(tokens, keep), dim=1).indices)


def diverse(tokens: Tensor, keep: float) -> Outputs:
    """The tokens least like one another: greedy max-min of 1 - cosine.

    DivPrune (arXiv 2503.02175): begin with the token farthest from its nearest neighbour, then
    always add the one farthest from those chosen.
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
