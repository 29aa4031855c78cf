"""Held-out answer loss: what a model in training makes of conversations that it is not trained on.

In nats an answer token, by dense inference: all visual tokens, all layers, no dropout, no gradient.
It is measured between two steps, and no weight and no draw depends on it. A data set gives its rows
in a split of its own, `validation`, whose ids are `<skill>/<number>`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy

from sts.pipeline.config import VALIDATION, StageConfig
from sts.pipeline.data.collator import Conversations, collate
from sts.pipeline.files import read_json, write_text_atomic
from sts.pipeline.run.weights import HELD_OUT, read_held_out
from sts.pipeline.train.feed import load_split
from sts.pipeline.train.job import Job
from sts.pipeline.train.parallel import rank
from sts.settings import IGNORE_INDEX

BATCH_TOKENS = 4096  # of a batch, whose logits are all computed

Measure = Callable[[int], None]  # after so many steps


def held_out_steps(block: StageConfig) -> set[int]:
    """The numbers of steps taken after which a stage's held-out loss is measured."""
    times = block.validations if block.split == "instruct" else 0
    return {math.ceil(block.steps * (time + 1) / times) for time in range(times)}


def held_out(
    job: Job, model: nn.Module, processor: Any, accelerator: Accelerator, first: int
) -> Measure:
    """What measures the held-out loss of a training where it is to be, and writes it.

    Args:
        job: The training; without data that have a validation split nothing is measured.
        model: As this process holds it, without the wrapper of data-parallel processes.
        processor: Of the model.
        accelerator: Of the processes, which all measure a part.
        first: The step that the training goes on with: later lines of the file are of a lost
            attempt.
    """
    data = [file for file in job.data if VALIDATION in read_json(file)["splits"]]
    steps = held_out_steps(job.block) if data else set()
    if not steps:
        return lambda _: None
    samples = load_split(job, processor, data, VALIDATION)
    batches = _batches(samples, _skills(samples))
    # as many forwards on every process, as shards are gathered by all; the last ones count once
    filled = batches + [("", batches[-1][1])] * (-len(batches) % accelerator.num_processes)
    mine = filled[accelerator.process_index :: accelerator.num_processes]
    names = list(dict.fromkeys(skill for skill, _ in batches))
    forward = partial(_sums, model, samples, processor, accelerator, mine, names, job.precision)
    rows = [row for row in read_held_out(job.folder) if row["step"] <= first]

    def measure(step: int) -> None:
        if step in steps:
            sums = dict(zip(names, forward(), strict=True))
            rows.append({"step": step, **_losses(sums)})
            if rank() == 0:
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                write_text_atomic(job.folder / HELD_OUT, lines)

    return measure


def _skills(samples: Conversations) -> list[str]:
    """The skill of each sample, from its row's id."""
    ids = samples.images.with_format(None)["id"]
    return [ids[row].partition("/")[0] for row in samples.samples["row"].to_pylist()]


def _batches(samples: Conversations, skills: list[str]) -> list[tuple[str, list[int]]]:
    """Samples of a skill that go through the model together."""
    size = max(1, BATCH_TOKENS // max(samples.lengths))
    by_skill: dict[str, list[int]] = defaultdict(list)
    for index, skill in enumerate(skills):
        by_skill[skill].append(index)
    return [
        (skill, indices[start : start + size])
        for skill, indices in by_skill.items()
        for start in range(0, len(indices), size)
    ]


@torch.no_grad()
def _sums(
    model: nn.Module,
    samples: Conversations,
    processor: Any,
    accelerator: Accelerator,
    batches: list[tuple[str, list[int]]],
    names: list[str],
    precision: str,
) -> list[list[float]]:
    """Of each skill the loss of all answer tokens on all processes, and their number."""
    device = accelerator.device
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    with _in_evaluation(model), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
        for skill, indices in batches:
            batch = collate(processor, [samples[index] for index in indices]).to(device)
            targets = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            is_answer = targets != IGNORE_INDEX
            loss = cross_entropy(logits[is_answer].float(), targets[is_answer], reduction="sum")
            if skill:
                sums[names.index(skill)] += torch.stack([loss, is_answer.sum()]).double()
    return accelerator.reduce(sums, "sum").tolist()


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and then each module as it was."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # no backward does it: a state would miss what the root holds


def _losses(sums: Mapping[str, list[float]]) -> dict[str, Any]:
    """Means over answer tokens, of all and of each skill, from (loss, tokens)."""
    loss, tokens = map(sum, zip(*sums.values(), strict=True))
    return {"loss": loss / tokens, "skills": {name: part / n for name, (part, n) in sums.items()}}
