"""How long the variants of a training take, measured side by side on a machine of their own.

    python -m sts bench --configs results/mini/configs/{dense,vtc,lds,sts}.yaml \
        --init results/mini/backbone/dense.json --data data/mini/scenes/manifest.json \
        --out results/mini/bench/main.json

Trainings that ran next to each other say little about time. Here single steps of every variant are
taken in turn, on the same batch, at the same points of the stage, as the training takes them: by as
many processes, in shards. A call times the stages that have as many processes as it was started
with; of several calls the next one adds to the result.
"""

import gc
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch.utils.benchmark import timer

from sts.checks import expect
from sts.pipeline.config import REPEATS, Config, StageConfig
from sts.pipeline.cost.history import measure, step_row
from sts.pipeline.cost.memory import held, step_memory
from sts.pipeline.data.collator import collate
from sts.pipeline.files import read_json, write_json_atomic
from sts.pipeline.measure.parts import PARTS, Laps, laps_of
from sts.pipeline.measure.timing import in_turn, measured_on, typical_steps, what_is_held
from sts.pipeline.run.device import lease
from sts.pipeline.train.feed import Shown, my_pieces
from sts.pipeline.train.job import Job
from sts.pipeline.train.parallel import rank, wait, world
from sts.pipeline.train.step import optimizer_step, put_scheme
from sts.pipeline.train.subset import load_data
from sts.pipeline.train.train import Training, set_up
from sts.scheme import Scheme, unsparsify

SEED = 0  # of data order, projector and layer draws


def bench(
    configs: Mapping[str, Config], data: Sequence[Path], inits: Mapping[str, Path], out: Path
) -> dict[str, Any]:
    """Time optimizer steps of every variant at points of its stages; write and return the result.

    A stage's time is its number of steps times the mean over the points of a step's median seconds;
    its FLOPs come from the very steps that were timed. Stages of one name and one model are timed
    side by side. A measured depth has measured nothing yet and so draws uniformly at its rate.
    Of several processes the clock of the first counts, which writes.

    Args:
        configs: Variant -> its configuration.
        data: Manifests of prepared data sets.
        inits: Variant -> its backbone manifest.
        out: File to write.

    Raises:
        ValueError: The variants don't agree on `bench`, data of a stage are missing, or no stage
            has as many processes as there are here.
    """
    plan, *others = (config.bench for config in configs.values())
    if any(other != plan for other in others):
        raise ValueError(f"bench: points and warmup must be the same in {', '.join(configs)}")
    here = int(os.environ.get("WORLD_SIZE", "1"))
    numbers = {block.processes for config in configs.values() for block in config.stages.values()}
    accepted = f"{' or '.join(map(str, sorted(numbers)))}: torchrun --nproc-per-node N -m sts bench"
    expect(here in numbers, "processes", here, accepted)
    before = read_json(out)["variants"] if numbers != {here} and out.exists() else {}
    jobs: dict[tuple[str, Path], dict[str, Job]] = defaultdict(dict)  # (stage, model) -> variants'
    for variant, config in configs.items():
        for stage, block in config.stages.items():
            if block.processes != here:
                continue
            init, sets = inits[variant], of_stage(data, config.stage(stage))
            manifest = out.parents[1] / f"runs/{variant}/seed{SEED}/{stage}.json"
            job = Job(config, variant, SEED, stage, sets, init, manifest)
            jobs[stage, init][variant] = job
    timed: dict[str, dict[str, Any]] = {variant: {} for variant in configs}
    with lease():
        for (stage, _), group in jobs.items():
            for variant, times in time_stage(group).items():
                timed[variant][stage] = times
            gc.collect()  # else the models of this stage are held beside those of the next
        about = measured_on()
    variants = {
        variant: _of_variant(config, timed[variant], before.get(variant, {}))
        for variant, config in configs.items()
    }
    result = {**about, "warmup": plan.warmup, "repeats": REPEATS, "variants": variants}
    if rank() == 0:
        write_json_atomic(out, result)
    return result


def _of_variant(
    config: Config, timed: Mapping[str, Any], before: Mapping[str, Any]
) -> dict[str, Any]:
    """What the result says of a variant: its stages in their order, those of a call before too."""
    flops = {stage: times.pop("flops") for stage, times in timed.items()}
    known = {**before, **timed}
    stages = {stage: known[stage] for stage in config.stages if stage in known}
    time_s = sum(times["stage_s"] for times in stages.values())
    return {**stages, "time_s": time_s, "flops": before.get("flops", {}) | flops}


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
        all)}; parts_s: the seconds of each part of a step (parts.py), of one more round at each
        point, which counts for nothing else.
    """
    variants = load_variants(jobs)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world()))  # nothing else runs
    first, *_ = jobs.values()
    plan = first.config.bench
    steps = {name: variant.typical_steps(plan.points) for name, variant in variants.items()}
    taken = in_turn(
        f"bench {first.stage}", list(jobs), plan.points, plan.warmup, REPEATS,
        lambda name, point, _: variants[name].take(steps[name][point], point),
    )  # fmt: skip
    parts = in_turn(
        f"parts {first.stage}", list(jobs), plan.points, 0, 1,
        lambda name, point, _: variants[name].take_parts(steps[name][point], point),
    )  # fmt: skip
    timed = {}
    for name, job in jobs.items():
        step_s = [median(seconds for _, (seconds, _) in rounds) for rounds in taken[name]]
        rows = [row for (_, (_, row)), *_ in taken[name]]  # the other rounds did the same
        timed[name] = {
            "step": steps[name],
            "step_s": step_s,
            "parts_s": {part: [of[part] for ((_, of),) in parts[name]] for part in PARTS},
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
    training: Training

    def scheme(self) -> Scheme:
        """VTC and LDS on the model, for the body of a `with`."""
        training, seed = self.training, self.job.seed_of("scheme")
        return put_scheme(training.plain, self.job.block, len(training.samples), seed)

    def typical_steps(self, points: int) -> list[int]:
        """Steps that stand for the whole stage."""
        with self.scheme() as scheme:
            return typical_steps(scheme, self.job.block.steps, points)

    def take_parts(self, step: int, batch: int) -> dict[str, float]:
        """Take the same step: seconds of each of its parts. On a GPU `input`, which is loaded
        while it works, takes no time of the step."""
        with laps_of(self.training) as laps:
            self.take(step, batch, laps)
        return laps.seconds

    def take(self, step: int, batch: int, laps: Laps | None = None) -> tuple[float, dict[str, Any]]:
        """Take an optimizer step on batch number `batch`: (seconds, its row of a history)."""
        block, training = self.job.block, self.training
        accelerator, indices = training.accelerator, training.order(batch)
        images, samples = training.samples.has_image, Shown(training.samples)
        pieces = my_pieces(indices, block.gradient_accumulation_steps, accelerator, images)
        with self.scheme() as scheme:
            scheme.begin_step(step)
            wait()
            if laps:
                laps.start()
            began = timer()
            loaded = [[samples[i] for i in piece] for piece in pieces]
            batches = [
                collate(training.processor, piece).to(accelerator.device) for piece in loaded
            ]
            if accelerator.device.type == "cuda":
                wait()  # other processes load while the GPU works: it takes no time
                began = timer()
            *_, sums = optimizer_step(
                accelerator, training.model, training.optimizer, batches, block, 0.0, scheme,
                partial(measure, scheme, training.meter, block, batches),
            )  # fmt: skip
            seconds = timer() - began
            if laps:
                laps.end("optimizer")
            return seconds, step_row(scheme, [images[i] for i in indices], sums)


def load_variants(jobs: Mapping[str, Job]) -> dict[str, Variant]:
    """The variants of a stage, with one model for all that can share it."""
    trainings: dict[tuple, Training] = {}
    variants, others = {}, 0.0
    for name, job in jobs.items():
        model = what_is_held(job.block)
        if training := trainings.get(model):
            samples, order = load_data(job, training.processor)
            variants[name] = Variant(job, replace(training, samples=samples, order=order))
            continue
        trainings[model] = set_up(job, others)
        unsparsify(trainings[model].plain)
        variants[name] = Variant(job, trainings[model])
        others += held(step_memory(trainings[model].meter.counts, job.block, 0.0, 0.0))
    return variants
