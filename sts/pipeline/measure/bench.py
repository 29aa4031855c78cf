"""How long the variants of a training take, measured side by side on a machine of their own.

    python -m sts bench --configs results/mini/configs/{dense,vtc,lds,sts}.yaml \
        --init results/mini/backbone/dense.json --data data/mini/scenes/manifest.json \
        --out results/mini/bench/main.json

Trainings that ran next to each other say little about time. Here one process with all cores takes
single steps of every variant in turn (A B C D, B C D A, ...), on the same batch, at the same points
of the stage, so that whatever else the machine does falls on all alike. What counts is the ratio.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from sts.pipeline.config import REPEATS, Config, StageConfig
from sts.pipeline.cost.history import Meter, measure
from sts.pipeline.data.collator import Conversations, collate, example
from sts.pipeline.files import read_json, write_json_atomic
from sts.pipeline.run import provenance
from sts.pipeline.run.device import lease
from sts.pipeline.run.progress import bar_of
from sts.pipeline.train.feed import load_data, my_pieces
from sts.pipeline.train.job import Job
from sts.pipeline.train.lora import train_parts
from sts.pipeline.train.model import build
from sts.pipeline.train.step import make_optimizer, optimizer_step, prepare_process, put_scheme
from sts.scheme import Scheme, unsparsify

SEED = 0  # of data order, projector and layer draws


def bench(
    configs: Mapping[str, Config],
    data: Sequence[Path],
    inits: Mapping[str, Path],
    out: Path,
) -> dict[str, Any]:
    """Time optimizer steps of every variant at points of its stages.

    A stage's time is its number of steps times the mean over the points of a step's median seconds;
    its FLOPs come from the very steps that were timed. Stages of one name and one model are timed
    side by side. A measured depth has measured nothing yet and so draws uniformly at its rate.

    Args:
        configs: Variant -> its configuration.
        data: Manifests of prepared data sets.
        inits: Variant -> its backbone manifest.
        out: File to write.

    Returns:
        The result, as it is written.

    Raises:
        ValueError: The variants don't agree on `bench`, or data of a stage are missing.
    """
    first, *others = configs.values()
    if any(other.bench != first.bench for other in others):
        raise ValueError(f"bench: points and warmup must be the same in {', '.join(configs)}")
    variants: dict[str, dict[str, Any]] = {variant: {} for variant in configs}
    with lease():
        for stage in dict.fromkeys(name for config in configs.values() for name in config.stages):
            for init in dict.fromkeys(inits.values()):
                jobs = {
                    variant: job_of(variant, config, stage, data, init, out)
                    for variant, config in configs.items()
                    if inits[variant] == init and stage in config.stages
                }
                for variant, timed in time_stage(jobs).items() if jobs else ():
                    variants[variant][stage] = timed
        facts = provenance.hardware()
    for stages in variants.values():
        time_s = sum(timed["stage_s"] for timed in stages.values())
        flops = {stage: timed.pop("flops") for stage, timed in stages.items()}
        stages |= {"time_s": time_s, "flops": flops}
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


def job_of(
    variant: str, config: Config, stage: str, data: Sequence[Path], init: Path, out: Path
) -> Job:
    """The training whose steps are timed, beside the result `out`; of `data` it takes its own."""
    manifest = out.parents[1] / "runs" / variant / f"seed{SEED}" / f"{stage}.json"
    sets = of_stage(data, config.stage(stage))
    return Job(config, variant, SEED, stage, sets, init, manifest)


def of_stage(data: Sequence[Path], block: StageConfig) -> list[Path]:
    """The manifests of the data sets that a stage trains on, in its order."""
    named = {read_json(file)["dataset"]: file for file in data}
    missing = [name for name in block.data if name not in named]
    if missing:
        raise ValueError(f"data: no manifest of {', '.join(missing)} among {', '.join(named)}")
    return [named[name] for name in block.data]


# ---- one stage --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A training of which single steps are taken, at learning rate 0: every step starts from equal
    weights, so variants that train the same parts share model and optimizer.

    Attributes:
        model: On its device, with what is trained.
        order: Step -> indices of the samples of its global batch.
    """

    job: Job
    accelerator: Accelerator
    processor: Any
    meter: Meter
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    samples: Conversations
    order: Callable[[int], list[int]]

    def put_scheme(self) -> Scheme:
        """VTC and LDS on the model."""
        seed = self.job.seed_of("scheme")
        return put_scheme(self.model, self.job.block, len(self.samples), seed)

    def typical_steps(self, points: int) -> list[int]:
        """Steps that stand for the whole stage."""
        steps = typical_steps(self.put_scheme(), self.job.block.steps, points)
        unsparsify(self.model)
        return steps

    def take(self, step: int, batch: int) -> tuple[float, dict[str, Any]]:
        """Take an optimizer step on batch number `batch`: (seconds, its row of a history)."""
        block, device = self.job.block, self.accelerator.device
        scheme = self.put_scheme()
        scheme.begin_step(step)
        indices = self.order(batch)[: block.global_batch // block.processes]
        pieces = my_pieces(indices, block.gradient_accumulation_steps, self.accelerator)
        began = now(device)
        samples = [[self.samples[i] for i in piece] for piece in pieces]
        batches = [collate(self.processor, piece).to(device) for piece in samples]
        if device.type == "cuda":  # other processes load while the GPU works: it takes no time
            began = now(device)
        optimizer_step(self.accelerator, self.model, self.optimizer, batches, block, 0.0, scheme)
        seconds = now(device) - began
        has_image = [self.samples.has_image[i] for i in indices]
        row = measure(scheme, self.meter, block, has_image, batches)
        unsparsify(self.model)
        return seconds, row


def time_stage(jobs: Mapping[str, Job]) -> dict[str, dict[str, Any]]:
    """Time the steps of a stage's variants, which all start from one model.

    Returns:
        Variant -> {steps, stage_s, flops (of the stage), and at each point step (its number),
        step_s (median seconds), layers_run, visual_tokens, order (places of its timed steps among
        all)}.
    """
    variants = load_variants(jobs)
    first, *_ = jobs.values()
    plan = first.config.bench
    steps = {id: variant.typical_steps(plan.points) for id, variant in variants.items()}
    taken: dict[tuple[str, int], list] = defaultdict(list)
    place = count()
    bar = bar_of(f"bench {first.stage}", 0, plan.steps * len(jobs))
    for id, point, repeat in in_turn(list(jobs), plan.points, plan.warmup, REPEATS):
        seconds, row = variants[id].take(steps[id][point], point)
        if repeat >= 0:
            taken[id, point].append((seconds, next(place), row))
        bar.update()
    bar.close()
    timed = {}
    for id, job in jobs.items():
        points = [list(zip(*taken[id, point], strict=True)) for point in range(plan.points)]
        step_s = [median(seconds) for seconds, _, _ in points]
        rows = [row for _, _, (row, *_) in points]  # the other repeats did the same
        timed[id] = {
            "step": steps[id],
            "step_s": step_s,
            "order": [list(places) for _, places, _ in points],
            **{name: [row[name] for row in rows] for name in ("layers_run", "visual_tokens")},
            "steps": job.block.steps,
            "stage_s": job.block.steps * fmean(step_s),
            "flops": job.block.steps * fmean(row["flops"] for row in rows),
        }
    return timed


def load_variants(jobs: Mapping[str, Job]) -> dict[str, Variant]:
    """The variants of a stage, with one model for all that train the same parts of it."""
    first, *_ = jobs.values()
    accelerator = prepare_process(first.block.model_copy(update={"processes": 1}))
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # nothing else runs
    models: dict[tuple, tuple] = {}  # by what is trained
    shared: dict[tuple, tuple] = {}
    variants = {}
    for id, job in jobs.items():
        block = job.block
        parts = (*sorted(block.trains), block.lora.rank if "lora" in block.trains else 0)
        if parts not in models:
            models[parts] = build(job.init, SEED)
            train_parts(models[parts][0], block, SEED)
        model, processor = models[parts]
        samples, order = load_data(job, processor)
        if parts not in shared:
            batch = example(samples, processor)
            meter = Meter(model, batch, partial(train_parts, stage=block, seed=SEED))
            both = accelerator.prepare(model, make_optimizer(model, block))
            shared[parts] = (processor, meter, *both)
        variants[id] = Variant(job, accelerator, *shared[parts], samples, order)
    return variants


# ---- in turn ----------------------------------------------------------------------------------


def in_turn(
    variants: Sequence[str], points: int, warmup: int, repeats: int
) -> Iterator[tuple[str, int, int]]:
    """(variant, point, repeat) of the steps to take, each round beginning with another variant.
    Rounds that don't count have numbers below 0."""
    for point in range(points):
        for repeat in range(-warmup, repeats):
            by = (point + repeat) % len(variants)
            for variant in (*variants[by:], *variants[:by]):
                yield variant, point, repeat


def now(device: torch.device) -> float:
    """Seconds of a clock, once a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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

    chosen, owed = [], 0.0
    for point in range(points):
        first, end = point * steps // points, (point + 1) * steps // points
        part = range(first, max(first + 1, end))
        middle = min((first + part[-1] + 1) // 2, steps - 1)
        left = {step: left_out(step) for step in part}
        wanted = fmean(left.values()) + owed
        best = min(part, key=lambda step: (abs(left[step] - wanted), abs(step - middle)))
        owed = wanted - left[best]
        chosen.append(best)
    return chosen
