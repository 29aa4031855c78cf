"""What the jobs of a cluster ask its scheduler for: host memory and time, from the estimate.

    python -m sts requests --configs results/paper/configs/*.yaml --out results/paper/requests.json

Both are limits at which the scheduler ends a job, so they are generous. The workflow asks for twice
as much at the second attempt, where a training goes on from its last checkpoint.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from sts.pipeline.cost.machines import CORES_BANDWIDTH, GPUS, SHARE
from sts.pipeline.files import write_json_atomic
from sts.pipeline.measure.stage_cost import StageCost, stage_costs, timing_memory
from sts.pipeline.plan import Plan

TIME_SLACK, MEMORY_SLACK = 2.0, 1.5
START_MINUTES = 15  # imports and weights from a busy shared folder
# FLOPs a second. Which GPU a job gets is not known: none of a cluster's is much slower
GPU_FLOPS, GPU_BANDWIDTH = SHARE * GPUS["a100"].flops, SHARE * GPUS["a100-40"].bandwidth
CORE_FLOPS = 5e9  # of a thread of a slow processor
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
    by_job, costs = {}, {}
    for id, config in plan.configs.items():
        stages = stage_costs(config, gpus)
        try:
            for stage, cost in stages.items():
                seconds = cost.flops / cost.block.processes / speed(cost)
                by_job[f"train/{id}/{stage}"] = limits(training_memory(cost), seconds)
        except ValueError as error:
            log.warning("Jobs ask for memory and time that no estimate says. %s", error)
            continue
        *_, last = stages.values()
        seconds = last.evaluation_seconds(speed(last), GPU_BANDWIDTH if gpus else CORES_BANDWIDTH)
        by_job[f"evaluate/{id}"] = limits(asking_memory(last), seconds)
        costs[id] = [*stages.values()]
    for table in plan.tables:
        if all(id in costs for id in plan.members(table)):
            timed = [cost for id in plan.members(table) for cost in costs[id]]
            memory = max(training_memory(cost, parts) for cost, parts in timing_memory(timed))
            seconds = sum(cost.timing_flops / cost.block.processes / speed(cost) for cost in timed)
            by_job[f"timing/{table}"] = limits(memory, seconds)
    write_json_atomic(out, by_job)
    return by_job


def limits(memory: float, seconds: float) -> dict[str, int]:
    """A request, from estimated bytes and seconds."""
    minutes = START_MINUTES + TIME_SLACK * seconds / 60
    return {"mem_mb": math.ceil(MEMORY_SLACK * memory / 1e6), "runtime": math.ceil(minutes)}


def speed(cost: StageCost) -> float:
    """FLOPs a second of one process of a stage on a slow machine."""
    return GPU_FLOPS if cost.on_gpu else CORE_FLOPS * cost.block.threads


def asking_memory(cost: StageCost) -> float:
    """Bytes of host memory that an evaluation takes. With GPUs each process holds the weights on
    their way."""
    parts = cost.evaluation_memory
    of_process = GPU_PROCESS_BYTES + parts["weights"] if cost.on_gpu else sum(parts.values())
    return cost.config.evaluate.processes * (of_process + HARNESS_BYTES)


def training_memory(cost: StageCost, parts: Mapping[str, float] | None = None) -> float:
    """Bytes of host memory that a stage takes on each of its nodes. With GPUs it holds weights on
    their way: a copy in each process, or if the model is sharded two in the first, at the end.

    parts: Of a process; by default those of the stage alone.
    """
    block = cost.block
    processes = block.processes // block.nodes
    if not cost.on_gpu:
        return processes * sum((parts or cost.memory).values())
    is_sharded = block.parallel == "fsdp2" and block.processes > 1
    copies = 2 if is_sharded else processes
    return processes * GPU_PROCESS_BYTES + copies * cost.weight_bytes
