"""LLaVA and its kin: square images, images of any size (Pixtral 12B), or tiles of them."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from sts.architectures._base import (
    Architecture,
    ClassAttention,
    Grid,
    Inputs,
    class_token_error,
    input_of,
    vit_side,
)


def _pack(model: PreTrainedModel, inputs: Inputs, tiles: Tensor, newline: float) -> list[Tensor]:
    """What the model itself makes of tile features, with padding cut away.

    Args:
        tiles: [tiles, tokens, 1], or [1, tokens, 1] for features that don't vary.
        newline: The feature that it puts after each row.

    Returns:
        [tokens, 1] of each image.
    """
    config, sizes = model.config, input_of(inputs, "image_sizes")
    size_of_tile = (config.image_grid_pinpoints, config.vision_config.image_size)
    counts = [
        image_size_to_num_patches(size, *size_of_tile) if is_tiled else 1
        for size, is_tiled in zip(sizes, _are_tiled(inputs), strict=True)
    ]
    if hasattr(config, "vision_aspect_ratio"):
        ratio = inputs.get("vision_aspect_ratio")  # None: as the config says
        extra = {"vision_aspect_ratio": ratio or config.vision_aspect_ratio}
    else:
        extra = {"vision_feature_select_strategy": "full"}  # only for a warning
    if len(tiles) != sum(counts):
        tiles = tiles[:1].expand(sum(counts), -1, -1)
    packed, _ = model.model.pack_image_features(
        list(tiles.split(counts)), sizes, image_newline=tiles.new_full((1,), newline), **extra
    )
    return packed


def _are_tiled(inputs: Inputs) -> list[bool]:
    """Of each image whether it is cut to tiles: LLaVA-OneVision leaves those of a sample with
    several images as they are."""
    images = inputs.get("batch_num_images")  # of each sample
    if images is None:
        return [True] * len(input_of(inputs, "image_sizes"))
    return [count == 1 for count in images for _ in range(count)]


def _anyres_grids(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """A tile that shows the whole image, then the rows of the image in full resolution, each ended
    by a newline; a single tile is followed by one newline."""
    side = vit_side(model.config)
    grids = []
    for tokens in _pack(model, inputs, torch.zeros(1, side * side, 1), newline=1.0):
        grids.append(Grid(side, side))
        newlines = tokens[side * side :, 0].nonzero()[:, 0].tolist()
        if newlines:  # an image of a multi-image sample has none
            grids.append(Grid(len(newlines), newlines[0], newline=True))
    return grids


def _clip_attention(model: PreTrainedModel) -> ClassAttention:
    """Of the CLIP layer that feeds the projector.

    hidden_states[i] is the output of layer i - 1; of several feature layers the deepest counts.
    """
    tower = model.get_submodule("model.vision_tower")
    if not hasattr(getattr(tower, "embeddings", None), "class_embedding"):
        raise class_token_error(tower)
    layers = tower.encoder.layers
    features = model.config.vision_feature_layer
    features = [features] if isinstance(features, int) else features
    deepest = max(index % (len(layers) + 1) for index in features)
    return ClassAttention(layers[max(deepest - 1, 0)].self_attn)


def _anyres_scores(model: PreTrainedModel, inputs: Inputs, scores: Tensor) -> Tensor:
    return torch.cat(_pack(model, inputs, scores[..., None], newline=0.0)).flatten()


def _pooled_frames(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """LLaVA-OneVision: frames at half the resolution, and a newline after the last of a video."""
    videos, frames = input_of(inputs, "pixel_values_videos").shape[:2]
    side = -(-vit_side(model.config) // 2)
    return ([Grid(side, side)] * frames + [Grid(1, 0, newline=True)]) * videos


_LLAVA = Architecture(class_attention=_clip_attention)
_ANYRES = Architecture(
    grids=_anyres_grids, class_attention=_clip_attention, token_scores=_anyres_scores
)

ARCHITECTURES = {
    "llava": _LLAVA,
    "vipllava": _LLAVA,
    "llava_next": _ANYRES,
    "llava_next_video": _ANYRES,
    "llava_onevision": Architecture(grids=_anyres_grids, video_grids=_pooled_frames),
}
