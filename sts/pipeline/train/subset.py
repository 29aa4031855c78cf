"""A random share of a stage's samples: the control of all that selects data.

A training without a share doesn't follow this file.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np

from sts.pipeline.data.collator import Conversations
from sts.pipeline.train import feed
from sts.pipeline.train.job import Job


def load_data(job: Job, processor: Any) -> tuple[Conversations, Callable[[int], list[int]]]:
    """The samples of a stage, or its share of them, and their order, as feed.load_data. The share
    is the same whatever else the stage does: it depends on the run's seed, stage and number."""
    block = job.block
    if block.samples == 1:
        return feed.load_data(job, processor)
    samples = feed.load_split(job, processor, job.data, block.split)
    part = draw(samples, block.samples, job.seed_of("samples"))
    return part, feed.order_of(job, part)


def draw(samples: Conversations, share: float, seed: int) -> Conversations:
    """A share of the samples, at least one, drawn without replacement; they keep their order."""
    count = max(1, round(share * len(samples)))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(samples))[:count])
    part = copy(samples)
    part.samples = samples.samples.take(chosen)
    part.lengths = part.samples["length"].to_pylist()
    part.has_image = part.samples["has_image"].to_pylist()
    return part
