"""STS in a training loop of your own: python -m examples.own_loop MODEL_FOLDER"""

import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sts import STS_LDS, STS_VTC, sparsify

STEPS = 8
# Not in fp16, as many a checkpoint is stored: AdamW's epsilon, 1e-8, is 0 there, and weights nan.
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=dtype).train()
processor = AutoProcessor.from_pretrained(sys.argv[1])
image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)  # yours goes here
prompt = f"user: {processor.image_token}\nwhat color is the circle? assistant: red"
batch = processor(images=[image], text=[prompt], return_tensors="pt")
batch["labels"] = batch["input_ids"].clone()
batch["labels"][:, :-1] = -100  # only the answer is learnt
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

# Kinds and formula are the paper's, the values (keep ratio, rate, epsilon) are our choice.
with sparsify(model, STS_VTC, STS_LDS, total_steps=STEPS) as scheme:
    for step in range(STEPS):
        scheme.begin_step(step)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{step}: loss {loss.item():.3f}", scheme.metrics())
