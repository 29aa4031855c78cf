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
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from sts.architectures import Architecture, ClassAttention, Grid
from sts.checks import expect
from sts.modules import see_hooks
from sts.sequence import (
    WRONG_ATTENTION,
    Batch,
    last_kept,
    pack,
    position_ids,
    positions_at,
    run_lengths,
    segments,
    shorten_mask,
    take,
    take_tokens,
    without_newlines,
    write_features,
)
from sts.settings import IGNORE_INDEX, VTC
from sts.vtc import compress, wants

FEATURES = ("mm_encoder_outputs", "image_embeds", "image_features")  # instead of pixels


@dataclass
class Compression:
    """VTC of one micro-batch.

    kind: what compresses, a function or a module with weights. keep: the share of the visual tokens
    that is kept now. seen: queries and keys of the class attention, where the kind wants scores.
    """

    model: PreTrainedModel
    architecture: Architecture
    vtc: VTC
    kind: Callable | nn.Module
    keep: float
    generator: torch.Generator
    attention: ClassAttention | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collects what the vision tower's attention computes anyway, where scores are wanted."""
        with ExitStack() as stack:
            if "scores" in wants(self.vtc.kind):
                see_hooks()
                self.attention = self.architecture.class_attention(self.model)
                for name in ("queries", "keys"):
                    module = self.attention.module.get_submodule(getattr(self.attention, name))
                    stack.enter_context(module.register_forward_hook(partial(self._record, name)))
            yield

    def _record(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.seen[name] = output.detach()  # [tiles, 1 + N, width]

    def __call__(self, batch: Batch, kwargs: dict[str, Any], count: int) -> tuple[dict, Tensor]:
        """Shorten the `count` visual tokens in the inputs `kwargs` of the language model, and the
        batch's mask; the number of visual tokens that are left."""
        check_images(batch.inputs, kwargs, count)
        full = self._carry(batch, kwargs, count)
        left = full["keep"] & batch.visual
        of_visual = left[batch.visual]
        if of_visual.all():  # as where strides leave all of a grid
            changed = {"inputs_embeds": full["embeddings"]} | full["features"]
            changed |= {"position_ids": full["positions"]} if self.vtc.positions == "mean" else {}
            return kwargs | changed, left.sum()
        order, real = pack(full["keep"])
        batch.mask, batch.shows = real, last_kept(full["keep"])
        embeddings = take(full["embeddings"], order)
        shortened = {
            "use_cache": False,
            "past_key_values": None,
            "inputs_embeds": embeddings,
            "attention_mask": self._shorter_mask(kwargs, embeddings, order, real),
            "position_ids": positions_at(full["positions"], order),
        }
        shortened |= {name: [x[of_visual] for x in each] for name, each in full["features"].items()}
        others = {
            name: _shorter(name, value, order, real, batch.visual.shape[1])
            for name, value in kwargs.items()
            if name not in shortened
        }
        return others | shortened, left.sum()

    def _carry(self, batch: Batch, kwargs: dict, count: int) -> dict:
        """Write the compressed tokens to the places of the tokens they stand at.

        Returns embeddings [B, T, D], positions [B, T] or [axes, B, T], features (keyword -> list of
        [V, D]), and keep [B, T]: true at those places and at text.
        """
        visual, embeddings = batch.visual, kwargs["inputs_embeds"]
        features = {
            name: list(value)
            for name, value in kwargs.items()
            if isinstance(value, list | tuple)
            and value
            and all(_of_visual(x, visual, count) for x in value)
        }
        positions = position_ids(kwargs)
        average = self.vtc.positions == "mean"
        positions = positions.float() if average else positions
        axes = positions.shape[:-2]
        by_place = positions.reshape(-1, visual.numel()).T  # [B * T, axes]
        text_places = batch.mask & ~visual
        vectors, keep = embeddings.flatten(0, 1), text_places.flatten()
        text, text_mask = self._text(batch, embeddings, text_places)
        scores = self._scores(batch, count)
        places = visual.flatten().nonzero()[:, 0]
        for grid, index in self._images(batch).items():
            index, ends = without_newlines(grid, index.to(visual.device), self.keep)
            keep = keep.index_fill(0, places[ends.flatten()], True)
            if not grid.width:
                continue
            where = places[index]  # [images, N] in the flattened batch
            rows = where[:, 0] // visual.shape[1]
            tokens, outputs = compress(
                self.kind,
                vectors[where],
                self.keep,
                (grid.height, grid.width),
                scores=None if scores is None else scores[index],
                text=None if text is None else text[rows],
                text_mask=None if text is None else text_mask[rows],
                generator=self.generator,
            )
            chosen, real = outputs.positions, outputs.real
            real = torch.ones_like(chosen, dtype=torch.bool) if real is None else real
            carriers = where.gather(1, chosen)[real]
            keep = keep.index_fill(0, carriers, True)
            if outputs.selects and outputs.tokens is None:  # they are there already
                continue
            vectors = write_features(vectors, carriers, tokens[real])
            if average:
                by_place = write_features(by_place, carriers, outputs.apply(by_place[where])[real])
            standing = index.gather(1, chosen)[real]
            for name, each in features.items():
                features[name] = [
                    write_features(x, standing, outputs.apply(x[index])[real]) for x in each
                ]
        return {
            "embeddings": vectors.view_as(embeddings),
            "positions": by_place.T.reshape(*axes, *visual.shape),
            "features": features,
            "keep": keep.view_as(visual) & batch.mask,
        }

    def _shorter_mask(
        self, kwargs: dict, embeddings: Tensor, order: Tensor, real: Tensor
    ) -> object:
        """The language model's attention mask for the places `order` [B, T'], which are `real`."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, dict):  # made already, one for each kind of layer
            return {
                kind: None if one is None else shorten_mask(one, order, real)
                for kind, one in mask.items()
            }
        if mask is not None:
            return shorten_mask(mask, order, real)
        packed = None if positions is None else segments(positions)
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
        counted = torch.arange(order.shape[1], device=order.device).expand_as(order)
        counted = counted - counted.where(starts, 0).cummax(1).values
        return create_causal_mask(  # which takes a restart for the next sequence
            config, embeddings, None, None, counted, allow_is_causal_skip=False
        )

    def _images(self, batch: Batch) -> dict[Grid, Tensor]:
        """Grid -> which of the batch's visual tokens are its images', [images, tokens]; a frame of
        a video is an image."""
        makers = {"image": self.architecture.grids, "video": self.architecture.video_grids}
        indexes: dict[Grid, list[Tensor]] = {}
        visual = batch.visual.cpu()  # what follows is counted there, so that one wait is all
        for medium, where in batch.media.items():
            there = where.cpu()
            mine = there[visual].nonzero()[:, 0]
            if not len(mine):
                continue
            grids = makers[medium](self.model, batch.inputs, run_lengths(there))
            sizes = [grid.tokens for grid in grids]
            if sum(sizes) != len(mine):
                shown = [tuple(grid) for grid in grids]
                raise ValueError(
                    f"input_ids hold {len(mine)} {medium} placeholders, but the {medium}s have "
                    f"{sum(sizes)} tokens by their grids (height, width, newline) {shown}: they "
                    "must be as many"
                )
            for grid, one in zip(grids, mine.split(sizes), strict=True):
                indexes.setdefault(grid, []).append(one)
        return {grid: torch.stack(each) for grid, each in indexes.items()}

    def _text(
        self, batch: Batch, embeddings: Tensor, text_places: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings [B, T', D] of each row's text and which are real [B, T'], for a kind that
        looks at text; the answer's tokens are no part of the `prompt`."""
        if not wants(self.vtc.kind) & {"text", "text_mask"}:
            return None, None
        if self.vtc.text == "prompt":
            labels = batch.inputs.get("labels")
            expect(labels is not None, "labels", None, "labels, for VTC.text='prompt'")
            text_places = text_places & (labels == IGNORE_INDEX)
        order, real = pack(text_places)
        return take(embeddings.detach(), order), real

    def _scores(self, batch: Batch, count: int) -> Tensor | None:
        """A score for each of the `count` visual tokens, where the kind wants one."""
        if self.attention is None:
            return None
        if not self.seen:
            raise ValueError(
                f"VTC.kind={self.vtc.kind!r} needs the vision tower to run in this forward: "
                "pass pixel_values rather than precomputed features"
            )
        module = self.attention.module
        scores = class_attention(
            self.seen["queries"], self.seen["keys"], module.head_dim, module.scale
        )
        scores = self.architecture.token_scores(self.model, batch.inputs, scores)
        expect(len(scores) == count, "image placeholders", count, f"one of {len(scores)} patches")
        return scores


def class_attention(queries: Tensor, keys: Tensor, head_dim: int, scale: float) -> Tensor:
    """Attention of the class token (first of `queries`, `keys` [images, 1 + N, width]) to the
    N patches, mean over heads: softmax(q_cls k^T * scale), [images, N]."""
    query = queries[:, :1].unflatten(-1, (-1, head_dim)).float()
    keys = keys.unflatten(-1, (-1, head_dim)).float()
    attention = torch.einsum("nqhd,nkhd->nhk", query, keys).mul(scale).softmax(-1)
    return attention.mean(1)[:, 1:]


def check_images(inputs: dict[str, Any], kwargs: dict[str, Any], count: int) -> None:
    """Raises ValueError for what VTC can't take."""
    seen = [name for name, value in inputs.items() if value is not None]
    if not any("pixel" in name or name in FEATURES for name in seen):
        raise ValueError(
            f"input_ids hold {count} image placeholders, but there are no images: pass "
            "pixel_values (or mm_encoder_outputs)"
        )
    cache = kwargs.get("past_key_values")
    seen = 0 if cache is None else cache.get_seq_length()
    accepted = "none: VTC trains on whole sequences, so leave the cache out"
    expect(seen == 0, "past_key_values of the length", seen, accepted)


def _of_visual(value: object, visual: Tensor, count: int) -> bool:
    """Whether it has a row for each of the `count` visual tokens [V, ...] of the batch."""
    rows = isinstance(value, Tensor) and value.ndim == 2 and value.shape[:2] != visual.shape
    return rows and len(value) == count


def _shorter(name: str, value: Any, order: Tensor, real: Tensor, length: int) -> Any:
    """Any other keyword of the language model, at the places `order` [B, T'], which are `real`."""
    expect("cu_seq" not in name or value is None, name, value, "none: VTC can't cut it")
    some = take_tokens(f"{name}.shape of the language model", value, order, length)
    if some is value or some.dtype != torch.bool:
        return some
    return some & real.view(*real.shape, *[1] * (some.ndim - 2))
