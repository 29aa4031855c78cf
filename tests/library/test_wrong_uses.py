"""What a user may get wrong: each has an error that names the argument, its value and the fix."""

from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from tiny import CASES, SQUARE, case, flat, text, vit
from torch import nn
from transformers import LlamaForCausalLM
from zoo import ZOO

from sts import LDS, VTC, SparseCallback, sparsify, unsparsify

ROWS = [["big", 5, 6, 7, 8], ["big", 9, 10, 11]]
HALF = {"policy": "layerdrop", "rate": 0.5}


def build():
    return CASES["llava"].build()


def begun(vtc=None, lds=None, **more):
    model = build()
    scheme = sparsify(model, vtc, lds, **more)
    scheme.begin_step(0)
    return model, scheme


def next_features():
    """LLaVA-NeXT with what its tower gave in the place of pixels."""
    case = CASES["llava_next"]
    model, batch = case.build(), case.batch(ROWS)
    features = model.get_image_features(batch.pop("pixel_values"), batch.pop("image_sizes"))
    sparsify(model, SOME).begin_step(0)
    model(**batch, mm_encoder_outputs={"image": features})


def forward(change, vtc=None, lds=None):
    model, _ = begun(vtc, lds)
    batch = CASES["llava"].batch(ROWS)
    model(**batch | change(batch))


def tuples():
    model = build()
    model.config.return_dict = False
    return model


SOME = VTC("uniform", keep=0.25)
CALLS = {
    lambda: sparsify(build(), VTC("avgpool2d")): r"VTC.keep=1.0: expected less than 1.*avgpool2d",
    lambda: LDS("sts", rate=0.5): r"LDS.epsilon=0.0: .*'slope' \(row sts: 1.0\); depth='uniform'",
    lambda: sparsify(build(), lds=LDS("sts"), total_steps=9): r"LDS.rate=0.0: expected more.*sts",
    lambda: sparsify(build(), LDS(**HALF)): r"vtc=LDS\(.*: expected a VTC\(...\), before the LDS",
    lambda: sparsify(build(), lds=SOME): r"lds=VTC\(.*: expected an LDS\(...\), after the VTC",
    lambda: sparsify(build(), "uniform"): r"vtc='uniform': expected a VTC\(",
    lambda: sparsify(SOME, build()): r"vtc='LlavaFor.*: expected a VTC\(",
    lambda: sparsify(type(build())): r"model='type': expected a model of transformers",
    lambda: sparsify(None, SOME): r"model='NoneType': expected a model of transformers",
    lambda: sparsify(tuples()): r"config.return_dict=False: expected True, as most types",
    lambda: sparsify(nn.Linear(2, 2)): r"Linear.*not an image-text-to-text model",
    lambda: sparsify(build().model): r"LlavaModel.*language head",
    lambda: sparsify(build().model.language_model): r"LlamaModel.*not an image-text-to-text",
    lambda: sparsify(LlamaForCausalLM(build().config.text_config)): r"LlamaForCausalLM.*not an",
    lambda: sparsify(build(), SOME, total_steps="9"): r"total_steps='9': expected a number of opt",
    lambda: sparsify(build(), SOME, total_steps=9.5): r"total_steps=9.5: expected a number of opt",
    lambda: sparsify(build(), SOME, total_steps=0): r"total_steps=0: expected the number of opt",
    lambda: sparsify(
        build(), lds=LDS("sts", 0.5, epsilon=1)
    ): r"total_steps=None: expected the number",
    lambda: sparsify(
        build(), lds=LDS("sts", rate=0.5, epsilon=1, clock="epochs"), total_steps=9
    ): r"steps_per_epoch=None: expected the number of optimizer steps of an epoch",
    lambda: sparsify(build(), SOME, seed="a"): r"seed='a': expected a whole number",
    lambda: sparsify(build(), SOME, dense_step="ok"): r"dense_step='ok': expected one of",
    lambda: sparsify(begun(SOME)[0], SOME): r"has a scheme already: call unsparsify\(model\)",
    lambda: unsparsify(build()): r"LlavaFor.* has no scheme: sparsify\(model\) puts one on it",
    lambda: sparsify(build(), lds=LDS(**HALF, protect_first=5)): r"protect_first=5: .*most 4",
    lambda: sparsify(build(), lds=LDS("layerdrop", rate=0.9)): r"LDS.rate=0.9: .*most 0.75",
    lambda: begun(SOME, total_steps=9)[1].decide(9): r"step=9: expected 0..8 \(total_steps=9",
    lambda: begun(SOME)[1].decide(-1): r"step=-1: expected 0..inf",
    lambda: begun(SOME)[1].decide(1.5): r"step=1.5: expected the number of the optimizer step",
    lambda: begun()[1].load_state_dict(None): r"state=None: expected a state_dict\(\) of a scheme",
    lambda: SparseCallback(SOME): r"model='VTC': expected a model of transformers",
    lambda: SparseCallback(build(), "uniform"): r"vtc='uniform': expected a VTC",
    lambda: SparseCallback(build(), lds=SOME): r"lds=VTC\(.*: expected an LDS",
}
BATCHES = {
    lambda: forward(lambda b: {"labels": b["labels"][:, 1:]}): r"labels.shape=\[2, 19\].*2, 20",
    lambda: forward(lambda b: {"labels": b["labels"][0]}): r"labels.shape=\[20\].*batch",
    lambda: forward(lambda b: {"labels": b["labels"].tolist()}): r"labels='list': .* a tensor",
    lambda: forward(lambda b: {"labels": b["labels"].double()}): r"labels.dtype='torch.float64'",
    lambda: forward(
        lambda b: {"attention_mask": torch.ones(2, 3)}, SOME
    ): r"attention_mask.shape=\[2, 3\]: expected \[2, 20\]",
    lambda: (
        next_features()
    ): r"image_sizes=None: expected what the processor gives: VTC needs it, also without pixels",
    lambda: forward(lambda b: {"pixel_values": None}, SOME): r"32 image placeholders.*no images",
    lambda: forward(
        lambda b: {"pixel_values": b["pixel_values"][:1]}, SOME
    ): r"Image features and image tokens do not match|placeholders",
    lambda: forward(
        lambda b: {"position_ids": torch.arange(3)[None]}, SOME
    ): r"position_ids.shape=\[1, 3\]: expected \[2, 20\]",
    lambda: forward(
        lambda b: {"labels": None}, VTC("text_guided", 0.25, text="prompt")
    ): r"labels=None: expected labels, for VTC.text='prompt'",
}


@pytest.mark.parametrize("wrong", [*CALLS, *BATCHES])
def test_a_wrong_use_is_an_error_that_says_what_is_right(wrong):
    with pytest.raises(ValueError, match={**CALLS, **BATCHES}[wrong]):
        wrong()


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (hf.FalconH1Config, {"mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8}),
        (hf.BambaConfig, {"mamba_n_heads": 6, "mamba_d_head": 8, "attn_layer_indices": [1]}),
    ],
)
def test_layers_that_return_more_than_the_hidden_state_are_refused(config, more):
    language = text(config, mamba_d_state=8, mamba_n_groups=1, **more)
    model = case(
        "Llava", vit(hf.CLIPVisionConfig), language, SQUARE, flat(3, 16, 16), image_seq_length=16
    ).build()
    sparsify(model, SOME)
    unsparsify(model)
    with pytest.raises(ValueError, match=r"LDS.rate=0.5: expected 0.0: .*Layer returns more than"):
        sparsify(model, lds=LDS(**HALF))


@pytest.mark.parametrize("name", ["llava", "blip-2"])
def test_the_forward_called_directly_is_sparse_or_refused(name):
    """It passes the outer hooks by, and BLIP-2 has no base model with hooks."""
    cases = CASES if name in CASES else ZOO
    model, batch = cases[name].build(), cases[name].batch([["big", 5, 6, 7, 8]])
    scheme = sparsify(model, VTC("avgpool1d", keep=0.25))
    scheme.begin_step(0)
    with (
        pytest.raises(RuntimeError, match=r"call model\(...\), not")
        if name == "blip-2"
        else (nullcontext())
    ):
        model.forward(**batch)
        assert scheme.metrics()["keep_ratio"] == 0.25


def test_data_parallel_is_refused():
    model, _ = begun(SOME)
    replica = model._replicate_for_data_parallel()  # as nn.DataParallel makes them
    with pytest.raises(RuntimeError, match=r"DataParallel.*use DDP"):
        replica(**CASES["llava"].batch(ROWS))


def test_a_forward_before_a_step_and_a_step_after_unsparsify_are_errors():
    model = build()
    scheme = sparsify(model, SOME)
    with pytest.raises(RuntimeError, match=r"call scheme.begin_step\(step\) before the forwards"):
        model(**CASES["llava"].batch(ROWS))
    unsparsify(model)
    with pytest.raises(RuntimeError, match=r"off its model: call sparsify\(model, ...\) again"):
        scheme.begin_step(0)
    with pytest.raises(ValueError, match="has no scheme"):
        unsparsify(model)
