"""VTC of a whole batch: from the inputs of the language model to shorter ones.

It stands between projector and language model: embeddings, mask, position ids, labels and features
that layers add later (deepstack) all lose the same tokens. Tensor shapes: B batch, T tokens of a
row, V visual tokens in the batch, N of an image, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from sts.architectures import Architecture, ClassAttention, Grid
from sts.checks import expect
from sts.modules import show_hooks_to_compile
from sts.sequence import (
    WRONG_ATTENTION,
    Batch,
    pack,
    position_ids,
    positions_at,
    run_lengths,
    segments,
    shorten_mask,
    take,
    take_tokens,
    write_places,
)
from sts.settings import IGNORE_INDEX, VTC
from sts.vtc import Outputs, compress, wants
from sts.vtc._shared import kept_rows

FEATURES = ("mm_encoder_outputs", "image_embeds", "image_features")  # instead of pixels


@dataclass
class FullSequence:
    """The sequence at its full length, while compressed tokens are written to it. M = B * T."""

    embeddings: Tensor  # [M, D]
    positions: Tensor  # ids of each axis, [M, axes]
    features: dict[str, list[Tensor]]  # keyword -> what later layers add to visual tokens, [V, D]
    keep: Tensor  # the text, and the tokens that compressed ones were written to, [M]


@dataclass
class Compression:
    """VTC of one micro-batch."""

    model: PreTrainedModel
    architecture: Architecture
    vtc: VTC
    kind: Callable | nn.Module  # what compresses; a module if it has weights
    keep: float  # the share of the visual tokens that is kept now
    generator: Callable[[], torch.Generator]  # called where the kind wants one
    attention: ClassAttention | None = None  # where the kind wants scores
    recorded: dict[str, Tensor] = field(default_factory=dict)  # its queries and keys

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the vision tower's attention computes anyway, where scores are wanted."""
        with ExitStack() as stack:
            if "scores" in wants(self.vtc.kind):
                show_hooks_to_compile()
                self.attention = self.architecture.class_attention(self.model)
                for name in ("queries", "keys"):
                    module = self.attention.module.get_submodule(getattr(self.attention, name))
                    stack.enter_context(module.register_forward_hook(partial(self._record, name)))
            yield

    def _record(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.recorded[name] = output.detach()  # [tiles, 1 + N, width]

    def __call__(self, batch: Batch, kwargs: dict[str, Any]) -> tuple[dict, Tensor]:
        """Shorten the visual tokens at the language model.

        Args:
            batch: Its mask and `shows` become those of the shortened sequence.
            kwargs: Keywords of the language model.

        Returns:
            Keywords for the shortened sequence, and the number of visual tokens in it.
        """
        # What follows from the placeholders alone is computed on the CPU: one wait for the device
        media = dict(zip(batch.media, torch.stack([*batch.media.values()]).cpu(), strict=True))
        places = torch.stack([*media.values()]).any(0).flatten().nonzero()[:, 0]
        if not len(places):
            return kwargs, batch.visual.sum()
        _check_inputs(batch.inputs, kwargs, len(places))
        index_of = self._images(batch, media, places)
        places, visual = places.to(batch.visual.device), batch.visual
        full = self._compress(batch, kwargs, index_of, places)
        embeddings = full.embeddings.view_as(kwargs["inputs_embeds"])
        positions = full.positions.T.reshape(*position_ids(kwargs).shape)
        keep = full.keep.view_as(visual) & batch.mask | _read_padding(batch)
        left = keep & visual
        numbers = keep.sum(1).max(), (left != visual).sum()
        longest, removed = torch.stack(numbers).tolist()  # the second wait, and the last
        if not removed:  # as where strides leave all of a grid
            changed = {"inputs_embeds": embeddings} | full.features
            changed |= {"position_ids": positions} if self.vtc.positions == "mean" else {}
            return kwargs | changed, left.sum()
        order, real = pack(keep, longest)
        real = real & batch.mask.gather(1, order)
        # each place shows the last kept one up to it, or the first
        batch.mask, batch.shows = real, (keep.cumsum(1) - 1).clamp(min=0)
        embeddings = take(embeddings, order)
        shortened = {
            "use_cache": False,
            "past_key_values": None,
            "inputs_embeds": embeddings,
            "attention_mask": self._shorten_mask(kwargs, embeddings, order, real),
            "position_ids": positions_at(positions, order),
        }
        is_left = left.flatten()[places]
        shortened |= {name: [x[is_left] for x in each] for name, each in full.features.items()}
        others = {
            name: _shorten(name, value, order, real, visual.shape[1])
            for name, value in kwargs.items()
            if name not in shortened
        }
        return others | shortened, left.sum()

    def _compress(
        self, batch: Batch, kwargs: dict, index_of: dict[Grid, Tensor], places: Tensor
    ) -> FullSequence:
        """Write the compressed tokens to the places of the tokens they stand at.

        Args:
            batch: The micro-batch.
            kwargs: Keywords of the language model.
            index_of: See `_images`.
            places: Of the batch's visual tokens in the full sequence, [V].
        """
        visual, embeddings = batch.visual, kwargs["inputs_embeds"]
        positions = position_ids(kwargs)
        positions = positions.float() if self.vtc.positions == "mean" else positions
        full = FullSequence(
            embeddings=embeddings.flatten(0, 1),
            positions=positions.reshape(-1, visual.numel()).T,
            features=_visual_features(kwargs, visual, len(places)),
            keep=(batch.mask & ~visual).flatten(),
        )
        text, text_mask, samples = self._text(batch, kwargs)
        scores = self._scores(batch, len(places))
        generator = self.generator() if "generator" in wants(self.vtc.kind) else None
        for grid, index in index_of.items():
            index, newlines = _without_newlines(grid, index.to(visual.device), self.keep)
            full.keep = full.keep.index_fill(0, places[newlines.flatten()], True)
            if not grid.width:
                continue
            sample = samples[places[index[:, 0]]]
            tokens, outputs = compress(
                self.kind,
                full.embeddings[places[index]],
                self.keep,
                (grid.height, grid.width),
                scores=None if scores is None else scores[index],
                text=None if text is None else text[sample],
                text_mask=None if text is None else text_mask[sample],
                generator=generator,
            )
            self._write(full, places, index, tokens, outputs)
        return full

    def _write(
        self, full: FullSequence, places: Tensor, index: Tensor, tokens: Tensor, outputs: Outputs
    ) -> None:
        """Write the compressed tokens of images of one grid.

        Args:
            full: Written to.
            places: Of the batch's visual tokens in the full sequence, [V].
            index: The images' patches among the visual tokens, [images, N].
            tokens: The images' compressed tokens, [images, k, D].
            outputs: How they were made.
        """
        chosen, where = outputs.positions, places[index]
        real = None if outputs.real is None else outputs.real.flatten().nonzero()[:, 0]

        def real_of(x: Tensor) -> Tensor:
            """The outputs [images, k, ...] that are no padding, one after the other."""
            return x.flatten(0, 1) if real is None else x.flatten(0, 1).index_select(0, real)

        written = real_of(where.gather(1, chosen))
        full.keep = full.keep.index_fill(0, written, True)
        if outputs.selects and outputs.tokens is None:  # they are there already
            return
        full.embeddings = write_places(full.embeddings, written, real_of(tokens))
        if self.vtc.positions == "mean":
            means = real_of(outputs.apply(full.positions[where]))
            full.positions = write_places(full.positions, written, means)
        written = real_of(index.gather(1, chosen))
        for name, each in full.features.items():
            full.features[name] = [
                write_places(x, written, real_of(outputs.apply(x[index]))) for x in each
            ]

    def _shorten_mask(
        self, kwargs: dict, embeddings: Tensor, order: Tensor, real: Tensor
    ) -> object:
        """The language model's attention mask for the places `order` [B, T'], which are `real`."""
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):  # made already, one for each kind of layer
            return {
                kind: None if layers_mask is None else shorten_mask(layers_mask, order, real)
                for kind, layers_mask in mask.items()
            }
        if mask is not None:
            return shorten_mask(mask, order, real)
        packed = segments(kwargs.get("position_ids"), torch.ones_like(order[:, :1]).bool())
        if packed is None:
            # Explicit even if all true: without a mask, gaps in the positions read as packing.
            return real.long()
        config = self.model.get_submodule(self.architecture.language_model).config
        if config._attn_implementation not in ("sdpa", "eager"):
            name = f"{config._attn_implementation} attention"
            raise ValueError(WRONG_ATTENTION.format("VTC on packed sequences", name))
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise ValueError(
                "position_ids of packed sequences: VTC can't shorten them for a language model "
                "with sliding-window layers; pass attention_mask [batch, tokens], one sample a row"
            )
        packed = packed.gather(1, order).masked_fill(~real, -1)
        starts = packed.diff(dim=1, prepend=packed[:, :1] - 1) != 0
        restarting = torch.arange(order.shape[1], device=order.device).expand_as(order)
        restarting = restarting - restarting.where(starts, 0).cummax(1).values
        return create_causal_mask(  # which takes a restart for the next sequence
            config, embeddings, None, None, restarting, allow_is_causal_skip=False
        )

    def _images(self, batch: Batch, media: dict[str, Tensor], places: Tensor) -> dict[Grid, Tensor]:
        """Grid -> which of the batch's visual tokens are its images', [images, tokens]; a frame of
        a video is an image. All on the CPU: where the placeholders of each medium stand, [B, T],
        and those of all, [V]."""
        grids_of = {"image": self.architecture.grids, "video": self.architecture.video_grids}
        indexes: dict[Grid, list[Tensor]] = {}
        for medium, placeholders in media.items():
            index = placeholders.flatten()[places].nonzero()[:, 0]
            if not len(index):
                continue
            grids = grids_of[medium](self.model, batch.inputs, run_lengths(placeholders))
            sizes = [grid.tokens for grid in grids]
            if sum(sizes) != len(index):
                shown = [tuple(grid) for grid in grids]
                raise ValueError(
                    f"input_ids hold {len(index)} {medium} placeholders, but the {medium}s have "
                    f"{sum(sizes)} tokens by their grids (height, width, newline) {shown}: they "
                    "must be as many"
                )
            for grid, image in zip(grids, index.split(sizes), strict=True):
                indexes.setdefault(grid, []).append(image)
        return {grid: torch.stack(images) for grid, images in indexes.items()}

    def _text(self, batch: Batch, kwargs: dict) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Embeddings [S, T', D] of each sample's text and which are real [S, T'], for a kind that
        looks at text; the answer's tokens are no part of the `prompt`. Also the sample of each
        place of the full sequence, [M]: a packed row holds several."""
        embeddings, places = kwargs["inputs_embeds"].detach(), batch.mask & ~batch.visual
        rows = torch.arange(len(places), device=places.device)[:, None]
        if not wants(self.vtc.kind) & {"text", "text_mask"}:
            return None, None, rows.expand_as(places).flatten()
        if self.vtc.text == "prompt":
            labels = batch.inputs.get("labels")
            expect(labels is not None, "labels", None, "labels, for VTC.text='prompt'")
            places = places & (labels == IGNORE_INDEX)
        number = segments(kwargs.get("position_ids"), batch.mask)
        most = 1 if number is None else int(number.max()) + 1
        number = torch.zeros_like(rows) if number is None else number
        each = torch.arange(most, device=places.device)[:, None]
        of_sample = places[:, None] & (number[:, None] == each)  # [B, most, T]
        order, real = pack(of_sample.flatten(0, 1))
        text = take(embeddings, order.reshape(len(rows), -1)).view(*order.shape, -1)
        return text, real, (rows * most + number).expand_as(places).flatten()

    def _scores(self, batch: Batch, count: int) -> Tensor | None:
        """A score for each of the `count` visual tokens, where the kind wants one."""
        if self.attention is None:
            return None
        if not self.recorded:
            raise ValueError(
                f"VTC.kind={self.vtc.kind!r} needs the vision tower to run in this forward: "
                "pass pixel_values rather than precomputed features"
            )
        scores = class_attention(self.recorded["queries"], self.recorded["keys"], self.attention)
        token_scores = self.architecture.token_scores
        scores = (
            token_scores(self.model, batch.inputs, scores) if token_scores else scores.flatten()
        )
        expect(len(scores) == count, "image placeholders", count, f"one of {len(scores)} patches")
        return scores


def _without_newlines(grid: Grid, index: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """Split the tokens [images, grid.tokens] of images into patches [images, N] and the newlines
    to keep [images, n].

    One newline stays for every row that pooling to the keep ratio would leave: that of the middle
    row of its cell.
    """
    if not grid.newline:
        return index, index[:, :0]
    rows = index.unflatten(1, (grid.height, grid.width + 1))
    kept = kept_rows(grid.height, grid.width, keep) if grid.width else range(grid.height)
    return rows[..., :-1].flatten(1), rows[:, list(kept), -1]


def class_attention(queries: Tensor, keys: Tensor, attention: ClassAttention) -> Tensor:
    """Attention of the class token to the patches, mean over heads: softmax(q_cls k^T * scale).

    queries, keys: [images, 1 + N, width], the class token first; the result: [images, N].
    """
    head_dim, scale = attention.module.head_dim, attention.module.scale
    query = queries[:, :1].unflatten(-1, (-1, head_dim)).float()
    keys = keys.unflatten(-1, (-1, head_dim)).float()
    weights = torch.einsum("nqhd,nkhd->nhk", query, keys).mul(scale).softmax(-1)
    return weights.mean(1)[:, 1:]


def _read_padding(batch: Batch) -> Tensor:
    """The padding [B, T] right before a target, whose hidden state the loss reads: where rows are
    padded on the left and their first token has a label, or padding has labels."""
    labels = batch.inputs.get("labels")
    if labels is None:
        return torch.zeros_like(batch.mask)
    return ~batch.mask & (F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) != IGNORE_INDEX)


def _check_inputs(inputs: dict[str, Any], kwargs: dict[str, Any], count: int) -> None:
    """Raise ValueError for what VTC can't take: no images, or a cache that holds tokens."""
    names = [name for name, value in inputs.items() if value is not None]
    if not any("pixel" in name or name in FEATURES for name in names):
        raise ValueError(
            f"input_ids hold {count} image placeholders, but there are no images: pass "
            "pixel_values (or mm_encoder_outputs)"
        )
    cache = kwargs.get("past_key_values")
    length = 0 if cache is None else cache.get_seq_length()
    accepted = (
        "0: VTC trains on whole sequences, without a cache (as prefix tuning passes: use LoRA)"
    )
    expect(length == 0, "past_key_values of the length", length, accepted)


def _visual_features(kwargs: dict, visual: Tensor, count: int) -> dict[str, list[Tensor]]:
    """The keywords that are lists of tensors with a row for each visual token, [V, ...]."""

    def is_of_visual(value: object) -> bool:
        is_matrix = isinstance(value, Tensor) and value.ndim == 2
        return is_matrix and value.shape[:2] != visual.shape and len(value) == count

    return {
        name: list(value)
        for name, value in kwargs.items()
        if isinstance(value, list | tuple) and value and all(map(is_of_visual, value))
    }


def _shorten(name: str, value: Any, order: Tensor, real: Tensor, length: int) -> Any:
    """Any other keyword of the language model, at the places `order` [B, T'], which are `real`."""
    expect("cu_seq" not in name or value is None, name, value, "none: VTC can't cut it")
    taken = take_tokens(f"{name}.shape of the language model", value, order, length)
    if taken is value or taken.dtype != torch.bool:
        return taken
    return taken & real.view(*real.shape, *[1] * (taken.ndim - 2))
