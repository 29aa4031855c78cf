"""Kinds whose outputs mix the tokens of a cell of the grid. None of them is the paper's."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sts.vtc import Outputs
from sts.vtc._shared import cell_bounds, cell_centres, count_of, crossings, pooled_grid


class _Pooled(torch.autograd.Function):
    """Adaptive average pooling of [B, C, H, W].

    torch keeps the input for the backward, which needs its shape only.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, cells: tuple[int, int]) -> Tensor:
        ctx.shape = image.shape
        return F.adaptive_avg_pool2d(image, cells)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shaped = grad.new_empty(1).expand(ctx.shape)
        return torch.ops.aten._adaptive_avg_pool2d_backward(grad.contiguous(), shaped), None


def _centres(tokens: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """The positions [B, rows * columns] nearest the centres of the cells of a grid."""
    rows, columns = cell_centres(grid[0], cells[0]), cell_centres(grid[1], cells[1])
    return crossings(tokens, grid[1], rows, columns)


def avgpool2d(tokens: Tensor, keep: float, *, grid: tuple[int, int]) -> Outputs:
    """Adaptive 2-D average pooling (DeCo; M3, arXiv 2405.17430).

    Cells overlap by a row or column where the grid doesn't divide. An output stands at the token
    nearest the centre of its cell.
    """
    (height, width), cells = grid, pooled_grid(*grid, keep)

    def apply(x: Tensor) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, (height, width))
        return _Pooled.apply(image, cells).flatten(2).transpose(1, 2)

    return Outputs(_centres(tokens, grid, cells), apply)


def avgpool1d(tokens: Tensor, keep: float) -> Outputs:
    """Adaptive average pooling along the sequence, row after row.

    After LLaVolta (arXiv 2406.20092), which pools inside the language model, with a fixed stride.
    """
    count = count_of(tokens, keep)

    def apply(x: Tensor) -> Tensor:
        line = x.transpose(1, 2).unsqueeze(2)  # as torch's 1-D pooling does
        return _Pooled.apply(line, (1, count)).squeeze(2).transpose(1, 2)

    return Outputs(_centres(tokens, (1, tokens.shape[1]), (1, count)), apply)


def pixel_shuffle(tokens: Tensor, keep: float, *, grid: tuple[int, int]) -> Outputs:
    """The n tokens of a cell share the channels of its output: channel c is that of token c mod n.

    After the pixel shuffle of InternVL and Idefics3, which puts all channels of the n tokens side
    by side for a wider projector. This has no new weights, so each token gives an n-th of its
    channels. The cells are those of `avgpool2d`.
    """
    cells = pooled_grid(*grid, keep)
    return Outputs(_centres(tokens, grid, cells), lambda x: _Shuffled.apply(x, grid, cells))


class _Shuffled(torch.autograd.Function):
    """The channels of x [B, N, C] that `_source_tokens` names.

    The index is twice as large as what it takes from an image, so the backward makes it again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
        ctx.shape, ctx.grid, ctx.cells = x.shape, grid, cells
        source = _source_tokens(grid, cells, x.shape[2]).to(x.device)
        return x.gather(1, source.expand(len(x), -1, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        source = _source_tokens(ctx.grid, ctx.cells, grad.shape[2]).to(grad.device)
        source = source.expand(len(grad), -1, -1)
        return grad.new_zeros(ctx.shape).scatter_add(1, source, grad), None, None


def _source_tokens(grid: tuple[int, int], cells: tuple[int, int], channels: int) -> Tensor:
    """The token that each output takes each channel from, [rows * columns, channels]."""
    (top, bottom), (left, right) = map(cell_bounds, grid, cells)
    top, bottom = top[:, None, None], bottom[:, None, None]
    left, right = left[None, :, None], right[None, :, None]
    width = right - left
    member = torch.arange(channels) % ((bottom - top) * width)
    return ((top + member // width) * grid[1] + left + member % width).flatten(0, 1)
