"""What a run of the pipeline will cost, before anything is trained.

    python -m sts estimate --configfile workflow/config/mini.yaml

Jobs are those of the plan, FLOPs are counted, memory is reckoned from sizes, and time is FLOPs over
a speed that is measured here and now: a few training steps where the model is small, one large
matrix product where it is not. All but the number of jobs is an estimate; nothing is downloaded.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sts.pipeline.config import DataConfig
from sts.pipeline.cost.machines import Machine
from sts.pipeline.cost.memory import memory_here, what_lacks
from sts.pipeline.data.fetch import fetched_bytes, user_folder
from sts.pipeline.data.registry import dataset
from sts.pipeline.measure.speed import at_once, calibrate, concurrent, fit
from sts.pipeline.measure.stage_cost import START_SECONDS, StageCost, stage_costs
from sts.pipeline.plan import MAIN, Plan, load_plan, unique


def estimate(
    configfile: str | Path,
    ablations: str | Path,
    as_json: bool = False,
    on: Machine | None = None,
) -> dict[str, Any]:
    """Print, as a table or as JSON, and return what the bare command will cost with this scale, on
    this machine or another.

    Raises:
        ConfigError: A file is not accepted.
        ValueError: The sizes of a pretrained model are not known here.
    """
    costs = forecast(load_plan(configfile, ablations), on)
    if as_json:
        print(json.dumps(costs, indent=2, sort_keys=True))
    else:
        show(costs, Console())
    return costs


def forecast(plan: Plan, on: Machine | None = None) -> dict[str, Any]:
    """Everything that `show` prints of the bare command, as plain numbers: seconds, bytes, FLOPs.
    `respread`: what of the configuration asks for more GPUs than there are, and what was estimated
    instead."""
    gpus = on.count if on else torch.cuda.device_count()
    pairs = {id: fit(config, gpus) for id, config in plan.configs.items()}
    respread = unique(text for id in plan.members(MAIN) for text in pairs[id][1])
    run = Forecast(
        replace(plan, configs={id: config for id, (config, _) in pairs.items()}), on, gpus
    )
    disk, free, memory = run.disk(), float(shutil.disk_usage(".").free), run.memory()
    lacking = [
        what_lacks(cost.stage, cost.block, cost.memory, memory["of_a_process"])
        for cost in run.trainings
    ]
    if on is None:
        lacking.append(full(disk, free))
    seconds = run.seconds()
    total, (rates, source) = sum(seconds.values()), run.speed
    return {
        "scale": plan.scale.scale,
        "jobs": plan.jobs(),
        "flops": {
            "runs": run.of_each_stage(lambda cost: cost.flops),
            "total": sum(cost.flops for cost in run.trainings),
        },
        "seconds": {**seconds, "total": total},
        "speed": {"flops_per_s": rates, "source": source, "trainings_at_once": run.slots},
        "disk_bytes": {**disk, "free": free},
        "memory_bytes": memory,
        "lacking": unique(filter(None, lacking)),
        "respread": respread,
        **({"gpu_hours": run.gpu_hours(total, on)} if on else {}),
    }


@dataclass(frozen=True)
class Forecast:
    """What the bare command costs.

    Attributes:
        plan: With as many processes as there is room for.
        on: Another machine than this.
        gpus: How many there are.
    """

    plan: Plan
    on: Machine | None
    gpus: int

    @cached_property
    def costs(self) -> dict[str, dict[str, StageCost]]:
        """Ablation -> stage -> its cost."""
        on_gpu = self.on is not None
        return {id: stage_costs(config, on_gpu) for id, config in self.plan.configs.items()}

    @cached_property
    def runs(self) -> dict[str, dict[str, StageCost]]:
        """The same of the main table's."""
        return {id: self.costs[id] for id in self.plan.members(MAIN)}

    @cached_property
    def trainings(self) -> list[StageCost]:
        """Of all that is trained, each once."""
        jobs = self.plan.trainings(self.runs)
        return [self.costs[job.ablation][job.stage] for job in jobs]

    @cached_property
    def speed(self) -> tuple[dict[str, float], str]:
        """Stage -> FLOPs a second, and how that was measured."""
        return calibrate([self.plan.scale, *(self.plan.configs[id] for id in self.runs)], self.on)

    @cached_property
    def slots(self) -> int:
        """Trainings that run at once."""
        return concurrent(self.plan.scale, self.gpus)

    def of_each_stage(self, value: Callable[[StageCost], float]) -> dict[str, dict[str, float]]:
        """Ablation -> stage -> a value of its cost."""
        return {
            id: {stage: value(cost) for stage, cost in costs.items()}
            for id, costs in self.runs.items()
        }

    def stage_seconds(self, cost: StageCost) -> float:
        """Of a training, without its start."""
        return cost.flops / self.speed[0][cost.stage] / at_once(cost.block, self.gpus)

    def seconds(self) -> dict[str, float]:
        """Of each kind of job, those that run at once together."""
        training = sum(self.stage_seconds(cost) + START_SECONDS for cost in self.trainings)
        evaluation = timing = 0.0
        rates = self.speed[0]
        for costs in self.runs.values():
            *_, last = costs.values()
            evaluation += len(last.config.seeds) * last.evaluation_seconds(rates[last.stage])
            timing += sum(cost.timing_flops / rates[stage] for stage, cost in costs.items())
        return {
            "training": training / self.slots,
            "evaluation": evaluation / self.slots,
            "timing": timing + START_SECONDS,
            "backbone": float(START_SECONDS),
        }

    def memory(self) -> dict[str, float]:
        """Bytes of the largest training, of all at once, and that a process may have."""
        peak = max(sum(cost.memory.values()) for cost in self.trainings)
        available = self.on.gpu.memory if self.on else memory_here(self.slots)
        return {
            "of_a_training": peak,
            "at_once": self.slots * peak,
            "of_a_process": available,
        }

    def disk(self) -> dict[str, float]:
        """Bytes of what is written and stays."""
        checkpoints = max(cost.checkpoint_bytes for cost in self.trainings)
        return {
            "data": data_bytes(self.plan.data(self.runs), self.plan.scale.data),
            "weights": sum(cost.weight_bytes for cost in self.trainings),
            "checkpoints": self.slots * checkpoints,
        }

    def gpu_hours(self, seconds: float, on: Machine) -> dict[str, Any]:
        """GPU-hours of the stages of each run of one seed and of all that is done in so many
        seconds, and its price."""
        runs = self.of_each_stage(
            lambda cost: cost.block.processes * self.stage_seconds(cost) / 3600
        )
        widest = max(
            cost.block.processes for costs in self.runs.values() for cost in costs.values()
        )
        total = seconds * min(on.count, self.slots * widest) / 3600
        price = {} if on.price is None else {"price": total * on.price}
        return {"runs": runs, "total": total, **price}


def full(disk: Mapping[str, float], free: float) -> str:
    """What the disk lacks, and what would help; "" if there is room for all."""
    if sum(disk.values()) <= free:
        return ""
    listed = ", ".join(f"{name} {size(value)}" for name, value in disk.items() if value)
    return (
        f"the disk: about {size(sum(disk.values()))} are needed ({listed}), and {size(free)} are "
        "free. What helps: data.folders for sets that you have; fewer seeds or rows; a larger disk"
    )


def data_bytes(names: Iterable[str], data: DataConfig) -> float:
    """Bytes of the pictures of data sets that are made here, and of the files of those that are
    fetched; none of those in a folder of the user's or of a mirror."""
    total = 0.0
    for name in names:
        entry = dataset(name, data)
        if entry.image_bytes and not entry.source:
            total += entry.image_bytes * sum(rows for rows, _ in entry.load(data, None).values())
        if not user_folder(name, data.folders, data.mirror):
            total += fetched_bytes(entry.files)
    return total


# ---- printed ----------------------------------------------------------------------------------


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
