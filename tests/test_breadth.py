"""STS on every image-text-to-text type of transformers: like the sequence that was shortened by
hand, and the model without its layers, or refused with its reason."""

import pytest
import torch
from by_hand import assert_same, backward, by_hand, decoder_layers, pooled
from tiny import LAYERS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES,
)
from zoo import ZOO

from sts import LDS, VTC, sparsify
from by_hand import KEEP

ROWS = [[3, "big", 5, "small", 6, 7, 8], [9, 10, 11, 12], ["small", 14, 15, 16]]
EVERY = pytest.mark.parametrize("name", sorted(ZOO))


@EVERY
def test_an_idle_scheme_is_the_model_itself(name):
    model, batch = ZOO[name].build(), ZOO[name].batch(ROWS)
    expected = backward(model, batch)
    sparsify(model).begin_step(0)
    assert_same(backward(model, batch), expected)


@EVERY
def test_vtc_is_the_sequence_shortened_by_hand(name):
    case = ZOO[name]
    model, batch = case.build(), case.batch(ROWS)
    expected = by_hand(model, case, ROWS, batch, pooled)
    scheme = sparsify(model, VTC("avgpool2d", keep=KEEP))
    scheme.begin_step(0)
    assert_same(backward(model, batch), expected)
    assert scheme.metrics()["keep_ratio"] < 0.6


@EVERY
def test_lds_is_the_model_without_those_layers(name):
    case = ZOO[name]
    model, batch = case.build(), case.batch(ROWS)
    lds = LDS("sts", rate=0.6, epsilon=0.5)
    scheme, ever = sparsify(model, lds=lds, total_steps=8, seed=3), set()
    for step in (0, 1, 2):
        scheme.begin_step(step)
        found, off = backward(model, batch), scheme.skipped
        ever |= off
        for layer in off:
            assert all(p.grad is None for p in decoder_layers(model)[layer].parameters())
        model.eval()  # the scheme doesn't act
        assert_same(found, by_hand(model, case, ROWS, batch, None, [off] * 3))
        model.train()
    assert ever >= {0, LAYERS - 1}  # none is protected
