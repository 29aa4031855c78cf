"""Counts, grids, and the Outputs of kinds that select or merge tokens."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from sts.vtc import Outputs

# Weight of the log distortion of a cell against the log error of the count
DISTORTION = 0.15


def count_of(tokens: Tensor, keep: float) -> int:
    """How many of the tokens [B, N, ...] a keep ratio leaves: at least one."""
    return max(1, round(keep * tokens.shape[1]))


@lru_cache(maxsize=4096)  # a schedule has another keep ratio each step, a batch many grids
def pooled_grid(height: int, width: int, keep: float) -> tuple[int, int]:
    """The (rows, columns) of a smaller grid that holds about `keep` of a grid's tokens.

    Minimises |log of the count's error| + DISTORTION * |log of the cells' distortion|: 24x24 at 1/4
    becomes 12x12; for 7 of 8x8 tokens it is 2x3 rather than strips of 1x7.
    """

    def cost(cells: tuple[int, int]) -> float:
        rows, columns = cells
        count = abs(math.log(rows * columns / (keep * height * width)))
        return count + DISTORTION * abs(math.log(rows * width / (columns * height)))

    candidates = [(r, c) for r in range(1, height + 1) for c in range(1, width + 1)]
    return min(candidates, key=cost)


def cell_bounds(size: int, cells: int) -> tuple[Tensor, Tensor]:
    """First index of each cell of adaptive pooling and the index after its last, [cells] each."""
    cell = torch.arange(cells)
    return cell * size // cells, -(-(cell + 1) * size // cells)


def cell_centres(size: int, cells: int) -> Tensor:
    """The middle index (the lower of two) of each cell of adaptive pooling, [cells]."""
    start, end = cell_bounds(size, cells)
    return (start + end - 1) // 2


def kept_rows(height: int, width: int, keep: float) -> list[int]:
    """The rows of a grid that stay when it is pooled to about `keep` of its tokens."""
    return cell_centres(height, pooled_grid(height, width, keep)[0]).tolist()


def crossings(tokens: Tensor, width: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The positions [B, rows * columns] where rows and columns of a grid cross, row by row."""
    places = rows[:, None] * width + columns
    return places.flatten().to(tokens.device).expand(len(tokens), -1)


def rows_at(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, N, C] at `positions` [B, k]: [B, k, C], by one index [B * k] into [B * N, C].

    So whole rows are copied, and the backward holds nothing else.
    """
    return x.flatten(0, 1).index_select(0, _flat(positions, x.shape[1])).view(*positions.shape, -1)


def _flat(positions: Tensor, length: int) -> Tensor:
    start = torch.arange(len(positions), device=positions.device)[:, None] * length
    return (start + positions).flatten()


def first_true(where: Tensor, count: int) -> Tensor:
    """The first `count` true places of each row of `where` [B, N], ascending: [B, count]."""
    return (~where).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def select(positions: Tensor) -> Outputs:
    """Keep the tokens at `positions` [B, k], in their original order."""
    positions = positions.sort(dim=1).values
    return Outputs(positions, lambda x: rows_at(x, positions), selects=True)


def merge(owner: Tensor, count: int) -> Outputs:
    """Average each group of tokens into one output.

    Args:
        owner: For each token [B, N] the token that stands for its group; that one is its own owner.
        count: The number of owners, the same in every row.
    """
    owns_itself = owner == torch.arange(owner.shape[1], device=owner.device)
    positions = first_true(owns_itself, count)
    slot = (owns_itself.cumsum(1) - 1).gather(1, owner)
    sizes = torch.zeros_like(positions).scatter_add_(1, slot, torch.ones_like(slot))

    def apply(x: Tensor) -> Tensor:
        total = x.new_zeros(positions.numel(), x.shape[2])
        total = total.index_add(0, _flat(slot, count), x.flatten(0, 1))
        return total.view(*positions.shape, -1) / sizes[..., None].to(x.dtype)

    return Outputs(positions, apply)


def directions(x: Tensor) -> Tensor:
    """x [..., D] as unit vectors, detached, in at least float32."""
    x = x.detach()
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [B, N, M] of a [B, N, D] and b [B, M, D].

    In their own dtype: in that of autocast many would tie.
    """
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.transpose(1, 2)
