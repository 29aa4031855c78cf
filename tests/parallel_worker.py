"""Train a tiny LLaVA sparsely on the processes of torchrun, and say what came of it.

torchrun --nproc-per-node 2 tests/parallel_worker.py MODE OUT STEPS

MODE is alone, ddp, fsdp2, zero2 or zero3. With _samples after it whole layers are replaced by
samples: four of them, and one process trains on the halves of two as they would. With _mixed
only one process's samples of a step have pictures, in each unit of LDS in turn.
"""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tiny import CASES
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sts import LDS, VTC, SparseCallback, sparsify

ROWS = [["big", 5, 6, 7, 8], ["big", 9, 10, 11, 12]]
LAYERS = LDS(
    "layerdrop",
    rate=0.7,
    schedule="rising_linear",
    dense_tail=0.1,
    protect_first=1,
    protect_last=1,
)
SAMPLES = replace(LAYERS, unit="samples", protect_first=0, protect_last=0)
UNITS = ("layer", "samples", "tokens", "backward")
MORE = [["big", 13, 14, 15, 16, 17], ["big", 18, 19, 20, 21]]


def main(mode: str, out: str, steps: int) -> None:
    mode, _, samples = mode.partition("_")
    dist.init_process_group("gloo")
    if samples == "mixed":
        return mixed(mode, out, steps)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    # in double precision the order of a sum does not matter over 200 steps; DeepSpeed has none
    dtype = torch.float32 if mode.startswith("zero") else torch.float64
    model = CASES["llava"].build(dtype)
    model.model.vision_tower.requires_grad_(False)
    vtc = VTC("avgpool2d", keep=0.25, schedule="falling_linear", dense_tail=0.1)
    scheme = sparsify(model, vtc, SAMPLES if samples else LAYERS, total_steps=steps, seed=3)
    layers = model.model.language_model.layers
    runner = shared(model, mode, find_unused_parameters=not samples)
    engine = runner if mode.startswith("zero") else None
    calls = [0] * len(layers)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))
    optimizer = None if engine else torch.optim.SGD(runner.parameters(), lr=0.05)
    batch = CASES["llava"].batch(ROWS + MORE if samples else ROWS)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    every = 2 if samples else world
    halves = range(every) if world == 1 else [rank]
    parts = [{key: value[half::every] for key, value in batch.items()} for half in halves]
    mine = parts[0]
    losses, kept, skips, expected = [], True, [], [0] * len(layers)
    for step in range(steps):
        mean = torch.zeros((), dtype=dtype)
        scheme.begin_step(step)
        for part in parts:
            loss = runner(**part).loss / len(parts)
            mean += loss.detach()
            if engine:
                engine.backward(loss)
            else:
                loss.backward()
        if engine:
            engine.step()
        else:
            for index, layer in enumerate(layers):
                gradients = [p.grad is not None for p in layer.parameters()]
                kept &= gradients == [index not in scheme.skipped] * len(gradients)
            optimizer.step()
            optimizer.zero_grad()
        for index in range(len(layers)):
            expected[index] += (index not in scheme.skipped) * len(parts)
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
        skips.append(scheme.metrics()["skipped"] if samples else sorted(scheme.skipped))
    counted = logged(scheme, world)
    all_skips = [None] * world
    dist.all_gather_object(all_skips, skips)
    if rank == 0:
        result = {
            "losses": losses,
            "skips": torch.tensor(all_skips).mean(0).tolist() if samples else skips,
            "same_on_all": all(other == skips for other in all_skips),
            "grad_where_not_skipped_alone": kept,
            "ran_only_what_was_not_skipped": calls == expected,
            "counted": counted,
        }
        if mode == "fsdp2":
            result["gathers"] = gathers(runner, scheme, mine, steps)
        Path(out).write_text(json.dumps(result))
    elif mode == "fsdp2":
        gathers(runner, scheme, mine, steps)
    # DDP's reducer must not be the last to hold the process group: it would wait for the group's
    # thread with the interpreter lock that this thread may be waiting for (torch 2.13, gloo)
    del runner
    gc.collect()
    dist.destroy_process_group()


def logged(scheme, world: int) -> list[float]:
    """What a callback says of the last step: FLOPs left out by all ranks, the share of layers run,
    visual tokens."""
    callback = SparseCallback(vtc=scheme.vtc, lds=scheme.lds)
    callback.scheme = scheme
    state = SimpleNamespace(total_flos=0.0, log_history=[{}])
    args = SimpleNamespace(world_size=world, device="cpu")
    callback._begin_log(state)
    callback.on_step_end(args, state, SimpleNamespace(should_log=True))
    callback.on_log(args, state, None, logs={"loss": 0.0})
    names = ("sts_layers_run", "sts_visual_tokens", "sts_keep_ratio")
    return [-state.total_flos, *map(state.log_history[-1].get, names)]


def shared(model: torch.nn.Module, mode: str, find_unused_parameters: bool) -> torch.nn.Module:
    """The model as the processes of a mode share it."""
    if mode == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
    if mode == "fsdp2":
        for layer in model.model.language_model.layers:
            fully_shard(layer)
        fully_shard(model)
    return deepspeed_engine(model, int(mode[-1])) if mode.startswith("zero") else model


def mixed(mode: str, out: str, steps: int) -> None:
    """Train in each unit on batches of which one process's has a picture, which another is shown
    too, without its labels; write the losses."""
    rank, result = dist.get_rank(), {}
    torch.set_num_threads(1)
    for unit in UNITS:
        model = CASES["llava"].build(torch.float32)
        lds = LDS("layerdrop", rate=0.5, unit=unit, draw="fixed_count")
        with sparsify(model, VTC("avgpool2d", keep=0.25), lds, seed=3) as scheme:
            runner = shared(model, mode, find_unused_parameters=True)
            optimizer = torch.optim.SGD(runner.parameters(), lr=0.05)
            losses = []
            for step in range(steps):
                has_picture = rank == step % 2
                rows = [["big", 5, 6, 7, 8]] * 2 if has_picture else [[9, 10, 11], ["big", 5, 6]]
                batch = CASES["llava"].batch(rows)
                batch["labels"][int(has_picture) + 1 :] = -100
                scheme.begin_step(step)
                loss = runner(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        result[unit] = losses
        del runner, optimizer
        gc.collect()
    if rank == 0:
        Path(out).write_text(json.dumps(result))
    dist.destroy_process_group()


def gathers(runner: torch.nn.Module, scheme, mine: dict, steps: int) -> dict[str, list[int]]:
    """Collectives of a step with some layers skipped, and of one (annealed) without."""
    from torch.distributed.tensor.debug import CommDebugMode

    collectives = {}
    for step in (int(0.85 * steps), steps - 1):
        scheme.begin_step(step)
        with CommDebugMode() as counted:
            runner(**mine).loss.backward()
        runner.zero_grad()
        name = "skipping" if scheme.skipped else "dense"
        collectives[name] = [counted.get_total_counts(), len(scheme.skipped)]
    return collectives


def deepspeed_engine(model: torch.nn.Module, stage: int):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {
                "stage": stage,
                "stage3_prefetch_bucket_size": 0,
                "stage3_param_persistence_threshold": 0,
            },
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
        },
    )
    return engine


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
