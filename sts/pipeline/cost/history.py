"""What each optimizer step did: a line of `history.jsonl`, and what the manifest says of all."""

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from sts.pipeline.config import StageConfig
from sts.pipeline.cost.counting import TowerWatch
from sts.pipeline.cost.flops import Counts, count
from sts.pipeline.files import read_json
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


class Meter:
    """Knows what steps of a model cost.

    Args:
        model: As it is trained.
        batch, prepare: See `count`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, Any],
        prepare: Callable[[PreTrainedModel], Any],
    ):
        self.counts = count(model.config, batch, prepare)
        self.watch = TowerWatch(model)


def measure(
    scheme: Scheme,
    meter: Meter,
    block: StageConfig,
    has_image: Sequence[bool],
    batches: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What a step really did, for its row of the history. Of several processes the first counts for
    all.

    Args:
        scheme: On the model that took the step.
        meter: Of that model; it begins anew.
        block: The stage.
        has_image: Of each sample of the global batch.
        batches: This process's micro-batches.

    Returns:
        `tokens` (that reached the decoder, padding included) and `answer_tokens` of the global
        batch, `patches` and `pairs` (`TowerWatch`); `visual_tokens`, mean of a sample; of each
        layer the chance `asked` for, the share `skipped` and its `work` (Scheme.metrics); `flops`,
        and `flops_dense` of the same step without VTC and LDS.
    """
    realised, samples = scheme.metrics(), len(has_image)
    seen = sum(len(batch["input_ids"]) for batch in batches)
    patches, pairs = (total * samples / seen for total in meter.watch.read())
    row = {
        "samples": samples,
        "images": sum(has_image),
        "fused_attention": _is_fused(scheme.model),
        "tokens": round(realised["tokens"] * samples),
        "answer_tokens": round(realised["answer_tokens"] * samples),
        "patches": patches,
        "pairs": pairs,
        **{name: realised[name] for name in ("visual_tokens", "keep_ratio", "layers_run")},
        **{name: realised[name] for name in ("asked", "skipped", "work")},
    }
    return row | {
        "flops": row_flops(meter.counts, block, row),
        "flops_dense": row_flops(meter.counts, block, _dense(row)),
    }


def _is_fused(model: PreTrainedModel) -> bool:
    return model.config.get_text_config()._attn_implementation != "eager"


def row_flops(counts: Counts, block: StageConfig, row: Mapping[str, Any]) -> float:
    """FLOPs of a step from what it realised (a row of the history)."""
    parts = counts.step(
        samples=row["samples"],
        tokens=row["tokens"] / row["samples"],
        answer_tokens=row["answer_tokens"] / row["samples"],
        patches=row["patches"],
        pairs=row["pairs"],
        work=row["work"],
        checkpointing=block.gradient_checkpointing,
        fused_attention=row["fused_attention"],
    )
    return sum(parts.values())


def _dense(row: dict[str, Any]) -> dict[str, Any]:
    """The row of the same step without VTC and LDS."""
    added = row["visual_tokens"] * (1 / row["keep_ratio"] - 1) * row["samples"]
    return row | {"tokens": row["tokens"] + added, "work": None}


def with_speed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the tokens per second of its step."""
    return row | {"tokens_per_s": row["tokens"] / row["seconds"]}


def peak_memory_mb() -> float:
    """Most memory so far in MB (10^6 bytes): of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def summary(folder: Path) -> dict[str, Any]:
    """What the manifest tells of finished weights."""
    history = read_history(folder)
    steps, layers = len(history), len(history[0]["skipped"])
    return {
        **read_json(folder / "done.json"),
        "steps": steps,
        **{name: sum(row[name] for row in history) for name in ("flops", "flops_dense")},
        "final_loss": fmean(row["loss"] for row in history[-max(1, steps // 10) :]),
        "realised": {
            "keep_ratio": fmean(row["keep_ratio"] for row in history),
            "layers_run": fmean(row["layers_run"] for row in history),
            "skipped_per_layer": [
                sum(row["skipped"][layer] for row in history) for layer in range(layers)
            ],
        },
    }
