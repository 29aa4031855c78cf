"""Low-rank adapters (LoRA, arXiv 2106.09685) in the decoder layers, merged into plain weights."""

import torch
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import PreTrainedModel

from sts.architectures import architecture_of
from sts.pipeline.config import LoraConfig, StageConfig
from sts.pipeline.train.model import freeze

MARK = "lora_"  # in the name of every parameter of an adapter


def train_parts(model: PreTrainedModel, stage: StageConfig, seed: int) -> LoraModel | None:
    """Freeze all that the stage does not train; the adapters, drawn from `seed`, if it has any."""
    freeze(model, [part for part in stage.trains if part != "lora"])
    return add_adapters(model, stage.lora, seed) if "lora" in stage.trains else None


def add_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int) -> LoraModel:
    """Put adapters, drawn from `seed`, on every linear layer of the decoder layers; they alone are
    set to be trained, and the model's own forward stays."""
    layers = architecture_of(model).decoder_layers
    targets = [
        f"{layers}.{name}"
        for name, module in model.get_submodule(layers).named_modules()
        if isinstance(module, nn.Linear)
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    peft = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = LoraModel(model, {"default": peft}, "default")
    for parameter in trained:  # peft has frozen all but its own
        parameter.requires_grad_(True)
    return adapters
