"""How long the variants of a training take, measured side by side on a machine of their own.

    python -m sts bench --configs results/mini/configs/{dense,vtc,lds,sts}.yaml \
        --init results/mini/backbone/dense.json --data data/mini/scenes/manifest.json \
        --out results/mini/bench/main.json

Trainings that ran next to each other say little about time. Here one process with all cores takes
single steps of every variant in turn (A B C D, B C D A, ...), on the same batch, at the same points
of the stage, so that whatever else the machine does falls on all alike. What counts is the ratio.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedModel

from sts.pipeline.config import REPEATS, BenchConfig, Config, StageConfig
from sts.pipeline.cost.history import Meter, measure
from sts.pipeline.data.collator import collate, example
from sts.pipeline.files import write_json_atomic
from sts.pipeline.run import provenance
from sts.pipeline.run.bar import bar_of
from sts.pipeline.run.device import lease
from sts.pipeline.train.feed import load_data, my_pieces
from sts.pipeline.train.lora import train_parts
from sts.pipeline.train.model import build
from sts.pipeline.train.step import make_optimizer, optimizer_step, prepare_process
from sts.pipeline.train.train import derived_seed, put_scheme
from sts.scheme import Scheme, unsparsify

SEED = 0  # of data order, projector and layer draws


def bench(
    configs: Mapping[str, Config],
    data: Sequence[str | Path],
    inits: Mapping[str, str | Path],
    out: str | Path,
) -> dict[str, Any]:
    """Time optimizer steps of every variant (id -> configuration) at points of its stages; write
    and return the result. Stages of one name and one model are timed side by side.

    A stage's time is its number of steps times the mean over the points of a step's median seconds;
    its FLOPs come from the very steps that were timed. data: manifests of prepared data sets;
    inits: id -> backbone manifest. A measured depth has measured nothing yet and so draws uniformly
    at its rate. Raises ValueError if the variants don't agree on `bench`.
    """
    first, *others = configs.values()
    if any(other.bench != first.bench for other in others):
        raise ValueError(f"bench: points and warmup must be the same in {', '.join(configs)}")
    variants: dict[str, dict[str, Any]] = {id: {} for id in configs}
    tokens = Path(out).parents[1] / "tokens"
    with lease():
        for stage in dict.fromkeys(name for config in configs.values() for name in config.stages):
            for init in dict.fromkeys(inits.values()):
                blocks = {
                    id: config.stage(stage)
                    for id, config in configs.items()
                    if inits[id] == init and stage in config.stages
                }
                if not blocks:
                    continue
                timed = time_stage(blocks, stage, data, init, first.bench, tokens)
                for id, found in timed.items():
                    variants[id][stage] = found
        facts = provenance.hardware()
    for found in variants.values():
        stages = list(found.items())
        found["time_s"] = sum(timed["stage_s"] for _, timed in stages)
        found["flops"] = {stage: timed.pop("flops") for stage, timed in stages}
    result = {
        "threads": torch.get_num_threads(),
        "device": ", ".join(facts["gpus"]) or f"{facts['cores']} x {facts['cpu']}",
        "warmup": first.bench.warmup,
        "repeats": REPEATS,
        "variants": variants,
        "command": provenance.command_line(),
        "commit": provenance.git()["commit"],
    }
    write_json_atomic(out, result)
    return result


def time_stage(
    blocks: Mapping[str, StageConfig],
    stage: str,
    data: Sequence[str | Path],
    init: str | Path,
    plan: BenchConfig,
    tokens: Path,
) -> dict[str, dict[str, Any]]:
    """id -> {steps, stage_s, flops (of the stage), and at each point step (its number), step_s
    (median seconds), layers_run, visual_tokens, order (places of its timed steps among all)}."""
    first = next(iter(blocks.values()))
    accelerator = prepare_process(first.model_copy(update={"processes": 1}))
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # nothing else runs
    sets = {id: of_stage(data, block) for id, block in blocks.items()}
    what = {id: _trained(block) for id, block in blocks.items()}
    trained = {}  # one model for all that train the same parts, each loaded when first asked for
    for id, block in blocks.items():
        if what[id] not in trained:
            trained[what[id]] = _prepared(block, init, accelerator)
    processor = next(iter(trained.values()))[2]
    seed = derived_seed(SEED, f"{stage}/order")
    feeds = {
        id: load_data(sets[id], block, processor, seed, tokens) for id, block in blocks.items()
    }
    meters: dict[str, Meter] = {}
    for id, block in blocks.items():
        if what[id] not in meters:
            batch = example(feeds[id][0], processor)
            prepare = partial(train_parts, stage=block, seed=SEED)
            meters[what[id]] = Meter(trained[what[id]][0], batch, prepare)
    on_gpu = accelerator.device.type == "cuda"
    chosen = {}
    for id, block in blocks.items():
        model = trained[what[id]][0]
        scheme = put_scheme(model, block, SEED, stage, len(feeds[id][0]))
        chosen[id] = typical_steps(scheme, block.steps, plan.points)
        unsparsify(model)

    def step(id: str, point: int) -> tuple[float, dict[str, Any]]:
        """(seconds, what it did) of one step of a variant on batch number `point`."""
        block, (samples, order) = blocks[id], feeds[id]
        model, optimizer, *_ = trained[what[id]]
        scheme = put_scheme(model, block, SEED, stage, len(samples))
        scheme.begin_step(chosen[id][point])
        own = block.batch_size * block.gradient_accumulation_steps  # of one process
        indices = order(point)[:own]
        pieces = my_pieces(indices, block.gradient_accumulation_steps, accelerator)
        began = time.perf_counter()
        batches = [collate(processor, [samples[i] for i in piece]) for piece in pieces]
        batches = [batch.to(accelerator.device) for batch in batches]
        if on_gpu:  # there other processes load while the GPU works, so loading takes no time
            torch.cuda.synchronize()
            began = time.perf_counter()
        optimizer_step(accelerator, model, optimizer, batches, block, 0.0, scheme)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        has_image = [samples.has_image[i] for i in indices]
        row = measure(scheme, meters[what[id]], block, has_image, batches)
        unsparsify(model)
        return seconds, row

    place = count()
    names = ("step_s", "flops", "layers_run", "visual_tokens", "order")
    found: dict[str, dict[str, list]] = {id: {name: [] for name in names} for id in blocks}
    bar = bar_of(f"bench {stage}", 0, plan.steps * len(blocks))
    for point in range(plan.points):
        timed: dict[str, list] = {id: [] for id in blocks}
        for repeat in range(-plan.warmup, REPEATS):
            for id in rotated(list(blocks), point + repeat):
                seconds, row = step(id, point)
                if repeat >= 0:
                    timed[id].append((seconds, next(place)))
                if repeat == 0:  # the other repeats do the same
                    for name in ("flops", "layers_run", "visual_tokens"):
                        found[id][name].append(row[name])
                bar.update()
        for id, pairs in timed.items():
            found[id]["step_s"].append(median(seconds for seconds, _ in pairs))
            found[id]["order"].append([turn for _, turn in pairs])
    bar.close()
    return {
        id: {
            **lists,
            "step": chosen[id],
            "steps": blocks[id].steps,
            "stage_s": blocks[id].steps * fmean(lists["step_s"]),
            "flops": blocks[id].steps * fmean(lists["flops"]),
        }
        for id, lists in found.items()
    }


def _trained(block: StageConfig) -> str:
    """What of a model is trained, as a key."""
    rank = block.lora.rank if "lora" in block.trains else 0
    return json.dumps([sorted(block.trains), rank])


def _prepared(
    block: StageConfig, init: str | Path, accelerator: Accelerator
) -> tuple[PreTrainedModel, AcceleratedOptimizer, Any]:
    """Model, optimizer and processor. At learning rate 0 every step starts from equal
    weights, so the steps of all variants may share them."""
    model, processor = build(init, SEED)
    train_parts(model, block, SEED)
    model, optimizer = accelerator.prepare(model, make_optimizer(model, block))
    return model, optimizer, processor


def typical_steps(scheme: Scheme, steps: int, points: int) -> list[int]:
    """A step in each of `points` equal parts of a stage, such that together they leave out as much
    as the whole stage does: with layers drawn on their own, the steps in the middle need not.

    In each part the step whose left-out layers are nearest the part's mean; what it is off by is
    made good in the parts that follow.
    """
    skipper = scheme.skipper

    def left_out(step: int) -> float:
        scheme.decide(step)
        decision, unit = skipper.decision, skipper.unit
        drawn = len(decision.off) / len(unit.shares)
        return drawn if unit.drawn_by_step else sum(decision.chances)

    found, owed = [], 0.0
    for point in range(points):
        first, end = point * steps // points, (point + 1) * steps // points
        part = range(first, max(first + 1, end))
        middle = min((first + part[-1] + 1) // 2, steps - 1)
        left = {step: left_out(step) for step in part}
        wanted = fmean(left.values()) + owed
        best = min(part, key=lambda step: (abs(left[step] - wanted), abs(step - middle)))
        owed = wanted - left[best]
        found.append(best)
    return found


def of_stage(data: Sequence[str | Path], block: StageConfig) -> list[Path]:
    """The manifests of the data sets that a stage trains on, in its order."""
    named = {json.loads(Path(file).read_text(encoding="utf-8"))["dataset"]: file for file in data}
    missing = [name for name in block.data if name not in named]
    if missing:
        raise ValueError(f"data: no manifest of {', '.join(missing)} among {', '.join(named)}")
    return [Path(named[name]) for name in block.data]


def rotated(items: list, by: int) -> list:
    """The items from position `by` on, then those before it: [A, B, C] by 1 is [B, C, A]."""
    by %= len(items)
    return items[by:] + items[:by]
