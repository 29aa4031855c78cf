"""One optimizer step of a training, and what it needs: processes, precision, optimizer, curve."""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sts.architectures import part_finder
from sts.pipeline.config import StageConfig
from sts.pipeline.run.device import attention_here, precision_here
from sts.pipeline.train.job import Job
from sts.pipeline.train.lora import MARK
from sts.pipeline.train.masters import (
    collect_gradients,
    master_of,
    show_gradients,
    take_over,
    with_masters,
)
from sts.pipeline.train.model import recompute
from sts.scheme import Scheme, sparsify
from sts.settings import IGNORE_INDEX

log = logging.getLogger(__name__)


def prepare_process(block: StageConfig) -> Accelerator:
    """Fixed threads, deterministic algorithms, and accelerate on whatever device there is.

    Raises ValueError if this is not the number of processes that the configuration says: the
    global batch, and so the weights, depend on it.
    """
    torch.set_num_threads(block.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes no result
    ddp = DistributedDataParallelKwargs(find_unused_parameters=may_lack_gradients(block))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
    if accelerator.num_processes != block.processes:
        raise ValueError(
            f"processes: the configuration says {block.processes}, this training was started with "
            f"{accelerator.num_processes}. Start it with: torchrun --nproc-per-node "
            f"{block.processes} -m sts train ..."
        )
    return accelerator


def may_lack_gradients(block: StageConfig) -> bool:
    """Whether a step may leave what is trained without a gradient, for which data-parallel
    processes would wait: skipped layers, and tower and projector in a batch of text alone."""
    has_vision = not {"projector", "vision_tower"}.isdisjoint(block.trains)
    return has_vision or block.lds.leaves_out


def put_scheme(model: PreTrainedModel, block: StageConfig, samples: int, seed: int) -> Scheme:
    """VTC and LDS of a stage on the model. Also where both are off: the dense run then computes its
    loss in the same way. Attention and recomputation are set as the stage wants them.

    Args:
        model: Not yet shared among processes.
        block: The stage.
        samples: Of an epoch.
        seed: Of the scheme's draws.
    """
    use_attention(model, attention_here(block.precision))
    recompute(model, block.gradient_checkpointing)
    return sparsify(
        model,
        vtc=block.vtc,
        lds=block.lds,
        total_steps=block.steps,
        steps_per_epoch=math.ceil(samples / block.global_batch),
        seed=seed,
    )


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Set the model's attention; a model that does not support it keeps what it was loaded with."""
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        log.warning("attention %r: not used (%s)", name, str(error).partition(" yet. ")[0])


def make_optimizer(model: PreTrainedModel, block: StageConfig) -> torch.optim.Optimizer:
    """AdamW on what is trained, or its masters, without decay on norms, biases and embeddings; each
    group knows its `peak` learning rate."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    part_of = part_finder(model)
    groups: dict[tuple[float, float], list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "lora" if MARK in name else part_of(name)
            peak = block.lr[part] if isinstance(block.lr, dict) else block.lr
            decays = parameter.ndim >= 2 and id(parameter) not in embeddings
            decay = block.weight_decay if decays else 0.0
            groups.setdefault((peak, decay), []).append(master_of(parameter))
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
            for (peak, decay), parameters in groups.items()
        ],
        fused=True,
    )


def peak_lr(block: StageConfig) -> float:
    """The highest learning rate of any part."""
    return max(block.lr.values()) if isinstance(block.lr, dict) else block.lr


def lr_factor(step: int, steps: int, rising: int) -> float:
    """Share of the peak learning rate: a line up over the first `rising` steps, then half a cosine
    down towards 0."""
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[dict],
    block: StageConfig,
    factor: float,
    scheme: Scheme,
    counts: Callable[[], Sequence[float]] = tuple,
) -> tuple[float, float, list[float]]:
    """Take one optimizer step.

    The loss is a mean over the answer tokens of the whole global batch, so that however a batch is
    split into micro-batches and processes, the step is the same. A step that is not finite is not
    taken.

    Args:
        model: As this process holds it.
        batches: Micro-batches of this process, on its device.
        factor: Share of the peak learning rates.
        counts: Numbers of this process that add up, asked after its backwards. They go along with
            the loss: a collective of their own would be one more wait of all in every step.

    Returns:
        Mean loss, gradient norm before clipping, and the counts of all processes added up.
    """
    is_bf16 = precision_here(block.precision) == "bf16"
    answers = sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batches)
    answers = accelerator.reduce(answers, "sum")
    total = torch.zeros((), device=accelerator.device)
    masters = with_masters(model)
    for i, batch in enumerate(batches):
        is_last = i == len(batches) - 1
        with (
            contextlib.nullcontext() if is_last or masters else accelerator.no_sync(model),
            torch.autocast(accelerator.device.type, torch.bfloat16, enabled=is_bf16),
        ):
            loss = model(**batch, num_items_in_batch=answers, use_cache=False).loss
            # gradients are averaged over processes, and the loss is to be their sum
            accelerator.backward(loss * accelerator.num_processes)
        collect_gradients(masters)
        total += loss.detach()
    show_gradients(masters)
    scheme.after_backward()
    stepped = [master_of(parameter) for parameter in model.parameters()]
    norm = accelerator.clip_grad_norm_(stepped, block.max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    sums = torch.tensor([0.0, *counts()], dtype=torch.float64, device=accelerator.device)
    sums[0] = total
    loss, *sums = accelerator.reduce(sums, "sum").tolist()
    if math.isfinite(loss + norm):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        take_over(masters)
    optimizer.zero_grad(set_to_none=True)  # no gradient at all: AdamW leaves skipped layers alone
    return loss, norm, sums


def check_finite(job: Job, step: int, loss: float, norm: float, factor: float) -> None:
    """Raise FloatingPointError, with what it may come from, for a loss or gradient norm that is not
    finite; factor: share of the peak learning rate."""
    if math.isfinite(loss + norm):
        return
    stage, block = job.stage, job.block
    bf16 = "; bf16 overflowed: try precision: fp32" if job.precision == "bf16" else ""
    raise FloatingPointError(
        f"{stage} step {step}: loss {loss}, gradient norm {norm} at {factor:.3g} of the learning "
        f"rate. Likely causes: {stage}.lr {block.lr} is too high, or {stage}.warmup_ratio "
        f"{block.warmup_ratio:g} too short (the losses before this step are in history.jsonl); "
        f"the initial weights are broken{bf16}. The last checkpoint is kept; another value in the "
        "configuration starts afresh."
    )
