"""PaliGemma and Gemma: an image is one square of tokens."""

from typing import Any

from torch import nn

from sts.architectures._base import Architecture, square_tiles, vit_side


def _is_read(layer: nn.Module) -> bool:
    """Whether later layers read this one's keys and values."""
    return bool(getattr(layer.self_attn, "store_full_length_kv", False))


def _pooled_side(config: Any) -> int:
    return round(config.mm_tokens_per_image**0.5)


ARCHITECTURES = {
    "paligemma": Architecture(grids=square_tiles(vit_side)),
    "gemma3n": Architecture(always=_is_read, partial=False),
    "gemma4": Architecture(always=_is_read, partial=False),
    "gemma3": Architecture(grids=square_tiles(_pooled_side)),
}
