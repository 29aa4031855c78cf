"""What the entry of an architecture is, and what several of them share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sts.checks import expect


class Grid(NamedTuple):
    """A rectangle of visual tokens, row by row."""

    height: int
    width: int  # patches of a row; 0: the rows hold nothing but newlines
    newline: bool = False  # every row ends in one more token, which is no patch

    @property
    def tokens(self) -> int:
        return self.height * (self.width + self.newline)


Inputs = dict[str, Any]  # of the outer forward
Grids = Callable[[PreTrainedModel, Inputs, Tensor], list[Grid]]


class ClassAttention(NamedTuple):
    """The vision attention whose class token (the first) rates the patches."""

    module: nn.Module  # has `head_dim` and `scale`
    queries: str = "q_proj"  # its submodule that gives them, [tiles, 1 + patches, width]
    keys: str = "k_proj"


def class_token_error(tower: nn.Module) -> ValueError:
    """The error where a VTC kind wants scores and the vision tower gives none."""
    return ValueError(
        "VTC kinds that want scores (cls_topk, cls_merge) need a vision tower with a class token, "
        f"and {type(tower).__name__} has none: use another VTC kind"
    )


def no_class_attention(model: PreTrainedModel) -> ClassAttention:
    base = model.base_model
    raise class_token_error(getattr(base, "vision_tower", base))


# ---- grids: (outer model, outer inputs, runs) -> the grids of the images, or of the frames of the
# videos, in the order in which their tokens stand in the batch. runs: the lengths of the runs of
# placeholders, [runs]; a run is an image, several side by side, or some of an image's tiles.

# What processors call the sizes of each image, [images, 2 or 3]: (frames,) rows and columns, in
# patches or in pixels
SIZES = {
    "image": ("image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes", "image_sizes"),
    "video": ("video_grid_thw", "target_sizes_videos"),
}


def input_of(inputs: Inputs, name: str) -> Any:
    """An input of the outer forward that says how the images lie.

    Raises:
        ValueError: It is not there, as where features take the place of pixels.
    """
    value = inputs.get(name)
    expect(
        value is not None, name, None, "what the processor gives: VTC needs it, also without pixels"
    )
    return value


def grids_by_sizes(sizes: Any, tokens: int) -> list[Grid]:
    """The grids of images of which step x step patches or pixels became one token.

    Args:
        sizes: [images, 2 or 3]: (frames,) rows and columns.
        tokens: The visual tokens of all of them, from which the step follows.
    """
    rows = [(*[1] * (3 - len(size)), *size) for size in torch.as_tensor(sizes).tolist()]
    step = max(1, round((sum(map(math.prod, rows)) / max(tokens, 1)) ** 0.5))
    return [Grid(h // step, w // step) for frames, h, w in rows for _ in range(frames)]


def _lengths(medium: str, inputs: Inputs, runs: list[int]) -> list[int]:
    """The visual tokens of each picture: an image, a tile of one or a frame of a video.

    Pictures that lie in one tensor have as many tokens each, wherever runs of placeholders begin
    and end. Of patches and of images with `pixel_values_local` a run is taken for a picture.

    Raises:
        ValueError: The runs can't be those of so many pictures.
    """
    encoded = getattr((inputs.get("mm_encoder_outputs") or {}).get(medium), "pooler_output", None)
    if encoded is not None and getattr(encoded, "ndim", 3) == 3:
        return [len(tokens) for tokens in encoded]
    pixels = inputs.get("pixel_values" if medium == "image" else "pixel_values_videos")
    if pixels is None or pixels.ndim < 4 or pixels.shape[-3] != 3:
        return runs
    name = f"runs of {medium} placeholders"
    if inputs.get("pixel_values_local") is not None:
        accepted = f"one or more for each of {len(pixels)} images, with other tokens between them"
        expect(len(runs) >= len(pixels), name, runs, accepted)
        return runs
    pictures = pixels.shape[:-3].numel()
    size, rest = divmod(sum(runs), pictures)
    is_even = not rest and all(run % size == 0 or size % run == 0 for run in runs)
    expect(is_even, name, runs, f"those of {pictures} pictures of one size")
    return [size] * pictures


def _grids_of(medium: str, model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """Of `image` or `video`, where an entry doesn't say: by the sizes that the processor gave if
    they explain the number of tokens, else a square where a picture's tokens make one, else a
    sequence."""
    tokens = int(runs.sum())
    for name in SIZES[medium]:
        if inputs.get(name) is not None:
            grids = grids_by_sizes(inputs[name], tokens)
            if sum(grid.tokens for grid in grids) == tokens:
                return grids
    lengths = _lengths(medium, inputs, runs.tolist())
    sides = [(length, round(length**0.5)) for length in lengths]
    return [Grid(side, side) if side**2 == length else Grid(1, length) for length, side in sides]


image_grids, video_grids = partial(_grids_of, "image"), partial(_grids_of, "video")


def square_tiles(
    side_of: Callable[[Any], int], model: PreTrainedModel, inputs: Inputs, runs: Tensor
) -> list[Grid]:
    """Tiles of side x side tokens, as many as there are placeholders for.

    side_of: The model's configuration -> side.
    """
    side = side_of(model.config)
    return [Grid(side, side)] * (int(runs.sum()) // (side * side))


def vit_side(config: Any) -> int:
    """Patches along a side of a square image."""
    sizes = (config.vision_config.image_size, config.vision_config.patch_size)
    image, patch = (size if isinstance(size, int) else size[0] for size in sizes)
    return image // patch


@dataclass(frozen=True)
class Architecture:
    """Where a model keeps what the scheme touches.

    Paths are relative to the outer model; those that are None are looked for where most models have
    them.

    Attributes:
        grids: See above; by default from sizes or runs of placeholders.
        video_grids: The same for the frames of videos.
        class_attention: Outer model -> the attention that rates patches; raises ValueError without
            one.
        token_scores: (outer model, outer inputs, scores [tiles, patches]) -> a score per visual
            token, [V]; None: each patch is one.
        base: The model without head; its first output is the last hidden state [batch, tokens,
            dim]. Empty where the outer model calls its language model itself.
        language_model: Takes inputs_embeds, attention_mask and position_ids by keyword.
        layers: Attribute of the language model with its decoder layers, each called with the hidden
            state [batch, tokens, dim] first and returning the next one.
        attention: Attributes that a decoder layer may have for its attention.
        mlp: The same for its MLP.
        returned: (hidden state, the layer's keywords) -> what a skipped layer returns, where that
            is a tuple, of which the hidden state is the first.
        always: Layer -> whether it always runs, since others read what it stores; None: no layer.
        partial: Whether a layer can run on some of the samples or tokens.
    """

    grids: Grids = image_grids
    video_grids: Grids = video_grids
    class_attention: Callable[[PreTrainedModel], ClassAttention] = no_class_attention
    token_scores: Callable[[PreTrainedModel, Inputs, Tensor], Tensor] | None = None
    base: str | None = None
    language_model: str | None = None
    layers: str | None = None
    attention: tuple[str, ...] = ("self_attn", "linear_attn", "conv")
    mlp: tuple[str, ...] = ("mlp", "feed_forward")
    returned: Callable[[Tensor, dict[str, Any]], Any] | None = None
    always: Callable[[nn.Module], bool] | None = None
    partial: bool = True

    @property
    def decoder_layers(self) -> str:
        """The path of the decoder layers in the outer model."""
        return f"{self.language_model}.{self.layers}"
