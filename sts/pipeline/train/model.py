"""What a run starts from, and which parts of it a stage trains.

    python -m sts backbone --config workflow/config/mini.yaml --out backbone.json

The backbone manifest says where the model lies and hashes it; every run starts from it. The model
is a whole checkpoint, or LLaVA from two parts (joined.py).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from sts.architectures import PARTS, part_finder
from sts.checks import expect
from sts.pipeline.config import SHIPPED, ConfigError, ModelConfig
from sts.pipeline.data.rows import IMAGE_TOKEN, turns_of
from sts.pipeline.data.source import DataError
from sts.pipeline.data.tokens import tokenise
from sts.pipeline.files import (
    check_files,
    read_json,
    sha256_file,
    sha256_json,
    write_json_atomic,
)
from sts.pipeline.train.fetch import NAMES, fetch_model, fetch_weights, in_folders
from sts.pipeline.train.joined import join_parts, joined_processor, remote_code, tower_config

GET_BACK = f"Get it back: git checkout -- {SHIPPED.parent}"


def write_manifest(model: ModelConfig, out: str | Path, folder: Path = SHIPPED) -> dict[str, Any]:
    """Write and return the backbone manifest; models of the hub are fetched.

    It names a whole checkpoint or pretrained parts by path or by hub id and commit, else the parts
    in `folder` (vision/, language/, processor/), with a hash of the bytes of those in a folder.

    Raises:
        FileNotFoundError: There are no files in `folder`.
        DataError: A model can't be had, or no processor can be made of its files.
        ValueError: The language model has not as many layers as the configuration says, or the
            tower is none of TOWERS.
    """
    manifest: dict[str, Any]
    if model.family == "whole":
        manifest = {"checkpoint": fetch_model(model.checkpoint), "fresh": model.fresh}
    elif model.backbone == "pretrained":
        parts = {"vision": fetch_model(model.vision), "language": fetch_model(model.language)}
        manifest = parts | {"processor": None}
    else:
        manifest = {name: str(folder / name) for name in ("vision", "language", "processor")}
    if model.trust_remote_code:
        manifest["trust_remote_code"] = True
    sources = model.sources or [manifest[name] for name in ("vision", "language", "processor")]
    _check_shipped(sources)
    if model.family == "joined":
        manifest["vision_feature_layer"] = model.vision_feature_layer
        choices = {"template": model.template, "image_aspect_ratio": model.image_aspect_ratio}
        manifest |= {name: value for name, value in choices.items() if value != "own"}
    if model.sources:
        _check_sources(model, manifest)
        for name in NAMES:
            if name in manifest:
                fetch_weights(manifest[name])
    paths = [path for source in sources for path in sorted(Path(source).rglob("*"))]
    files = {str(path): sha256_file(path) for path in paths if path.is_file()}
    if not model.sources and not files:
        raise FileNotFoundError(
            f"{folder}: no backbone files; get them with `git checkout -- {folder}`"
        )
    hashes = [[Path(path).name, digest] for path, digest in files.items()]
    manifest["sha256"] = sha256_json([manifest, hashes])
    manifest["files"] = files
    write_json_atomic(out, manifest)
    return manifest


def _check_sources(model: ModelConfig, manifest: dict[str, Any]) -> None:
    """Raise what `write_manifest` says by the small files of a model, before its weights are
    fetched, and long before the first training."""
    start, is_whole = in_folders(manifest), model.family == "whole"
    _check_layers(model, start["checkpoint" if is_whole else "language"])
    if not is_whole:
        depth = tower_config(start["vision"], **remote_code(start)).num_hidden_layers
        accepted = f"a layer of {model.vision}, {-depth - 1} to {depth}"
        layer = model.vision_feature_layer
        expect(-depth - 1 <= layer <= depth, "model.vision_feature_layer", layer, accepted)
    try:
        whole = {"pretrained_model_name_or_path": start.get("checkpoint"), **remote_code(start)}
        processor = AutoProcessor.from_pretrained(**whole) if is_whole else joined_processor(start)
        turns = turns_of([(f"{IMAGE_TOKEN}\nwhat?", "this")])
        tokenise(processor, [turns], [[(64, 64)]])
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"model {', '.join(model.sources)}: its tokenizer and image processor can't be used: "
            f"{error}"
        ) from error


def _check_shipped(sources: list[str]) -> None:
    """Raise SpoiltError for a file of the repository's backbones, if they are among `sources`, that
    is not as it is listed there."""
    ours = [source for source in sources if Path(source).is_relative_to(SHIPPED.parent)]
    listed = read_json(SHIPPED.parent / "sha256.json", GET_BACK) if ours else {}
    by_path = {str(SHIPPED.parent / name): digest for name, digest in listed.items()}
    files = {path: digest for path, digest in by_path.items() if path.startswith((*ours,))}
    check_files(".", files, GET_BACK)


def _check_layers(model: ModelConfig, name: str) -> None:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        key, accepted = "model.trust_remote_code", f"true, which runs the Python files of {name}"
        raise ConfigError("the configuration", key, False, accepted) from None
    layers = config.get_text_config().num_hidden_layers
    if layers != model.layers:
        raise ValueError(
            f"model.layers: {model.layers}, but {name} has {layers} decoder layers: set it to that"
        )


def read_backbone(manifest: str | Path) -> dict[str, Any]:
    """A backbone manifest, whose files are as they were when it was written, with a folder for each
    of its models. Raises SpoiltError, or DataError if the hub's cache lacks one."""
    start = read_json(manifest)
    cure = f"If that is on purpose, delete {manifest} and run snakemake again. Else get it back"
    check_files(".", start.get("files", {}), cure)
    return in_folders(start)


def build(manifest: str | Path, seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model of a backbone manifest, float32, and its processor; what the manifest calls fresh,
    and the projector between two parts, is drawn from `seed`."""
    start = read_backbone(manifest)
    if "checkpoint" not in start:
        return join_parts(start, seed)
    model, processor = load_whole(start["checkpoint"], start.get("trust_remote_code", False))
    if start["fresh"]:
        _draw_anew(model, start["fresh"], seed)
    return model, processor


def load_whole(
    folder: str | Path, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Any image-text-to-text model of a folder or the hub, float32, and its processor."""
    code = {"trust_remote_code": trust_remote_code}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **code)
    return model, AutoProcessor.from_pretrained(folder, **code)


def _draw_anew(model: PreTrainedModel, parts: Collection[str], seed: int) -> None:
    """Initialise parts of a model as its class does, from `seed`."""
    part_of = part_finder(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other = type(model)._from_config(model.config, dtype=torch.float32)
    drawn = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part_of(name) in parts:
                parameter.copy_(drawn[name])


def freeze(model: PreTrainedModel, trains: Collection[str]) -> None:
    """Put the model into training mode, with gradients for the parts in `trains` only; a vision
    tower that is not trained is in evaluation mode.

    Raises:
        ValueError: A name is not in PARTS, or the model has no such part.
    """
    for part in trains:
        expect(part in PARTS, "trains", part, f"names of {', '.join(PARTS)}")
    part_of = part_finder(model)
    for name, module in model.named_modules():
        module.training = part_of(name) != "vision_tower" or "vision_tower" in trains
    parts = set()
    for name, parameter in model.named_parameters():
        parts.add(part_of(name))
        parameter.requires_grad_(part_of(name) in trains)
    missing = [part for part in trains if part not in parts]
    expect(not missing, "trains", missing, f"parts of {type(model).__name__}: {', '.join(parts)}")


def recompute(model: PreTrainedModel, on: bool) -> None:
    """Switch activation checkpointing: layers compute their activations once more in the backward
    pass instead of keeping them."""
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # it has made all embeddings ask for gradients, which only the reentrant kind needs: a
        # frozen vision tower would be computed backward for nothing
        model.disable_input_require_grads()
    else:
        model.activation_checkpointing_disable()
