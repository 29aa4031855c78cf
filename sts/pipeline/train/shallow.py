"""A smaller decoder: some layers of a pretrained language model are taken out for good, before the
first training. It is trained, saved and asked without them, as an ordinary model of fewer layers.
"""

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from sts.pipeline.config import SHIPPED, ModelConfig
from sts.pipeline.train import model as models
from sts.pipeline.train.fetch import WEIGHTS, in_folders


def write_manifest(model: ModelConfig, out: str | Path) -> dict[str, Any]:
    """Write and return the backbone manifest, as model.write_manifest. Where the model keeps a
    share of its decoder layers, they are written beside it, and it names these."""
    if model.layers_share == 1:
        return models.write_manifest(model, out)
    folder = Path(out).with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    start = in_folders(models.write_manifest(model, folder / "all_layers.json"))
    fewer = {"layers": len(model.kept_layers), "layers_share": 1.0}
    if model.backbone == "shipped":
        shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
        keep_layers(start["language"], model.kept_layers, folder / "language")
        return models.write_manifest(model.model_copy(update=fewer), out, folder)
    weights = shutil.ignore_patterns(*WEIGHTS, "*.index.json")
    shutil.copytree(start["language"], folder / "language", ignore=weights)
    keep_layers(start["language"], model.kept_layers, folder / "language")
    fewer["language"] = str(folder / "language")
    return models.write_manifest(model.model_copy(update=fewer), out)


def keep_layers(source: str, kept: list[int], folder: Path) -> None:
    """Write a language model with these of its decoder layers, in the number format it has."""
    language = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    decoder, config = language.get_decoder(), language.config
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in kept)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    language.save_pretrained(folder)
