"""What the entry of an architecture is, and what several of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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


def never(layer: nn.Module) -> bool:
    return False


# ---- grids: (outer model, outer inputs, runs) -> the grids of the images, or of the frames of the
# videos, in the order in which their tokens stand in the batch. runs: how many placeholders stand
# in a row in each place where there are some, [runs]; all of them the same image's or its tiles'.


def of_runs(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """A square where a run of placeholders is one, else a sequence; for models of unknown grids."""
    return [_square(n) or Grid(1, n) for n in runs.tolist()]


def _square(tokens: int) -> Grid | None:
    side = round(tokens**0.5)
    return Grid(side, side) if side * side == tokens else None


# What processors call the sizes of each image, [images, 2 or 3]: (frames,) rows and columns, in
# patches or in pixels
SIZES = {
    "image": ("image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes", "image_sizes"),
    "video": ("video_grid_thw", "target_sizes_videos"),
}


def of_sizes(sizes: Tensor, tokens: int) -> list[Grid]:
    """By sizes [images, 2 or 3] of which step x step became one token: by the step that explains
    the number of `tokens`."""
    step = max(1, round((int(sizes.prod(1).sum()) / max(tokens, 1)) ** 0.5))
    rows = [(*[1] * (3 - len(size)), *size) for size in sizes.tolist()]
    return [Grid(h // step, w // step) for frames, h, w in rows for _ in range(frames)]


def found(medium: str, model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """Of `image` or `video`, where an entry doesn't say: by the sizes that the processor gave if
    they explain the number of tokens, else by runs of placeholders."""
    tokens = int(runs.sum())
    for name in SIZES[medium]:
        if inputs.get(name) is not None:
            made = of_sizes(torch.as_tensor(inputs[name]), tokens)
            if sum(grid.tokens for grid in made) == tokens:
                return made
    frames = inputs.get("pixel_values_videos") if medium == "video" else None
    if frames is not None and frames.ndim == 5 and tokens % frames.shape[:2].numel() == 0:
        count = frames.shape[:2].numel()  # [videos, frames, channels, height, width]
        runs = torch.full((count,), tokens // count)
    return of_runs(model, inputs, runs)


of_images, of_videos = partial(found, "image"), partial(found, "video")


def square_tiles(side_of: Callable[[Any], int]) -> Grids:
    """As many tiles of side x side tokens as there are placeholders for; `side_of` the config."""
    return partial(_square_tiles, side_of)  # not a closure: a model with a scheme can be pickled


def _square_tiles(
    side_of: Callable[[Any], int], model: PreTrainedModel, inputs: Inputs, runs: Tensor
) -> list[Grid]:
    side = side_of(model.config)
    return [Grid(side, side)] * (int(runs.sum()) // (side * side))


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
    attention, mlp: attributes that a decoder layer may have for its two sublayers.
    returned: (hidden state, the layer's keywords) -> what a layer returns that changes nothing,
        where that is not the hidden state alone: a tuple, of which it is the first.
    always: layer -> whether it always runs, since others read what it stores.
    partial: whether a layer can run on some of the samples or tokens.
    """

    grids: Grids = of_images
    video_grids: Grids = of_videos
    class_attention: Callable[[PreTrainedModel], ClassAttention] = without_class_token
    token_scores: Callable[[PreTrainedModel, Inputs, Tensor], Tensor] = a_patch_a_token
    base: str | None = None
    language_model: str | None = None
    layers: str | None = None
    attention: tuple[str, ...] = ("self_attn", "linear_attn", "conv")
    mlp: tuple[str, ...] = ("mlp", "feed_forward")
    returned: Callable[[Tensor, dict[str, Any]], Any] | None = None
    always: Callable[[nn.Module], bool] = never
    partial: bool = True

    @property
    def decoder_layers(self) -> str:
        """The path of the decoder layers in the outer model."""
        return f"{self.language_model}.{self.layers}"
