"""How fast trainings run here or on another machine: processes that there is room for, and FLOPs a
second, measured within seconds or taken from a GPU's data sheet."""

import os
import time
from collections.abc import Iterable, Iterator
from statistics import median

import torch

from sts.pipeline.config import Config, StageConfig
from sts.pipeline.cost.machines import SHARE, Machine
from sts.pipeline.measure import shapes
from sts.pipeline.measure.stage_cost import StageCost, model_config, tokens
from sts.pipeline.run.device import precision_here
from sts.pipeline.tasks.registry import questions_of
from sts.pipeline.train.lora import train_parts
from sts.pipeline.train.step import make_optimizer, optimizer_step, prepare_process, put_scheme
from sts.settings import LDS, VTC

START_SECONDS = 20  # imports and loading, each job
ANSWER_SECONDS = 0.004  # of a short answer's other tokens and the harness, a question on a core
MATMUL_SHARE = 0.4  # of a matrix product's speed that a training of a large model reaches


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


def concurrent(config: Config, on: Machine | None = None) -> int:
    """Trainings that run at once: by GPUs if there are any, else by cores."""
    block = config.stage(config.last)
    gpus = on.count if on else torch.cuda.device_count()
    room = gpus or len(os.sched_getaffinity(0)) // block.threads
    return max(1, room // block.processes)


# ---- FLOPs a second ---------------------------------------------------------------------------


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


def training_rate(config: Config, stage: str, budget: float = 6) -> float:
    """FLOPs a second of dense training steps on random weights and tokens; at most about `budget`
    seconds and five steps."""
    dense = {"processes": 1, "vtc": VTC(), "lds": LDS()}
    block = config.stage(stage).model_copy(update=dense)
    config = config.model_copy(update={"stages": {**config.stages, stage: block}})
    accelerator = prepare_process(block)
    text, answer = map(round, tokens(block, config.data))
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
    seconds: list[float] = []
    began = time.perf_counter()
    while not seconds or (len(seconds) < 5 and time.perf_counter() - began < budget):
        scheme.begin_step(0)
        start = time.perf_counter()
        optimizer_step(accelerator, wrapped, optimizer, batches, block, 0.0, scheme)
        seconds.append(time.perf_counter() - start)
    # the median: neither the first step, which warms up, nor the luckiest
    return StageCost(config, stage).step_flops(0.0) / median(seconds)


def matmul_rate(block: StageConfig, largest: int = 2048, enough: float = 0.1) -> float:
    """FLOPs a second of square matrix products with the stage's precision and threads: of the
    first size, from 256 on, that takes `enough` seconds (bf16 is slow on a CPU without it)."""
    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(block.threads)
    dtype = torch.bfloat16 if precision_here(block.precision) == "bf16" else torch.float32
    size, fastest = 128, 0.0
    while fastest < enough and size < largest:
        size *= 2
        a = torch.ones(size, size, dtype=dtype, device="cuda" if on_gpu else "cpu")
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            (a @ a).sum().item()
            seconds.append(time.perf_counter() - began)
        fastest = min(seconds)
    return 2 * size**3 / fastest


def evaluation_seconds(last: StageCost, speed: float) -> float:
    """One evaluation job of a run with this last stage: a forward of every question and what its
    answer takes beside, and of a share again with a grey image."""
    wanted = last.config.evaluate
    counts = [questions_of(name) or last.config.data.scenes.test for name in wanted.benchmarks]
    limit = wanted.limit or max(counts)
    questions = sum(min(count, limit) for count in counts) * (1 + wanted.blind)
    return START_SECONDS + questions * (last.answer_flops / speed + ANSWER_SECONDS)
