"""What a training is fed with: the batch of each optimizer step, in a seeded order, in pieces."""

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BatchFeature

from sts.pipeline.config import StageConfig
from sts.pipeline.data.collator import Conversations, batch_order, collate, split_files
from sts.pipeline.features import reader_of

LOADERS = 4  # processes that load data for a GPU; a CPU training loads its own


def load_data(
    data: Sequence[str | Path],
    block: StageConfig,
    processor: Any,
    seed: int,
    features: Sequence[str | Path] = (),
) -> tuple[Conversations, Callable[[int], list[int]]]:
    """The samples of a stage, and the function step -> indices of that step's global batch.

    features: manifests of vision features of the data sets, if they are cached.
    """
    read = reader_of(features) if features else None
    samples = Conversations(split_files(data, block.split), processor, block.max_length, read)
    order = batch_order(
        samples.lengths,
        samples.has_image,
        block.global_batch,
        seed,
        block.group_by_length,
    )
    return samples, order


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


def leave_sigterm(_: int) -> None:
    """A scheduler sends SIGTERM to every process: the training ends its loaders when it is done."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
        worker_init_fn=leave_sigterm,
        pin_memory=gpu,
        generator=torch.Generator(),  # else a resumed training draws from torch's once more
    )
    batches = iter(loader)
    for step, mine in zip(steps, pieces, strict=True):
        yield step, [next(batches).to(accelerator.device) for _ in mine]
