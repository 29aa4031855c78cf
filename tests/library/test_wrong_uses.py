"""What a user may get wrong: each has an error that names the argument, its value and the fix."""

import math

import pytest
import torch
from tiny import CASES
from torch import nn
from transformers import LlamaForCausalLM

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


def forward(change, vtc=None, lds=None):
    model, _ = begun(vtc, lds)
    batch = CASES["llava"].batch(ROWS)
    model(**batch | change(batch))


SOME = VTC("uniform", keep=0.25)
SETTINGS = {  # of nothing but themselves
    lambda: VTC(keep=0.25): r"VTC.keep=0.25: expected 1.0 where VTC.kind is none",
    lambda: VTC("mean", keep=0.25): r"VTC.kind='mean': expected one of none, uniform",
    lambda: VTC(0.25): r"VTC.kind=0.25: expected one of",
    lambda: VTC(LDS(**HALF)): r"VTC.kind=LDS.*: expected one of",
    lambda: VTC("uniform", keep=0): r"VTC.keep=0: expected a number in \(0, 1\]",
    lambda: VTC("uniform", keep=25): r"VTC.keep=25: expected a number in \(0, 1\]",
    lambda: VTC("uniform", keep="0.25"): r"VTC.keep='0.25': expected a number",
    lambda: VTC("uniform", keep=True): r"VTC.keep=True: expected a number",
    lambda: VTC("uniform", keep=math.nan): r"VTC.keep=nan: expected a number",
    lambda: VTC("uniform", 0.25, schedule="linear"): r"VTC.schedule='linear': expected one of",
    lambda: VTC("uniform", 0.25, dense_tail=10): r"VTC.dense_tail=10: expected a number in \[0",
    lambda: VTC("uniform", 0.25, positions="first"): r"VTC.positions='first': expected one of",
    lambda: VTC("text_guided", 0.25, text="answer"): r"VTC.text='answer': expected one of",
    lambda: LDS(rate=0.5): r"LDS.rate=0.5: expected 0.0 where LDS.policy is none",
    lambda: LDS("uniform", rate=0.5): r"LDS.policy='uniform': expected one of none, sts",
    lambda: LDS(0.5): r"LDS.policy=0.5: expected one of",
    lambda: LDS("sts", rate=1.5): r"LDS.rate=1.5: expected a number in \[0, 1\]",
    lambda: LDS("sts", rate="0.5"): r"LDS.rate='0.5': expected a number",
    lambda: LDS("sts", rate=0.5, epsilon=2): r"LDS.epsilon=2: expected a number in \[-1, 1\]",
    lambda: LDS("sts", rate=0.9, epsilon=0.5): r"LDS.rate=0.9: expected at most 0.666",
    lambda: LDS(**HALF, schedule="down"): r"LDS.schedule='down': expected one of",
    lambda: LDS(**HALF, depth="deep"): r"LDS.depth='deep': expected one of",
    lambda: LDS(**HALF, draw="coin"): r"LDS.draw='coin': expected one of",
    lambda: LDS(**HALF, unit="rows"): r"LDS.unit='rows': expected one of",
    lambda: LDS(**HALF, unit="tokens"): r"LDS.draw='independent': expected one of fixed_count",
    lambda: LDS(**HALF, protect_first=-1): r"LDS.protect_first=-1: expected 0 or more",
    lambda: LDS(**HALF, protect_last=1.5): r"LDS.protect_last=1.5: expected 0 or more",
    lambda: LDS(**HALF, clock="days"): r"LDS.clock='days': expected one of",
    lambda: LDS(**HALF, rescale="yes"): r"LDS.rescale='yes': expected true or false",
    lambda: LDS("random_ltd", rate=0.5, rescale=True): r"LDS.rescale=True: expected false for unit",
    lambda: LDS("block_influence", rate=0.5, ema=1): r"LDS.ema=1: expected a number in \[0, 1\)",
}
CALLS = {
    lambda: sparsify(build(), VTC("avgpool2d")): r"VTC.keep=1.0: expected less than 1.*avgpool2d",
    lambda: sparsify(build(), lds=LDS("sts"), total_steps=9): r"LDS.rate=0.0: expected more.*sts",
    lambda: sparsify(build(), LDS(**HALF)): r"vtc=LDS\(.*: expected a VTC\(...\), before the LDS",
    lambda: sparsify(build(), lds=SOME): r"lds=VTC\(.*: expected an LDS\(...\), after the VTC",
    lambda: sparsify(build(), "uniform"): r"vtc='uniform': expected a VTC\(",
    lambda: sparsify(SOME, build()): r"vtc='LlavaFor.*: expected a VTC\(",
    lambda: sparsify(type(build())): r"model='type': expected a model of transformers",
    lambda: sparsify(None, SOME): r"model='NoneType': expected a model of transformers",
    lambda: sparsify(nn.Linear(2, 2)): r"Linear.*not an image-text-to-text model",
    lambda: sparsify(build().model): r"LlavaModel.*language head",
    lambda: sparsify(build().model.language_model): r"LlamaModel.*not an image-text-to-text",
    lambda: sparsify(LlamaForCausalLM(build().config.text_config)): r"LlamaForCausalLM.*not an",
    lambda: sparsify(build(), SOME, total_steps="9"): r"total_steps='9': expected a number of opt",
    lambda: sparsify(build(), SOME, total_steps=9.5): r"total_steps=9.5: expected a number of opt",
    lambda: sparsify(build(), SOME, total_steps=0): r"total_steps=0: expected the number of opt",
    lambda: sparsify(build(), lds=LDS("sts", rate=0.5)): r"total_steps=None: expected the number",
    lambda: sparsify(
        build(), lds=LDS("sts", rate=0.5, clock="epochs"), total_steps=9
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
    lambda: forward(lambda b: {"pixel_values": None}, SOME): r"32 image placeholders.*no images",
    lambda: forward(
        lambda b: {"labels": None}, VTC("text_guided", 0.25, text="prompt")
    ): r"labels=None: expected labels, for VTC.text='prompt'",
}


@pytest.mark.parametrize("wrong", [*SETTINGS, *CALLS, *BATCHES])
def test_a_wrong_use_is_an_error_that_says_what_is_right(wrong):
    with pytest.raises(ValueError, match={**SETTINGS, **CALLS, **BATCHES}[wrong]):
        wrong()


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
