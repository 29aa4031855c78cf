"""STS in a transformers Trainer: python -m examples.trainer MODEL_FOLDER OUTPUT_FOLDER"""

import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from sts import STS_LDS, STS_VTC, SparseCallback

# Not in fp16, as many a checkpoint is stored: AdamW's epsilon, 1e-8, is 0 there, and weights nan.
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=dtype)
processor = AutoProcessor.from_pretrained(sys.argv[1])
prompt = f"user: {processor.image_token}\nwhat color is the circle? assistant: red"
image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)  # yours goes here


def collate(samples: list[dict]) -> dict:
    """A batch of any model's: only its processor knows how images are put together."""
    images, text = [[x["image"]] for x in samples], [x["text"] for x in samples]
    batch = processor(images=images, text=text, return_tensors="pt")
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100  # only the answer is learnt
    return {**batch, "labels": labels}


# Kinds and formula are the paper's, the values (keep ratio, rate, epsilon) are our choice.
callback = SparseCallback(model, STS_VTC, STS_LDS)
arguments = TrainingArguments(sys.argv[2], max_steps=8, logging_steps=1, report_to="none",
                              remove_unused_columns=False)  # fmt: skip
samples = [{"image": image, "text": prompt}] * 64
Trainer(
    model, arguments, collate, samples, processing_class=processor, callbacks=[callback]
).train()
model.save_pretrained(sys.argv[2])
processor.save_pretrained(sys.argv[2])
