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
from sts.sequence import (
    WRONG_ATTENTION,
    Batch,
    at,
    attended,
    pack,
    position_ids,
    put,
    see_hooks,
    segments,
    shorter,
    take,
    without_newlines,
)
from sts.settings import IGNORE_INDEX, VTC
from sts.vtc import compress, wants


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
        batch's labels and mask; the number of visual tokens that are left."""
        check_images(batch.inputs, count)
        full = self._carry(batch, kwargs, count)
        order, real = pack(full["keep"])
        batch.mask = real
        batch.labels = batch.labels.gather(1, order).masked_fill(~real, IGNORE_INDEX)
        embeddings = take(full["embeddings"], order)
        shortened = {
            "inputs_embeds": embeddings,
            "attention_mask": self._shorter_mask(kwargs, embeddings, order, real),
            "position_ids": at(full["positions"], order),
        }
        left = full["keep"] & batch.visual
        names = self.architecture
        if names.visual_mask and kwargs.get(names.visual_mask) is not None:
            shortened[names.visual_mask] = left.gather(1, order) & real
            of_visual = left[batch.visual]
            shortened[names.visual_features] = [x[of_visual] for x in full["features"]]
        return kwargs | shortened, left.sum()

    def _carry(self, batch: Batch, kwargs: dict, count: int) -> dict:
        """Write the compressed tokens to the places of the tokens they stand at.

        Returns embeddings [B, T, D], positions [B, T] or [axes, B, T], features (each [V, D]), and
        keep [B, T]: true at those places and at text.
        """
        visual, embeddings = batch.visual, kwargs["inputs_embeds"]
        names = self.architecture
        features = list((names.visual_features and kwargs.get(names.visual_features)) or ())
        positions = position_ids(kwargs)
        average = self.vtc.positions == "mean"
        positions = positions.float() if average else positions
        axes = positions.shape[:-2]
        by_place = positions.reshape(-1, visual.numel()).T  # [B * T, axes]
        text_places = attended(batch.inputs, visual) & ~visual
        vectors, keep = embeddings.flatten(0, 1), text_places.flatten()
        text, text_mask = self._text(batch, embeddings, text_places)
        scores = self._scores(batch, count)
        places = visual.flatten().nonzero()[:, 0]
        for grid, index in self._images(batch, count).items():
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
            vectors = put(vectors, carriers, tokens[real])
            keep = keep.index_fill(0, carriers, True)
            if average:
                by_place = put(by_place, carriers, outputs.apply(by_place[where])[real])
            features = [
                put(x, index.gather(1, chosen)[real], outputs.apply(x[index])[real])
                for x in features
            ]
        return {
            "embeddings": vectors.view_as(embeddings),
            "positions": by_place.T.reshape(*axes, *visual.shape),
            "features": features,
            "keep": keep.view_as(visual),
        }

    def _shorter_mask(
        self, kwargs: dict, embeddings: Tensor, order: Tensor, real: Tensor
    ) -> object:
        """The language model's attention mask for the places `order` [B, T'], which are `real`."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, dict):  # made already, one for each kind of layer
            return {
                kind: None if one is None else shorter(one, order, real)
                for kind, one in mask.items()
            }
        if mask is not None:
            return shorter(mask, order, real)
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

    def _images(self, batch: Batch, count: int) -> dict[Grid, Tensor]:
        """Grid -> which of the `count` visual tokens are its images', [images, tokens]."""
        grids = self.architecture.grids(self.model, batch.inputs, count)
        sizes = [grid.tokens for grid in grids]
        if sum(sizes) != count:
            shown = [tuple(grid) for grid in grids]
            raise ValueError(
                f"input_ids hold {count} image placeholders, but the images have {sum(sizes)} "
                f"tokens by their grids (height, width, newline) {shown}: they must be as many"
            )
        ranges = torch.arange(count).split(sizes)
        return {
            grid: torch.stack([r for g, r in zip(grids, ranges, strict=True) if g == grid])
            for grid in dict.fromkeys(grids)
        }

    def _text(
        self, batch: Batch, embeddings: Tensor, text_places: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings [B, T', D] of each row's text and which are real [B, T'], for a kind that
        looks at text; the answer's tokens are no part of the `prompt`."""
        if not wants(self.vtc.kind) & {"text", "text_mask"}:
            return None, None
        if self.vtc.text == "prompt":
            text_places = text_places & (batch.labels == IGNORE_INDEX)
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


def check_images(inputs: dict[str, Any], count: int) -> None:
    """Raises ValueError for what VTC can't take."""
    if all(inputs.get(key) is None for key in ("pixel_values", "mm_encoder_outputs")):
        raise ValueError(
            f"input_ids hold {count} image placeholders, but there are no images: pass "
            "pixel_values (or mm_encoder_outputs)"
        )
    if inputs.get("pixel_values_videos") is not None:
        raise ValueError("pixel_values_videos: VTC compresses images only; leave videos out")
    if inputs.get("past_key_values") is not None:
        raise ValueError("past_key_values: VTC trains on whole sequences, so leave the cache out")
