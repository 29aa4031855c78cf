"""LLaVA from two pretrained parts: a vision tower and a language model, joined by a projector that
is drawn anew.
"""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from sts.checks import expect
from sts.pipeline.data.rows import IMAGE_TOKEN
from sts.pipeline.data.templates import CHAT_TEMPLATE, V1

# Towers that can be joined -> LLaVA's name for what is projected: of CLIP's hidden states all but
# the class token, of SigLIP's all, as it has none
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}


def join_parts(
    parts: dict[str, Any], seed: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join the parts of a backbone manifest to a LLaVA in float32, and make its processor.

    Args:
        parts: The manifest: `vision`, `language` and `processor` (a hub id or folder, or none), and
            what else `write_manifest` puts there.
        seed: Of the projector, and of the image token's embedding where the language model has no
            such token.
    """
    vision = load_tower(parts["vision"], dtype=torch.float32, **remote_code(parts))
    language = AutoModelForCausalLM.from_pretrained(
        parts["language"], dtype=torch.float32, **remote_code(parts)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        processor = _processor(parts, vision, language)
        tokenizer = processor.tokenizer
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision.config,
                text_config=language.config,
                image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
                vision_feature_layer=parts.get("vision_feature_layer", -2),
                vision_feature_select_strategy=TOWERS[vision.config.model_type],
                tie_word_embeddings=language.config.tie_word_embeddings,
            )
        )
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.get_decoder().state_dict())
    model.lm_head.load_state_dict(language.get_output_embeddings().state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, processor


def remote_code(parts: dict[str, Any]) -> dict[str, bool]:
    """Whether Python files beside the weights of a backbone manifest may run: as transformers is
    told, which asks at a terminal where it is not told."""
    return {"trust_remote_code": parts.get("trust_remote_code", False)}


def tower_config(
    name: str, config: PreTrainedConfig | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The configuration of a vision tower without what LLaVA doesn't read of it.

    Args:
        name: A folder or hub id; any name with a `config`.
        config: The tower's own; by default that of `name`.

    Raises:
        ValueError: The tower is none of TOWERS.
    """
    if config is None:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        config = getattr(config, "vision_config", config)
    kind = config.model_type
    accepted = f"a tower of {', '.join(TOWERS)}"
    expect(kind in TOWERS, "model.vision", f"{name} ({kind})", accepted)
    if hasattr(config, "vision_use_head"):  # SigLIP's, which pools the patches
        config.vision_use_head = False
    return config


def load_tower(name: str, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The vision tower of a folder or the hub. Raises ValueError as `tower_config`."""
    code = {"trust_remote_code": trust_remote_code}
    return AutoModel.from_pretrained(name, config=tower_config(name, **code), **code, **options)


def _processor(
    parts: dict[str, Any], vision: PreTrainedModel, language: PreTrainedModel
) -> LlavaProcessor:
    """The processor of a backbone manifest. Where it names none, one of the parts' own, with an
    image token in the tokenizer and the language model's embeddings."""
    if parts["processor"]:
        processor = LlavaProcessor.from_pretrained(parts["processor"], **remote_code(parts))
        processor.image_processor = image_processor(parts)
    else:
        tokenizer = AutoTokenizer.from_pretrained(
            parts["language"], padding_side="left", **remote_code(parts)
        )
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if len(tokenizer) > language.config.vocab_size:  # some have rows to spare
            language.resize_token_embeddings(len(tokenizer))
        strategy = TOWERS[vision.config.model_type]
        processor = LlavaProcessor(
            image_processor=image_processor(parts),
            tokenizer=tokenizer,
            patch_size=vision.config.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=1 if strategy == "default" else 0,
            chat_template=tokenizer.chat_template or CHAT_TEMPLATE,
        )
    if "template" in parts:
        processor.chat_template = V1
    return processor


def image_processor(parts: dict[str, Any]) -> Any:
    """The image processor of a backbone manifest: the tower's, or one that pads pictures to squares
    first. It is saved with the model, so that evaluation prepares pictures as training did."""
    folder = parts["processor"] or parts["vision"]
    of_tower = AutoImageProcessor.from_pretrained(folder, **remote_code(parts))
    if "image_aspect_ratio" not in parts:
        return of_tower
    values = of_tower.to_dict()
    values |= {"do_pad": True, "do_center_crop": bool(of_tower.do_center_crop)}
    del values["image_processor_type"]
    return LlavaImageProcessorPil(**values)
