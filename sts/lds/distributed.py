"""What skipped layers mean where several processes train one model."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def care_for_several_processes(
    layers: nn.ModuleList, skipped: Iterable[int], warn: Callable[[str], None]
) -> None:
    """Say what is lost where parameters are not sharded layer by layer; see to ZeRO-3."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    zero3 = any(hasattr(p, "ds_id") for p in layers.parameters())
    sharded = any(isinstance(p, DTensor) for p in layers.parameters())
    if zero3:
        warn(
            "DeepSpeed ZeRO-3: skipped layers are neither computed nor gathered, but have a "
            "gradient of zero rather than none: weight decay and momentum still move them"
        )
        _forget_gradients(layers, skipped)
    elif distributed.get_world_size() > 1 and not sharded:
        warn(
            "skipped layers are not computed, but without FSDP2 (fully_shard on each decoder "
            "layer) their gradients' place in the all-reduce is still sent; DDP needs "
            "find_unused_parameters=True; with DeepSpeed their gradient is zero rather than "
            "none, so that weight decay and momentum still move them"
        )


def _forget_gradients(layers: nn.ModuleList, skipped: Iterable[int]) -> None:
    """ZeRO-3 would else apply a skipped layer's last gradient again: it writes over what it keeps
    for a parameter only when a new one comes."""
    from deepspeed.utils import safe_set_local_grad  # there, as the parameters are its own

    for index in skipped:
        for parameter in layers[index].parameters():
            if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
                safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))
