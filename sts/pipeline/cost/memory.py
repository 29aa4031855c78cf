"""Memory of a training, foreseen, and a refusal before the first step of what can't fit."""

import logging
import os

import numpy as np
import torch

from sts.pipeline.config import StageConfig
from sts.pipeline.cost.counting import BACKWARD, RECOMPUTED
from sts.pipeline.cost.flops import Counts
from sts.pipeline.run.device import attention_here, precision_here

PROCESS_BYTES = 0.7e9  # torch, transformers and tracking in memory before any model
FLOAT32 = 4.0  # bytes
# Values that are kept for an output of a matrix product, and for one of its two gradients more;
# fitted to what autograd keeps of LLaVA and of seven other types
OF_OUTPUT, OF_GRADIENT = 1.2, 0.5
HEAD_WIDTH = 64  # channels of an attention head

log = logging.getLogger(__name__)


def step_memory(
    counts: Counts, block: StageConfig, tokens: float, answer_tokens: float, on_gpu: bool = False
) -> dict[str, float]:
    """Peak bytes of one process of a training with AdamW, at all visual tokens and layers.

    Left out: a frozen vision tower's working set and the allocator's overhead. Expect the true
    figure within half and twice of it.

    Args:
        counts: Of the model as the stage trains it.
        block: The stage.
        tokens: Of a sample that reach the decoder.
        answer_tokens: Of a sample, whose logits are computed.
        on_gpu: Whether the training runs on a machine with GPUs that this may not be.

    Returns:
        `process`: what there is before any model. `weights`: in float32. `optimizer`: gradients and
        two moments, float32, of what is trained. `gathered`: where weights and optimizer are split
        over processes, what each has whole at a time, as weights and as gradients: all outside the
        decoder's layers and two of them, the one that runs and the next. `activations`: what the
        backward needs, and logits in float32 three times over.
    """
    precision = block.precision if on_gpu else precision_here(block.precision)
    is_fused = on_gpu or attention_here(block.precision) != "eager"
    value_bytes = 2.0 if precision == "bf16" else FLOAT32
    shards = block.processes if block.parallel == "fsdp2" else 1
    weights = counts.parameters
    outside = weights["projector"] + weights["head"]
    gathered = outside + 2 * weights["decoder"] / len(counts.layers)
    values = _kept(counts, tokens, block.gradient_checkpointing, is_fused)
    logits = 3 * FLOAT32 * answer_tokens * counts.vocab
    return {
        "process": PROCESS_BYTES,
        "weights": FLOAT32 * sum(weights.values()) / shards,
        "optimizer": 3 * FLOAT32 * sum(counts.trained.values()) / shards,
        "gathered": 2 * value_bytes * gathered if shards > 1 else 0.0,
        "activations": block.batch_size * (value_bytes * values + logits),
    }


def _kept(counts: Counts, tokens: float, checkpointing: bool, is_fused: bool) -> float:
    """Values that the backward of a sample needs: of each layer some for every output of a matrix
    product, or with checkpointing its input, and all of one layer. Fused attention keeps no scores.
    """
    total = 0.0
    for cost, width, layers, number, pairs in (
        (np.sum(counts.layers, (0, 1)), counts.width, len(counts.layers), tokens, tokens**2),
        (counts.pictures, counts.tower_width, counts.tower_layers, counts.patches, counts.pairs),
    ):
        if cost[RECOMPUTED].any():  # else nothing before it is trained
            values = OF_OUTPUT * cost[RECOMPUTED, 0] + OF_GRADIENT * cost[BACKWARD, 0]
            values *= number / (2 * width)  # FLOPs to outputs
            if not is_fused:
                values += 2 * layers * pairs * width / HEAD_WIDTH
            total += layers * width * number + values / layers if checkpointing else values
    return total


def memory_here(processes: int) -> float:
    """Bytes that one of `processes` on this machine may have: of a GPU if there is one, else its
    share of the host's."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / processes


def check_memory(
    counts: Counts, stage: str, block: StageConfig, tokens: float, answer_tokens: float
) -> None:
    """Check before the first step that a stage fits this machine; tokens: as in `step_memory`.

    Warns where its activations may not fit, which are a rough figure.

    Raises:
        MemoryError: Its weights and what the optimizer holds of them don't fit, which is certain;
            the text says what helps.
    """
    available = memory_here(int(os.environ.get("LOCAL_WORLD_SIZE", block.processes)))
    parts = step_memory(counts, block, tokens, answer_tokens)
    message = what_lacks(stage, block, parts, available)
    if message and sum(parts.values()) - parts["activations"] > available:
        raise MemoryError(message)
    if message:
        log.warning("%s", message)


def what_lacks(stage: str, block: StageConfig, parts: dict[str, float], available: float) -> str:
    """What a process needs, and the keys that would help, if it has not so many bytes; else ""."""
    needed = sum(parts.values())
    if needed <= available:
        return ""
    listed = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in parts.items() if value)
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
        f"stages.{stage}: a process needs about {needed / 1e9:.3g} GB ({listed}), and has "
        f"{available / 1e9:.3g} GB. What helps: {'; '.join(keys)}"
    )
