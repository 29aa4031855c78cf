"""One stage of one run, from weights to weights: the whole story of a training in one file.

    python -m sts train --config results/mini/configs/sts.yaml --ablation sts --seed 0 \
        --stage align --data data/mini/scenes/manifest.json \
        --init results/mini/backbone/dense.json --out results/mini/runs/sts/seed0/align.json

`out` is a small deterministic manifest. The bytes lie in `weights/<key>`, where the key is a hash
of everything that the weights depend on: what is finished is reused by any run that asks for the
same, and what was interrupted goes on from its last checkpoint to the same weights, bit for bit.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from sts.pipeline.config import config_hash
from sts.pipeline.cost.history import (
    Meter,
    device_peak,
    measure,
    open_history,
    peak_memory_mb,
    step_row,
    summary,
    tracked_rows,
)
from sts.pipeline.cost.memory import check_memory
from sts.pipeline.data.collator import Conversations, example
from sts.pipeline.files import SpoiltError, read_json, write_json_atomic
from sts.pipeline.run import tracking
from sts.pipeline.run.device import lease
from sts.pipeline.run.progress import bar_of
from sts.pipeline.run.weights import DONE, check_weights, weights_of
from sts.pipeline.train.checkpoint import (
    finish,
    forget_states,
    load_state,
    locked,
    save_state,
    sigterm_put_off,
)
from sts.pipeline.train.chunked_loss import chunk_loss
from sts.pipeline.train.feed import feed, longest_batch
from sts.pipeline.train.held_out import held_out
from sts.pipeline.train.job import Job, derived_seed
from sts.pipeline.train.lora import train_parts
from sts.pipeline.train.masters import has_masters, keep_masters, with_masters
from sts.pipeline.train.model import build, load_whole
from sts.pipeline.train.parallel import (
    anywhere,
    gathered,
    is_sharded,
    load_shared,
    of_first,
    rank,
    shard,
)
from sts.pipeline.train.step import (
    check_finite,
    lr_factor,
    make_optimizer,
    optimizer_step,
    peak_lr,
    prepare_process,
    put_scheme,
)
from sts.pipeline.train.subset import load_data
from sts.scheme import Scheme, unsparsify

CHECKPOINT_SECONDS = 600  # a slow training is checkpointed this often whatever `checkpoint_every`

log = logging.getLogger(__name__)


def train(job: Job) -> dict[str, Any]:
    """Train a stage, or reuse its finished weights.

    Returns:
        The manifest, as it is written to `job.out`.

    Raises:
        FloatingPointError: Loss or gradient is not finite.
        MemoryError: Weights and optimizer can't fit.
        OSError: A checkpoint can't be written; the one before is kept.
        SystemExit: With status 143, after SIGTERM and a last checkpoint.
    """
    if job.block.processes > 1:  # which have their GPUs, and now can talk
        prepare_process(job.block)
    with locked(job.folder):
        is_finished = of_first(rank() == 0 and are_finished(job.folder))
        with (
            contextlib.nullcontext() if is_finished else lease(),
            tracking.run(
                job.name,
                params=job.block.model_dump(),
                tags=_tags(job, is_finished),
                directory=job.out.with_suffix("") / job.key,  # another key is another run
                rows=lambda: tracked_rows(job.folder),
            ) as tracked,
            sigterm_put_off() as has_sigterm,
        ):
            if is_finished:
                log.info("%s: %s is finished: reused", job.stage, job.folder)
                forget_states(job.folder)
            else:
                fit(job, tracked.send, has_sigterm)
    manifest = {
        "ablation": job.ablation,
        "stage": job.stage,
        "seed": job.seed,
        "key": job.key,
        "precision": job.precision,
        "weights": str(job.folder),
        **summary(job.folder),
    }
    if rank() == 0:
        write_json_atomic(job.out, manifest)
    return manifest


def are_finished(folder: Path) -> bool:
    """Whether a folder has finished weights, as they were written; spoilt ones count as none."""
    if not (folder / DONE).exists():
        return False
    try:
        check_weights(folder, "The stage is trained again")
    except SpoiltError as error:
        log.warning("%s", error)
        (folder / DONE).unlink()
        return False
    return True


def _tags(job: Job, is_finished: bool) -> dict[str, Any]:
    """What the tracked run says of the job."""
    sets = map(read_json, job.data)
    return {
        "ablation": job.ablation,
        "seed": job.seed,
        "stage": job.stage,
        "key": job.key,
        "config": config_hash(job.config),
        "data": ", ".join(f"{m['dataset']} {m['version']} {m['sha256'][:8]}" for m in sets),
        "reused": is_finished,
    }


@dataclass(frozen=True)
class Training:
    """What takes the steps of a job, on one process.

    Attributes:
        plain: The model as transformers knows it.
        model: The same as the processes share it.
        order: Step -> indices of the samples of its global batch.
    """

    accelerator: Accelerator
    processor: Any
    samples: Conversations
    order: Callable[[int], list[int]]
    meter: Meter
    plain: PreTrainedModel
    adapters: Any
    scheme: Scheme
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step_row(self, step: int, sums: Sequence[float]) -> dict[str, Any]:
        """What a step did, from the counts of all processes added up (`step_row`)."""
        has_image = [self.samples.has_image[index] for index in self.order(step)]
        return step_row(self.scheme, has_image, sums)


def fit(job: Job, send: Callable[[], None], has_sigterm: Callable[[], bool]) -> None:
    """Train to the finished folder of a job, from its last checkpoint if there is one.

    Args:
        job: The stage.
        send: Is called after a checkpoint.
        has_sigterm: Whether SIGTERM has come to this process. Then a checkpoint is written after
            the step that is being taken.
    """
    if job.precision != job.block.precision:
        log.warning(
            "%s.precision: %s is slow on this processor: %s instead; scores differ in the last "
            "digits from those of a processor that has it",
            job.stage, job.block.precision, job.precision,
        )  # fmt: skip
    training = set_up(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    first = load_state(job.folder, training.plain, training.optimizer, training.scheme)
    measure_held_out = held_out(
        job, training.plain, training.processor, training.accelerator, first
    )
    with open_history(job.folder, first) if rank() == 0 else contextlib.nullcontext() as history:
        take_steps(job, training, first, history, send, has_sigterm, measure_held_out)
    unsparsify(training.plain)
    write_weights(job, training)


def set_up(job: Job, others: float = 0.0) -> Training:
    """The model at the start of a stage, with its scheme and optimizer, and its data; others: bytes
    of what else this process holds."""
    block = job.block
    accelerator = prepare_process(block)
    plain, processor = load_shared(block, lambda: load(job))
    adapters = train_parts(plain, block, job.seed_of("lora"))
    samples, order = load_data(job, processor)
    meter = Meter(plain, example(samples, processor), partial(train_parts, stage=block, seed=0))
    longest = longest_batch(samples, block.batch_size, meter.counts.visual_tokens)
    check_memory(meter.counts, job.stage, block, *longest, others)
    if block.cross_entropy == "chunked":
        chunk_loss(plain)
    scheme = put_scheme(plain, block, len(samples), job.seed_of("scheme"))
    torch.manual_seed(job.seed_of("dropout"))  # nothing else draws from it
    if is_sharded(block):
        shard(plain, accelerator.device, job.precision == "bf16")
    if has_masters(block):
        keep_masters(plain, accelerator.device)
    model = plain if is_sharded(block) else accelerator.prepare(plain)
    optimizer = accelerator.prepare(make_optimizer(plain, block))
    return Training(
        accelerator, processor, samples, order, meter, plain, adapters, scheme, model, optimizer
    )


def load(job: Job) -> tuple[PreTrainedModel, Any]:
    """Model and processor at the start of a stage: the finished weights of the one before, or for
    the first what the run starts from."""
    if "weights" in read_json(job.init):
        return load_whole(weights_of(job.init), job.config.model.trust_remote_code)
    return build(job.init, derived_seed(job.seed, "projector"))


def take_steps(
    job: Job,
    training: Training,
    first: int,
    history: Any,
    send: Callable[[], None],
    has_sigterm: Callable[[], bool],
    measure_held_out: Callable[[int], None],
) -> None:
    """Take the optimizer steps from `first` on, with checkpoints between them.

    Args:
        job, training: What is trained.
        first: Number of the first step.
        history: The open file of a row a step; None but on the first process.
        send, has_sigterm: As in `fit`; measure_held_out(number of steps taken) follows each step.
    """
    block, scheme = job.block, training.scheme
    rising = math.ceil(block.warmup_ratio * block.steps)
    bar = bar_of(f"{job.ablation} seed {job.seed} {job.stage}", first, block.steps)
    peak = device_peak(block.processes)
    parts = (training.accelerator, training.model, training.optimizer)
    last_save, is_asked = time.monotonic(), False

    def counts(batches: Sequence[Any]) -> list[float]:
        """Whether this process asks for a checkpoint after this step, and what it did in it."""
        asks = has_sigterm() or time.monotonic() - last_save > CHECKPOINT_SECONDS
        return [float(asks), *measure(scheme, training.meter, block, batches)]

    batches_of_steps = feed(
        block, training.samples, training.order, training.processor, training.accelerator, first
    )
    began = time.monotonic()
    for step, batches in batches_of_steps:
        scheme.begin_step(step)
        # checkpoints come after begin_step: what it measured is now averaged over the processes
        if step > first and (is_asked or step % block.checkpoint_every == 0):
            save_state(job.folder, history, training.plain, training.optimizer, scheme, step)
            send()
            last_save = time.monotonic()
            if anywhere(has_sigterm()):
                log.info("SIGTERM: %s stops before step %d", job.stage, step)
                raise SystemExit(tracking.TERMINATED)
        factor = lr_factor(step, block.steps, rising)
        loss, norm, (askers, *sums) = optimizer_step(
            *parts, batches, block, factor, scheme, partial(counts, batches)
        )
        is_asked = askers > 0
        check_finite(job, step, loss, norm, factor)
        if history is not None:
            row = {"step": step, "loss": loss, "lr": peak_lr(block) * factor, "grad_norm": norm}
            row |= training.step_row(step, sums)
            row |= {"seconds": time.monotonic() - began, "peak_mem_mb": peak_memory_mb(), **peak}
            history.write(json.dumps(row) + "\n")
        measure_held_out(step + 1)
        training.meter.watch.read()  # what the tower saw meanwhile is no step's
        began = time.monotonic()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
    bar.close()


def write_weights(job: Job, training: Training) -> None:
    """Write what was trained as a plain checkpoint, from the first process."""
    model, adapters = training.plain, training.adapters
    weights = gathered(model) if is_sharded(job.block) else {}
    if has_masters(job.block):  # what is frozen was read in float32 and is written so
        pairs = dict(with_masters(model))
        weights = {name: pairs[p] for name, p in model.named_parameters() if p in pairs}
    if rank() == 0:
        if weights:
            model, _ = load(job)
            adapters = train_parts(model, job.block, job.seed_of("lora"))
            model.load_state_dict(weights, strict=is_sharded(job.block))
        if adapters is not None:
            adapters.merge_and_unload()
        finish(job.folder, model, training.processor, job.config)
    training.accelerator.wait_for_everyone()
