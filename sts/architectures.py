"""Where each Hugging Face architecture keeps what the scheme touches: one short entry each.

Keys are `model.config.model_type` of the image-text-to-text class (the one with the head). A new
architecture is one entry; tests/test_architectures.py runs over all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils import ModelOutput

# --- the grid of each image ----------------------------------------------------------------------


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


def _square_tiles(side_of: Callable[[Any], int]) -> Grids:
    """As many tiles of side x side tokens as there are placeholders for; `side_of` the config."""

    def grids(model: PreTrainedModel, inputs: Inputs, count: int) -> list[Grid]:
        side = side_of(model.config)
        return [Grid(side, side)] * (count // (side * side))

    return grids


def _vit_side(config: Any) -> int:
    return _first(config.vision_config.image_size) // _first(config.vision_config.patch_size)


def _first(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]


def _sized_grids(config_merge: Callable[[Any], int]) -> Grids:
    """By `image_sizes` (pixels) of towers that take any size (Pixtral); `config_merge`: patches
    merged along each side."""

    def grids(model: PreTrainedModel, inputs: Inputs, count: int) -> list[Grid]:
        side = model.config.vision_config.patch_size * config_merge(model.config)
        sizes = torch.as_tensor(inputs["image_sizes"]) // side
        return [Grid(height, width) for height, width in sizes.tolist()]

    return grids


def _llava_grids(model: PreTrainedModel, inputs: Inputs, count: int) -> list[Grid]:
    sized = model.config.vision_config.model_type == "pixtral"  # Pixtral 12B is a LLaVA
    grids = _sized_grids(lambda config: 1) if sized else _square_tiles(_vit_side)
    return grids(model, inputs, count)


def _qwen_grids(model: PreTrainedModel, inputs: Inputs, count: int) -> list[Grid]:
    merge = model.config.vision_config.spatial_merge_size
    return [
        Grid(height // merge, width // merge)
        for frames, height, width in inputs["image_grid_thw"].tolist()
        for _ in range(frames)
    ]


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
        extra["vision_aspect_ratio"] = inputs.get("vision_aspect_ratio", config.vision_aspect_ratio)
    else:
        extra["vision_feature_select_strategy"] = "full"  # only for a warning
    if len(tiles) != sum(counts):  # features that don't vary: the grid is all that is asked for
        tiles = tiles[:1].expand(sum(counts), -1, -1)
    packed, _ = model.model.pack_image_features(
        list(tiles.split(counts)), sizes, image_newline=tiles.new_full((1,), newline), **extra
    )
    return packed


def _anyres_grids(model: PreTrainedModel, inputs: Inputs, count: int) -> list[Grid]:
    """A tile that shows the whole image, then the rows of the image in full resolution, each ended
    by a newline; a single tile is followed by one newline."""
    side = _vit_side(model.config)
    grids = []
    for tokens in _pack(model, inputs, torch.zeros(1, side * side, 1), newline=1.0):
        grids.append(Grid(side, side))
        newlines = tokens[side * side :, 0].nonzero()[:, 0].tolist()
        if newlines:  # an image of a multi-image sample has none
            grids.append(Grid(len(newlines), newlines[0], newline=True))
    return grids


# --- attention of a class token ------------------------------------------------------------------


class ClassAttention(NamedTuple):
    """The vision attention whose class token (the first) rates the patches.

    queries, keys: names of its modules that give them, [tiles, 1 + patches, width].
    """

    module: nn.Module  # has head_dim and scale
    queries: str = "q_proj"
    keys: str = "k_proj"


def _clip_attention(model: PreTrainedModel) -> ClassAttention:
    """Of the CLIP layer that feeds the projector.

    hidden_states[i] is the output of layer i - 1; of several feature layers the deepest counts.
    """
    tower = model.get_submodule("model.vision_tower")
    if not hasattr(getattr(tower, "embeddings", None), "class_embedding"):
        raise ValueError(_no_class_token(tower))
    layers = tower.encoder.layers
    features = model.config.vision_feature_layer
    features = [features] if isinstance(features, int) else features
    deepest = max(index % (len(layers) + 1) for index in features)
    return ClassAttention(layers[max(deepest - 1, 0)].self_attn)


def _internvl_attention(model: PreTrainedModel) -> ClassAttention:
    layers = model.get_submodule("model.vision_tower").encoder.layer
    deepest = model.config.vision_feature_layer % (len(layers) + 1)
    return ClassAttention(layers[max(deepest - 1, 0)].attention, "q_norm", "k_norm")


def _no_class_token(tower: nn.Module) -> str:
    return (
        "VTC kinds cls_topk and cls_merge need a vision tower with a class token, and "
        f"{type(tower).__name__} has none: use another VTC kind"
    )


def _without_class_token(model: PreTrainedModel) -> ClassAttention:
    base = model.get_submodule("model")
    raise ValueError(_no_class_token(getattr(base, "vision_tower", base)))


def _a_patch_a_token(model: PreTrainedModel, inputs: Inputs, scores: Tensor) -> Tensor:
    return scores.flatten()


def _anyres_scores(model: PreTrainedModel, inputs: Inputs, scores: Tensor) -> Tensor:
    return torch.cat(_pack(model, inputs, scores[..., None], newline=0.0)).flatten()


def _shuffled_scores(model: PreTrainedModel, inputs: Inputs, scores: Tensor) -> Tensor:
    """The mean over the patches that InternVL's pixel shuffle makes one token of."""
    merged = round(1 / model.config.downsample_ratio)
    side = round(scores.shape[1] ** 0.5)
    return F.avg_pool2d(scores.unflatten(1, (1, side, side)), merged).flatten()


# --- the entries ---------------------------------------------------------------------------------


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
    visual_mask, visual_features: further keywords of the language model: where the visual tokens
        are, [batch, tokens]; lists of features [V, dim] that layers add to them (deepstack).
    """

    grids: Grids
    class_attention: Callable[[PreTrainedModel], ClassAttention] = _without_class_token
    token_scores: Callable[[PreTrainedModel, Inputs, Tensor], Tensor] = _a_patch_a_token
    base: str = "model"
    language_model: str = "model.language_model"
    layers: str = "layers"
    visual_mask: str | None = None
    visual_features: str | None = None


_LLAVA = Architecture(grids=_llava_grids, class_attention=_clip_attention)
_QWEN = Architecture(grids=_qwen_grids)
_IDEFICS = Architecture(
    grids=_square_tiles(lambda config: _vit_side(config) // config.scale_factor),
    language_model="model.text_model",
)

ARCHITECTURES: dict[str, Architecture] = {
    "llava": _LLAVA,
    "vipllava": _LLAVA,
    "llava_next": Architecture(
        grids=_anyres_grids, class_attention=_clip_attention, token_scores=_anyres_scores
    ),
    "llava_onevision": Architecture(grids=_anyres_grids),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": Architecture(
        grids=_qwen_grids,
        visual_mask="visual_pos_masks",
        visual_features="deepstack_visual_embeds",
    ),
    "internvl": Architecture(
        grids=_square_tiles(lambda config: round(_vit_side(config) * config.downsample_ratio)),
        class_attention=_internvl_attention,
        token_scores=_shuffled_scores,
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "paligemma": Architecture(grids=_square_tiles(_vit_side)),
    "gemma3": Architecture(
        grids=_square_tiles(lambda config: round(config.mm_tokens_per_image**0.5))
    ),
    "mistral3": Architecture(grids=_sized_grids(lambda config: config.spatial_merge_size)),
}


def architecture_of(model: nn.Module) -> Architecture:
    """The entry of `model`. Raises ValueError, saying what an entry needs, for an unknown one."""
    name = getattr(getattr(model, "config", None), "model_type", None)
    entry = ARCHITECTURES.get(name)
    headed = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if not (entry and headed and _has(model, entry.language_model)):
        raise ValueError(
            f"{type(model).__name__} (model_type={name!r}) is not a known image-text-to-text model "
            f"with a language head; known: {', '.join(ARCHITECTURES)}. Pass the model itself, "
            "not a wrapper around it (DDP, FSDP, PEFT), or add an entry: "
            f"sts.architectures.ARCHITECTURES[{name!r}] = Architecture(grids=...), where `grids` "
            "says how the visual tokens of a batch lie, and the other fields say where base model, "
            "language model and decoder layers are if not at model, model.language_model, layers"
        )
    return entry


def _has(model: nn.Module, path: str) -> bool:
    try:
        return model.get_submodule(path) is not None
    except AttributeError:
        return False


def output_class(model: PreTrainedModel) -> type[ModelOutput]:
    """What the outer forward says that it returns."""
    annotation = signature(type(model).forward).return_annotation
    (found,) = [a for a in get_args(annotation) or [annotation] if a is not tuple]
    return found
