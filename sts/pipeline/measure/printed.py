"""An estimate as a table for people."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print a forecast as a small table."""
    table = Table("what", "estimate", title=f"Scale {found['scale']}: what a run will cost")
    total = sum(found["jobs"].values())
    kinds = ", ".join(f"{n} {name}" for name, n in found["jobs"].items())
    table.add_row("jobs", f"{total}: {kinds}")
    runs = found["flops"]["runs"]
    dense = sum(next(iter(runs.values())).values())
    for id, stages in runs.items():
        parts = " + ".join(f"{flops:.2g} {stage}" for stage, flops in stages.items())
        table.add_row(f"FLOPs of {id}", f"{parts}, {sum(stages.values()) / dense:.0%}")
    table.add_row("FLOPs of all trainings", f"{found['flops']['total']:.2g}")
    for name, seconds in found["seconds"].items():
        table.add_row(f"time: {name}", duration(seconds))
    disk, memory = found["disk_bytes"], found["memory_bytes"]
    for name in ("data", "features", "weights", "checkpoints", "free"):
        table.add_row(f"disk: {name}", size(disk[name]))
    there = f"{size(memory['of_a_training'])}, there are {size(memory['of_a_process'])}"
    table.add_row("memory of a process", there)
    table.add_row("memory at once", size(memory["at_once"]))
    for id, stages in found.get("gpu_hours", {}).get("runs", {}).items():
        each = " + ".join(f"{hours:.3g} {stage}" for stage, hours in stages.items())
        table.add_row(f"GPU-hours of {id}", f"{each} = {sum(stages.values()):.3g}")
    if "gpu_hours" in found:
        spent = found["gpu_hours"]
        price = f", price {spent['price']:,.0f}" if "price" in spent else ""
        table.add_row("GPU-hours of all", f"{spent['total']:.3g}{price}")
    console.print(table)
    for said in found["respread"]:
        console.print(f"[bold]Fewer GPUs[/bold]: {said}", highlight=False)
    for said in found["lacking"]:
        console.print(f"[bold]Does not fit[/bold]: {said}", highlight=False)
    speed = found["speed"]
    rates = ", ".join(f"{rate / 1e9:.3g} GFLOP/s {s}" for s, rate in speed["flops_per_s"].items())
    console.print(
        f"Estimates. Speed: {rates} ({speed['source']}); {speed['trainings_at_once']} trainings "
        "at once. VTC and LDS save less time than FLOPs: `bench` says how much. FLOPs in % of the "
        "first run; jobs as from an empty folder.",
        highlight=False,
    )


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 12 min, 3.5 h, 21 days."""
    for limit, unit, name in ((90, 1, "s"), (90 * 60, 60, "min"), (72 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"


def size(value: float) -> str:
    """Bytes for people, in powers of ten."""
    power = min(4, int(math.log10(max(value, 1)) // 3))
    return f"{value / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
