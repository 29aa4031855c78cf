"""Places, masks and positions of a sequence with fewer tokens or rows: functions on tensors.

Shapes: B rows, T tokens of a row, V visual tokens in the batch, M places of a flattened batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sts.checks import expect

WRONG_ATTENTION = (
    "{} can't handle an attention mask of type {}: load the model with attn_implementation='sdpa' "
    "or 'eager'"
)


@dataclass
class Batch:
    """A micro-batch on its way through the model."""

    inputs: dict[str, Any]  # keywords of the outer forward
    media: dict[str, Tensor]  # medium -> where its placeholders stand, [B, T]
    visual: Tensor  # where placeholders of any medium stand, [B, T]
    mask: Tensor  # which tokens of the language model's sequence, shortened or not, are no padding
    # for each of the T places the token of the shortened sequence whose hidden state it gets
    # afterwards, [B, T]; None: the sequence was not shortened
    shows: Tensor | None = None


def not_padding(inputs: dict[str, Any], visual: Tensor) -> Tensor:
    """Which places [B, T] are no padding, by the attention mask of the outer forward."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if inputs.get("past_key_values") is not None:  # whose places come first: prefix tuning
            mask = mask[:, -visual.shape[1] :]
        expected = list(visual.shape)
        expect(list(mask.shape) == expected, "attention_mask.shape", list(mask.shape), expected)
        return mask.bool()
    return torch.ones_like(visual)


# ---- some places of each row ---------------------------------------------------------------------


def positions_at(x: Tensor, index: Tensor) -> Tensor:
    """x [..., B or 1, T] at the places `index` [B, k] of each row: [..., B, k]."""
    lead = x.shape[:-2]
    return x.expand(*lead, len(index), -1).gather(-1, index.expand(*lead, *index.shape))


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, ...] at the places `index` [B, k] of each row: [B, k, ...].

    The backward holds an index [B, k]; that of gather or take_along_dim would be [B, k, D].
    """
    return x.flatten(0, 1).index_select(0, _flat(x, index)).unflatten(0, index.shape)


def write_rows(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """x [B, T, D] with `values` [B, k, D] at the places `index` [B, k] of each row."""
    return write_places(x.flatten(0, 1), _flat(x, index), values.flatten(0, 1)).view_as(x)


def _flat(x: Tensor, index: Tensor) -> Tensor:
    rows = torch.arange(len(index), device=index.device)[:, None]
    return (rows * x.shape[1] + index).flatten()


def write_places(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """x [M, ...] with `values` [k, ...] at the places `index` [k]."""
    return _IndexCopy.apply(x, index, values.to(x.dtype))


class _IndexCopy(torch.autograd.Function):
    """`index_copy` along the first axis.

    torch's keeps `values` for the backward, which needs their shape only; with checkpointing that
    is as much memory as a layer's input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return x.index_copy(0, index, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        of_x = grad.index_fill(0, index, 0) if ctx.needs_input_grad[0] else None
        of_values = grad.index_select(0, index) if ctx.needs_input_grad[2] else None
        return of_x, None, of_values


def run_lengths(where: Tensor) -> Tensor:
    """The length of each run of true places in `where` [B, T], row by row, [runs]."""
    flat = torch.nn.functional.pad(where, (1, 1)).int().flatten()  # a run ends with its row
    steps = flat.diff()
    return (steps == -1).nonzero()[:, 0] - (steps == 1).nonzero()[:, 0]


def pack(keep: Tensor, longest: int | None = None) -> tuple[Tensor, Tensor]:
    """The gather index [B, T'] that moves the kept places of each row to its front, in order.

    Also which of them are no padding, [B, T']; T' is the number of places that the fullest row
    keeps, `longest` where that is computed already.
    """
    counts = keep.sum(1)
    longest = int(counts.max()) if longest is None else longest
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    return order, torch.arange(longest, device=keep.device) < counts[:, None]


# ---- masks and positions of the shorter sequence -------------------------------------------------


def queries_and_keys(mask: Tensor, index: Tensor) -> Tensor:
    """The rows and columns `index` [B, k] of a mask [B or 1, 1, T, T]: [B, 1, k, k]."""
    mask = mask.take_along_dim(index[:, None, :, None], 2)
    return mask.take_along_dim(index[:, None, None, :], 3)


def tensor_mask(mask: object, method: str) -> Tensor:
    """The mask, if it is a tensor; else raise a ValueError that names what needs one."""
    if not isinstance(mask, Tensor):
        raise ValueError(WRONG_ATTENTION.format(method, type(mask).__name__))
    return mask


def shorten_mask(mask: object, order: Tensor, real: Tensor) -> Tensor:
    """A mask [B, T] or [B, 1, T, T] at the places `order` [B, T'].

    `real` [B, T'] says which of these are no padding, see `pack`.
    """
    mask = tensor_mask(mask, "VTC")
    if mask.ndim == 2:
        return real.to(mask.dtype)
    expect(mask.ndim == 4, "attention_mask.shape", list(mask.shape), "[batch, tokens], or 4-D")
    mask = queries_and_keys(mask.expand(len(order), -1, -1, -1), order)
    masked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~real[:, None, None, :], masked)


def position_ids(kwargs: dict[str, Any]) -> Tensor:
    """The position ids of the full sequence or their default: [B, T], [axes, B, T] for M-RoPE."""
    shape, positions = kwargs["inputs_embeds"].shape[:2], kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(shape[1], device=kwargs["inputs_embeds"].device)[None]
    is_right = positions.ndim in (2, 3) and positions.shape[-1] == shape[1]
    accepted = f"{list(shape)}, or 3-D for M-RoPE"
    expect(is_right, "position_ids.shape", list(positions.shape), accepted)
    return positions.expand(*positions.shape[:-2], *shape)


def segments(positions: Tensor | None, real: Tensor) -> Tensor | None:
    """The number of the packed sample that each token belongs to, [B, T]; None: nothing is packed.

    As transformers reads it: where positions [B, T], or the text row of [4, B, T], don't go up by
    one, another sample begins. Padding begins none: `real` [B, T].
    """
    if positions is None or (positions.ndim == 3 and len(positions) != 4):
        return None
    positions = positions[0] if positions.ndim == 3 else positions
    starts = (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1) & real
    return starts.cumsum(-1) if starts.any() else None


def take_tokens(name: str, value: Any, index: Tensor, length: int) -> Any:
    """An argument at the places `index` [B, k] of each row, if it has a value for every token.

    Such an argument is [B, length, ...]; anything else is returned as it is.

    Raises:
        ValueError: Another axis is as long as the sequence.
    """
    if not isinstance(value, Tensor) or length not in value.shape:
        return value
    is_right = value.shape[:2] == (len(index), length)
    expect(is_right, name, list(value.shape), f"[batch, tokens, ...] or no axis of {length} tokens")
    return take(value, index)


# ---- a decoder layer's arguments for some of the tokens, or of the rows. They are (tuples of)
# position_embeddings [..., B or 1, T, head_dim], position_ids [..., B or 1, T], attention_mask
# [B or 1, T] or [B or 1, 1, T, T], and others.

AXIS_OF_ROWS = {"position_embeddings": -3, "position_ids": -2, "attention_mask": 0}


def token_argument(name: str, value: Any, index: Tensor, length: int) -> Any:
    """A decoder layer's argument for the tokens `index` [B, k] of each row of `length` tokens."""
    if isinstance(value, dict):
        return {key: token_argument(name, x, index, length) for key, x in value.items()}
    if value is None or name not in AXIS_OF_ROWS:
        return take_tokens(f"{name}.shape of a decoder layer", value, index, length)
    if isinstance(value, tuple):
        return tuple(token_argument(name, x, index, length) for x in value)
    if name == "position_embeddings":
        return positions_at(value.movedim(-1, 0), index).movedim(0, -1)
    if name == "attention_mask" and tensor_mask(value, "LDS unit 'tokens'").ndim == 4:
        return queries_and_keys(value, index)
    return positions_at(value, index)


def row_argument(name: str, value: Any, rows: Tensor, batch: int) -> Any:
    """A decoder layer's argument for the rows [k] of a batch of `batch` rows."""
    if isinstance(value, dict):
        return {key: row_argument(name, x, rows, batch) for key, x in value.items()}
    if value is None or name not in AXIS_OF_ROWS:
        has_rows = isinstance(value, Tensor) and value.ndim > 1 and len(value) == batch
        return value.index_select(0, rows) if has_rows else value
    if isinstance(value, tuple):
        return tuple(row_argument(name, x, rows, batch) for x in value)
    if name == "attention_mask":
        tensor_mask(value, "LDS unit 'samples'")
    axis = AXIS_OF_ROWS[name]
    return value if value.shape[axis] == 1 else value.index_select(axis, rows)
