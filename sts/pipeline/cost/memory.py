"""Memory of a training and of an evaluation, foreseen, and a refusal of what can't fit before the
first step or question."""

import logging
import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
from transformers import PreTrainedConfig

from sts.pipeline.config import EvaluateConfig, StageConfig
from sts.pipeline.cost.counting import BACKWARD, RECOMPUTED
from sts.pipeline.cost.flops import Counts
from sts.pipeline.run.device import attention_here, precision_here

PROCESS_BYTES = 0.7e9  # torch, transformers and tracking in memory, or CUDA, before any model
FLOAT32 = 4.0  # bytes
# Values that are kept for an output of a matrix product, and for one of its two gradients more;
# fitted to what autograd keeps of LLaVA and of seven other types
OF_OUTPUT, OF_GRADIENT = 1.2, 0.5
# Bytes of such a value, a mean, and of one of a layer's input. Fitted to SmolLM2-135M and
# Vicuna-7B: autocast keeps what is between layers, and norms, in float32; bf16 shards don't
BYTES = {"fp32": (4.0, 4.0), "autocast": (2.8, 4.0), "shards": (2.3, 2.0)}
ALLOCATOR = 1.1  # what torch reserves of a GPU for what is alive of activations
HEAD_WIDTH = 64  # channels of an attention head
ASKED_TOKENS = 64  # of a question, at least, where the model doesn't say how many a picture has

log = logging.getLogger(__name__)


def step_memory(
    counts: Counts, block: StageConfig, tokens: float, answer_tokens: float, on_gpu: bool = False
) -> dict[str, float]:
    """Peak bytes of one process of a training with AdamW, at all visual tokens and layers.

    Left out: a frozen vision tower's working set. Expect the true figure of LLaVA within a fifth of
    it, of other types within half and twice.

    Args:
        counts: Of the model as the stage trains it.
        block: The stage.
        tokens: Of a sample that reach the decoder, padding included.
        answer_tokens: Of a sample, whose logits are computed.
        on_gpu: Whether the training runs on a machine with GPUs that this may not be.

    Returns:
        `process`: what there is before any model. `weights`: in float32 or bf16. `optimizer`:
        gradients and two moments, float32, of what is trained, and masters of bf16 weights.
        `copies`: of weights in bf16, or gradients of bf16 weights, and of what shards are gathered
        to, with gradients: all outside the decoder's layers and two of them, the one that runs and
        the next. `activations`: what the backward needs. `logits`: in float32 three times over,
        or of a chunk; with checkpointing they are gone before a layer is computed again.
    """
    is_bf16 = (block.precision if on_gpu else precision_here(block.precision)) == "bf16"
    is_fused = on_gpu or attention_here(block.precision) != "eager"
    shards = block.processes if block.parallel == "fsdp2" else 1
    has_masters = is_bf16 and block.weights == "bf16"
    kind = ("shards" if shards > 1 or has_masters else "autocast") if is_bf16 else "fp32"
    of_layer, kept = _kept(counts, tokens, block.gradient_checkpointing, is_fused, *BYTES[kind])
    # a chunk's logits are no larger than the hidden states
    is_chunked = block.cross_entropy == "chunked"
    logits = 3 * FLOAT32 * answer_tokens * (counts.width if is_chunked else counts.vocab)
    reserved = ALLOCATOR if on_gpu or torch.cuda.is_available() else 1.0
    if block.gradient_checkpointing:
        of_layer = max(of_layer - logits, 0.0)
    rows = reserved * block.batch_size
    return {
        "process": PROCESS_BYTES,
        "weights": FLOAT32 / (1 + has_masters) * sum(counts.parameters.values()) / shards,
        "optimizer": (3 + has_masters) * FLOAT32 * sum(counts.trained.values()) / shards,
        "copies": _copies(counts, block, shards, is_bf16),
        "activations": rows * (kept + of_layer),
        "logits": rows * logits,
    }


def _copies(counts: Counts, block: StageConfig, shards: int, is_bf16: bool) -> float:
    """Bytes of `copies` of `step_memory`. Autocast keeps copies of weights that are trained, and
    without checkpointing the backward those of all."""
    value_bytes = 2.0 if is_bf16 else FLOAT32
    if is_bf16 and block.weights == "bf16":
        return value_bytes * sum(counts.trained.values())  # their gradients
    if shards > 1:
        layers = 2 / len(counts.layers)
        return value_bytes * sum(
            of["projector"] + of["head"] + layers * of["decoder"]
            for of in (counts.parameters, counts.trained)
        )
    of = counts.trained if block.gradient_checkpointing else counts.parameters
    return is_bf16 * value_bytes * (sum(of.values()) - of["vision"])


def _kept(
    counts: Counts,
    tokens: float,
    checkpointing: bool,
    is_fused: bool,
    value_bytes: float,
    input_bytes: float,
) -> tuple[float, float]:
    """Bytes that the backward of a sample needs: of one layer, if it is computed again, and of all.

    Of each layer some values for every output of a matrix product, or with checkpointing its input.
    Fused attention keeps no scores.
    """
    of_layer = kept = 0.0
    for cost, width, layers, number, pairs in (
        (np.sum(counts.layers, (0, 1)), counts.width, len(counts.layers), tokens, tokens**2),
        (counts.pictures, counts.tower_width, counts.tower_layers, counts.patches, counts.pairs),
    ):
        if cost[RECOMPUTED].any():  # else nothing before it is trained
            values = OF_OUTPUT * cost[RECOMPUTED, 0] + OF_GRADIENT * cost[BACKWARD, 0]
            values *= number / (2 * width)  # FLOPs to outputs
            if not is_fused:
                values += 2 * layers * pairs * width / HEAD_WIDTH
            if checkpointing:
                kept += input_bytes * layers * width * number
                of_layer = max(of_layer, value_bytes * values / layers)
            else:
                kept += value_bytes * values
    return float(of_layer), float(kept)


def held(parts: Mapping[str, float]) -> float:
    """Bytes of a model and its optimizer between steps, of the parts of `step_memory`."""
    return parts["weights"] + parts["optimizer"]


def evaluation_memory(
    config: PreTrainedConfig, parameters: int, options: EvaluateConfig, precision: str
) -> dict[str, float]:
    """Peak bytes of one process that asks a model, by its sizes.

    Args:
        config: The model's.
        parameters: Their number.
        options: The block `evaluate`.
        precision: Of the weights as they are asked, `fp32` or `bf16`.

    Returns:
        `process`, `weights`; of a batch of `batch_tokens`: `cache`, keys and values of all layers,
        also of the answers; `activations`, the widest layer of decoder and tower; `logits`.
    """
    value_bytes, text = 2.0 if precision == "bf16" else FLOAT32, config.get_text_config()
    vision, tokens = getattr(config, "vision_config", None) or text, options.batch_tokens
    questions = tokens / getattr(config, "image_seq_length", ASKED_TOKENS)
    heads = _size(text, "num_attention_heads")
    of_head = _size(text, "head_dim") or _size(text, "hidden_size") // heads
    of_token = 2 * of_head * (_size(text, "num_key_value_heads") or heads)
    cached = tokens + questions * options.max_new_tokens
    patches = (_size(vision, "spatial_merge_size") or 1) ** 2  # that become a visual token
    widest = max(_layer_values(text), patches * _layer_values(vision))
    return {
        "process": PROCESS_BYTES,
        "weights": value_bytes * parameters,
        "cache": value_bytes * text.num_hidden_layers * of_token * cached,
        "activations": ALLOCATOR * value_bytes * tokens * widest,
        "logits": 3 * FLOAT32 * questions * text.vocab_size,
    }


def _layer_values(sizes: PreTrainedConfig) -> float:
    """Values of a token that a layer's forward holds at a time."""
    width = _size(sizes, "embed_dim") or _size(sizes, "hidden_size")
    return 4 * width + 3 * (_size(sizes, "intermediate_size") or 4 * width)


def _size(sizes: PreTrainedConfig, name: str) -> float:
    """What a configuration says, where layers differ of the widest; 0: nothing."""
    try:
        value = getattr(sizes, name, None)
    except RuntimeError:  # transformers' word for layers that differ
        value = sizes.to_dict().get(name)
    return float(np.max(value or 0))


def memory_here(processes: int) -> float:
    """Bytes that one of `processes` on this machine may have: of a GPU if there is one, else its
    share of the host's."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / processes


def check_memory(
    counts: Counts,
    stage: str,
    block: StageConfig,
    tokens: float,
    answer_tokens: float,
    others: float = 0.0,
) -> None:
    """Check before the first step that a stage fits this machine.

    Warns where its activations may not fit, which are a rough figure.

    Args:
        counts, block, tokens, answer_tokens: As in `step_memory`.
        stage: Its name.
        others: Bytes of other models that the process holds.

    Raises:
        MemoryError: Its weights and what the optimizer holds of them don't fit, which is certain;
            the text says what helps.
    """
    parts = step_memory(counts, block, tokens, answer_tokens) | {"others": others}
    _check(parts, block.processes, lambda available: lacking(stage, block, parts, available))


def check_evaluation(
    config: PreTrainedConfig, parameters: int, options: EvaluateConfig, precision: str
) -> None:
    """The same before the first question; arguments: as in `evaluation_memory`."""
    parts = evaluation_memory(config, parameters, options, precision)
    _check(parts, options.processes, lambda available: unasked(options, parts, available))


def _check(parts: dict[str, float], processes: int, lack: Callable[[float], str]) -> None:
    available = memory_here(int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    message = lack(available)
    rough = sum(parts[name] for name in ("activations", "logits"))
    if message and sum(parts.values()) - rough > available:
        raise MemoryError(message)
    if message:
        log.warning("%s", message)


def lacking(stage: str, block: StageConfig, parts: dict[str, float], available: float) -> str:
    """What a process of a stage needs, and the keys that would help, if it has not so many bytes;
    else ""."""
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
    keys.append(f"a smaller max_length than {block.max_length}")
    return _lack(f"stages.{stage}", parts, available, keys)


def unasked(options: EvaluateConfig, parts: dict[str, float], available: float) -> str:
    """The same of a process of an evaluation."""
    return _lack("evaluate", parts, available, [f"batch_tokens below {options.batch_tokens}"])


def _lack(place: str, parts: dict[str, float], available: float, keys: list[str]) -> str:
    needed = sum(parts.values())
    if needed <= available:
        return ""
    listed = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in parts.items() if value)
    return (
        f"{place}: a process needs about {needed / 1e9:.3g} GB ({listed}), and has "
        f"{available / 1e9:.3g} GB. What helps: {'; '.join(keys)}"
    )
