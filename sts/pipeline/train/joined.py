"""LLaVA from two pretrained parts: a vision tower and a language model, joined by a projector that
is drawn anew.
"""

import os
from typing import Any

import torch
from tokenizers.models import BPE
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
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

from sts.checks import expect
from sts.pipeline.data.rows import IMAGE_TOKEN
from sts.pipeline.data.templates import CHAT_TEMPLATE, V1

# Towers that can be joined -> LLaVA's name for what is projected: of CLIP's hidden states all but
# the class token, of SigLIP's all, as it has none
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
ROWS_OF = 64  # embeddings come in multiples of it, of which a GPU's matrix products are faster
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # as SentencePiece writes it, also before a text


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
    for part in (vision, language):
        part.config._name_or_path = ""  # a folder of this machine, which would be saved
    processor = joined_processor(parts)
    tokenizer = processor.tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if len(tokenizer) > language.config.vocab_size:  # some have rows to spare
            language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROWS_OF)
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
        for layer in model.model.multi_modal_projector.children():
            if hasattr(layer, "reset_parameters"):  # as LLaVA draws it, not as transformers does
                layer.reset_parameters()
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


def joined_processor(parts: dict[str, Any]) -> LlavaProcessor:
    """The processor of a backbone manifest. Where it names none, one of the parts' own, with an
    image token in the tokenizer."""
    if parts["processor"]:
        processor = LlavaProcessor.from_pretrained(parts["processor"], **remote_code(parts))
        processor.image_processor = image_processor(parts)
    else:
        tower = tower_config(parts["vision"], **remote_code(parts))
        tokenizer = load_tokenizer(parts["language"], **remote_code(parts))
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        strategy = TOWERS[tower.model_type]
        processor = LlavaProcessor(
            image_processor=image_processor(parts),
            tokenizer=tokenizer,
            patch_size=tower.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=1 if strategy == "default" else 0,
            chat_template=tokenizer.chat_template or CHAT_TEMPLATE,
        )
    if "template" in parts:
        processor.chat_template = V1
        if processor.tokenizer.tokenize("\n")[:1] == [SPACE]:  # LLaVA begins a text after an image
            processor.chat_template = V1.replace(f"{IMAGE_TOKEN}\\n", f"{IMAGE_TOKEN} \\n")
    return processor


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model. Of a SentencePiece file alone, as Vicuna has, transformers
    takes the order of ids for that of merges; they go by the scores of their pieces."""
    options = {"padding_side": "left", "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy  # else it is not saved
    file, model = tokenizer.init_kwargs.get("vocab_file") or "", tokenizer.backend_tokenizer.model
    if os.path.basename(file) == "tokenizer.model" and isinstance(model, BPE):
        vocabulary, _, merges = SentencePieceExtractor(file).extract()
        options = {"fuse_unk": model.fuse_unk, "byte_fallback": model.byte_fallback}
        tokenizer.backend_tokenizer.model = BPE(vocabulary, merges, **options)
    return tokenizer


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
