"""InternVL: square tiles, and a pixel shuffle that makes one token of several patches."""

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


def _internvl_attention(model: PreTrainedModel) -> ClassAttention:
    layers = model.get_submodule("model.vision_tower").encoder.layer
    deepest = model.config.vision_feature_layer % (len(layers) + 1)
    return ClassAttention(layers[max(deepest - 1, 0)].attention, "q_norm", "k_norm")


def _shuffled_scores(model: PreTrainedModel, inputs: Inputs, scores: Tensor) -> Tensor:
    """The mean over the patches that InternVL's pixel shuffle makes one token of."""
    merged = round(1 / model.config.downsample_ratio)
    side = round(scores.shape[1] ** 0.5)
    return F.avg_pool2d(scores.unflatten(1, (1, side, side)), merged).flatten()


def _side(config: Any) -> int:
    return round(vit_side(config) * config.downsample_ratio)


ARCHITECTURES = {
    "internvl": Architecture(
        grids=square_tiles(_side),
        class_attention=_internvl_attention,
        token_scores=_shuffled_scores,
    ),
}
