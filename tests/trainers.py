"""A tiny model, and a Trainer of transformers for one."""

from pathlib import Path

import torch
from tiny import CASES
from transformers import Trainer, TrainingArguments, default_data_collator

from sts import LDS, VTC, SparseCallback

VISUAL = VTC("uniform", keep=0.25)
ROWS = [["big", 5, 6, 7, 8], ["big", 9, 10, 11, 12]]
USUAL = {"per_device_train_batch_size": 2, "use_cpu": True, "logging_steps": 1,
         "report_to": "none", "disable_tqdm": True}  # fmt: skip


def tiny(name="llava"):
    model, batch = CASES[name].build(torch.float32), CASES[name].batch(ROWS)
    batch["pixel_values"] = batch["pixel_values"].float()
    return model, batch


def samples(batch: dict, times: int = 4) -> list[dict]:
    """The rows of a batch of two as a data set, some times over."""
    return [{name: value[i] for name, value in batch.items()} for i in (0, 1)] * times


def trainer_of(model, batch: dict, folder: Path, callbacks=(), times: int = 4, **more) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(str(folder), **USUAL | more),
        default_data_collator,
        train_dataset=samples(batch, times),
        callbacks=list(callbacks),
    )


def trainer_for(folder: Path, lds: LDS, vtc: VTC = VISUAL, **settings) -> Trainer:
    model, batch = tiny("smolvlm")  # a Trainer of transformers 5.23 can't resume a LLaVA: it looks
    # for the weights under other names than it saved them under
    settings = {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-3} | settings
    callbacks = [SparseCallback(model, vtc, lds, seed=5)]
    return trainer_of(model, batch, folder, callbacks, times=9, **settings)
