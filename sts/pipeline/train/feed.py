"""What a training is fed with: the batch of each optimizer step, in a seeded order, in pieces."""

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from transformers import BatchFeature

from sts.pipeline.config import CODE, StageConfig
from sts.pipeline.data.collator import Conversations, batch_order, collate, split_files
from sts.pipeline.data.conversation import template_of
from sts.pipeline.files import read_json, sha256_json
from sts.pipeline.run import follows
from sts.pipeline.train.job import Job
from sts.settings import IGNORE_INDEX


def load_data(job: Job, processor: Any) -> tuple[Conversations, Callable[[int], list[int]]]:
    """The samples of a stage, and the function step -> indices of that step's global batch."""
    samples = load_split(job, processor, job.data, job.block.split)
    return samples, order_of(job, samples)


def order_of(job: Job, samples: Conversations) -> Callable[[int], list[int]]:
    """Step -> indices of the samples of a stage's global batch."""
    block = job.block
    return batch_order(
        samples.lengths,
        samples.has_image,
        block.global_batch,
        job.seed_of("order"),
        group_by_length=block.group_by_length,
        sorted_batches=block.sorted_batches,
    )


def load_split(job: Job, processor: Any, data: Sequence[Path], split: str) -> Conversations:
    """A split of these data manifests, as the stage reads its samples."""
    block = job.block
    tokens = job.tokens / f"{tokens_key(job, processor, data, split)}.arrow"
    files = split_files(data, split)
    return Conversations(files, processor, block.max_length, tokens, block.template)


def longest_batch(samples: Conversations, rows: int, visual_tokens: float) -> tuple[float, float]:
    """(tokens, answer tokens) of a sample, padding included, of the longest batch of so many rows
    that an order can give; all that is no picture counts as answer.

    visual_tokens: of a sample with an image.
    """
    lengths = np.array(samples.lengths, float)
    texts = np.sort(lengths - visual_tokens * np.array(samples.has_image))
    return lengths.max(), max(texts[-rows:].mean(), 0.0)


def tokens_key(job: Job, processor: Any, data: Sequence[Path], split: str) -> str:
    """16 hex digits of all that the tokens of a split of data manifests depend on."""
    block = job.block
    texts = [processor.tokenizer.backend_tokenizer.to_str(), processor.to_json_string()]
    return sha256_json(
        {
            "data": [read_json(manifest)["sha256"] for manifest in data],
            "split": split,
            "max_length": block.max_length,
            "template": block.template,
            "processor": [type(processor).__name__, template_of(processor), *texts],
            "code": follows.code(*follows.imported([CODE / "pipeline/data/collator.py"])),
        }
    )[:16]


def my_pieces(
    indices: list[int],
    accumulation: int,
    accelerator: Accelerator,
    has_image: Sequence[bool] = (),
) -> list[list[int]]:
    """This process's share of a global batch, as the indices of its micro-batches.

    A batch at the end of an epoch may be small: then there are fewer micro-batches, and a few
    samples come twice if the processes could not share them evenly. Where other processes see an
    image and this one would not, it gets one, as ~index: a sample without its labels (`Shown`). All
    then run the same modules, as those that share weights must.

    Args:
        indices: Samples of the global batch.
        accumulation: Micro-batches of a process.
        has_image: Of every sample.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    even = indices + indices[: -len(indices) % world]
    parts = min(accumulation * world, len(even))
    bounds = [len(even) * i // parts for i in range(parts + 1)]
    pieces = [even[bounds[i] : bounds[i + 1]] for i in range(parts)]
    for first in range(0, parts if has_image else 0, world):
        at_once = pieces[first : first + world]
        images = [[index for index in piece if has_image[index]] for piece in at_once]
        if any(images):
            shown = next(filter(None, images))[0]
            for piece, with_image in zip(at_once, images, strict=True):
                piece.extend([] if with_image else [~shown])
    return pieces[rank::world]


class Shown(Dataset):
    """The samples, and under ~index the sample of that index without labels: the model sees it and
    learns nothing of it."""

    def __init__(self, samples: Conversations):
        self.samples = samples

    def __getitem__(self, index: int) -> dict:
        if index >= 0:
            return self.samples[index]
        sample = self.samples[~index]
        return sample | {"labels": np.full_like(sample["labels"], IGNORE_INDEX)}


def leave_sigterm(_: int) -> None:
    """A scheduler sends SIGTERM to every process: the training ends its loaders when it is done."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def feed(
    block: StageConfig,
    samples: Conversations,
    order: Callable[[int], list[int]],
    processor: Any,
    accelerator: Accelerator,
    first: int,
) -> Iterator[tuple[int, list[BatchFeature]]]:
    """(step, this process's micro-batches on its device) for every step from `first` on."""
    steps = range(first, block.steps)
    accumulation = block.gradient_accumulation_steps
    pieces = [
        my_pieces(order(step), accumulation, accelerator, samples.has_image) for step in steps
    ]
    gpu = accelerator.device.type == "cuda"
    loader = DataLoader(
        Shown(samples),
        batch_sampler=[piece for of_step in pieces for piece in of_step],
        collate_fn=partial(collate, processor),
        num_workers=block.threads if gpu else 0,  # a CPU training has no cores to spare
        worker_init_fn=leave_sigterm,
        pin_memory=gpu,
        generator=torch.Generator(),  # else a resumed training draws from torch's once more
    )
    batches = iter(loader)
    for step, of_step in zip(steps, pieces, strict=True):
        device = accelerator.device  # pinned memory is copied while the GPU computes
        yield step, [next(batches).to(device, non_blocking=gpu) for _ in of_step]
