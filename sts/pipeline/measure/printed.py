"""An estimate as a table for people."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(costs: Mapping[str, Any], console: Console) -> None:
    """Print an estimate (`forecast`) as a small table."""
    table = Table("what", "estimate", title=f"Scale {costs['scale']}: what a run will cost")
    for name, text in _rows(costs):
        table.add_row(name, text)
    console.print(table)
    for title, name in (("Fewer GPUs", "respread"), ("Does not fit", "lacking")):
        for text in costs[name]:
            console.print(f"[bold]{title}[/bold]: {text}", highlight=False)
    speed = costs["speed"]
    rates = ", ".join(f"{rate / 1e9:.3g} GFLOP/s {s}" for s, rate in speed["flops_per_s"].items())
    console.print(
        f"Estimates. Speed: {rates} ({speed['source']}); {speed['trainings_at_once']} trainings "
        "at once. VTC and LDS save less time than FLOPs: `bench` says how much. FLOPs in % of the "
        "first run; jobs as from an empty folder.",
        highlight=False,
    )


def _rows(costs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The table's."""
    jobs = ", ".join(f"{count} {rule}" for rule, count in costs["jobs"].items())
    yield "jobs", f"{sum(costs['jobs'].values())}: {jobs}"
    runs = costs["flops"]["runs"]
    dense = sum(next(iter(runs.values())).values())
    for id, stages in runs.items():
        parts = " + ".join(f"{flops:.2g} {stage}" for stage, flops in stages.items())
        yield f"FLOPs of {id}", f"{parts}, {sum(stages.values()) / dense:.0%}"
    yield "FLOPs of all trainings", f"{costs['flops']['total']:.2g}"
    for name, seconds in costs["seconds"].items():
        yield f"time: {name}", duration(seconds)
    for name, value in costs["disk_bytes"].items():
        yield f"disk: {name}", size(value)
    memory = costs["memory_bytes"]
    available = f"there are {size(memory['of_a_process'])}"
    yield "memory of a process", f"{size(memory['of_a_training'])}, {available}"
    yield "memory at once", size(memory["at_once"])
    if hours := costs.get("gpu_hours"):
        for id, stages in hours["runs"].items():
            each = " + ".join(f"{value:.3g} {stage}" for stage, value in stages.items())
            yield f"GPU-hours of {id}", f"{each} = {sum(stages.values()):.3g}"
        price = f", price {hours['price']:,.0f}" if "price" in hours else ""
        yield "GPU-hours of all", f"{hours['total']:.3g}{price}"


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
