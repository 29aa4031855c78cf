"""What several kinds use: counts, grids, and the outputs of selecting and of merging tokens."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from sts.vtc import Outputs

DISTORTION = 0.15  # of the cells, in logs, that is as bad as one of the count


def count_of(tokens: Tensor, keep: float) -> int:
    """The number of tokens [B, N, D] that `keep` of them is: at least one."""
    return max(1, round(keep * tokens.shape[1]))


@lru_cache(maxsize=4096)  # a schedule asks for another keep each step, a batch for many grids
def pooled_grid(height: int, width: int, keep: float) -> tuple[int, int]:
    """The (rows, columns) that [height, width] is pooled to so that about `keep` of it remains.

    Minimises the log error of the count plus a little of the log distortion of the cells: 12x12 of
    24x24 at 1/4, and 2x3 rather than strips of 1x7 where 7 of 8x8 are asked for.
    """

    def cost(shape: tuple[int, int]) -> float:
        rows, columns = shape
        count = abs(math.log(rows * columns / (keep * height * width)))
        return count + DISTORTION * abs(math.log(rows * width / (columns * height)))

    shapes = [(r, c) for r in range(1, height + 1) for c in range(1, width + 1)]
    return min(shapes, key=cost)


def cell_bounds(size: int, cells: int) -> tuple[Tensor, Tensor]:
    """First index of each adaptive pooling cell, and the one after its last, [cells] each."""
    cell = torch.arange(cells)
    return cell * size // cells, -(-(cell + 1) * size // cells)


def cell_centres(size: int, cells: int) -> Tensor:
    """The index nearest the middle of each adaptive pooling cell (the lower of two), [cells]."""
    start, end = cell_bounds(size, cells)
    return (start + end - 1) // 2


def kept_rows(height: int, width: int, keep: float) -> list[int]:
    """The rows of a grid at which pooling to about `keep` of it leaves a row."""
    return cell_centres(height, pooled_grid(height, width, keep)[0]).tolist()


def crossings(tokens: Tensor, width: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Positions [B, rows * columns] where `rows` and `columns` of a grid cross, row by row."""
    places = rows[:, None] * width + columns
    return places.flatten().to(tokens.device).expand(len(tokens), -1)


def select(positions: Tensor) -> Outputs:
    """The tokens at `positions` [B, k], in their original order."""
    positions = positions.sort(dim=1).values

    def apply(x: Tensor) -> Tensor:
        # By one index [B * k] into [B * N, C], which is all that the backward holds.
        start = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
        chosen = x.flatten(0, 1).index_select(0, (start + positions).flatten())
        return chosen.view(*positions.shape, x.shape[2])

    return Outputs(positions, apply, selects=True)


def merge(owner: Tensor) -> Outputs:
    """Each token [B, N] goes to its owner (an owner owns itself); an output is the mean of an
    owner's tokens. Every row has the same number of owners."""
    owns_itself = owner == torch.arange(owner.shape[1], device=owner.device)
    positions = owns_itself.nonzero()[:, 1].view(len(owner), -1)
    slot = (owns_itself.cumsum(1) - 1).gather(1, owner)
    sizes = torch.zeros_like(positions).scatter_add_(1, slot, torch.ones_like(slot))

    def apply(x: Tensor) -> Tensor:
        total = x.new_zeros(*positions.shape, x.shape[2])
        total = total.scatter_add(1, slot[..., None].expand_as(x), x)
        return total / sizes[..., None].to(x.dtype)

    return Outputs(positions, apply)


def directions(x: Tensor) -> Tensor:
    """x [..., D] as unit vectors, detached, in at least float32."""
    x = x.detach()
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [B, N, M] of a [B, N, D] and b [B, M, D], in their own dtype: in autocast's,
    many would tie."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.transpose(1, 2)
