"""Skipped layers where several processes train one model."""

import logging
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

log = logging.getLogger(__name__)

STILL_MOVED = "gradient is zero rather than none, so that weight decay and momentum still move them"


def prepare_skipped_layers(layers: nn.ModuleList, skipped: Iterable[int]) -> None:
    """Warn where skipping saves less because parameters are not sharded layer by layer.

    With DeepSpeed ZeRO-3 also set the gradients that it keeps for skipped layers to zero: it
    replaces them only when new ones come, so it would apply the last ones again.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if any(hasattr(p, "ds_id") for p in layers.parameters()):
        log.warning_once(  # transformers' addition to loggers
            "sts: DeepSpeed ZeRO-3: skipped layers are neither computed nor gathered, but their "
            f"{STILL_MOVED}"
        )
        from deepspeed.utils import safe_set_local_grad  # installed wherever there is ZeRO-3

        for parameter in (p for index in skipped for p in layers[index].parameters()):
            if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
                safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))
    elif distributed.get_world_size() > 1 and not any(
        isinstance(p, DTensor) for p in layers.parameters()
    ):
        log.warning_once(
            "sts: skipped layers are not computed, but without FSDP2 (fully_shard on each decoder "
            "layer) their gradients' place in the all-reduce is still sent; DDP needs "
            f"find_unused_parameters=True; with DeepSpeed their {STILL_MOVED}"
        )
