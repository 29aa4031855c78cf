"""A random share of a stage's samples: the control of all that selects data.

A training without a share doesn't follow this file.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np

from sts.pipeline.data.collator import Conversations, batch_order
from sts.pipeline.train import feed
from sts.pipeline.train.job import Job


def load_data(job: Job, processor: Any) -> tuple[Conversations, Callable[[int], list[int]]]:
    """The samples of a stage, or its share of them, and their order, as feed.load_data. The share
    is the same whatever else the stage does: it depends on the run's seed, stage and number."""
    samples, order = feed.load_data(job, processor)
    block = job.block
    if block.samples == 1:
        return samples, order
    part = draw(samples, block.samples, job.seed_of("samples"))
    order = batch_order(
        part.lengths,
        part.has_image,
        block.global_batch,
        job.seed_of("order"),
        group_by_length=block.group_by_length,
        sorted_batches=block.sorted_batches,
    )
    return part, order


def draw(samples: Conversations, share: float, seed: int) -> Conversations:
    """A share of the samples, at least one, drawn without replacement; they keep their order."""
    count = max(1, round(share * len(samples)))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(samples))[:count])
    part = copy(samples)
    part.samples = samples.samples.take(chosen)
    part.lengths = part.samples["length"].to_pylist()
    part.has_image = part.samples["has_image"].to_pylist()
    return part
