"""STS on every image-text-to-text type of transformers: like the sequence that was shortened by
hand, and the model without its layers, or refused with its reason."""

import re
from types import SimpleNamespace

import pytest
import torch
from by_hand import (
    KEEP,
    assert_same,
    backward,
    by_hand,
    decoder_layers,
    pooled,
    skipping_is_by_hand,
)
from cases import SIDE_BY_SIDE
from tiny import CASES, LAYERS
from zoo import NO_BACKWARD, PAGE, TYPES, ZOO, table

from sts import LDS, VTC, sparsify
from sts.architectures import NO_LDS, NO_VTC, REFUSED
from sts.draws import digest
from sts.lds.units import kept_rows

ROWS = [[3, "big", 5, "small", 6, 7, 8], [9, 10, 11, 12], ["small", 14, 15, 16]]
# How many images there are is said by nothing but the tokens between them
PATCHES = ("fuyu", "inkling_mm_model")
VIEWS = ("deepseek_ocr2", "unlimited_ocr", "step3p7")
# The model's own positions take a run of placeholders for one image, and its forward raises
ONE_RUN = ("cohere_compass", "cosmos3_edge", "cosmos3_omni", "ernie4_5_vl_moe", "glm46v", "glm4v",
           "glm4v_moe", "glm_ocr", "glmga", "hunyuan_vl", "minicpmv4_7", "paddleocr_vl", "qwen3_5",
           "qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp")  # fmt: skip
NO_PARTS = ("gemma3n", "gemma4", "glm5_next", "minimax_m3_vl", "mistral_large4")
# The types of tiny.py are those of test_architectures.py
OTHERS = sorted(set(ZOO) - set(CASES))
EVERY = pytest.mark.parametrize("name", OTHERS)
FOR_LDS = pytest.mark.parametrize("name", sorted(set(OTHERS) - set(NO_LDS)))


@EVERY
@pytest.mark.slow
def test_an_idle_scheme_is_the_model_itself(name):
    model, batch = ZOO[name].build(), ZOO[name].batch(ROWS)
    expected = backward(model, batch)
    sparsify(model).begin_step(0)
    assert_same(backward(model, batch), expected)


@EVERY
def test_vtc_and_lds_are_the_sequence_and_the_layers_taken_out_by_hand(name):
    """First both, then LDS alone; with images side by side, no token between them."""
    rows = ROWS if name in PATCHES + VIEWS + ONE_RUN else SIDE_BY_SIDE
    vtc = None if name in NO_VTC else VTC("avgpool2d", keep=KEEP, dense_tail=0.5)
    lds = LDS() if name in NO_LDS else LDS("layerdrop", rate=0.5, draw="fixed_count")
    ever = skipping_is_by_hand(ZOO[name], rows, vtc, pooled, lds, steps=(2, 4))
    stored = name in ("gemma3n", "gemma4")  # later layers read what the first two store
    assert ever == (set() if name in NO_LDS else {2, 3} if stored else set(range(LAYERS)))


@pytest.mark.parametrize("name", VIEWS)
def test_images_with_views_are_refused_side_by_side(name):
    model, batch = ZOO[name].build(), ZOO[name].batch(SIDE_BY_SIDE)
    sparsify(model, VTC("avgpool2d", keep=KEEP)).begin_step(0)
    with pytest.raises(ValueError, match=r"image placeholders=\[.*of 3 images, with other tokens"):
        model(**batch)


@FOR_LDS
@pytest.mark.slow
@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_a_part_of_a_layer_is_that_part_or_refused(name, unit):
    """Samples: as each row through its own layers. Tokens: finite, and each layer sees some."""
    case = ZOO[name]
    model, batch = case.build(), case.batch(ROWS)
    lds = LDS("layerdrop", rate=0.5, unit=unit, draw="fixed_count")
    if name in NO_PARTS:
        with pytest.raises(ValueError, match=f"LDS.unit={unit!r}"):
            sparsify(model, lds=lds)
        return
    scheme = sparsify(model, lds=lds, seed=4)
    scheme.begin_step(0)
    result, work = backward(model, batch), scheme.metrics()["work"]
    share = {"samples": "rows", "tokens": "tokens"}[unit]
    assert torch.isfinite(result[0]) and all(share in of_layer for of_layer in work)
    if unit == "tokens":
        return
    drawn_by = digest(batch["input_ids"])  # what is drawn in a micro-batch
    decisions = [scheme.skipper.decision_of(i, lambda: drawn_by) for i in range(LAYERS)]
    kept = [kept_rows(3, decision).tolist() for decision in decisions]
    off = [[layer for layer in range(LAYERS) if row not in kept[layer]] for row in range(3)]
    model.eval()
    assert_same(result, by_hand(model, case, ROWS, batch, off=off))


@FOR_LDS
@pytest.mark.slow
def test_dropbp_changes_no_output(name):
    case = ZOO[name]
    model, batch = case.build(), case.batch(ROWS)
    if name in NO_BACKWARD:
        with pytest.raises(ValueError, match=r"LDS.unit='backward'.*no attention and MLP"):
            sparsify(model, lds=LDS("dropbp", rate=0.4))
        return
    expected, dense = backward(model, batch)
    scheme = sparsify(model, lds=LDS("dropbp", rate=0.7), seed=1)
    scheme.begin_step(0)
    loss, grads = backward(model, batch)
    torch.testing.assert_close(loss, expected)
    assert scheme.decision.off and dense.keys() - grads.keys()
    for layer, share in scheme.decision.off:
        name = scheme.skipper.decision_of(layer).sublayers[share]
        sublayer = decoder_layers(model)[layer].get_submodule(name)
        assert all(p.grad is None for p in sublayer.parameters())


def test_the_page_says_what_is_carried():
    assert PAGE.read_text() == table(), "write it anew: PYTHONPATH=. python tests/zoo.py"
    assert len(set(ZOO) - {"pixtral"} - set(NO_VTC) - set(NO_LDS)) >= 40


def test_every_type_of_transformers_is_carried_or_refused_with_its_reason():
    assert set(ZOO) - {"pixtral"} | set(REFUSED) == set(TYPES)  # Pixtral 12B is a LLaVA
    for name, reason in REFUSED.items():
        model = torch.nn.Module()
        model.config = SimpleNamespace(model_type=name)
        with pytest.raises(ValueError, match=re.escape(reason)):
            sparsify(model)
    for name, reason in NO_VTC.items():
        with pytest.raises(ValueError, match=re.escape(reason)):
            sparsify(ZOO[name].build(), VTC("uniform", keep=0.25))
    for name, reason in NO_LDS.items():
        with pytest.raises(ValueError, match=re.escape(reason)):
            sparsify(ZOO[name].build(), lds=LDS("layerdrop", rate=0.5))
