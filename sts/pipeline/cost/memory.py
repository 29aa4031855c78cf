"""Memory of a training, foreseen, and a refusal before the first step of what can't fit."""

import logging
import os

import torch

from sts.pipeline.config import StageConfig
from sts.pipeline.cost import flops as cost
from sts.pipeline.run.device import precision_here

PROCESS_BYTES = 0.7e9  # torch, transformers and tracking in memory before any model

log = logging.getLogger(__name__)


def step_memory(
    shape: cost.Shape, block: StageConfig, text: float, answer: float, on_gpu: bool = False
) -> dict[str, float]:
    """Peak bytes of one process of a training, at all visual tokens and layers, by what they hold
    (cost.peak_memory). text, answer: tokens of a sample. on_gpu: of a machine that this is not."""
    precision = block.precision if on_gpu else precision_here(block.precision)
    parts = cost.peak_memory(
        shape,
        batch=block.batch_size,
        visual_tokens=shape.visual_tokens,
        text_tokens=text,
        answer_tokens=answer,
        layers_run=shape.layers,
        trains=block.trains,
        lora_rank=block.lora.rank,
        checkpointing=block.gradient_checkpointing,
        value_bytes=2 if precision == "bf16" else 4,
        shards=block.processes if block.parallel == "fsdp2" else 1,
    )
    return {"process": PROCESS_BYTES, **parts}


def memory_here(processes: int) -> float:
    """Bytes that one of `processes` on this machine may have: of a GPU if there is one, else its
    share of the host's."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / processes


def check_memory(
    shape: cost.Shape, stage: str, block: StageConfig, text: float, answer: float
) -> None:
    """Raise MemoryError, with what helps, if the weights of a stage and what its optimizer holds of
    them don't fit, which is known; warn if its activations may not, which is a rough figure."""
    there = memory_here(int(os.environ.get("LOCAL_WORLD_SIZE", block.processes)))
    parts = step_memory(shape, block, text, answer)
    said = lacking(stage, block, parts, there)
    if said and sum(parts.values()) - parts["activations"] > there:
        raise MemoryError(said)
    if said:
        log.warning("%s", said)


def lacking(stage: str, block: StageConfig, parts: dict[str, float], there: float) -> str:
    """What a process needs, and the keys that would help, if it has not so many bytes; else ""."""
    needed = sum(parts.values())
    if needed <= there:
        return ""
    held = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in parts.items() if value)
    keys = []
    if block.parallel != "fsdp2" or block.processes == 1:
        keys.append("parallel: fsdp2 with several processes")
    else:
        keys.append(f"more processes than {block.processes}")
    if "language_model" in block.trains:
        keys.append("trains: lora instead of language_model")
    if not block.gradient_checkpointing:
        keys.append("gradient_checkpointing: true")
    if block.batch_size > 1:
        keys.append("a smaller batch_size with more gradient_accumulation_steps")
    return (
        f"stages.{stage}: a process needs about {needed / 1e9:.3g} GB ({held}), and has "
        f"{there / 1e9:.3g} GB. What helps: {'; '.join(keys)}"
    )
