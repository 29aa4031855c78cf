"""Where each Hugging Face architecture keeps what the scheme touches: one short entry each.

Keys are `model.config.model_type` of the image-text-to-text class (the one with the head). A new
architecture is one entry; tests/test_scheme.py runs over all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def _one_grid_per_image(config: PreTrainedConfig, inputs: dict, tokens: int) -> list:
    """Every image is the square grid of patches of the vision tower, as in LLaVA-1.5."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [(side, side)] * (tokens // (side * side))


def _clip_attention(model: PreTrainedModel) -> nn.Module:
    """The CLIP attention (q_proj, k_proj, head_dim, scale) whose layer feeds the projector.

    hidden_states[i] is the output of layer i - 1; of several feature layers the deepest counts.
    """
    tower = model.get_submodule("model.vision_tower")
    if not hasattr(getattr(tower, "embeddings", None), "class_embedding"):
        raise ValueError(
            f"kind='cls_topk' needs a vision tower with a class token, and "
            f"{type(tower).__name__} has none: use another VTC kind"
        )
    layers = tower.encoder.layers
    features = model.config.vision_feature_layer
    features = [features] if isinstance(features, int) else features
    deepest = max(index % (len(layers) + 1) for index in features)
    return layers[max(deepest - 1, 0)].self_attn


@dataclass(frozen=True)
class Architecture:
    """One entry. The paths are relative to the outer model.

    output: "module:class" of what the outer forward returns.
    grids: (config, forward inputs, number of visual tokens in the batch) -> [(height, width)] of
        each image, in the order in which its tokens stand in the batch, row by row.
    cls_attention: outer model -> the vision attention whose class token rates the patches.
    base: the model without head; its first output is the last hidden state [batch, tokens, dim].
    language_model: takes inputs_embeds, attention_mask and position_ids by keyword.
    layers: attribute of the language model with its decoder layers, each called with the hidden
        state [batch, tokens, dim] first and returning the next one.
    """

    output: str
    grids: Callable[[PreTrainedConfig, dict, int], list]
    cls_attention: Callable[[PreTrainedModel], nn.Module]
    base: str = "model"
    language_model: str = "model.language_model"
    layers: str = "layers"

    def output_class(self) -> type:
        module, name = self.output.split(":")
        return getattr(import_module(module), name)


ARCHITECTURES: dict[str, Architecture] = {
    "llava": Architecture(
        output="transformers.models.llava.modeling_llava:LlavaCausalLMOutputWithPast",
        grids=_one_grid_per_image,
        cls_attention=_clip_attention,
    ),
    "vipllava": Architecture(
        output="transformers.models.vipllava.modeling_vipllava:VipLlavaCausalLMOutputWithPast",
        grids=_one_grid_per_image,
        cls_attention=_clip_attention,
    ),
}


def architecture_of(model: nn.Module) -> Architecture:
    """The entry of `model`. Raises ValueError, saying what an entry needs, for an unknown one."""
    name = getattr(getattr(model, "config", None), "model_type", None)
    headed = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if name not in ARCHITECTURES or not headed:
        raise ValueError(
            f"{type(model).__name__} (model_type={name!r}) is not a known image-text-to-text model "
            f"with a language head; known: {', '.join(ARCHITECTURES)}. Pass the model itself, "
            "not a wrapper around it (DDP, FSDP, PEFT), or add an entry to "
            "sts.architectures.ARCHITECTURES: output class, the grid of each image, the vision "
            "attention with the class token, and the paths of base model, language model and "
            "decoder layers"
        )
    return ARCHITECTURES[name]
