"""Idefics3 and SmolVLM: square tiles, and a pixel shuffle that makes several patches one token."""

from typing import Any

from sts.architectures._base import Architecture, square_tiles, vit_side


def _side(config: Any) -> int:
    return vit_side(config) // config.scale_factor


_IDEFICS = Architecture(grids=square_tiles(_side))

ARCHITECTURES = {"idefics3": _IDEFICS, "smolvlm": _IDEFICS}
