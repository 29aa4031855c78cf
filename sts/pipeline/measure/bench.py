"""How long the variants of a training take, measured side by side on a machine of their own.

    python -m sts bench --configs results/mini/configs/{dense,vtc,lds,sts}.yaml \
        --init results/mini/backbone/dense.json --data data/mini/scenes/manifest.json \
        --out results/mini/bench/main.json

Trainings that ran next to each other say little about time. Here one process with all cores takes
single steps of every variant in turn, on the same batch, at the same points of the stage.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.benchmark import timer
from transformers import PreTrainedModel

from sts.pipeline.config import REPEATS, Config, StageConfig
from sts.pipeline.cost.history import Meter, measure
from sts.pipeline.data.collator import Conversations, collate, example
from sts.pipeline.files import read_json, write_json_atomic
from sts.pipeline.measure.timing import in_turn, measured_on, typical_steps
from sts.pipeline.run.device import lease
from sts.pipeline.train.feed import load_data, my_pieces
from sts.pipeline.train.job import Job
from sts.pipeline.train.lora import train_parts
from sts.pipeline.train.model import build
from sts.pipeline.train.step import make_optimizer, optimizer_step, prepare_process, put_scheme
from sts.scheme import Scheme

SEED = 0  # of data order, projector and layer draws


def bench(
    configs: Mapping[str, Config], data: Sequence[Path], inits: Mapping[str, Path], out: Path
) -> dict[str, Any]:
    """Time optimizer steps of every variant at points of its stages; write and return the result.

    A stage's time is its number of steps times the mean over the points of a step's median seconds;
    its FLOPs come from the very steps that were timed. Stages of one name and one model are timed
    side by side. A measured depth has measured nothing yet and so draws uniformly at its rate.

    Args:
        configs: Variant -> its configuration.
        data: Manifests of prepared data sets.
        inits: Variant -> its backbone manifest.
        out: File to write.

    Raises:
        ValueError: The variants don't agree on `bench`, or data of a stage are missing.
    """
    plan, *others = (config.bench for config in configs.values())
    if any(other != plan for other in others):
        raise ValueError(f"bench: points and warmup must be the same in {', '.join(configs)}")
    jobs: dict[tuple[str, Path], dict[str, Job]] = defaultdict(dict)  # (stage, model) -> variants'
    for variant, config in configs.items():
        for stage in config.stages:
            init, sets = inits[variant], of_stage(data, config.stage(stage))
            manifest = out.parents[1] / f"runs/{variant}/seed{SEED}/{stage}.json"
            job = Job(config, variant, SEED, stage, sets, init, manifest)
            jobs[stage, init][variant] = job
    with lease():
        timed = {key: time_stage(group) for key, group in jobs.items()}
        about = measured_on()
    variants = {}
    for variant, config in configs.items():
        stages = {stage: timed[stage, inits[variant]][variant] for stage in config.stages}
        time_s = sum(times["stage_s"] for times in stages.values())
        flops = {stage: times.pop("flops") for stage, times in stages.items()}
        variants[variant] = {**stages, "time_s": time_s, "flops": flops}
    result = {**about, "warmup": plan.warmup, "repeats": REPEATS, "variants": variants}
    write_json_atomic(out, result)
    return result


def of_stage(data: Sequence[Path], block: StageConfig) -> list[Path]:
    """The manifests of the data sets that a stage trains on, in its order."""
    files = {read_json(file)["dataset"]: file for file in data}
    missing = [name for name in block.data if name not in files]
    if missing:
        raise ValueError(f"data: no manifest of {', '.join(missing)} among {', '.join(files)}")
    return [files[name] for name in block.data]


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
    steps = {name: variant.typical_steps(plan.points) for name, variant in variants.items()}
    taken = in_turn(
        f"bench {first.stage}", list(jobs), plan.points, plan.warmup, REPEATS,
        lambda name, point, _: variants[name].take(steps[name][point], point),
    )  # fmt: skip
    timed = {}
    for name, job in jobs.items():
        step_s = [median(seconds for _, (seconds, _) in rounds) for rounds in taken[name]]
        rows = [row for (_, (_, row)), *_ in taken[name]]  # the other rounds did the same
        timed[name] = {
            "step": steps[name],
            "step_s": step_s,
            "order": [[place for place, _ in rounds] for rounds in taken[name]],
            **{key: [row[key] for row in rows] for key in ("layers_run", "visual_tokens")},
            "steps": job.block.steps,
            "stage_s": job.block.steps * fmean(step_s),
            "flops": job.block.steps * fmean(row["flops"] for row in rows),
        }
    return timed


@dataclass(frozen=True)
class Variant:
    """A training of which single steps are taken, at learning rate 0: every step starts from equal
    weights, so variants that train the same parts share model and optimizer."""

    job: Job
    accelerator: Accelerator
    processor: Any
    meter: Meter
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    samples: Conversations
    order: Callable[[int], list[int]]  # step -> samples of its global batch

    def scheme(self) -> Scheme:
        """VTC and LDS on the model, for the body of a `with`."""
        seed = self.job.seed_of("scheme")
        return put_scheme(self.model, self.job.block, len(self.samples), seed)

    def typical_steps(self, points: int) -> list[int]:
        """Steps that stand for the whole stage."""
        with self.scheme() as scheme:
            return typical_steps(scheme, self.job.block.steps, points)

    def take(self, step: int, batch: int) -> tuple[float, dict[str, Any]]:
        """Take an optimizer step on batch number `batch`: (seconds, its row of a history)."""
        block, device = self.job.block, self.accelerator.device
        indices = self.order(batch)[: block.global_batch // block.processes]
        pieces = my_pieces(indices, block.gradient_accumulation_steps, self.accelerator)
        has_image = [self.samples.has_image[i] for i in indices]
        with self.scheme() as scheme:
            scheme.begin_step(step)
            began = timer()
            samples = [[self.samples[i] for i in piece] for piece in pieces]
            batches = [collate(self.processor, piece).to(device) for piece in samples]
            if device.type == "cuda":  # other processes load while the GPU works: it takes no time
                began = timer()
            optimizer_step(
                self.accelerator, self.model, self.optimizer, batches, block, 0.0, scheme
            )
            seconds = timer() - began
            return seconds, measure(scheme, self.meter, block, has_image, batches)


def load_variants(jobs: Mapping[str, Job]) -> dict[str, Variant]:
    """The variants of a stage, with one model for all that train the same parts of it."""
    first, *_ = jobs.values()
    accelerator = prepare_process(first.block.model_copy(update={"processes": 1}))
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # nothing else runs
    by_parts: dict[tuple, Variant] = {}
    variants = {}
    for name, job in jobs.items():
        block = job.block
        parts = (*sorted(block.trains), block.lora.rank if "lora" in block.trains else 0)
        if twin := by_parts.get(parts):
            samples, order = load_data(job, twin.processor)
            variants[name] = replace(twin, job=job, samples=samples, order=order)
            continue
        model, processor = build(job.init, SEED)
        train_parts(model, block, SEED)
        samples, order = load_data(job, processor)
        meter = Meter(
            model, example(samples, processor), partial(train_parts, stage=block, seed=SEED)
        )
        both = accelerator.prepare(model, make_optimizer(model, block))
        by_parts[parts] = Variant(job, accelerator, processor, meter, *both, samples, order)
        variants[name] = by_parts[parts]
    return variants
