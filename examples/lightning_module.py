"""STS in Lightning: python -m examples.lightning_module MODEL_FOLDER OUTPUT_FOLDER"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForImageTextToText, AutoProcessor

from sts import STS_LDS, STS_VTC
from sts.hosts.lightning import SparseTraining

processor = AutoProcessor.from_pretrained(sys.argv[1])
image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)  # yours goes here
prompt = f"user: {processor.image_token}\nwhat color is the circle? assistant: red"


def collate(samples: list[dict]) -> dict:
    """A batch of any model's: only its processor knows how images are put together."""
    images, text = [[x["image"]] for x in samples], [x["text"] for x in samples]
    batch = processor(images=images, text=text, return_tensors="pt")
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100  # only the answer is learnt
    return {**batch, "labels": labels}


class Answers(LightningModule):
    """Trains a model on answers."""

    def __init__(self) -> None:
        super().__init__()
        # not fp16, in which AdamW's epsilon is 0
        model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)
        self.model = model.train()

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        """The loss, which is the model's own."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all weights."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


# Kinds and formula are the paper's, the values (keep ratio, rate, epsilon) are our choice.
trainer = Trainer(
    max_steps=4,
    accumulate_grad_batches=2,
    callbacks=[SparseTraining(STS_VTC, STS_LDS)],
    logger=CSVLogger(sys.argv[2]),
    log_every_n_steps=1,
    accelerator="auto",
)
data = torch.utils.data.DataLoader([{"image": image, "text": prompt}] * 16, 2, collate_fn=collate)
trainer.fit(Answers(), data)
print(trainer.callback_metrics)
