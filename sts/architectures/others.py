"""Types that are like no other: separators among the placeholders, or parts in other places."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sts.architectures._base import (
    Architecture,
    Grid,
    Inputs,
    grids_by_sizes,
    input_of,
)


def _with_row_ends(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """Emu 3: every row of an image ends in one more token."""
    factor = model.model.vqmodel.vision_spatial_factor
    sizes = torch.as_tensor(input_of(inputs, "image_sizes")).tolist()
    return [Grid(height // factor, width // factor, newline=True) for height, width in sizes]


def _between_two(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """HunYuan: the rows of an image end in one more token, and one stands before and one after."""
    merge = model.config.vision_config.spatial_merge_size
    return [
        grid
        for _, height, width in torch.as_tensor(input_of(inputs, "image_grid_thw")).tolist()
        for grid in (Grid(1, 1), Grid(height // merge, width // merge, newline=True), Grid(1, 1))
    ]


def _overview_and_crops(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """Molmo 2: (rows, columns) of the overview and of the crops, of each image."""
    sizes = torch.as_tensor(input_of(inputs, "image_grids")).reshape(-1, 2)
    return [Grid(*size) for size in sizes.tolist()]


def _as_many_tiles(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """Perception LM: pixel_values [images, tiles, 3, H, W], every tile a square of tokens."""
    tiles = input_of(inputs, "pixel_values").shape[:2].numel()
    side = round((int(runs.sum()) / tiles) ** 0.5)
    return [Grid(side, side)] * tiles


def _by_places(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """Gemma 4: (column, row) of each patch, [images, patches, 2], and -1 where there is none."""
    places = torch.as_tensor(input_of(inputs, "image_position_ids"))
    return grids_by_sizes(places.amax(1).flip(1) + 1, int(runs.sum()))


def _queries(model: PreTrainedModel, inputs: Inputs, runs: Tensor) -> list[Grid]:
    """Idefics 2: as many queries an image, whatever its size."""
    queries = model.config.perceiver_config.resampler_n_latents
    return [Grid(1, queries)] * (int(runs.sum()) // queries)


def _is_read(layer: nn.Module) -> bool:
    """Whether later layers read this one's keys and values."""
    return bool(getattr(layer.self_attn, "store_full_length_kv", False))


def _with_indices(hidden: Tensor, kwargs: dict[str, Any]) -> tuple:
    """A layer hands on which keys an earlier one chose."""
    return hidden, kwargs.get("prev_topk_indices")


ARCHITECTURES = {
    "emu3": Architecture(grids=_with_row_ends),
    "hunyuan_vl": Architecture(grids=_between_two),
    "idefics2": Architecture(grids=_queries),
    "molmo2": Architecture(grids=_overview_and_crops),
    "perception_lm": Architecture(grids=_as_many_tiles),
    # no vision tower: patches are embedded as they are
    "fuyu": Architecture(),
    # their outer models merge the images and call a language model with a head of its own
    "llama4": Architecture(language_model="language_model.model"),
    "nemotron_h_omni": Architecture(),
    "gemma3n": Architecture(always=_is_read, partial=False),
    "gemma4": Architecture(grids=_by_places, always=_is_read, partial=False),
    "gemma4_unified": Architecture(grids=_by_places),
    # a layer returns more than the hidden state
    "glm5_next": Architecture(returned=_with_indices, partial=False),
    "mistral_large4": Architecture(returned=_with_indices, partial=False),
    # its sparse attention reads position ids as places of the sequence
    "minimax_m3_vl": Architecture(partial=False),
}
