"""Images that are one or several square tiles; most make one token of several patches."""

from functools import partial  # no closure: a model with a scheme can be pickled
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from sts.architectures._base import (
    Architecture,
    ClassAttention,
    Inputs,
    square_tiles,
    vit_side,
)


def _gemma3_side(config: Any) -> int:
    return round(config.mm_tokens_per_image**0.5)


def _idefics_side(config: Any) -> int:
    return vit_side(config) // config.scale_factor


def _cohere_side(config: Any) -> int:
    return vit_side(config) // config.downsample_factor


def _granite_side(config: Any) -> int:
    return vit_side(config) // config.vision_config.scale_factor


def _internvl_side(config: Any) -> int:
    return round(vit_side(config) * config.downsample_ratio)


def _internvl_attention(model: PreTrainedModel) -> ClassAttention:
    layers = model.get_submodule("model.vision_tower").encoder.layer
    deepest = model.config.vision_feature_layer % (len(layers) + 1)
    return ClassAttention(layers[max(deepest - 1, 0)].attention, "q_norm", "k_norm")


def _internvl_scores(model: PreTrainedModel, inputs: Inputs, scores: Tensor) -> Tensor:
    """The mean over the patches that InternVL's pixel shuffle makes one token of."""
    merged = round(1 / model.config.downsample_ratio)
    side = round(scores.shape[1] ** 0.5)
    return F.avg_pool2d(scores.unflatten(1, (1, side, side)), merged).flatten()


_IDEFICS = Architecture(grids=partial(square_tiles, _idefics_side))
_COHERE = Architecture(grids=partial(square_tiles, _cohere_side))

ARCHITECTURES = {
    "paligemma": Architecture(grids=partial(square_tiles, vit_side)),
    "gemma3": Architecture(grids=partial(square_tiles, _gemma3_side)),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "aya_vision": _COHERE,
    "cohere2_vision": _COHERE,
    "granite_docling": Architecture(grids=partial(square_tiles, _granite_side)),
    "internvl": Architecture(
        grids=partial(square_tiles, _internvl_side),
        class_attention=_internvl_attention,
        token_scores=_internvl_scores,
    ),
}
