"""What a run starts from: a vision tower and a language model joined by a fresh projector, or a
whole checkpoint.

    python -m sts backbone --config workflow/config/mini.yaml --out backbone.json

The backbone manifest says where they lie and hashes them; every run starts from it.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from sts.architectures import PARTS, part_finder
from sts.checks import expect
from sts.pipeline.config import ModelConfig
from sts.pipeline.data.rows import IMAGE_TOKEN
from sts.pipeline.data.templates import CHAT_TEMPLATE, V1
from sts.pipeline.files import read_json, sha256_file, sha256_json, write_json_atomic

SHIPPED = Path("data/backbones/mini")
# Towers that are joined -> what is projected: of CLIP's all but the class token, SigLIP has none
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}


def write_manifest(model: ModelConfig, out: str | Path, folder: Path = SHIPPED) -> dict[str, Any]:
    """Write and return the backbone manifest: a whole checkpoint or pretrained parts by hub id or
    path, else the files in `folder` (vision/, language/, processor/); with the hash of the bytes
    that lie in a folder.

    Raises FileNotFoundError if there are none, ValueError if the language model has not the number
    of layers that the configuration says, or the tower is none of TOWERS.
    """
    if model.family == "whole" or model.backbone == "pretrained":
        _check_layers(model)
    if model.family == "joined" and model.backbone == "pretrained":
        tower_config(model.vision)
    manifest: dict[str, Any]
    if model.family == "whole":
        manifest = {"checkpoint": model.checkpoint, "fresh": model.fresh}
    elif model.backbone == "pretrained":
        manifest = {"vision": model.vision, "language": model.language, "processor": None}
    else:
        manifest = {name: str(folder / name) for name in ("vision", "language", "processor")}
    sources = model.sources or list(manifest.values())
    files = [file for source in sources for file in sorted(Path(source).rglob("*"))]
    hashes = [[file.name, sha256_file(file)] for file in files if file.is_file()]
    if model.family == "joined":
        manifest["vision_feature_layer"] = model.vision_feature_layer
        chosen = {"template": model.template, "image_aspect_ratio": model.image_aspect_ratio}
        manifest |= {name: value for name, value in chosen.items() if value != "own"}
        if model.backbone != "pretrained" and not hashes:
            raise FileNotFoundError(
                f"{folder}: no backbone files; get them with `git checkout -- {folder}`"
            )
    manifest["sha256"] = sha256_json([manifest, hashes])
    write_json_atomic(out, manifest)
    return manifest


def _check_layers(model: ModelConfig) -> None:
    name = model.checkpoint if model.family == "whole" else model.language
    found = AutoConfig.from_pretrained(name).get_text_config().num_hidden_layers
    if found != model.layers:
        raise ValueError(
            f"model.layers: {model.layers}, but {name} has {found} decoder layers: set it to that"
        )


def build(manifest: str | Path, seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model of a backbone manifest, float32, and its processor; what is fresh is drawn from
    `seed`."""
    start = read_json(manifest)
    if "checkpoint" not in start:
        return build_llava(manifest, seed)
    model, processor = load_whole(start["checkpoint"])
    if start["fresh"]:
        _draw_anew(model, start["fresh"], seed)
    return model, processor


def load_whole(folder: str | Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Any image-text-to-text model of a folder or the hub, float32, and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder)


def _draw_anew(model: PreTrainedModel, parts: Collection[str], seed: int) -> None:
    """Initialise parts of a model as its class does, from `seed`."""
    part_of = part_finder(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other = AutoModelForImageTextToText.from_config(model.config, dtype=torch.float32)
    drawn = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part_of(name) in parts:
                parameter.copy_(drawn[name])


def build_llava(
    manifest: str | Path, seed: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The two parts of a backbone manifest, float32, joined by a projector drawn from `seed`; what
    pretrained parts need beside it, the embedding of the image token, is drawn too."""
    parts = read_json(manifest)
    vision = load_tower(parts["vision"], dtype=torch.float32)
    language = AutoModelForCausalLM.from_pretrained(parts["language"], dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if parts["processor"]:
            processor = LlavaProcessor.from_pretrained(parts["processor"])
        else:
            processor = pretrained_processor(parts["vision"], parts["language"], vision, language)
        if "image_aspect_ratio" in parts:
            processor.image_processor = image_processor(parts)
        if "template" in parts:
            processor.chat_template = V1
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


def tower_config(name: str) -> PreTrainedConfig:
    """The configuration of a vision tower of a folder or the hub, without what LLaVA doesn't read
    of it. Raises ValueError if it is none of TOWERS."""
    config = AutoConfig.from_pretrained(name)
    return as_tower(name, getattr(config, "vision_config", config))


def as_tower(name: str, config: PreTrainedConfig) -> PreTrainedConfig:
    """A tower's configuration, as `tower_config` gives it."""
    expect(
        config.model_type in TOWERS,
        "model.vision",
        f"{name} ({config.model_type})",
        f"a tower of {', '.join(TOWERS)}",
    )
    if hasattr(config, "vision_use_head"):  # SigLIP's, which pools the patches
        config.vision_use_head = False
    return config


def load_tower(name: str, **settings: Any) -> PreTrainedModel:
    """The vision tower of a folder or the hub. Raises ValueError as `tower_config`."""
    return AutoModel.from_pretrained(name, config=tower_config(name), **settings)


def image_processor(parts: dict[str, Any]) -> Any:
    """What turns pictures into tensors for the tower of a backbone manifest: the tower's own, or
    one that pads them to squares first. It is saved with the model, which so is asked as it was
    trained."""
    own = AutoImageProcessor.from_pretrained(parts["processor"] or parts["vision"])
    if "image_aspect_ratio" not in parts:
        return own
    settings = own.to_dict() | {"do_pad": True, "do_center_crop": bool(own.do_center_crop)}
    del settings["image_processor_type"]
    return LlavaImageProcessorPil(**settings)


def pretrained_processor(
    vision_name: str, language_name: str, vision: PreTrainedModel, language: PreTrainedModel
) -> LlavaProcessor:
    """A LLaVA processor from the two parts' own; the image token is added to the language model."""
    tokenizer = AutoTokenizer.from_pretrained(language_name, padding_side="left")
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if len(tokenizer) > language.config.vocab_size:  # some have rows to spare
        language.resize_token_embeddings(len(tokenizer))
    strategy = TOWERS[vision.config.model_type]
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(vision_name),
        tokenizer=tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if strategy == "default" else 0,
        chat_template=tokenizer.chat_template or CHAT_TEMPLATE,
    )


def freeze(model: PreTrainedModel, trains: Collection[str]) -> None:
    """Put the model into training mode, with gradients for the parts in `trains` only; a vision
    tower that is not trained is in evaluation mode.

    Raises ValueError for a name that is not in `PARTS`, and where the model has no such part.
    """
    for part in trains:
        expect(part in PARTS, "trains", part, f"names of {', '.join(PARTS)}")
    part_of = part_finder(model)
    for name, module in model.named_modules():
        module.training = part_of(name) != "vision_tower" or "vision_tower" in trains
    found = set()
    for name, parameter in model.named_parameters():
        found.add(part_of(name))
        parameter.requires_grad_(part_of(name) in trains)
    missing = [part for part in trains if part not in found]
    expect(not missing, "trains", missing, f"parts of {type(model).__name__}: {', '.join(found)}")


def recompute(model: PreTrainedModel, on: bool) -> None:
    """Whether layers keep their activations, or compute them once more in the backward pass."""
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # it has made all embeddings ask for gradients, which only the reentrant kind needs: a
        # frozen vision tower would be computed backward for nothing
        model.disable_input_require_grads()
    else:
        model.activation_checkpointing_disable()
