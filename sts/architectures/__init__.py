"""Where Hugging Face architectures keep what the scheme touches.

Most image-text-to-text models have the common shape and need no entry: `_lookup.py` finds base
model, language model and decoder layers, vision tower and projector, and `_base.py` the grids of
their images. A file without a leading underscore holds what some types have
otherwise: `ARCHITECTURES`, whose keys are `model.config.model_type` of the class with the language
head. REFUSED says which types can't be carried, and why.
"""

from sts.architectures._base import Architecture, ClassAttention, Grid
from sts.architectures._lookup import (
    ARCHITECTURES,
    PARTS,
    architecture_of,
    decoder_layers_of,
    head_of,
    part_finder,
    projector_of,
    tower_layers_of,
    tower_of,
)
from sts.architectures._refused import NO_LDS, NO_VTC, REFUSED

__all__ = [
    "ARCHITECTURES",
    "NO_LDS",
    "NO_VTC",
    "PARTS",
    "REFUSED",
    "Architecture",
    "ClassAttention",
    "Grid",
    "architecture_of",
    "decoder_layers_of",
    "head_of",
    "part_finder",
    "projector_of",
    "tower_layers_of",
    "tower_of",
]
