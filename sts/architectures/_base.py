"""What the entry of an architecture is, and what several of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Grid(NamedTuple):
    """A rectangle of visual tokens, row by row. newline: every row ends in one more token, which
    is no patch (width 0: nothing but such tokens)."""

    height: int
    width: int
    newline: bool = False

    @property
    def tokens(self) -> int:
        return self.height * (self.width + self.newline)


Inputs = dict[str, Any]  # of the outer forward
Grids = Callable[[PreTrainedModel, Inputs, Tensor], list[Grid]]


class ClassAttention(NamedTuple):
    """The vision attention whose class token (the first) rates the patches.

    queries, keys: names of its modules that give them, [tiles, 1 + patches, width].
    """

    module: nn.Module  # has head_dim and scale
    queries: str = "q_proj"
    keys: str = "k_proj"


def no_class_token(tower: nn.Module) -> str:
    """What to say where a VTC kind wants scores and nothing gives them."""
    return (
        "VTC kinds that want scores (cls_topk, cls_merge) need a vision tower with a class token, "
        f"and {type(tower).__name__} has none: use another VTC kind"
    )


def without_class_token(model: PreTrainedModel) -> ClassAttention:
    base = model.base_model
    raise ValueError(no_class_token(getattr(base, "vision_tower", base)))


def a_patch_a_token(model: PreTrainedModel, inputs: Inputs, scores: Tensor) -> Tensor:
    return scores.flatten()


# ---- grids: (outer model, outer inputs, runs) -> the grids of the images, or of the frames of the
# videos, in the order in which their tokens stand in the batch. runs: how many placeholders stand
# in a row in each place where there are some, [runs]; all of them the same image's or its tiles'.


def of_runs(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """A square where a run of placeholders is one, else a sequence; for models of unknown grids."""
    return [_square(n) or Grid(1, n) for n in runs.tolist()]


def _square(tokens: int) -> Grid | None:
    side = round(tokens**0.5)
    return Grid(side, side) if side * side == tokens else None


def by_grid_thw(name: str) -> Grids:
    """By (frames, rows, columns) of patches, as `inputs[name]` [images, 3] has them, of which
    `merge` x `merge` became a token: as many as explain the number of placeholders."""

    def grids(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
        sizes = torch.as_tensor(inputs[name])
        patches, tokens = int(sizes.prod(1).sum()), int(runs.sum())
        merge = round((patches / max(tokens, 1)) ** 0.5)
        return [
            Grid(height // merge, width // merge)
            for frames, height, width in sizes.tolist()
            for _ in range(frames)
        ]

    return grids


def found(medium: str) -> Grids:
    """Of `image` or `video`, where an entry doesn't say: by the sizes that the processor gave if
    they are such of patches, else by runs of placeholders."""

    def grids(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
        name = f"{medium}_grid_thw"
        if inputs.get(name) is not None:
            made = by_grid_thw(name)(model, inputs, runs)
            if sum(grid.tokens for grid in made) == int(runs.sum()):
                return made
        return of_runs(model, inputs, runs)

    return grids


of_images, of_videos = found("image"), found("video")


def square_tiles(side_of: Callable[[Any], int]) -> Grids:
    """As many tiles of side x side tokens as there are placeholders for; `side_of` the config."""

    def grids(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
        side = side_of(model.config)
        return [Grid(side, side)] * (int(runs.sum()) // (side * side))

    return grids


def sized_grids(config_merge: Callable[[Any], int]) -> Grids:
    """By `image_sizes` (pixels) of towers that take any size (Pixtral); `config_merge`: patches
    merged along each side."""

    def grids(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
        side = model.config.vision_config.patch_size * config_merge(model.config)
        sizes = torch.as_tensor(inputs["image_sizes"]) // side
        return [Grid(height, width) for height, width in sizes.tolist()]

    return grids


def vit_side(config: Any) -> int:
    """Patches along a side of a square image."""
    return _first(config.vision_config.image_size) // _first(config.vision_config.patch_size)


def _first(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]


@dataclass(frozen=True)
class Architecture:
    """Where a model keeps what the scheme touches. Paths are relative to the outer model, and those
    that are None are found where most models have them.

    grids, video_grids: see above; without them they are found.
    class_attention: outer model -> the attention that rates patches; raises ValueError without one.
    token_scores: (outer model, outer inputs, scores [tiles, patches]) -> one per visual token, [V].
    base: the model without head; its first output is the last hidden state [batch, tokens, dim].
        Empty where the outer model calls its language model itself.
    language_model: takes inputs_embeds, attention_mask and position_ids by keyword.
    layers: attribute of the language model with its decoder layers, each called with the hidden
        state [batch, tokens, dim] first and returning the next one.
    attention, mlp: attributes of a decoder layer, its two sublayers.
    """

    grids: Grids = of_images
    video_grids: Grids = of_videos
    class_attention: Callable[[PreTrainedModel], ClassAttention] = without_class_token
    token_scores: Callable[[PreTrainedModel, Inputs, Tensor], Tensor] = a_patch_a_token
    base: str | None = None
    language_model: str | None = None
    layers: str | None = None
    attention: str = "self_attn"
    mlp: str = "mlp"
