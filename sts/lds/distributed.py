"""Skipped layers where several processes train one model."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def prepare_skipped_layers(
    layers: nn.ModuleList, skipped: Iterable[int], warn: Callable[[str], None]
) -> None:
    """Warn where skipping saves less because parameters are not sharded layer by layer.

    With DeepSpeed ZeRO-3 also drop the gradients that it kept for the skipped layers.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    is_zero3 = any(hasattr(p, "ds_id") for p in layers.parameters())
    is_sharded = any(isinstance(p, DTensor) for p in layers.parameters())
    if is_zero3:
        warn(
            "DeepSpeed ZeRO-3: skipped layers are neither computed nor gathered, but have a "
            "gradient of zero rather than none: weight decay and momentum still move them"
        )
        _drop_kept_gradients(layers, skipped)
    elif distributed.get_world_size() > 1 and not is_sharded:
        warn(
            "skipped layers are not computed, but without FSDP2 (fully_shard on each decoder "
            "layer) their gradients' place in the all-reduce is still sent; DDP needs "
            "find_unused_parameters=True; with DeepSpeed their gradient is zero rather than "
            "none, so that weight decay and momentum still move them"
        )


def _drop_kept_gradients(layers: nn.ModuleList, skipped: Iterable[int]) -> None:
    """Set the gradients that ZeRO-3 keeps for skipped layers to zero.

    ZeRO-3 replaces the gradient that it keeps of a parameter only when a new one comes, so it would
    apply the last gradient of a skipped layer again.
    """
    from deepspeed.utils import safe_set_local_grad  # installed wherever there is ZeRO-3

    for index in skipped:
        for parameter in layers[index].parameters():
            if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
                safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))
