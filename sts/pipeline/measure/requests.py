"""What the jobs of a cluster ask its scheduler for: host memory and time, from the estimate.

    python -m sts requests --configs results/paper/configs/*.yaml --out results/paper/requests.json

Both are limits at which the scheduler ends a job, so they are generous. The workflow asks for twice
as much at the second attempt, where a training goes on from its last checkpoint.
"""

import logging
import math
from pathlib import Path

from sts.pipeline.config import Config, DataConfig, StageConfig
from sts.pipeline.cost import flops as cost
from sts.pipeline.cost.machines import SHARE, Machine
from sts.pipeline.cost.memory import PROCESS_BYTES, step_memory
from sts.pipeline.files import write_json_atomic
from sts.pipeline.measure.forecast import (
    evaluation_seconds,
    model_config,
    stage_flops,
    tokens,
)
from sts.pipeline.plan import Plan, unique

TIME_SLACK, MEMORY_SLACK = 2.0, 1.5
START_MINUTES = 15  # imports and weights from a busy shared folder
SLOW = Machine("a100", 1)  # which GPU a job gets is not known: none of a cluster's is much slower
CORE_FLOPS = 5e9  # a second, of a thread of a slow processor
GPU_PROCESS_BYTES = 6e9  # host memory of a process with CUDA and four that load its data
HARNESS_BYTES = 2e9  # lm-eval and the questions of a benchmark

log = logging.getLogger(__name__)


def requests(plan: Plan, gpus: bool, out: str | Path) -> dict[str, dict[str, int]]:
    """Write and return what jobs ask for, {job: {`mem_mb`, `runtime` in minutes}}, on a cluster
    with GPUs or without: `train/<id>/<stage>`, `evaluate/<id>` of every
    ablation, `timing/<table>` of every table. Memory is that of one node.

    What starts from a model whose sizes are not known here is left out, with a warning.
    """
    found, timings = {}, {}
    shapes = {id: shape_of(plan.configs[id]) for id in unique(map(plan.model_of, plan.configs))}
    for id, config in plan.configs.items():
        shape = shapes[plan.model_of(id)]
        if shape is None:
            continue
        for stage, block in config.stages.items():
            seconds = training_seconds(shape, config, stage, gpus)
            memory = training_memory(shape, block, config.data, gpus)
            found[f"train/{id}/{stage}"] = limits(memory, seconds)
            alone = block.model_copy(update={"processes": 1, "nodes": 1})
            alone = training_memory(shape, alone, config.data, gpus)
            timings[id, stage] = (alone, config.bench.steps / block.steps * seconds)
        rate = speed(config.stage(config.last), gpus)
        memory = (GPU_PROCESS_BYTES if gpus else PROCESS_BYTES) + float32_bytes(shape)
        seconds = evaluation_seconds(shape, config, rate)
        found[f"evaluate/{id}"] = limits(memory + HARNESS_BYTES, seconds)
    for group in plan.tables:
        of_group = [(id, stage) for id in plan.members(group) for stage in plan.configs[id].stages]
        if all(one in timings for one in of_group):
            sizes, times = zip(*(timings[one] for one in of_group), strict=True)
            found[f"timing/{group}"] = limits(2 * max(sizes), sum(times))  # two models
    write_json_atomic(out, found)
    return found


def shape_of(config: Config) -> cost.Shape | None:
    """Sizes of the model that a run starts from; None, with a warning, where they are not known."""
    try:
        return cost.shape_of(model_config(config))
    except ValueError as error:
        log.warning("Jobs ask for memory and time that no estimate says. %s", error)
        return None


def float32_bytes(shape: cost.Shape) -> float:
    """Bytes of all weights of a model."""
    return 4.0 * sum(shape.parameters.values())


def limits(memory: float, seconds: float) -> dict[str, int]:
    """A request, from estimated bytes and seconds."""
    minutes = START_MINUTES + TIME_SLACK * seconds / 60
    return {"mem_mb": math.ceil(MEMORY_SLACK * memory / 1e6), "runtime": math.ceil(minutes)}


def speed(block: StageConfig, gpus: bool) -> float:
    """FLOPs a second of one process of a stage on a slow machine."""
    return SHARE * SLOW.gpu.flops if gpus else CORE_FLOPS * block.threads


def training_seconds(shape: cost.Shape, config: Config, stage: str, gpus: bool) -> float:
    """Seconds that a stage takes."""
    block = config.stage(stage)
    flops = stage_flops(shape, block, config.data, on=SLOW if gpus else None)
    return flops / block.processes / speed(block, gpus)


def training_memory(shape: cost.Shape, block: StageConfig, data: DataConfig, gpus: bool) -> float:
    """Bytes of host memory that a stage takes on each of its nodes. With GPUs it holds weights on
    their way: a copy in each process, or if the model is sharded two in the first, at the end."""
    here = block.processes // block.nodes
    if not gpus:
        return here * sum(step_memory(shape, block, *tokens(block, data)).values())
    sharded = block.parallel == "fsdp2" and block.processes > 1
    copies = 2 if sharded else here
    return here * GPU_PROCESS_BYTES + copies * float32_bytes(shape)
