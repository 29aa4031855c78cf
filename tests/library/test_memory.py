"""What a forward holds for its backward is never more than the untouched model holds."""

import pytest
import torch
import transformers as hf
from tiny import case, flat, text, vit
from torch.autograd.graph import saved_tensors_hooks

from sts import LDS, VTC, sparsify, unsparsify
from sts.vtc import FAMILIES

CASE = case(
    "Llava",
    vit(hf.CLIPVisionConfig, 32),
    text(hf.LlamaConfig, hidden_size=96, head_dim=32, intermediate_size=192),
    {"big": [(8, 8, False)]},
    flat(3, 32, 32),
    image_seq_length=64,
)
ROWS = [["big", *range(5, 25)], ["big", *range(5, 20)], ["big", *range(5, 25)], ["big", 7, 8, 9]]
SETTINGS = {
    "idle": (None, None),
    **{
        f"{kind} {keep}": (VTC(kind, keep=keep), None)
        for keep in (0.5, 0.95)
        for kinds in FAMILIES.values()
        for kind in kinds
    },
    "layer": (None, LDS("layerdrop", rate=0.25, draw="fixed_count")),
    "layer, rescaled": (None, LDS("layerdrop", rate=0.25, draw="fixed_count", rescale=True)),
    "samples": (None, LDS("layerdrop", rate=0.25, unit="samples")),
    "samples, rescaled": (None, LDS("layerdrop", rate=0.25, unit="samples", rescale=True)),
    "tokens": (None, LDS("random_ltd", rate=0.2)),
    "backward": (None, LDS("dropbp", rate=0.3)),
    "block influence": (None, LDS("block_influence", rate=0.3)),
    "both": (VTC("uniform", keep=0.5), LDS("layerdrop", rate=0.25, unit="samples")),
}


def held(model, batch) -> int:
    """Bytes that a forward keeps for its backward, without the weights."""
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    model.zero_grad()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights)


NEW, OLD = {"use_reentrant": False}, {"use_reentrant": True}


@pytest.mark.parametrize("frozen", [True, False], ids=["align", "instruct"])
@pytest.mark.parametrize(
    ("checkpointing", "dtype"),
    [
        (None, torch.float32),
        (NEW, torch.float32),
        pytest.param(OLD, torch.float32, marks=pytest.mark.slow),
        pytest.param(NEW, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_no_setting_holds_more_than_the_plain_model(dtype, frozen, checkpointing):
    model, batch = CASE.build(dtype), CASE.batch(ROWS)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    if frozen:
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    if checkpointing:
        model.activation_checkpointing_enable(checkpointing)
    plain, result = held(model, batch), {}
    with sparsify(model) as scheme:  # the probe of the forward comes once
        scheme.begin_step(0)
        held(model, batch)
    for name, setting in SETTINGS.items():
        scheme = sparsify(model, *setting, seed=1)
        scheme.begin_step(1)
        result[name] = held(model, batch) / plain
        unsparsify(model)
    assert {name: share for name, share in result.items() if share > 1} == {}
    assert result["uniform 0.5"] < 0.75 and result["layer"] < 0.9
