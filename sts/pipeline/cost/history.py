"""What each optimizer step did: a line of `history.jsonl`, and what the manifest says of all."""

import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from sts.pipeline.config import StageConfig
from sts.pipeline.cost.counting import TowerWatch
from sts.pipeline.cost.flops import Counts, count
from sts.pipeline.cost.machines import gpu_of
from sts.pipeline.files import read_json
from sts.pipeline.run.weights import DONE, HISTORY, read_held_out, read_history
from sts.scheme import Scheme


def open_history(folder: Path, first: int) -> Any:
    """`history.jsonl`, to be written on from step `first`: later rows are of a lost attempt."""
    file = folder / HISTORY
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[:first] if first else []
    part = file.with_suffix(".part")
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, file)
    return open(file, "a", buffering=1, encoding="utf-8")


class Meter:
    """Knows what steps of a model cost, which is as it is trained; batch, prepare: see `count`."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, Any],
        prepare: Callable[[PreTrainedModel], Any],
    ):
        self.counts = count(model.config, batch, prepare)
        self.watch = TowerWatch(model)


def measure(
    scheme: Scheme, meter: Meter, block: StageConfig, batches: Sequence[Mapping[str, Any]]
) -> list[float]:
    """What this process really did in a step, as numbers that add up over processes: patches, pairs
    (`TowerWatch`), FLOPs, those without VTC and LDS, and the scheme's totals.

    Args:
        scheme: On the model that took the step.
        meter: Of that model; it begins anew.
        block: The stage.
        batches: This process's micro-batches.
    """
    patches, pairs = meter.watch.read()
    totals, samples = scheme.totals(), sum(len(batch["input_ids"]) for batch in batches)
    realised = scheme.metrics(totals)
    row = {"samples": samples, "patches": patches, "pairs": pairs, "work": realised["work"]}
    row |= {"fused_attention": _is_fused(scheme)}
    row |= {name: realised[name] * samples for name in ("tokens", "answer_tokens")}
    left_out = realised["visual_tokens"] * (1 / realised["keep_ratio"] - 1) * samples
    dense = row | {"tokens": row["tokens"] + left_out, "work": None}
    flops = (row_flops(meter.counts, block, each) for each in (row, dense))
    return [patches, pairs, *flops, *totals]


def step_row(scheme: Scheme, has_image: Sequence[bool], sums: Sequence[float]) -> dict[str, Any]:
    """What all processes did in a step, for its row of the history.

    Args:
        scheme: On the model that took the step.
        has_image: Of each sample of the global batch.
        sums: Of `measure` over processes.

    Returns:
        `tokens` (that reached the decoder, padding included) and `answer_tokens` of the global
        batch, `patches` and `pairs`; `visual_tokens`, mean of a sample; of each layer the chance
        `asked` for, the share `skipped` and its `work` (Scheme.metrics); `flops`, and `flops_dense`
        of the same step without VTC and LDS.
    """
    patches, pairs, flops, flops_dense, *totals = sums
    realised = scheme.metrics(totals)
    counted = {name: round(realised.pop(name) * totals[0]) for name in ("tokens", "answer_tokens")}
    return {
        "samples": len(has_image),
        "images": sum(has_image),
        "fused_attention": _is_fused(scheme),
        **counted,
        "patches": patches,
        "pairs": pairs,
        **realised,
        "flops": flops,
        "flops_dense": flops_dense,
    }


def _is_fused(scheme: Scheme) -> bool:
    """Whether the model's attention is fused."""
    return scheme.model.config.get_text_config()._attn_implementation != "eager"


def row_flops(counts: Counts, block: StageConfig, row: Mapping[str, Any]) -> float:
    """FLOPs of a step from what it realised (a row of the history)."""
    of_sample = {name: row[name] / row["samples"] for name in ("tokens", "answer_tokens")}
    of_batch = {name: row[name] for name in ("samples", "patches", "pairs", "work")}
    parts = counts.step(
        **of_batch,
        **of_sample,
        checkpointing=block.gradient_checkpointing,
        fused_attention=row["fused_attention"],
    )
    return sum(parts.values())


def with_speed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the tokens per second of its step, and its MFU, the share of the devices' peak
    that its FLOPs are, where the peak is known. What was skipped counts for neither."""
    row = row | {"tokens_per_s": row["tokens"] / row["seconds"]}
    peak = row.get("peak_flops")
    return row | {"mfu": row["flops"] / row["seconds"] / peak} if peak else row


def tracked_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a history with their speed and, of a step after which the held-out loss was
    measured, with that."""
    held_out = {row["step"]: row for row in read_held_out(folder)}
    for row in read_history(folder):
        losses = {}
        if measured := held_out.get(row["step"] + 1):
            by_skill = measured["skills"].items()
            losses = {f"held_out_loss/{skill}": loss for skill, loss in by_skill}
            losses["held_out_loss"] = measured["loss"]
        yield losses | with_speed(row)  # what every row has comes last


def device_peak(processes: int) -> dict[str, float]:
    """`peak_flops` of the GPUs of all processes, for a row of the history; empty if not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    gpu = gpu_of(name)
    return {"peak_flops": gpu.flops * processes} if gpu else {}


def peak_memory_mb() -> float:
    """Most memory so far in MB (10^6 bytes): of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def summary(folder: Path) -> dict[str, Any]:
    """What the manifest tells of finished weights."""
    history, held_out = read_history(folder), read_held_out(folder)
    skipped = zip(*(row["skipped"] for row in history), strict=True)
    return {
        "weights_sha256": read_json(folder / DONE)["weights_sha256"],
        "steps": len(history),
        **{name: sum(row[name] for row in history) for name in ("flops", "flops_dense")},
        "final_loss": fmean(row["loss"] for row in history[-max(1, len(history) // 10) :]),
        "realised": {
            **{n: fmean(row[n] for row in history) for n in ("keep_ratio", "layers_run")},
            "skipped_per_layer": list(map(sum, skipped)),
        },
        **({"held_out": held_out} if held_out else {}),
    }
