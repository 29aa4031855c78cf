"""One stage of one run, from weights to weights: the whole story of a training in one file.

    python -m sts train --config results/mini/configs/sts.yaml --ablation sts --seed 0 \
        --stage align --data data/mini/scenes/manifest.json \
        --init results/mini/backbone/manifest.json --out results/mini/runs/sts/seed0/align.json

`out` is a small deterministic manifest. The bytes lie in `weights/<key>`, where the key is a hash
of everything that the weights depend on: what is finished is reused by any run that asks for the
same, and what was interrupted goes on from its last checkpoint to the same weights, bit for bit.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoProcessor,
    BatchFeature,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from sts.lds import UNITS
from sts.mini.backbone import build_llava
from sts.pipeline import cost, provenance, tracking
from sts.pipeline.config import Config, StageConfig, config_hash
from sts.pipeline.data.collator import Conversations, batch_order, collate, split_files
from sts.pipeline.device import bf16_is_native, lease
from sts.pipeline.provenance import write_json_atomic
from sts.scheme import Scheme, sparsify, unsparsify
from sts.settings import IGNORE_INDEX

CHECKPOINT_SECONDS = 600  # a slow training is checkpointed this often whatever `checkpoint_every`
LOADERS = 4  # processes that load data for a GPU; a CPU training loads its own

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
    """Train one stage (`align` or `instruct`), or reuse its finished weights; write and return the
    manifest `out`.

    data: manifests of prepared data sets. init: the backbone manifest for `align`, the manifest of
    the align stage for `instruct`. Raises FloatingPointError if loss or gradient is not finite,
    OSError if a checkpoint can't be written; the one before is kept.
    """
    block, out = config.stage(stage), Path(out)
    key = stage_key(block, stage, seed, data, init)
    folder = out.parents[3] / "weights" / key
    tags = {
        "ablation": ablation, "seed": seed, "stage": stage, "key": key,
        "config": config_hash(config), "data": _data_version(data),
    }  # fmt: skip
    with locked(folder):
        finished = (folder / "done.json").exists()
        with (
            contextlib.nullcontext() if finished else lease(),
            tracking.run(
                f"{ablation}/seed{seed}/{stage}",
                params=block.model_dump(),
                tags={**tags, "reused": finished},
                directory=out.with_suffix("") / key,  # another key is another run
            ) as tracked,
        ):
            if finished:
                log.info("%s: %s is finished: reused", stage, folder)
                for row in read_history(folder):
                    tracked.log(_with_speed(row), row["step"])
            else:
                fit(config, ablation, seed, stage, data, init, folder, tracked.log)
    manifest = {"ablation": ablation, "stage": stage, "seed": seed, "key": key,
                "precision": precision_here(block),
                "weights": str(folder), **summary(folder, stage, block)}  # fmt: skip
    if _is_main():
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
) -> None:
    """Train from the last checkpoint in `folder`, or from `init`, to the finished `folder`."""
    block = config.stage(stage)
    if precision_here(block) != block.precision:
        log.warning(
            "%s.precision: %s is slow on this processor: %s instead; scores differ in the last "
            "digits from those of a processor that has it",
            stage, block.precision, precision_here(block),
        )  # fmt: skip
    accelerator = prepare_process(block)
    model, processor = load(stage, init, seed)
    freeze(model, stage)
    shape = cost.shape_of(model.config)
    samples, order = load_data(data, stage, block, processor, seed)
    scheme = put_scheme(model, block, seed, stage, len(samples))
    model, optimizer = accelerator.prepare(model, make_optimizer(model, block))

    plain = accelerator.unwrap_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    first = load_state(folder, plain, optimizer, scheme)
    history = open_history(folder, first) if accelerator.is_main_process else None

    bar = progress(f"{ablation} seed {seed} {stage}", first, block.steps)
    saved = began = time.monotonic()
    for step, batches in feed(samples, order, processor, block, accelerator, first):
        scheme.begin_step(step)
        # checkpoints come after begin_step: what it measured is now averaged over the processes
        late = time.monotonic() - saved > CHECKPOINT_SECONDS
        if step > first and (late or step % block.checkpoint_every == 0):
            if history is not None:
                save_state(folder, history, plain, optimizer, scheme, step)
            saved = time.monotonic()
        lr = block.lr * lr_factor(step, block.steps, block.warmup_ratio)
        loss, norm = optimizer_step(accelerator, model, optimizer, batches, block, lr, scheme)
        check_finite(loss, norm, stage, step, lr, block)
        if history is not None:
            row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm}
            row |= measure(scheme, shape, stage, block, [samples.has_image[i] for i in order(step)])
            row |= {"seconds": time.monotonic() - began, "peak_mem_mb": peak_memory_mb()}
            history.write(json.dumps(row) + "\n")
            report(_with_speed(row), step)
        began = time.monotonic()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
    bar.close()
    accelerator.wait_for_everyone()
    if history is not None:
        history.close()
        finish(folder, plain, processor, config)
    accelerator.wait_for_everyone()


# ---- before the loop --------------------------------------------------------------------------


def stage_key(
    block: StageConfig, stage: str, seed: int, data: Sequence[str | Path], init: str | Path
) -> str:
    """16 hex digits of all that the weights of a stage depend on: settings, code, seed, bytes of
    the data and of the weights it starts from. The name of the ablation is not among them."""
    start = read_json(init)
    parts = [start.get("sha256"), start.get("vision_feature_layer")]  # of a backbone manifest
    return provenance.sha256_json(
        {
            "stage": stage,
            "settings": block.identity(),
            "code": provenance.fingerprint(*block.sources()),
            "precision": precision_here(block),
            "seed": seed,
            "data": [read_json(manifest)["sha256"] for manifest in data],
            "init": start.get("weights_sha256") or parts,
        }
    )[:16]


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose (31 bits): no purpose moves the random numbers of another."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4]) >> 1


def prepare_process(block: StageConfig) -> Accelerator:
    """Fixed threads, deterministic algorithms, and accelerate on whatever device there is.

    Raises ValueError if this is not the number of processes that the configuration says: the
    global batch, and so the weights, depend on it.
    """
    torch.set_num_threads(block.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes no result
    # skipped layers have no gradient: without this, data-parallel processes would wait for them
    unused = block.lds.rate > 0 and not UNITS[block.lds.unit].trains_all
    ddp = DistributedDataParallelKwargs(find_unused_parameters=unused)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
    if accelerator.num_processes != block.processes:
        raise ValueError(
            f"processes: the configuration says {block.processes}, this training was started with "
            f"{accelerator.num_processes}. Start it with: torchrun --nproc-per-node "
            f"{block.processes} -m sts train ..."
        )
    return accelerator


def load(stage: str, init: str | Path, seed: int) -> tuple[PreTrainedModel, Any]:
    """Model and processor at the start of a stage: `align` joins the backbones by a fresh
    projector, `instruct` takes the finished weights of `align`."""
    if stage == "align":
        return build_llava(init, derived_seed(seed, "projector"))
    weights = read_json(init)["weights"]
    model = LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(weights)


def freeze(model: PreTrainedModel, stage: str) -> None:
    """`align` trains the projector, `instruct` the language model too, none the vision tower."""
    model.train().requires_grad_(False)
    model.model.vision_tower.eval()
    trained = [model.model.multi_modal_projector]
    if stage == "instruct":
        trained += [model.model.language_model, model.lm_head]
    for module in trained:
        module.requires_grad_(True)


def put_scheme(
    model: PreTrainedModel, block: StageConfig, seed: int, stage: str, samples: int
) -> Scheme:
    """VTC and LDS of the stage on the model, which trains on `samples` samples an epoch. Also where
    both are off: the dense run then computes its loss in the same way. Attention and recomputation
    are set as the stage wants them."""
    model.set_attn_implementation("sdpa" if fused_attention(block) else "eager")
    if block.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
    return sparsify(
        model,
        vtc=block.vtc,
        lds=block.lds,
        total_steps=block.steps,
        steps_per_epoch=math.ceil(samples / global_batch(block)),
        seed=derived_seed(seed, f"{stage}/scheme"),
    )


def precision_here(block: StageConfig) -> str:
    """What the forward pass is computed in: bf16 only where the hardware computes in it.

    Elsewhere fp32 takes its place. The weights' key follows it.
    """
    return block.precision if torch.cuda.is_available() or bf16_is_native() else "fp32"


def fused_attention(block: StageConfig) -> bool:
    """Whether attention is torch's fused one. In bf16 on a CPU it is not: the fused backward there
    (torch 2.13, 32 channels a head) takes longer than all the rest of the step."""
    return torch.cuda.is_available() or precision_here(block) == "fp32"


def load_data(
    data: Sequence[str | Path], stage: str, block: StageConfig, processor: Any, seed: int
) -> tuple[Conversations, Callable[[int], list[int]]]:
    """The samples of a stage, and the function step -> indices of that step's global batch."""
    samples = Conversations(split_files(data, stage), processor, block.max_length)
    order = batch_order(
        samples.lengths,
        samples.has_image,
        global_batch(block),
        derived_seed(seed, f"{stage}/order"),
        block.group_by_length,
    )
    return samples, order


def global_batch(block: StageConfig) -> int:
    """Samples of an optimizer step, over all processes and micro-batches."""
    return block.batch_size * block.gradient_accumulation_steps * block.processes


def my_pieces(indices: list[int], accumulation: int, accelerator: Accelerator) -> list[list[int]]:
    """This process's share of a global batch, as its micro-batches.

    A batch at the end of an epoch may be small: then there are fewer micro-batches, and a few
    samples come twice if the processes could not share them evenly.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    even = indices + indices[: -len(indices) % world]
    parts = min(accumulation * world, len(even))
    bounds = [len(even) * i // parts for i in range(parts + 1)]
    return [even[bounds[i] : bounds[i + 1]] for i in range(rank, parts, world)]


def feed(
    samples: Conversations,
    order: Callable[[int], list[int]],
    processor: Any,
    block: StageConfig,
    accelerator: Accelerator,
    first: int,
) -> Iterator[tuple[int, list[BatchFeature]]]:
    """(step, this process's micro-batches on its device) for every step from `first` on."""
    steps = range(first, block.steps)
    pieces = [
        my_pieces(order(step), block.gradient_accumulation_steps, accelerator) for step in steps
    ]
    gpu = accelerator.device.type == "cuda"
    loader = DataLoader(
        samples,
        batch_sampler=[piece for mine in pieces for piece in mine],
        collate_fn=partial(collate, processor),
        num_workers=LOADERS if gpu else 0,
        pin_memory=gpu,
    )
    batches = iter(loader)
    for step, mine in zip(steps, pieces, strict=True):
        yield step, [next(batches).to(accelerator.device) for _ in mine]


def make_optimizer(model: PreTrainedModel, block: StageConfig) -> torch.optim.Optimizer:
    """AdamW on what is trained, without decay on norms, biases and embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    groups = [
        {"params": decayed, "weight_decay": block.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=block.lr, fused=True)


# ---- one step ---------------------------------------------------------------------------------


def lr_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate: a line up over the first `warmup_ratio` of the steps, then
    half a cosine down towards 0."""
    rising = math.ceil(warmup_ratio * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[dict],
    block: StageConfig,
    lr: float,
    scheme: Scheme,
) -> tuple[float, float]:
    """One step on the micro-batches of this process: (mean loss, gradient norm before clipping).

    The loss is a mean over the answer tokens of the whole global batch, so that however a batch is
    split into micro-batches and processes, the step is the same. A step that is not finite is not
    taken.
    """
    answers = sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batches)
    answers = accelerator.reduce(answers, "sum")
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with (
            contextlib.nullcontext() if last else accelerator.no_sync(model),
            torch.autocast(
                accelerator.device.type, torch.bfloat16, enabled=precision_here(block) == "bf16"
            ),
        ):
            loss = model(**batch, num_items_in_batch=answers, use_cache=False).loss
            # gradients are averaged over processes, and the loss is to be their sum
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    scheme.after_backward()
    norm = accelerator.clip_grad_norm_(model.parameters(), block.max_grad_norm).item()
    loss = accelerator.reduce(total, "sum").item()
    if math.isfinite(loss) and math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # no gradient at all: AdamW leaves skipped layers alone
    return loss, norm


def check_finite(
    loss: float, norm: float, stage: str, step: int, lr: float, block: StageConfig
) -> None:
    """Raise FloatingPointError, with what it may come from, for a loss or gradient that is not
    finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    bf16 = precision_here(block) == "bf16"
    half = "; bf16 overflowed: try precision: fp32" if bf16 else ""
    raise FloatingPointError(
        f"{stage} step {step}: loss {loss}, gradient norm {norm} at learning rate {lr:.3g}. Likely "
        f"causes: {stage}.lr {block.lr:g} is too high, or {stage}.warmup_ratio "
        f"{block.warmup_ratio:g} too short (the losses before this step are in history.jsonl); "
        f"the initial weights are broken{half}. The last checkpoint is kept; another value in the "
        "configuration starts afresh."
    )


def measure(
    scheme: Scheme, shape: cost.Shape, stage: str, block: StageConfig, has_image: Sequence[bool]
) -> dict[str, Any]:
    """What a step really did, for its row of the history. `has_image`: of its global batch.

    tokens (reached the language model, padding included) and answer_tokens of the global batch;
    visual_tokens, mean of a sample; of each layer the chance asked for, the share skipped and its
    work (Scheme.metrics); FLOPs. Of several processes the first counts for all.
    """
    seen, samples = scheme.metrics(), len(has_image)
    row = {
        "samples": samples,
        "images": sum(has_image),
        "fused_attention": fused_attention(block),
        "tokens": round(seen["tokens"] * samples),
        "answer_tokens": round(seen["answer_tokens"] * samples),
        **{name: seen[name] for name in ("visual_tokens", "keep_ratio", "layers_run")},
        **{name: seen[name] for name in ("asked", "skipped", "work")},
    }
    return row | {"flops": row_flops(shape, stage, block, row)}


def row_flops(shape: cost.Shape, stage: str, block: StageConfig, row: dict[str, Any]) -> float:
    """FLOPs of a step from what it realised (a row of the history)."""
    return cost.step_flops(
        shape,
        batch=row["samples"],
        images=row["images"],
        visual_tokens=row["visual_tokens"],
        text_tokens=row["tokens"] / row["samples"] - row["visual_tokens"],
        answer_tokens=row["answer_tokens"] / row["samples"],
        stage=stage,
        checkpointing=block.gradient_checkpointing,
        fused_attention=row["fused_attention"],
        work=row["work"],
    )


def _with_speed(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"tokens_per_s": row["tokens"] / row["seconds"]}


def peak_memory_mb() -> float:
    """Most memory so far in MB (10^6 bytes): of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# ---- what lies on disk ------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one training at a time works on a key; another waits and then finds it finished.

    The lock goes with the process, however it ends. Of several processes of one training the first
    holds it for all.
    """
    if not _is_main():
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another training makes %s: waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save_state(
    folder: Path,
    history: Any,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scheme: Scheme,
    step: int,
) -> None:
    """Checkpoint before `step`: one file, whole or not at all; the one before stays until then.

    Raises OSError, naming the file, if it can't be written.
    """
    history.flush()
    os.fsync(history.fileno())
    state = {
        "step": step,
        "model": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "scheme": scheme.state_dict(),
        "rng": torch.get_rng_state(),
    }
    target = folder / "state" / "checkpoint.pt"
    target.parent.mkdir(exist_ok=True)
    part = target.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except (OSError, RuntimeError) as error:  # torch wraps what the file system says
        raise OSError(
            f"{target}: the checkpoint before step {step} was not written ({error}). Is the disk "
            "full? The one before is kept: make room and start again"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def load_state(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, scheme: Scheme
) -> int:
    """Take up the checkpoint in `folder`, if there is one; the step to go on with."""
    file = folder / "state" / "checkpoint.pt"
    if not file.exists():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state["model"].items():
            own[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    scheme.load_state_dict(state["scheme"])
    torch.set_rng_state(state["rng"])
    log.info("going on from step %d: %s", state["step"], file)
    return state["step"]


def open_history(folder: Path, first: int) -> Any:
    """`history.jsonl`, to be written on from step `first`: later rows are of a lost attempt."""
    file = folder / "history.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[:first] if first else []
    part = file.with_suffix(".part")
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, file)
    return open(file, "a", buffering=1, encoding="utf-8")


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a training's `history.jsonl`, one an optimizer step."""
    text = (Path(folder) / "history.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def summary(folder: Path, stage: str, block: StageConfig) -> dict[str, Any]:
    """What the manifest tells of finished weights. FLOPs are computed here from what each step
    realised, so that a better formula in sts/pipeline/cost.py needs no new training."""
    history = read_history(folder)
    shape = cost.shape_of(AutoConfig.from_pretrained(folder))
    layers = shape.layers
    steps = len(history)
    return {
        **read_json(folder / "done.json"),
        "steps": steps,
        "flops": sum(row_flops(shape, stage, block, row) for row in history),
        "flops_dense": sum(row_flops(shape, stage, block, _dense(row)) for row in history),
        "final_loss": fmean(row["loss"] for row in history[-max(1, steps // 10) :]),
        "realised": {
            "keep_ratio": fmean(row["keep_ratio"] for row in history),
            "layers_run": fmean(row["layers_run"] for row in history),
            "skipped_per_layer": [
                sum(row["skipped"][layer] for row in history) for layer in range(layers)
            ],
        },
    }


def _dense(row: dict[str, Any]) -> dict[str, Any]:
    """The row of the same step without VTC and LDS."""
    whole = row["visual_tokens"] / row["keep_ratio"]
    added = (whole - row["visual_tokens"]) * row["samples"]
    return row | {"visual_tokens": whole, "tokens": row["tokens"] + added, "work": None}


def finish(folder: Path, model: PreTrainedModel, processor: Any, config: Config) -> None:
    """Save the plain model and its processor; `done.json`, the last file, says that it is whole."""
    unsparsify(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_json_atomic(folder / "provenance.json", provenance.collect(config_hash(config)))
    write_json_atomic(folder / "done.json", {"weights_sha256": weights_sha256(folder)})
    shutil.rmtree(folder / "state", ignore_errors=True)


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the safetensors files of a checkpoint; for one file what sha256sum says."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as part:
            while chunk := part.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file. Raises FileNotFoundError naming it."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _data_version(data: Iterable[str | Path]) -> str:
    found = map(read_json, data)
    return ", ".join(f"{m['dataset']} {m['version']} {m['sha256'][:8]}" for m in found)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def progress(title: str, first: int, steps: int) -> tqdm:
    """A bar with the time left: lively on a terminal, a line now and then in a log file."""
    every = 0.5 if sys.stderr.isatty() else 10
    return tqdm(
        desc=title, initial=first, total=steps, unit="step", mininterval=every, maxinterval=every,
        disable=not _is_main(), dynamic_ncols=sys.stderr.isatty(),
    )  # fmt: skip
