"""STS in a transformers Trainer: python examples/trainer.py MODEL_FOLDER OUTPUT_FOLDER"""

import sys

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from sts import STS_LDS, STS_VTC, SparseCallback

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)  # yours goes here
prompt = f"user: {processor.image_token}\nwhat color is the circle? assistant: red"
batch = processor(images=[image], text=[prompt], return_tensors="pt")
sample = {name: value[0] for name, value in batch.items()}
sample["labels"] = sample["input_ids"].clone()
sample["labels"][:-1] = -100  # only the answer is learnt

# Kinds and formula are the paper's, the values (keep ratio, rate, epsilon) are our choice.
callback = SparseCallback(model, STS_VTC, STS_LDS)
arguments = TrainingArguments(sys.argv[2], max_steps=8, logging_steps=1, report_to="none")
Trainer(
    model, arguments, default_data_collator, train_dataset=[sample] * 64, callbacks=[callback]
).train()
model.save_pretrained(sys.argv[2])
