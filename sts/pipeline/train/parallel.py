"""How the processes of one training share its model: a whole copy each (DDP), or a shard of
everything each (FSDP2, torch's `fully_shard` on every layer).

Sharded, only the first process reads the weights; the others start from their shapes and are sent
their shards. At the end the shards are gathered by the first, for an ordinary checkpoint.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForImageTextToText, PreTrainedModel

from sts.architectures import decoder_layers_of, tower_layers_of
from sts.pipeline.config import StageConfig


def rank() -> int:
    """Number of this process among those of the training, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes the training has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def everywhere(here: bool) -> bool:
    """Whether it is so on all processes."""
    answers = [here] * world()
    if dist.is_initialized():
        dist.all_gather_object(answers, here)
    return all(answers)


def anywhere(here: bool) -> bool:
    """Whether it is so on any process."""
    return not everywhere(not here)


def of_first(value: Any) -> Any:
    """What the first process gives, on all."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def is_sharded(block: StageConfig) -> bool:
    """Whether the model of a stage is in shards."""
    return block.parallel == "fsdp2" and block.processes > 1


def load_shared(
    block: StageConfig, load: Callable[[], tuple[PreTrainedModel, Any]]
) -> tuple[PreTrainedModel, Any]:
    """Model and processor as `load` gives them. If it is to be sharded the model of all processes
    but the first has shapes alone (device meta)."""
    if not is_sharded(block):
        return load()
    model, processor = load() if rank() == 0 else (None, None)
    config, processor = of_first((model and model.config, processor))
    if model is None:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    return model, processor


def shard(model: PreTrainedModel, device: torch.device, bf16: bool) -> None:
    """Shard a model in place over all processes, each layer of decoder and tower by itself and the
    rest together, so that a layer is gathered only while it runs, and not at all if it is skipped.

    The first process has its weights, which the others are sent. bf16: gathered and computed in it,
    from weights in float32; gradients are summed in float32.
    """
    weights = model.state_dict() if rank() == 0 else {}
    buffers = dict(model.named_buffers())
    model.to("meta")
    model.tie_weights()
    mesh = init_device_mesh(device.type, (world(),))
    mixed = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    policy = MixedPrecisionPolicy(**mixed if bf16 else {})
    for module in (*decoder_layers_of(model), *tower_layers_of(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if rank() == 0:
                buffer.copy_(buffers[name])
            dist.broadcast(buffer, 0)
    model.tie_weights()


def gathered(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The whole weights of a sharded model, on the CPU of the first process; none on others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)
