"""PaliGemma and Gemma 3: an image is one square of tokens."""

from sts.architectures._base import Architecture, square_tiles, vit_side

ARCHITECTURES = {
    "paligemma": Architecture(grids=square_tiles(vit_side)),
    "gemma3": Architecture(
        grids=square_tiles(lambda config: round(config.mm_tokens_per_image**0.5))
    ),
}
