"""One stage of one run, from weights to weights: the whole story of a training in one file.

    python -m sts train --config results/mini/configs/sts.yaml --ablation sts --seed 0 \
        --stage align --data data/mini/scenes/manifest.json \
        --init results/mini/backbone/dense.json --out results/mini/runs/sts/seed0/align.json

`out` is a small deterministic manifest. The bytes lie in `weights/<key>`, where the key is a hash
of everything that the weights depend on: what is finished is reused by any run that asks for the
same, and what was interrupted goes on from its last checkpoint to the same weights, bit for bit.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from sts.pipeline.config import Config, StageConfig, config_hash
from sts.pipeline.cost.history import (
    Meter,
    measure,
    open_history,
    peak_memory_mb,
    read_history,
    summary,
    with_speed,
)
from sts.pipeline.cost.memory import check_memory
from sts.pipeline.data.collator import example
from sts.pipeline.files import read_json, sha256_json, write_json_atomic
from sts.pipeline.run import follows, tracking
from sts.pipeline.run.bar import bar_of
from sts.pipeline.run.device import attention_here, lease, precision_here
from sts.pipeline.train.checkpoint import (
    finish,
    forget_states,
    load_state,
    locked,
    save_state,
    sigterm_put_off,
)
from sts.pipeline.train.feed import feed, load_data
from sts.pipeline.train.lora import train_parts
from sts.pipeline.train.model import build, load_whole, recompute
from sts.pipeline.train.parallel import anywhere, gathered, load_shared, of_first, shards, shared
from sts.pipeline.train.step import (
    check_finite,
    lr_factor,
    make_optimizer,
    optimizer_step,
    peak_lr,
    prepare_process,
)
from sts.scheme import Scheme, sparsify, unsparsify

CHECKPOINT_SECONDS = 600  # a slow training is checkpointed this often whatever `checkpoint_every`

log = logging.getLogger(__name__)


def train(
    config: Config,
    ablation: str,
    seed: int,
    stage: str,
    data: Sequence[str | Path],
    init: str | Path,
    out: str | Path,
) -> dict[str, Any]:
    """Train one stage, or reuse its finished weights; write and return the manifest `out`.

    data: manifests of prepared data sets. init: the backbone manifest for the first stage, else the
    manifest of the stage before. Raises FloatingPointError if loss or gradient is
    not finite, OSError if a checkpoint can't be written; the one before is kept.
    """
    block, out = config.stage(stage), Path(out)
    key = stage_key(block, stage, seed, data, init, config.model.family)
    folder = out.parents[3] / "weights" / key
    tags = {
        "ablation": ablation, "seed": seed, "stage": stage, "key": key,
        "config": config_hash(config), "data": _data_version(data),
    }  # fmt: skip
    if block.processes > 1:  # which have their GPUs, and now can talk
        prepare_process(block)
    with locked(folder):
        finished = of_first((folder / "done.json").exists())
        with (
            contextlib.nullcontext() if finished else lease(),
            tracking.run(
                f"{ablation}/seed{seed}/{stage}",
                params=block.model_dump(),
                tags={**tags, "reused": finished},
                directory=out.with_suffix("") / key,  # another key is another run
            ) as tracked,
            sigterm_put_off() as stopped,
        ):
            if finished:
                log.info("%s: %s is finished: reused", stage, folder)
                forget_states(folder)
                for row in read_history(folder):
                    tracked.log(with_speed(row), row["step"])
            else:
                run = (config, ablation, seed, stage, data, init, folder)
                fit(*run, tracked.log, stopped)
    manifest = {"ablation": ablation, "stage": stage, "seed": seed, "key": key,
                "precision": precision_here(block.precision),
                "weights": str(folder), **summary(folder)}  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        write_json_atomic(out, manifest)
    return manifest


def fit(
    config: Config,
    ablation: str,
    seed: int,
    stage: str,
    data: Sequence[str | Path],
    init: str | Path,
    folder: Path,
    report: Callable[[dict, int], None],
    stopped: Callable[[], bool],
) -> None:
    """Train from the last checkpoint in `folder`, or from `init`, to the finished `folder`.

    stopped: whether SIGTERM has come to this process. Then a checkpoint is written after the step
    that is being taken, and SystemExit(143) raised.
    """
    block = config.stage(stage)
    if precision_here(block.precision) != block.precision:
        log.warning(
            "%s.precision: %s is slow on this processor: %s instead; scores differ in the last "
            "digits from those of a processor that has it",
            stage, block.precision, precision_here(block.precision),
        )  # fmt: skip
    accelerator = prepare_process(block)
    model, processor = load_shared(block, partial(load, init, seed))
    adapters = train_parts(model, block, derived_seed(seed, f"{stage}/lora"))
    shuffled, tokens = derived_seed(seed, f"{stage}/order"), folder.parents[1] / "tokens"
    samples, order = load_data(data, block, processor, shuffled, tokens)
    meter = Meter(model, example(samples, processor), partial(train_parts, stage=block, seed=0))
    tokens = fmean(samples.lengths)
    check_memory(meter.counts, stage, block, tokens, tokens - meter.counts.visual_tokens)
    scheme = put_scheme(model, block, seed, stage, len(samples))
    torch.manual_seed(derived_seed(seed, f"{stage}/dropout"))  # nothing else draws from it
    plain, model = model, shared(accelerator, model, block)
    optimizer = accelerator.prepare(make_optimizer(plain, block))
    folder.mkdir(parents=True, exist_ok=True)
    first = load_state(folder, plain, optimizer, scheme)
    history = open_history(folder, first) if accelerator.is_main_process else None

    bar = bar_of(f"{ablation} seed {seed} {stage}", first, block.steps)
    saved = began = time.monotonic()
    for step, batches in feed(samples, order, processor, block, accelerator, first):
        scheme.begin_step(step)
        # checkpoints come after begin_step: what it measured is now averaged over the processes
        late = time.monotonic() - saved > CHECKPOINT_SECONDS
        due = step % block.checkpoint_every == 0 or anywhere(late or stopped())
        if due and step > first:
            save_state(folder, history, plain, optimizer, scheme, step)
            saved = time.monotonic()
        if due and anywhere(stopped()):
            log.info("SIGTERM: %s stops before step %d", stage, step)
            raise SystemExit(tracking.TERMINATED)
        factor = lr_factor(step, block.steps, math.ceil(block.warmup_ratio * block.steps))
        loss, norm = optimizer_step(accelerator, model, optimizer, batches, block, factor, scheme)
        check_finite(loss, norm, stage, step, factor, block)
        if history is not None:
            lr = peak_lr(block) * factor
            row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm}
            shown = [samples.has_image[i] for i in order(step)]
            row |= measure(scheme, meter, block, shown, batches)
            row |= {"seconds": time.monotonic() - began, "peak_mem_mb": peak_memory_mb()}
            history.write(json.dumps(row) + "\n")
            report(with_speed(row), step)
        began = time.monotonic()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
    bar.close()
    unsparsify(plain)
    if shards(block):
        weights = gathered(plain)
        if history is not None:  # the first process, which has the weights
            plain, _ = load(init, seed)
            adapters = train_parts(plain, block, seed)
            plain.load_state_dict(weights)
    if history is not None:
        history.close()
        finish(folder, plain, adapters, processor, config)
    accelerator.wait_for_everyone()


def stage_key(
    block: StageConfig,
    stage: str,
    seed: int,
    data: Sequence[str | Path],
    init: str | Path,
    family: str = "joined",
) -> str:
    """16 hex digits of all that the weights of a stage depend on: settings, code, seed, bytes of
    the data and of the weights it starts from. The name of the ablation is not among them."""
    start = read_json(init)
    parts = [start.get("sha256"), start.get("vision_feature_layer")]  # of a backbone manifest
    return sha256_json(
        {
            "stage": stage,
            "settings": block.identity(),
            "code": follows.code(*follows.training(block, family)),
            "precision": precision_here(block.precision),
            "attention": attention_here(block.precision),
            "seed": seed,
            "data": [read_json(manifest)["sha256"] for manifest in data],
            "init": start.get("weights_sha256") or parts,
        }
    )[:16]


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose (31 bits): no purpose moves the random numbers of another."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4]) >> 1


def load(init: str | Path, seed: int) -> tuple[PreTrainedModel, Any]:
    """Model and processor at the start of a stage: the finished weights of the one before, or for
    the first what the run starts from."""
    weights = read_json(init).get("weights")
    if weights is None:
        return build(init, derived_seed(seed, "projector"))
    return load_whole(weights)


def put_scheme(
    model: PreTrainedModel, block: StageConfig, seed: int, stage: str, samples: int
) -> Scheme:
    """VTC and LDS of the stage on the model, which trains on `samples` samples an epoch. Also where
    both are off: the dense run then computes its loss in the same way. Attention and recomputation
    are set as the stage wants them."""
    model.set_attn_implementation(attention_here(block.precision))
    recompute(model, block.gradient_checkpointing)
    return sparsify(
        model,
        vtc=block.vtc,
        lds=block.lds,
        total_steps=block.steps,
        steps_per_epoch=math.ceil(samples / block.global_batch),
        seed=derived_seed(seed, f"{stage}/scheme"),
    )


def _data_version(data: Iterable[str | Path]) -> str:
    found = map(read_json, data)
    return ", ".join(f"{m['dataset']} {m['version']} {m['sha256'][:8]}" for m in found)
