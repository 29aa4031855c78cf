"""What a run of the pipeline will cost, before anything is trained.

    python -m sts estimate --configfile workflow/config/mini.yaml

Jobs are those of the plan, FLOPs are counted, memory is reckoned from sizes, and time is FLOPs over
a speed that is measured here and now: a few training steps where the model is small, one large
matrix product where it is not. All but the number of jobs is an estimate; nothing is downloaded.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sts.pipeline.config import Config, DataConfig
from sts.pipeline.cost.machines import Machine
from sts.pipeline.cost.memory import lacking, memory_here, unasked
from sts.pipeline.data.fetch import fetched_bytes, user_folder
from sts.pipeline.data.registry import dataset
from sts.pipeline.data.source import mirror_folder
from sts.pipeline.measure.speed import at_once, calibrate, concurrent, fit, reached_bandwidth
from sts.pipeline.measure.stage_cost import START_SECONDS, StageCost, stage_costs, timing_memory
from sts.pipeline.plan import MAIN, Plan, load_plan, unique
from sts.pipeline.tasks.registry import bytes_of, hub_set_of


def estimate(
    configfile: str | Path | Sequence[Path],
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


Runs = Mapping[str, Mapping[str, StageCost]]  # ablation -> stage -> its cost


def forecast(plan: Plan, on: Machine | None = None) -> dict[str, Any]:
    """Everything that `show` prints of the bare command, as plain numbers: seconds, bytes, FLOPs.
    `respread`: what of the configuration asks for more GPUs than there are, and what was estimated
    instead."""
    gpus = on.count if on else torch.cuda.device_count()
    pairs = {id: fit(config, gpus) for id, config in plan.configs.items()}
    plan = replace(plan, configs={id: config for id, (config, _) in pairs.items()})
    costs = {id: stage_costs(config, on is not None) for id, config in plan.configs.items()}
    runs = {id: costs[id] for id in plan.members(MAIN)}
    trainings = [costs[job.ablation][job.stage] for job in plan.trainings(runs)]
    rates, source = calibrate([plan.scale, *(plan.configs[id] for id in runs)], on)
    slots = concurrent(plan.scale, gpus)

    def stage_seconds(cost: StageCost) -> float:  # without its start
        return cost.flops / rates[cost.stage] / at_once(cost.block, gpus)

    training = sum(stage_seconds(cost) + START_SECONDS for cost in trainings)
    seconds = {"training": training / slots, **_beside_training(runs, rates, slots, gpus, on)}
    seconds["total"] = sum(seconds.values())
    configs = [plan.configs[id] for id in runs]
    memory, lacks = _memory(runs, trainings, on.gpu.memory if on else memory_here(slots))
    fetched = {"benchmarks": benchmark_bytes(configs), "models": model_bytes(runs)}
    disk = {
        "data": data_bytes(plan.data(runs), plan.scale.data),
        **{name: value for name, value in fetched.items() if value},
        "weights": sum(cost.weight_bytes for cost in trainings),
        "checkpoints": slots * max(cost.checkpoint_bytes for cost in trainings),
    }
    free = float(shutil.disk_usage(".").free)
    return {
        "scale": plan.scale.scale,
        "jobs": plan.jobs(),
        "flops": {
            "runs": _of_each_stage(runs, lambda cost: cost.flops),
            "pictures_share": _of_each_stage(runs, lambda cost: cost.pictures_share),
            "total": sum(cost.flops for cost in trainings),
        },
        "seconds": seconds,
        "speed": {"flops_per_s": rates, "source": source, "trainings_at_once": slots},
        "disk_bytes": {**disk, "free": free},
        "memory_bytes": {**memory, "at_once": slots * memory["of_a_training"]},
        "lacking": lacks,
        "full": full(disk, free),
        "unlike": plan.unlike_timing(),
        "respread": unique(text for id in runs for text in pairs[id][1]),
        **(
            {"gpu_hours": _gpu_hours(runs, stage_seconds, seconds["total"], slots, on)}
            if on
            else {}
        ),
    }


def _memory(
    runs: Runs, trainings: Sequence[StageCost], available: float
) -> tuple[dict[str, float], list[str]]:
    """Bytes of a process of each kind of job, at most, and what of them doesn't fit."""
    timed = timing_memory(cost for stages in runs.values() for cost in stages.values())
    needs = [(cost, cost.memory) for cost in trainings] + timed
    asks = {id: [*stages.values()][-1] for id, stages in runs.items()}
    texts = [lacking(cost.stage, cost.block, parts, available) for cost, parts in needs]
    texts += [unasked(c.config.evaluate, c.evaluation_memory, available) for c in asks.values()]
    memory = {
        "of_a_training": max(map(StageCost.total, trainings)),
        "of_a_timing": max(sum(parts.values()) for _, parts in timed),
        "of_an_evaluation": max(sum(cost.evaluation_memory.values()) for cost in asks.values()),
        "of_a_process": available,
    }
    return memory, unique(filter(None, texts))


def _of_each_stage(runs: Runs, value: Callable[[StageCost], float]) -> dict[str, dict[str, float]]:
    return {id: {name: value(cost) for name, cost in stages.items()} for id, stages in runs.items()}


def _beside_training(
    runs: Runs, rates: Mapping[str, float], slots: int, gpus: int, on: Machine | None
) -> dict[str, float]:
    """Seconds of each other kind of job, those that run at once together."""
    evaluation = timing = 0.0
    bandwidth = reached_bandwidth(on)
    for stages in runs.values():
        *_, last = stages.values()
        asked = last.evaluation_seconds(rates[last.stage], bandwidth)
        evaluation += len(last.config.seeds) * asked
        timing += sum(
            cost.timing_flops / rates[stage] / at_once(cost.block, gpus)
            for stage, cost in stages.items()
        )
    *_, last = next(iter(runs.values())).values()
    at_a_time = max(1, gpus // last.config.evaluate.processes) if gpus else slots
    return {
        "evaluation": evaluation / at_a_time,
        "timing": timing + START_SECONDS,
        "backbone": float(START_SECONDS),
    }


def _gpu_hours(
    runs: Runs,
    stage_seconds: Callable[[StageCost], float],
    total_seconds: float,
    slots: int,
    on: Machine,
) -> dict[str, Any]:
    """GPU-hours of the stages of each run of one seed and of all that is done, and its price."""
    widest = max(cost.block.processes for stages in runs.values() for cost in stages.values())
    total = total_seconds * min(on.count, slots * widest) / 3600
    hours = _of_each_stage(runs, lambda cost: cost.block.processes * stage_seconds(cost) / 3600)
    return {"runs": hours, "total": total} | (
        {} if on.price is None else {"price": total * on.price}
    )


def full(disk: Mapping[str, float], free: float) -> str:
    """What the disk lacks, and what would help; "" if there is room for all."""
    if sum(disk.values()) <= free:
        return ""
    listed = ", ".join(f"{name} {size(value)}" for name, value in disk.items() if value)
    return (
        f"the disk: about {size(sum(disk.values()))} are needed ({listed}), and {size(free)} are "
        "free. What helps: data.folders for sets that you have; fewer seeds or rows; a larger disk"
    )


def benchmark_bytes(configs: Iterable[Config]) -> float:
    """Bytes of the data of benchmarks that are fetched: those that no mirror has."""
    names = unique(
        name
        for config in configs
        for name in config.evaluate.benchmarks
        if not _is_mirrored(name, config.data.mirror)
    )
    return float(bytes_of(*names))


def _is_mirrored(benchmark: str, mirror: str | None) -> bool:
    path, root = hub_set_of(benchmark).get("path"), mirror_folder(mirror)
    return bool(path and root and (root / path).is_dir())


def model_bytes(runs: Runs) -> float:
    """Bytes of the models that are fetched: towers in float32, language models in 16 bits."""
    by_source = {}
    for cost in (cost for stages in runs.values() for cost in stages.values()):
        model, parts = cost.config.model, cost.counts.parameters
        language = parts["decoder"] + parts["head"]
        sizes = {
            model.vision: 4.0 * parts["vision"],
            model.language: 2.0 * language,
            model.checkpoint: 2.0 * (language + parts["vision"] + parts["projector"]),
        }
        by_source |= {name: sizes[name] for name in model.sources if not Path(name).is_dir()}
    return sum(by_source.values())


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
    titles = {"respread": "Fewer GPUs", "lacking": "Does not fit", "unlike": "Not the time"}
    named = [(title, costs[name]) for name, title in titles.items()]
    for title, texts in (*named, ("Does not fit here", filter(None, [costs["full"]]))):
        for text in texts:
            console.print(f"[bold]{title}[/bold]: {text}", highlight=False)
    if not costs["lacking"]:
        console.print("All fits into memory: trainings, timing and evaluations.")
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
    shares = next(iter(costs["flops"]["pictures_share"].values()))
    parts = ", ".join(f"{share:.0%} {stage}" for stage, share in shares.items())
    yield "of them tower and projector, dense", parts
    yield "FLOPs of all trainings", f"{costs['flops']['total']:.2g}"
    for name, seconds in costs["seconds"].items():
        yield f"time: {name}", duration(seconds)
    for name, value in costs["disk_bytes"].items():
        yield f"disk: {name}", size(value)
    memory = costs["memory_bytes"]
    for job in ("a_training", "a_timing", "an_evaluation"):
        yield f"memory of {job.replace('_', ' ')}", size(memory[f"of_{job}"])
    yield "memory of a process here", size(memory["of_a_process"])
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
