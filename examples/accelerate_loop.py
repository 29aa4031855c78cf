"""STS with accelerate: accelerate launch -m examples.accelerate_loop MODEL_FOLDER"""

import sys

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from transformers import AutoModelForImageTextToText, AutoProcessor

from sts import STS_LDS, STS_VTC, sparsify

STEPS, MICRO_BATCHES = 4, 2
# A skipped layer has no gradient: without this, DDP waits for it.
ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES, kwargs_handlers=[ddp])
# Weights are not fp16, where AdamW's epsilon is 0; `mixed_precision="bf16"` is right on a GPU.
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32).train()
processor = AutoProcessor.from_pretrained(sys.argv[1])
image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)  # yours goes here
prompt = f"user: {processor.image_token}\nwhat color is the circle? assistant: red"
batch = processor(images=[image], text=[prompt], return_tensors="pt").to(accelerator.device)
batch["labels"] = batch["input_ids"].clone()
batch["labels"][:, :-1] = -100  # only the answer is learnt
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

# Accelerate has no callbacks: the scheme goes onto the model before or after `prepare`.
with sparsify(model, STS_VTC, STS_LDS, total_steps=STEPS) as scheme:
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        scheme.begin_step(step)  # once an optimizer step, on every rank
        for _ in range(MICRO_BATCHES):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"{step}: loss {loss.item():.3f}", scheme.metrics())
