"""What the jobs of a cluster ask its scheduler for: host memory and time, from the estimate.

    python -m sts requests --configs results/paper/configs/*.yaml --out results/paper/requests.json

Both are limits at which the scheduler ends a job, so they are generous. The workflow asks for twice
as much at the second attempt, where a training goes on from its last checkpoint.
"""

import logging
import math
from pathlib import Path

from sts.pipeline.config import StageConfig
from sts.pipeline.cost.machines import SHARE, Machine
from sts.pipeline.cost.memory import PROCESS_BYTES
from sts.pipeline.files import write_json_atomic
from sts.pipeline.measure.speed import evaluation_seconds
from sts.pipeline.measure.stage_cost import StageCost
from sts.pipeline.plan import Plan

TIME_SLACK, MEMORY_SLACK = 2.0, 1.5
START_MINUTES = 15  # imports and weights from a busy shared folder
SLOW = Machine("a100", 1)  # which GPU a job gets is not known: none of a cluster's is much slower
CORE_FLOPS = 5e9  # a second, of a thread of a slow processor
GPU_PROCESS_BYTES = 6e9  # host memory of a process with CUDA and four that load its data
HARNESS_BYTES = 2e9  # lm-eval and the questions of a benchmark

log = logging.getLogger(__name__)


def requests(plan: Plan, gpus: bool, out: str | Path) -> dict[str, dict[str, int]]:
    """Write and return what jobs ask for on a cluster; memory is that of one node.

    What starts from a model whose sizes are not known here is left out, with a warning.

    Args:
        plan: Of all tables.
        gpus: Whether the cluster has GPUs.
        out: The file.

    Returns:
        Job -> {`mem_mb`, `runtime` in minutes}: `train/<id>/<stage>` and `evaluate/<id>` of every
        ablation, `timing/<table>` of every table.
    """
    wanted = {}
    costs = {id: stage_costs(plan, id, gpus) for id in plan.configs}
    for id, stages in costs.items():
        if not stages:
            continue
        for stage, cost in stages.items():
            memory = training_memory(cost)
            wanted[f"train/{id}/{stage}"] = limits(memory, training_seconds(cost))
        *_, last = stages.values()
        memory = (GPU_PROCESS_BYTES if gpus else PROCESS_BYTES) + last.weight_bytes + HARNESS_BYTES
        seconds = evaluation_seconds(last, speed(last.block, gpus))
        wanted[f"evaluate/{id}"] = limits(memory, seconds)
    for table in plan.tables:
        members = [costs[id] for id in plan.members(table)]
        if all(members):
            timed = [cost for stages in members for cost in stages.values()]
            memory = 2 * max(training_memory(cost.alone) for cost in timed)  # two models are held
            seconds = sum(
                cost.timing_share * cost.flops / speed(cost.block, gpus) for cost in timed
            )
            wanted[f"timing/{table}"] = limits(memory, seconds)
    write_json_atomic(out, wanted)
    return wanted


def stage_costs(plan: Plan, id: str, gpus: bool) -> dict[str, StageCost]:
    """Stage -> its cost; empty, with a warning, where the model's sizes are not known here."""
    config = plan.configs[id]
    costs = {stage: StageCost(config, stage, on_gpu=gpus) for stage in config.stages}
    try:
        for cost in costs.values():
            cost.counts  # noqa: B018
    except ValueError as error:
        log.warning("Jobs ask for memory and time that no estimate says. %s", error)
        return {}
    return costs


def limits(memory: float, seconds: float) -> dict[str, int]:
    """A request, from estimated bytes and seconds."""
    minutes = START_MINUTES + TIME_SLACK * seconds / 60
    return {"mem_mb": math.ceil(MEMORY_SLACK * memory / 1e6), "runtime": math.ceil(minutes)}


def speed(block: StageConfig, gpus: bool) -> float:
    """FLOPs a second of one process of a stage on a slow machine."""
    return SHARE * SLOW.gpu.flops if gpus else CORE_FLOPS * block.threads


def training_seconds(cost: StageCost) -> float:
    """Seconds that a stage takes."""
    return cost.flops / cost.block.processes / speed(cost.block, cost.on_gpu)


def training_memory(cost: StageCost) -> float:
    """Bytes of host memory that a stage takes on each of its nodes. With GPUs it holds weights on
    their way: a copy in each process, or if the model is sharded two in the first, at the end."""
    block = cost.block
    processes = block.processes // block.nodes
    if not cost.on_gpu:
        return processes * sum(cost.memory.values())
    is_sharded = block.parallel == "fsdp2" and block.processes > 1
    copies = 2 if is_sharded else processes
    return processes * GPU_PROCESS_BYTES + copies * cost.weight_bytes
