"""What a run of the pipeline will cost, before anything is trained.

    python -m sts estimate --configfile workflow/config/mini.yaml

Jobs are counted, FLOPs and memory are computed from shapes (sts/pipeline/cost), and time is FLOPs
over a speed that is measured here and now: a few training steps where the model is small, one
large matrix product where it is not. All but the number of jobs is an estimate; nothing is
downloaded.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from sts.lds.decision import expected_work
from sts.pipeline.config import Config, DataConfig, StageConfig
from sts.pipeline.cost import flops as cost
from sts.pipeline.cost.machines import SHARE, Machine
from sts.pipeline.cost.memory import lacking, memory_here, step_memory
from sts.pipeline.data.fetch import fetched_bytes, user_folder
from sts.pipeline.data.registry import dataset
from sts.pipeline.measure import shapes
from sts.pipeline.plan import MAIN, Plan, load_plan
from sts.pipeline.run.device import attention_here, precision_here
from sts.pipeline.tasks.registry import questions_of
from sts.pipeline.train.checkpoint import KEPT
from sts.pipeline.train.lora import train_parts
from sts.pipeline.train.model import SHIPPED
from sts.pipeline.train.step import (
    make_optimizer,
    optimizer_step,
    prepare_process,
    put_scheme,
)
from sts.schedule import keep_at
from sts.settings import LDS, VTC

# Split -> (text, answer) tokens of a sample where the data set doesn't say: a guess at what LLaVA's
# two data sets hold.
TOKENS = {"align": (40, 25), "instruct": (250, 130)}
START_SECONDS = 20  # imports and loading, each job
ANSWER_SECONDS = 0.004  # of a short answer's other tokens and the harness, a question on a core
MATMUL_SHARE = 0.4  # of a matrix product's speed that a training of a large model reaches


def estimate(
    configfile: str | Path,
    ablations: str | Path,
    as_json: bool = False,
    on: Machine | None = None,
) -> dict[str, Any]:
    """Print, as a table or as JSON, and return what the bare command will cost with this scale, on
    this machine or another.

    Raises ConfigError for a file that is not accepted, ValueError for a pretrained model whose
    sizes are not known here.
    """
    found = forecast(load_plan(configfile, ablations), on)
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True))
    else:
        show(found, Console())
    return found


def forecast(plan: Plan, on: Machine | None = None) -> dict[str, Any]:
    """Everything that `show` prints of the bare command, as plain numbers: seconds, bytes, FLOPs.
    `respread`: what of the configuration asks for more GPUs than there are, and what was estimated
    instead."""
    gpus = on.count if on else torch.cuda.device_count()
    members = plan.members(MAIN)
    respread = [said for id in members for said in too_wide(plan.configs[id], gpus)]
    plan = replace(plan, configs={id: spread(c, gpus) for id, c in plan.configs.items()})
    base = plan.scale
    configs = {id: plan.configs[id] for id in members}
    model, data = model_config(base), base.data
    shape = cost.shape_of(model)
    trainings = [(plan.configs[job.ablation], job.stage) for job in plan.trainings(members)]
    speed, source = calibrate(base, configs, model, on)
    slots = concurrent(base, on)

    def flops(config: Config, stage: str) -> float:
        return stage_flops(shape, config.stage(stage), data, on=on)

    def seconds(config: Config, stage: str) -> float:
        return flops(config, stage) / speed[stage] / at_once(config.stage(stage), gpus)

    training = [seconds(config, stage) + START_SECONDS for config, stage in trainings]
    evaluation = [
        len(config.seeds) * evaluation_seconds(shape, config, speed[config.last])
        for config in configs.values()
    ]
    timing = sum(
        base.bench.steps * flops(configs[id], stage) / block.steps / block.processes / speed[stage]
        for id in members
        for stage, block in configs[id].stages.items()
    )
    parts = {
        "training": sum(training) / slots,
        "evaluation": sum(evaluation) / slots,
        "timing": timing + START_SECONDS,
        "backbone": float(START_SECONDS),
    }
    weights = 4.0 * sum(shape.parameters.values())
    blocks = [config.stage(stage) for config, stage in trainings]
    needs = [
        step_memory(shape, block, *tokens(block, data), on_gpu=on is not None) for block in blocks
    ]
    peak = max(sum(parts.values()) for parts in needs)
    there = on.gpu.memory if on else memory_here(slots)
    lacks = [
        lacking(stage, block, parts, there)
        for (_, stage), block, parts in zip(trainings, blocks, needs, strict=True)
    ]
    disk = {
        "data": data_bytes(plan.data(members), data),
        "weights": weights * len(trainings),
        "checkpoints": slots * max(state_bytes(shape, block) for block in blocks),
    }
    free = float(shutil.disk_usage(".").free)
    if on is None:
        lacks.append(full(disk, free))
    return {
        "scale": base.scale,
        "jobs": plan.jobs(),
        "flops": {
            "runs": {
                id: {stage: flops(config, stage) for stage in config.stages}
                for id, config in configs.items()
            },
            "total": sum(flops(config, stage) for config, stage in trainings),
        },
        "seconds": {**parts, "total": sum(parts.values())},
        "speed": {"flops_per_s": speed, "source": source, "trainings_at_once": slots},
        "disk_bytes": {**disk, "free": free},
        "memory_bytes": {"of_a_training": peak, "at_once": slots * peak, "of_a_process": there},
        "lacking": list(dict.fromkeys(filter(None, lacks))),
        "respread": list(dict.fromkeys(respread)),
        **({"gpu_hours": gpu_hours(configs, seconds, parts, slots, on)} if on else {}),
    }


def gpu_hours(
    configs: Mapping[str, Config],
    seconds: Callable[[Config, str], float],
    parts: Mapping[str, float],
    slots: int,
    on: Machine,
) -> dict[str, Any]:
    """GPU-hours of the stages of each run of one seed and of all that is done, and its price."""
    runs = {
        id: {
            stage: config.stage(stage).processes * seconds(config, stage) / 3600
            for stage in config.stages
        }
        for id, config in configs.items()
    }
    widest = max(c.stage(stage).processes for c in configs.values() for stage in c.stages)
    total = sum(parts.values()) * min(on.count, slots * widest) / 3600
    price = {} if on.price is None else {"price": total * on.price}
    return {"runs": runs, "total": total, **price}


# ---- sizes ------------------------------------------------------------------------------------


def model_config(config: Config) -> PreTrainedConfig:
    """The model's sizes: the mini scale's own, those of published or local parts, or those of a
    whole checkpoint."""
    model = config.model
    if model.family == "whole":
        return shapes.local(model.checkpoint)
    if model.backbone == "pretrained":
        vision, language = shapes.part(model.vision), shapes.part(model.language)
    else:
        vision, language = (shapes.part(str(SHIPPED / name)) for name in ("vision", "language"))
        language.num_hidden_layers = model.layers
    return shapes.joined(vision, language, model.vision_feature_layer)


def tokens(block: StageConfig, data: DataConfig) -> tuple[float, float]:
    """(text, answer) tokens of a sample, text with the padding of its batch: means over the data
    sets of the stage."""
    known = [dataset(name, data).tokens for name in block.data]
    pairs = [one.get(block.split, TOKENS[block.split]) for one in known]
    text, answer = (fmean(values) for values in zip(*pairs, strict=True))
    return text, answer


def stage_flops(
    shape: cost.Shape,
    block: StageConfig,
    data: DataConfig,
    points: int = 50,
    on: Machine | None = None,
) -> float:
    """FLOPs of a whole stage on all processes, with its schedules for keep ratio and skip rate."""
    return block.steps * fmean(
        step_flops(shape, block, data, (i + 0.5) / points, on) for i in range(points)
    )


def step_flops(
    shape: cost.Shape,
    block: StageConfig,
    data: DataConfig,
    fraction: float,
    on: Machine | None = None,
) -> float:
    """FLOPs of one optimizer step at a fraction of the stage, on all processes."""
    vtc = block.vtc
    keep = keep_at(fraction, vtc.keep, vtc.schedule, vtc.dense_tail)
    text, answer = tokens(block, data)
    return cost.step_flops(
        shape,
        batch=block.global_batch,
        visual_tokens=keep * shape.visual_tokens,
        text_tokens=text,
        answer_tokens=answer,
        work=expected_work(block.lds, shape.layers, fraction),
        trains=block.trains,
        lora_rank=block.lora.rank,
        checkpointing=block.gradient_checkpointing,
        fused_attention=on is not None or attention_here(block.precision) == "sdpa",
    )


def state_bytes(shape: cost.Shape, block: StageConfig) -> float:
    """Bytes of the checkpoints kept while the next is written: trained weights, two moments."""
    return (KEPT + 1) * 12.0 * cost.trained_parameters(shape, block.trains, block.lora.rank)


def full(disk: Mapping[str, float], free: float) -> str:
    """What the disk lacks, and what would help; "" if there is room for all."""
    if sum(disk.values()) <= free:
        return ""
    held = ", ".join(f"{name} {size(value)}" for name, value in disk.items() if value)
    return (
        f"the disk: about {size(sum(disk.values()))} are needed ({held}), and {size(free)} are "
        "free. What helps: data.folders for sets that you have; fewer seeds or rows; a larger disk"
    )


def data_bytes(names: Iterable[str], data: DataConfig) -> float:
    """Bytes of the pictures of data sets that are made here, and of the files of those that are
    fetched; none of those in a folder of the user's or of a mirror."""
    total = 0.0
    for name in names:
        entry = dataset(name, data)
        total += entry.image_bytes * sum(rows_made_here(name, data).values())
        if not user_folder(name, data.folders, data.mirror):
            total += fetched_bytes(entry.files)
    return total


def rows_made_here(name: str, data: DataConfig) -> dict[str, int]:
    """Split -> rows of a data set that is made here; none of one that is fetched or the user's."""
    entry = dataset(name, data)
    made_here = entry.image_bytes and not entry.source
    return {s: count for s, (count, _) in entry.load(data, None).items()} if made_here else {}


# ---- processes on the GPUs that there are -----------------------------------------------------


def on_fewer(block: StageConfig, gpus: int) -> StageConfig:
    """The stage with at most a process for each of `gpus` (0: without any there is no such limit),
    and its optimizer step as it was: what the others did is done one after the other."""
    pieces = block.processes * block.gradient_accumulation_steps
    most = min(block.processes, gpus or block.processes)
    processes = max(n for n in range(1, most + 1) if pieces % n == 0)
    split = {"processes": processes, "gradient_accumulation_steps": pieces // processes}
    return block.model_copy(update=split)


def spread(config: Config, gpus: int) -> Config:
    """The configuration with every stage `on_fewer`."""
    stages = {name: on_fewer(block, gpus) for name, block in config.stages.items()}
    return config.model_copy(update={"stages": stages})


def too_wide(config: Config, gpus: int) -> Iterator[str]:
    """What is said of the stages that have more processes than there are GPUs: the trainer refuses
    another number than configured."""
    for name, block in config.stages.items():
        fewer = on_fewer(block, gpus)
        if fewer.processes < block.processes:
            yield (
                f"stages.{name}: {block.processes} processes do not run on {gpus} GPU"
                f"{'s' * (gpus > 1)}. Estimated with processes: {fewer.processes} and "
                f"gradient_accumulation_steps: {fewer.gradient_accumulation_steps}, which keep "
                f"the global batch of {block.global_batch}; set them before you train"
            )


def at_once(block: StageConfig, gpus: int) -> int:
    """Processes of a training that compute at once: all on GPUs, on a CPU as many as have cores."""
    cores = len(os.sched_getaffinity(0)) // block.threads
    return block.processes if gpus else max(1, min(block.processes, cores))


# ---- time -------------------------------------------------------------------------------------


def concurrent(config: Config, on: Machine | None = None) -> int:
    """Trainings that run at once: by GPUs if there are any, else by cores."""
    block = config.stage(config.last)
    gpus = on.count if on else torch.cuda.device_count()
    room = gpus or len(os.sched_getaffinity(0)) // block.threads
    return max(1, room // block.processes)


def calibrate(
    base: Config,
    configs: Mapping[str, Config],
    model: PreTrainedConfig,
    on: Machine | None = None,
) -> tuple[dict[str, float], str]:
    """({stage: FLOPs a second of one training}, how it was measured), within seconds. Of stages of
    one name the first counts."""
    blocks: dict[str, StageConfig] = {}
    for config in (base, *configs.values()):
        blocks = {**config.stages, **blocks}
    if on:
        return dict.fromkeys(blocks, SHARE * on.gpu.flops), f"{SHARE:.0%} of the peak of {on.kind}"
    if base.model.family == "whole" or base.model.backbone == "pretrained":
        rate = MATMUL_SHARE * matmul_rate(base.stage(base.last))
        share = f"{MATMUL_SHARE:.0%} of a matrix product's speed"
        return dict.fromkeys(blocks, rate), f"{share}, measured on this machine: a rough guess"
    speed = {stage: training_rate(model, block, base.data) for stage, block in blocks.items()}
    return speed, "dense training steps, measured on this machine just now"


def training_rate(
    model: PreTrainedConfig, block: StageConfig, data: DataConfig, budget: float = 6
) -> float:
    """FLOPs a second of dense training steps on random weights and tokens; at most about `budget`
    seconds and five steps."""
    block = block.model_copy(update={"processes": 1, "vtc": VTC(), "lds": LDS()})
    accelerator = prepare_process(block)
    text, answer = map(round, tokens(block, data))
    batch = {
        name: values.to(accelerator.device)
        for name, values in shapes.made_up_batch(model, block.batch_size, text, answer).items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = shapes.random_model(model)
    train_parts(built, block, seed=0)
    scheme = put_scheme(built, block, block.global_batch, seed=0)
    wrapped, optimizer = accelerator.prepare(built, make_optimizer(built, block))
    batches = [batch] * block.gradient_accumulation_steps
    seconds: list[float] = []
    began = time.perf_counter()
    while not seconds or (len(seconds) < 5 and time.perf_counter() - began < budget):
        scheme.begin_step(0)
        start = time.perf_counter()
        optimizer_step(accelerator, wrapped, optimizer, batches, block, 0.0, scheme)
        seconds.append(time.perf_counter() - start)
    # the median: neither the first step, which warms up, nor the luckiest
    return step_flops(cost.shape_of(model), block, data, 0.0) / median(seconds)


def matmul_rate(block: StageConfig, largest: int = 2048, enough: float = 0.1) -> float:
    """FLOPs a second of square matrix products with the stage's precision and threads: of the
    first size, from 256 on, that takes `enough` seconds (bf16 is slow on a CPU without it)."""
    gpu = torch.cuda.is_available()
    torch.set_num_threads(block.threads)
    kind = torch.bfloat16 if precision_here(block.precision) == "bf16" else torch.float32
    size, fastest = 128, 0.0
    while fastest < enough and size < largest:
        size *= 2
        a = torch.ones(size, size, dtype=kind, device="cuda" if gpu else "cpu")
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            (a @ a).sum().item()
            seconds.append(time.perf_counter() - began)
        fastest = min(seconds)
    return 2 * size**3 / fastest


def evaluation_seconds(shape: cost.Shape, config: Config, speed: float) -> float:
    """One evaluation job: a forward pass of every question (a third of a training step's FLOPs) and
    what its answer takes beside, and of a share again with a grey image."""
    asked = config.evaluate
    each = [questions_of(name) or config.data.scenes.test for name in asked.benchmarks]
    questions = sum(min(count, asked.limit or count) for count in each) * (1 + asked.blind)
    whole = {"trains": ["projector", "language_model"], "vtc": VTC(), "lds": LDS()}
    block = config.stage(config.last).model_copy(update=whole)
    forward = step_flops(shape, block, config.data, 0.0) / block.global_batch / 3
    return START_SECONDS + questions * (forward / speed + ANSWER_SECONDS)


# ---- printing ---------------------------------------------------------------------------------


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
    for name in ("data", "weights", "checkpoints", "free"):
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
