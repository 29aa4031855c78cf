"""What a configuration names on this machine: folders and files that must be there, and a model's
sizes, by its config.json. Checked once, where a plan is made; no torch needed.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sts.checks import NotAccepted, expect
from sts.pipeline.config.blocks import Config
from sts.pipeline.config.errors import ConfigError

SHIPPED = Path("data/backbones/mini")
SMOLLM2 = "data/smollm2"  # a language model from PyPI, which a rule fetches
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")
# Types with as many visual tokens of a picture as the tower has patches, or more
OF_PATCHES = ("llava", "llava_next", "idefics3")


def check_inputs(config: Config, file: str | Path, ablation: str = "") -> None:
    """Refuse what can't be right on this machine.

    Args:
        config: Of a scale, or of an ablation.
        file: Names the file in an error.
        ablation: The entry that the configuration is of, which then begins the key in an error.

    Raises:
        ConfigError: A folder or file that is not there, or a value that is not the model's.
    """
    try:
        _check_places(config)
        _check_sizes(config)
    except NotAccepted as error:
        key = f"{ablation}.{error.name.removeprefix('stages.')}" if ablation else error.name
        raise ConfigError(file, key, error.value, error.accepted) from None


def _check_places(config: Config) -> None:
    data, model = config.data, config.model
    folders = {f"data.folders.{name}": folder for name, folder in data.folders.items()}
    mirror = os.environ.get("STS_DATA_MIRROR")  # which takes the place of the other
    folders |= {"STS_DATA_MIRROR": mirror} if mirror else {"data.mirror": data.mirror}
    sources = {}
    for name, custom in data.custom.items():
        key = f"data.custom.{name}"
        kind, file = custom.table
        is_there = file is None or os.path.isfile(file)
        expect(is_there, f"{key}.{kind}", file, "a file that is there")
        folders[f"{key}.images"] = custom.images
        sources[f"{key}.hub"] = custom.hub
    for key in ("checkpoint", "vision", "language"):
        source = getattr(model, key)
        sources[f"model.{key}"] = source if source in model.sources else None
    for key, folder in folders.items():
        expect(folder is None or os.path.isdir(folder), key, folder, "a folder that is there")
    for key, source in sources.items():
        accepted = "a folder that is there, or a hub id"
        expect(source in (None, SMOLLM2) or _is_source(source), key, source, accepted)


def _is_source(name: str) -> bool:
    """Whether it is a folder that is there, or may be a hub id: owner/name, and no such owner is a
    folder here."""
    if os.path.exists(name):
        return os.path.isdir(name)
    return bool(HUB_ID.fullmatch(name)) and not ("/" in name and os.path.isdir(Path(name).parent))


def _check_sizes(config: Config) -> None:
    model = config.model
    if model.family == "whole":
        language = tower = ("model.checkpoint", model.checkpoint)
    elif model.backbone == "shipped":
        language, tower = (("model.backbone", SHIPPED / part) for part in ("language", "vision"))
    else:
        language, tower = ("model.language", model.language), ("model.vision", model.vision)
    of_text = _sizes(*language, "text_config")
    layers = of_text.get("num_hidden_layers", model.layers)
    accepted = f"{layers}, the decoder layers of {language[1]}"
    expect(model.layers == layers, "model.layers", model.layers, accepted)
    of_tower, patches = _sizes(*tower, "vision_config"), 0
    if model.family == "joined":
        depth, layer = of_tower.get("num_hidden_layers", 1000), model.vision_feature_layer
        accepted = f"a layer of {tower[1]}, {-depth - 1} to {depth}"
        expect(-depth - 1 <= layer <= depth, "model.vision_feature_layer", layer, accepted)
    of_model = _sizes(*tower)
    if model.family == "joined" or of_model.get("model_type") in OF_PATCHES:
        size, patch = of_tower.get("image_size", 0), of_tower.get("patch_size", 1)
        patches = (size // patch // of_model.get("scale_factor", 1)) ** 2
    for name, block in config.stages.items():
        accepted = f"more than {patches}, the visual tokens of a picture"
        key = f"stages.{name}.max_length"
        expect(block.max_length > patches, key, block.max_length, accepted)


def _sizes(key: str, source: str | Path | None, part: str = "") -> Mapping[str, Any]:
    """What the config.json of a model says of a part of it; nothing where it is not yet here."""
    folder = model_folder(str(source or ""))
    file = Path(folder or "", "config.json")
    is_users = folder == Path(source or "") and source != SMOLLM2
    if folder is None or not (is_users or file.exists()):
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        sizes = content.get(part, content)
        return {name: value for name, value in sizes.items() if isinstance(value, int | str)}
    except (OSError, ValueError, AttributeError):
        accepted = "a folder with the config.json of a model"
        raise NotAccepted(key, str(source), accepted) from None


def model_folder(source: str) -> Path | None:
    """The folder of a model: itself, or for `<owner>/<name>@<revision>` that in the hub's cache;
    None where it is not on this machine."""
    if os.path.isdir(source):
        return Path(source)
    name, _, revision = source.partition("@")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(cache, "huggingface")
    variables = map(os.environ.get, ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"))
    hub = os.path.expandvars(next(filter(None, variables), Path(home, "hub")))
    model = Path(hub).expanduser() / f"models--{name.replace('/', '--')}"
    note = model / "refs" / (revision or "main")
    commit = note.read_text(encoding="utf-8").strip() if note.is_file() else revision
    folder = model / "snapshots" / commit
    return folder if commit and folder.is_dir() else None
