"""What fewer tokens or rows make of places, masks and positions: pure functions on tensors.

Shapes: B rows, T tokens of a row, V visual tokens in the batch, M places of a flattened batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sts.architectures import Grid
from sts.checks import expect
from sts.vtc._shared import kept_rows

WRONG_ATTENTION = (
    "{} can't handle an attention mask of type {}: load the model with attn_implementation='sdpa' "
    "or 'eager'"
)


@dataclass
class Batch:
    """A micro-batch on its way through the model.

    inputs: of the outer forward. media: where the placeholders of `image` and of `video` stand,
    [B, T] each; visual: of either. mask: which tokens are no padding, of the sequence that the
    language model gets: VTC shortens it. shows: for each of the T places the token of that
    sequence whose hidden state it has afterwards, [B, T]; None: its own, nothing was shortened.
    """

    inputs: dict[str, Any]
    media: dict[str, Tensor]
    visual: Tensor
    mask: Tensor
    shows: Tensor | None = None


def attended(inputs: dict[str, Any], visual: Tensor) -> Tensor:
    """Which places [B, T] hold no padding, by the outer attention mask."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        expected = list(visual.shape)
        expect(list(mask.shape) == expected, "attention_mask.shape", list(mask.shape), expected)
        return mask.bool()
    return torch.ones_like(visual)


# ---- some places of each row ---------------------------------------------------------------------


def at(x: Tensor, index: Tensor) -> Tensor:
    """x [..., B or 1, T] at the places `index` [B, k] of each row: [..., B, k]."""
    lead = x.shape[:-2]
    return x.expand(*lead, len(index), -1).gather(-1, index.expand(*lead, *index.shape))


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, ...] at the places `index` [B, k] of each row: [B, k, ...].

    Backward keeps indexes of [B, k]; those of gather or take_along_dim would be [B, k, D].
    """
    return x.flatten(0, 1).index_select(0, _flat(x, index)).unflatten(0, index.shape)


class _Placed(torch.autograd.Function):
    """`index_copy` along the first axis. torch's keeps `values` for the backward, for nothing but
    their shape; with checkpointing that is as much as a layer's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return x.index_copy(0, index, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return (
            grad.index_fill(0, index, 0) if ctx.needs_input_grad[0] else None,
            None,
            grad.index_select(0, index) if ctx.needs_input_grad[2] else None,
        )


def placed(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """x [M, ...] with `values` [k, ...] at the places `index` [k]."""
    return _Placed.apply(x, index, values)


def replaced(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """x [B, T, D] with `values` [B, k, D] at the places `index` [B, k] of each row."""
    return placed(x.flatten(0, 1), _flat(x, index), values.flatten(0, 1)).view_as(x)


def _flat(x: Tensor, index: Tensor) -> Tensor:
    rows = torch.arange(len(index), device=index.device)[:, None]
    return (rows * x.shape[1] + index).flatten()


def put(target: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """`target` [M, C] with `values` [..., C] at `places` [...]."""
    values = values.reshape(-1, target.shape[1]).to(target.dtype)
    return placed(target, places.flatten(), values)


def runs(where: Tensor) -> Tensor:
    """How many places [B, T] follow one another wherever some do, row by row, [runs]."""
    flat = torch.nn.functional.pad(where, (1, 1)).int().flatten()  # a run ends with its row
    steps = flat.diff()
    return (steps == -1).nonzero()[:, 0] - (steps == 1).nonzero()[:, 0]


def last_kept(keep: Tensor) -> Tensor:
    """For every place [B, T] where among the kept ones the last one up to it is (the first one, if
    none was before)."""
    return (keep.cumsum(1) - 1).clamp(min=0)


def pack(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Gather index [B, T'] that moves the kept places of each row to its front, in order, and
    which of them are real [B, T']; T' is the most that a row keeps."""
    counts = keep.sum(1)
    longest = int(counts.max())
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    return order, torch.arange(longest, device=keep.device) < counts[:, None]


def without_newlines(grid: Grid, index: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """Patches [images, N] and row ends to keep [images, n] of the tokens of a grid.

    A newline remains for every row that pooling would leave, at the middle one of its rows.
    """
    if not grid.newline:
        return index, index[:, :0]
    rows = index.unflatten(1, (grid.height, grid.width + 1))
    left = kept_rows(grid.height, grid.width, keep) if grid.width else range(grid.height)
    return rows[..., :-1].flatten(1), rows[:, list(left), -1]


# ---- masks and positions of what is left ---------------------------------------------------------


def of_queries_and_keys(mask: Tensor, index: Tensor) -> Tensor:
    """mask [B or 1, 1, T, T] -> [B, 1, k, k], the rows and columns `index` [B, k]."""
    mask = mask.take_along_dim(index[:, None, :, None], 2)
    return mask.take_along_dim(index[:, None, None, :], 3)


def shorter(mask: object, order: Tensor, real: Tensor) -> Tensor:
    """A mask [B, T] or [B, 1, T, T] for the places `order` [B, T'], of which some are not real."""
    if not isinstance(mask, Tensor):
        raise ValueError(WRONG_ATTENTION.format("VTC", type(mask).__name__))
    if mask.ndim == 2:
        return real.to(mask.dtype)
    expect(mask.ndim == 4, "attention_mask.shape", list(mask.shape), "[batch, tokens], or 4-D")
    mask = of_queries_and_keys(mask.expand(len(order), -1, -1, -1), order)
    nothing = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~real[:, None, None, :], nothing)


def position_ids(kwargs: dict[str, Any]) -> Tensor:
    """Position ids of the full sequence, or their default: [B, T], or [axes, B, T] of M-RoPE."""
    shape, positions = kwargs["inputs_embeds"].shape[:2], kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(shape[1], device=kwargs["inputs_embeds"].device)[None]
    fits = positions.ndim in (2, 3) and positions.shape[-1] == shape[1]
    expect(fits, "position_ids.shape", list(positions.shape), f"{list(shape)}, or 3-D for M-RoPE")
    return positions.expand(*positions.shape[:-2], *shape)


def segments(positions: Tensor) -> Tensor | None:
    """The number [B, T] of the packed sample that each token belongs to, or None: not packed.

    As transformers reads it: positions [B, T], or the text row of [4, B, T], that don't go up by
    one begin another sample.
    """
    if positions.ndim == 3:
        if len(positions) != 4:
            return None
        positions = positions[0]
    starts = positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1
    return starts.cumsum(-1) if starts.any() else None


def of_each_token(name: str, value: Any, index: Tensor, length: int) -> Any:
    """An argument that may hold something for every token, [B, T, ...], at the places `index`
    [B, k] of each row of `length`. Raises ValueError for what is as long in some other way."""
    if not isinstance(value, Tensor) or length not in value.shape:
        return value
    fits = value.shape[:2] == (len(index), length)
    expect(fits, name, list(value.shape), f"[batch, tokens, ...] or no axis of {length} tokens")
    return take(value, index)


# ---- a decoder layer's arguments for some of the tokens, or of the rows --------------------------


def of_tokens(name: str, value: Any, index: Tensor, length: int) -> Any:
    """A decoder layer's argument for the tokens `index` [B, k] of each row of `length`."""
    if isinstance(value, dict):
        return {key: of_tokens(name, x, index, length) for key, x in value.items()}
    if name == "position_embeddings":  # tensors [..., B or 1, T, head_dim]
        return _each(lambda x: at(x.movedim(-1, 0), index).movedim(0, -1), value)
    if name == "position_ids" and value is not None:  # [..., B or 1, T]
        return at(value, index)
    if name == "attention_mask" and value is not None:
        value = _tensor(value, "tokens")
        return at(value, index) if value.ndim == 2 else of_queries_and_keys(value, index)
    return of_each_token(f"{name}.shape of a decoder layer", value, index, length)


def of_rows(name: str, value: Any, rows: Tensor, batch: int) -> Any:
    """A decoder layer's argument for the rows [k] of a batch of `batch`."""
    if isinstance(value, dict):
        return {key: of_rows(name, x, rows, batch) for key, x in value.items()}
    if name == "position_embeddings":  # tensors [..., B or 1, T, head_dim]
        return _each(lambda x: _rows(x, -3, rows), value)
    if name == "position_ids" and value is not None:  # [..., B or 1, T]
        return _rows(value, -2, rows)
    if name == "attention_mask" and value is not None:  # [B or 1, T] or [B or 1, 1, T, T]
        return _rows(_tensor(value, "samples"), 0, rows)
    mine = isinstance(value, Tensor) and value.ndim > 1 and len(value) == batch
    return value.index_select(0, rows) if mine else value


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Of a tensor, or of each in a tuple of them."""
    if isinstance(value, tuple):
        return tuple(function(x) for x in value)
    return None if value is None else function(value)


def _rows(x: Tensor, dim: int, rows: Tensor) -> Tensor:
    return x if x.shape[dim] == 1 else x.index_select(dim, rows)


def _tensor(mask: object, unit: str) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ValueError(WRONG_ATTENTION.format(f"LDS unit {unit!r}", type(mask).__name__))
    return mask
