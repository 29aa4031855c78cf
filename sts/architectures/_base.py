"""What the entry of an architecture is, and what several of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Grid(NamedTuple):
    """A rectangle of visual tokens, row by row. newline: every row ends in one more token, which
    is no patch (width 0: nothing but such tokens)."""

    height: int
    width: int
    newline: bool = False

    @property
    def tokens(self) -> int:
        return self.height * (self.width + self.newline)


Inputs = dict[str, Any]  # of the outer forward
Grids = Callable[[PreTrainedModel, Inputs, int], list[Grid]]


class ClassAttention(NamedTuple):
    """The vision attention whose class token (the first) rates the patches.

    queries, keys: names of its modules that give them, [tiles, 1 + patches, width].
    """

    module: nn.Module  # has head_dim and scale
    queries: str = "q_proj"
    keys: str = "k_proj"


def no_class_token(tower: nn.Module) -> str:
    """What to say where a VTC kind wants scores and nothing gives them."""
    return (
        "VTC kinds that want scores (cls_topk, cls_merge) need a vision tower with a class token, "
        f"and {type(tower).__name__} has none: use another VTC kind"
    )


def without_class_token(model: PreTrainedModel) -> ClassAttention:
    base = model.get_submodule("model")
    raise ValueError(no_class_token(getattr(base, "vision_tower", base)))


def a_patch_a_token(model: PreTrainedModel, inputs: Inputs, scores: Tensor) -> Tensor:
    return scores.flatten()


@dataclass(frozen=True)
class Architecture:
    """One entry. Paths are relative to the outer model.

    grids: (outer model, outer inputs, number of image placeholders) -> the grids of the images, in
        the order in which their tokens stand in the batch.
    class_attention: outer model -> the attention that rates patches; raises ValueError without one.
    token_scores: (outer model, outer inputs, scores [tiles, patches]) -> one per visual token, [V].
    base: the model without head; its first output is the last hidden state [batch, tokens, dim].
    language_model: takes inputs_embeds, attention_mask and position_ids by keyword.
    layers: attribute of the language model with its decoder layers, each called with the hidden
        state [batch, tokens, dim] first and returning the next one.
    attention, mlp: attributes of a decoder layer, its two sublayers.
    visual_mask, visual_features: further keywords of the language model: where the visual tokens
        are, [batch, tokens]; lists of features [V, dim] that layers add to them (deepstack).
    """

    grids: Grids
    class_attention: Callable[[PreTrainedModel], ClassAttention] = without_class_token
    token_scores: Callable[[PreTrainedModel, Inputs, Tensor], Tensor] = a_patch_a_token
    base: str = "model"
    language_model: str = "model.language_model"
    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    visual_mask: str | None = None
    visual_features: str | None = None


def square_tiles(side_of: Callable[[Any], int]) -> Grids:
    """As many tiles of side x side tokens as there are placeholders for; `side_of` the config."""

    def grids(model: PreTrainedModel, inputs: Inputs, count: int) -> list[Grid]:
        side = side_of(model.config)
        return [Grid(side, side)] * (count // (side * side))

    return grids


def sized_grids(config_merge: Callable[[Any], int]) -> Grids:
    """By `image_sizes` (pixels) of towers that take any size (Pixtral); `config_merge`: patches
    merged along each side."""

    def grids(model: PreTrainedModel, inputs: Inputs, count: int) -> list[Grid]:
        side = model.config.vision_config.patch_size * config_merge(model.config)
        sizes = torch.as_tensor(inputs["image_sizes"]) // side
        return [Grid(height, width) for height, width in sizes.tolist()]

    return grids


def vit_side(config: Any) -> int:
    """Patches along a side of a square image."""
    return _first(config.vision_config.image_size) // _first(config.vision_config.patch_size)


def _first(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]
