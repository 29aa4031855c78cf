"""What each optimizer step did: a line of `history.jsonl`, and what the manifest says of all."""

import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoConfig

from sts.pipeline.config import StageConfig
from sts.pipeline.cost import flops as cost
from sts.pipeline.files import read_json
from sts.pipeline.run.device import attention_here
from sts.scheme import Scheme


def open_history(folder: Path, first: int) -> Any:
    """`history.jsonl`, to be written on from step `first`: later rows are of a lost attempt."""
    file = folder / "history.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[:first] if first else []
    part = file.with_suffix(".part")
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, file)
    return open(file, "a", buffering=1, encoding="utf-8")


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a training's `history.jsonl`, one an optimizer step."""
    text = (Path(folder) / "history.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def measure(
    scheme: Scheme,
    shape: cost.Shape,
    block: StageConfig,
    has_image: Sequence[bool],
    batches: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What a step really did, for its row of the history. `has_image`: of its global batch.

    tokens (reached the language model, padding included) and answer_tokens of the global batch;
    visual_tokens, mean of a sample; of each layer the chance asked for, the share skipped and its
    work (Scheme.metrics); FLOPs. batches: this process's micro-batches, for the patches that went
    through the vision tower and the pairs of them that see each other (without them every sample
    with an image has one of the tower's size). Of several processes the first counts for all.
    """
    seen, samples = scheme.metrics(), len(has_image)
    row = {
        "samples": samples,
        "images": sum(has_image),
        "fused_attention": attention_here(block.precision) == "sdpa",
        "tokens": round(seen["tokens"] * samples),
        "answer_tokens": round(seen["answer_tokens"] * samples),
        **{name: seen[name] for name in ("visual_tokens", "keep_ratio", "layers_run")},
        **{name: seen[name] for name in ("asked", "skipped", "work")},
    }
    if batches:
        own = sum(len(batch["input_ids"]) for batch in batches)
        found = [cost.tower_work(scheme.model.config, shape, batch) for batch in batches]
        patches, pairs = (sum(values) * samples / own for values in zip(*found, strict=True))
        row |= {"patches": patches, "pairs": pairs}
    return row | {"flops": row_flops(shape, block, row)}


def row_flops(shape: cost.Shape, block: StageConfig, row: dict[str, Any]) -> float:
    """FLOPs of a step from what it realised (a row of the history)."""
    return cost.step_flops(
        shape,
        batch=row["samples"],
        images=row["images"],
        patches=row.get("patches"),  # older rows are of images of the tower's size
        pairs=row.get("pairs"),
        visual_tokens=row["visual_tokens"],
        text_tokens=row["tokens"] / row["samples"] - row["visual_tokens"],
        answer_tokens=row["answer_tokens"] / row["samples"],
        trains=block.trains,
        lora_rank=block.lora.rank,
        checkpointing=block.gradient_checkpointing,
        fused_attention=row["fused_attention"],
        work=row["work"],
    )


def with_speed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the tokens per second of its step."""
    return row | {"tokens_per_s": row["tokens"] / row["seconds"]}


def peak_memory_mb() -> float:
    """Most memory so far in MB (10^6 bytes): of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def summary(folder: Path, block: StageConfig) -> dict[str, Any]:
    """What the manifest tells of finished weights. FLOPs are computed here from what each step
    realised, so that a better formula in sts/pipeline/cost/flops.py needs no new training."""
    history = read_history(folder)
    shape = cost.shape_of(AutoConfig.from_pretrained(folder))
    layers = shape.layers
    steps = len(history)
    return {
        **read_json(folder / "done.json"),
        "steps": steps,
        "flops": sum(row_flops(shape, block, row) for row in history),
        "flops_dense": sum(row_flops(shape, block, _dense(row)) for row in history),
        "final_loss": fmean(row["loss"] for row in history[-max(1, steps // 10) :]),
        "realised": {
            "keep_ratio": fmean(row["keep_ratio"] for row in history),
            "layers_run": fmean(row["layers_run"] for row in history),
            "skipped_per_layer": [
                sum(row["skipped"][layer] for row in history) for layer in range(layers)
            ],
        },
    }


def _dense(row: dict[str, Any]) -> dict[str, Any]:
    """The row of the same step without VTC and LDS."""
    whole = row["visual_tokens"] / row["keep_ratio"]
    added = (whole - row["visual_tokens"]) * row["samples"]
    return row | {"visual_tokens": whole, "tokens": row["tokens"] + added, "work": None}
