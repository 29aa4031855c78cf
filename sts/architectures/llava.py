"""LLaVA and its kin: square images, images of any size (Pixtral 12B), or tiles of them."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from sts.architectures._base import (
    Architecture,
    ClassAttention,
    Grid,
    Inputs,
    no_class_token,
    square_tiles,
    vit_side,
)


def _pack(model: PreTrainedModel, inputs: Inputs, tiles: Tensor, newline: float) -> list[Tensor]:
    """What the model itself makes of tile features [tiles, tokens, 1] with padding cut away and
    `newline` after each row: [tokens of the image, 1] of each image."""
    config, sizes = model.config, inputs["image_sizes"]
    alone = inputs.get("batch_num_images")
    whole = [True] * len(sizes) if alone is None else [n == 1 for n in alone for _ in range(n)]
    counts = [
        image_size_to_num_patches(
            image_size=size,
            grid_pinpoints=config.image_grid_pinpoints,
            patch_size=config.vision_config.image_size,
        )
        if cut
        else 1
        for size, cut in zip(sizes, whole, strict=True)
    ]
    extra = {}
    if hasattr(config, "vision_aspect_ratio"):
        asked = inputs.get("vision_aspect_ratio")  # None: as the config says
        extra["vision_aspect_ratio"] = asked or config.vision_aspect_ratio
    else:
        extra["vision_feature_select_strategy"] = "full"  # only for a warning
    if len(tiles) != sum(counts):  # features that don't vary: the grid is all that is asked for
        tiles = tiles[:1].expand(sum(counts), -1, -1)
    packed, _ = model.model.pack_image_features(
        list(tiles.split(counts)), sizes, image_newline=tiles.new_full((1,), newline), **extra
    )
    return packed


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
        raise ValueError(no_class_token(tower))
    layers = tower.encoder.layers
    features = model.config.vision_feature_layer
    features = [features] if isinstance(features, int) else features
    deepest = max(index % (len(layers) + 1) for index in features)
    return ClassAttention(layers[max(deepest - 1, 0)].self_attn)


def _anyres_scores(model: PreTrainedModel, inputs: Inputs, scores: Tensor) -> Tensor:
    return torch.cat(_pack(model, inputs, scores[..., None], newline=0.0)).flatten()


def _pooled_frames(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """LLaVA-OneVision: frames at half the resolution, and a newline after the last of a video."""
    videos, frames = inputs["pixel_values_videos"].shape[:2]
    side = -(-vit_side(model.config) // 2)
    return ([Grid(side, side)] * frames + [Grid(1, 0, newline=True)]) * videos


def _side(config: Any) -> int:
    return vit_side(config) // config.downsample_factor


_LLAVA = Architecture(class_attention=_clip_attention)
_TILES = Architecture(grids=square_tiles(_side))

ARCHITECTURES = {
    "llava": _LLAVA,
    "vipllava": _LLAVA,
    "llava_next": Architecture(
        grids=_anyres_grids, class_attention=_clip_attention, token_scores=_anyres_scores
    ),
    "llava_next_video": Architecture(
        grids=_anyres_grids, class_attention=_clip_attention, token_scores=_anyres_scores
    ),
    "llava_onevision": Architecture(grids=_anyres_grids, video_grids=_pooled_frames),
    "aya_vision": _TILES,
    "cohere2_vision": _TILES,
}
