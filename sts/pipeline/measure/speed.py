"""How fast trainings run here or on another machine: processes that there is room for, and FLOPs a
second, measured within seconds or taken from a GPU's data sheet."""

import os
from collections.abc import Iterable

import torch
from torch.utils.benchmark import Timer

from sts.pipeline.config import Config, StageConfig
from sts.pipeline.cost.machines import CORES_BANDWIDTH, SHARE, Machine, gpu_of
from sts.pipeline.measure import shapes
from sts.pipeline.measure.stage_cost import StageCost, model_config
from sts.pipeline.run.device import precision_here
from sts.pipeline.train.lora import train_parts
from sts.pipeline.train.step import make_optimizer, optimizer_step, prepare_process, put_scheme
from sts.settings import LDS, VTC

MATMUL_SHARE = 0.4  # of a matrix product's speed that a training of a large model reaches
MATMUL_SIZE = 2048


def on_fewer(block: StageConfig, gpus: int) -> StageConfig:
    """The stage with at most a process for each of `gpus` (0: without any there is no such limit),
    and its optimizer step as it was: what the others did is done one after the other."""
    pieces = block.processes * block.gradient_accumulation_steps
    most = min(block.processes, gpus or block.processes)
    processes = max(n for n in range(1, most + 1) if pieces % n == 0)
    split = {"processes": processes, "gradient_accumulation_steps": pieces // processes}
    return block.model_copy(update=split)


def fit(config: Config, gpus: int) -> tuple[Config, list[str]]:
    """The configuration with every stage `on_fewer`, and what is said of the stages that have more
    processes than there are GPUs: the trainer refuses another number than configured."""
    stages = {name: on_fewer(block, gpus) for name, block in config.stages.items()}
    texts = [
        f"stages.{name}: {block.processes} processes do not run on {gpus} GPU{'s' * (gpus > 1)}. "
        f"Estimated with processes: {stages[name].processes} and gradient_accumulation_steps: "
        f"{stages[name].gradient_accumulation_steps}, which keep the global batch of "
        f"{block.global_batch}; set them before you train"
        for name, block in config.stages.items()
        if stages[name].processes < block.processes
    ]
    asked = config.evaluate
    if gpus and asked.processes > gpus:
        texts.append(f"evaluate.processes: {asked.processes} do not run on {gpus}: set {gpus}")
        asked = asked.model_copy(update={"processes": gpus})
    return config.model_copy(update={"stages": stages, "evaluate": asked}), texts


def at_once(block: StageConfig, gpus: int) -> int:
    """Processes of a training that compute at once: all on GPUs, on a CPU as many as have cores."""
    cores = len(os.sched_getaffinity(0)) // block.threads
    return block.processes if gpus else max(1, min(block.processes, cores))


def concurrent(config: Config, gpus: int) -> int:
    """Trainings that run at once: by GPUs if there are any, else by cores."""
    block = config.stage(config.last)
    room = gpus or len(os.sched_getaffinity(0)) // block.threads
    return max(1, room // block.processes)


def calibrate(configs: Iterable[Config], on: Machine | None = None) -> tuple[dict[str, float], str]:
    """Speed of the stages of configurations that start from one model; of stages of one name the
    first counts.

    Returns:
        Stage -> FLOPs a second of one training, and how that was measured.
    """
    stages: dict[str, Config] = {}
    for config in configs:
        stages = dict.fromkeys(config.stages, config) | stages
    if on:
        return dict.fromkeys(stages, SHARE * on.gpu.flops), f"{SHARE:.0%} of the peak of {on.kind}"
    base = next(iter(stages.values()))
    if base.model.family == "whole" or base.model.backbone == "pretrained":
        rate = MATMUL_SHARE * matmul_rate(base.stage(base.last))
        share = f"{MATMUL_SHARE:.0%} of a matrix product's speed"
        return dict.fromkeys(stages, rate), f"{share}, measured on this machine: a rough guess"
    speed = {stage: training_rate(config, stage) for stage, config in stages.items()}
    return speed, "dense training steps, measured on this machine just now"


def training_rate(config: Config, stage: str) -> float:
    """FLOPs a second of dense training steps on random weights and tokens."""
    dense = {"processes": 1, "vtc": VTC(), "lds": LDS()}
    block = config.stage(stage).model_copy(update=dense)
    cost = StageCost(config.model_copy(update={"stages": {stage: block}}), stage)
    accelerator = prepare_process(block)
    text, answer = map(round, cost.tokens)
    sizes = model_config(config.model)
    batch = {
        name: values.to(accelerator.device)
        for name, values in shapes.made_up_batch(sizes, block.batch_size, text, answer).items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = shapes.random_model(sizes)
    train_parts(model, block, seed=0)
    scheme = put_scheme(model, block, block.global_batch, seed=0)
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, block))
    batches = [batch] * block.gradient_accumulation_steps

    def step() -> None:
        scheme.begin_step(0)
        optimizer_step(accelerator, wrapped, optimizer, batches, block, 0.0, scheme)

    return cost.step_flops(0.0) / seconds_of("step()", block, step=step)


def matmul_rate(block: StageConfig) -> float:
    """FLOPs a second of square matrix products with the stage's precision and threads."""
    dtype = torch.bfloat16 if precision_here(block.precision) == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device=device)
    return 2 * MATMUL_SIZE**3 / seconds_of("matrix @ matrix", block, matrix=matrix)


def reached_bandwidth(on: Machine | None = None) -> float:
    """Bytes a second of weights that are read to decode answers."""
    here = torch.cuda.is_available() and gpu_of(torch.cuda.get_device_name())
    gpu = on.gpu if on else here
    return SHARE * gpu.bandwidth if gpu else CORES_BANDWIDTH


def seconds_of(statement: str, block: StageConfig, **names: object) -> float:
    """Median time of a statement with the stage's threads, after a warm-up."""
    timer = Timer(statement, globals=names, num_threads=block.threads)
    return timer.blocked_autorange(min_run_time=1).median
