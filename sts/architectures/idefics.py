"""Idefics3 and SmolVLM: square tiles, and a pixel shuffle that makes several patches one token."""

from sts.architectures._base import Architecture, square_tiles, vit_side

_IDEFICS = Architecture(grids=square_tiles(lambda config: vit_side(config) // config.scale_factor))

ARCHITECTURES = {"idefics3": _IDEFICS, "smolvlm": _IDEFICS}
