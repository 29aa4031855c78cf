"""STS on every architecture: each family of VTC and each unit of LDS against the same model fed by
hand, row by row: a sequence that was shortened here, and layers that do nothing.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from by_hand import (
    CLOSE,
    KEEP,
    about_the_text,
    assert_same,
    backward,
    by_hand,
    decoder_layers,
    influence,
    of_language_model,
    pooled,
    positive,
    skipping_is_by_hand,
    strided,
    the_positive,
)
from cases import ALIKE, CLASS_TOKEN, EVERY, FOUR, MIXED, ROWS, SIDE_BY_SIDE
from tiny import CASES, IMAGE, LAYERS, PAD
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import ZOO

from sts import LDS, VTC, sparsify, unsparsify
from sts.architectures import ARCHITECTURES, architecture_of
from sts.vtc import FAMILIES, KINDS

SIDES = pytest.mark.parametrize("side", ["right", "left"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
CHECKPOINTING = ({"use_reentrant": True}, {"use_reentrant": False})


# ---- the entries ---------------------------------------------------------------------------------


def test_every_entry_has_a_tiny_model():
    assert set(ARCHITECTURES) <= set(ZOO)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_entry_can_be_pickled_as_a_model_with_a_scheme_is(name):
    entry = ARCHITECTURES[name]
    assert pickle.loads(pickle.dumps(entry)).base == entry.base


@EVERY
def test_every_decoder_layer_has_the_sublayers_that_its_entry_names(name):
    model = CASES[name].build()
    entry = architecture_of(model)
    for layer in decoder_layers(model):
        assert hasattr(layer, entry.attention[0]) and hasattr(layer, entry.mlp[0])
        parts = [getattr(layer, entry.attention[0]), getattr(layer, entry.mlp[0])]
        matrices = {p for part in parts for p in part.parameters() if p.ndim > 1}
        assert all(any(True for _ in part.parameters()) for part in parts)
        assert matrices == {p for p in layer.parameters() if p.ndim > 1}  # nothing but norms beside


def test_a_model_without_images_is_refused():
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=8,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(model_type='llama'\).*image-text"):
        sparsify(model)


@EVERY
@SIDES
def test_the_loss_without_vtc_and_lds_is_the_models_own(name, side):
    case = CASES[name]
    model, batch = case.build(), case.batch(ROWS["one image"], side)
    expected = backward(model, batch)
    sparsify(model).begin_step(0)
    assert_same(backward(model, batch), expected)


# ---- VTC -----------------------------------------------------------------------------------------


@EVERY
@SIDES
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_vtc_equals_the_sequence_shortened_by_hand(name, side, rows):
    case = CASES[name]
    model, batch = case.build(), case.batch(rows, side)
    expected = by_hand(model, case, rows, batch, pooled)
    sparsify(model, VTC("avgpool2d", keep=KEEP)).begin_step(0)
    assert_same(backward(model, batch), expected)


@EVERY
def test_images_side_by_side_are_images_of_their_own(name):
    case = CASES[name]
    model, batch = case.build(), case.batch(SIDE_BY_SIDE)
    if name.startswith("qwen"):  # its own positions take a run of placeholders for one image
        with pytest.raises(RuntimeError, match="shape mismatch"):
            model(**batch)
        return
    expected = by_hand(model, case, SIDE_BY_SIDE, batch, pooled)
    sparsify(model, VTC("avgpool2d", keep=KEEP)).begin_step(0)
    assert_same(backward(model, batch), expected)


@EVERY
@pytest.mark.parametrize("kind", ["uniform", "text_guided", "positive"])
def test_selected_tokens_are_those_selected_by_hand(name, kind, monkeypatch):
    """`positive` leaves another number of each image, so that rows differ in length."""
    monkeypatch.setitem(KINDS, "positive", positive)
    choose = {"uniform": strided, "text_guided": about_the_text, "positive": the_positive}[kind]
    case = CASES[name]
    model, batch = case.build(), case.batch(FOUR)
    expected = by_hand(model, case, FOUR, batch, choose)
    sparsify(model, VTC(kind, keep=KEEP)).begin_step(0)
    assert_same(backward(model, batch), expected)


@EVERY
def test_outputs_may_take_the_mean_of_the_positions_they_stand_for(name):
    case, rows = CASES[name], ROWS[MIXED]
    model, batch = case.build(), case.batch(rows)
    expected = by_hand(model, case, rows, batch, pooled, positions="mean")
    sparsify(model, VTC("avgpool2d", keep=KEEP, positions="mean")).begin_step(0)
    assert_same(backward(model, batch), expected)


@EVERY
def test_every_kind_trains_and_leaves_generation_alone(name):
    case = CASES[name]
    model, batch = case.build(), case.batch(FOUR)
    prompt = {k: v for k, v in case.batch([["big", 5, 6, 7]]).items() if k != "labels"}
    generate = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD}
    before = model.eval().generate(**prompt, **generate)
    model.train()
    families = [kind for kinds in FAMILIES.values() for kind in kinds]
    kinds = [kind for kind in families if name in CLASS_TOKEN or not kind.startswith("cls_")]
    for kind in kinds:
        with sparsify(model, VTC(kind, keep=KEEP)) as scheme:
            scheme.begin_step(0)
            loss, grads = backward(model, batch)
            assert torch.isfinite(loss) and 0.2 < scheme.metrics()["keep_ratio"] < 0.4, kind
            assert grads and all(torch.isfinite(grad).all() for grad in grads.values()), kind
            vision = [grad for key, grad in grads.items() if "vis" in key and grad.ndim > 1]
            assert any(grad.abs().sum() > 0 for grad in vision), kind
            after = model.eval().generate(**prompt, **generate)
            model.train()
        assert torch.equal(after, before), kind


@pytest.mark.parametrize("name", ["llava", "vipllava"])
def test_the_class_token_attends_most_to_what_is_left(name):
    case = CASES[name]
    model, batch = case.build(), case.batch(FOUR)
    tower = case.build().model.vision_tower
    tower.set_attn_implementation("eager")
    attentions = tower(batch["pixel_values"], output_attentions=True).attentions
    scores = iter(attentions[-2 if name == "llava" else 1].mean(1)[:, 0, 1:])

    def choose(height, width, patches, text):
        best = next(scores).topk(round(KEEP * len(patches))).indices.sort().values
        return [([i], i) for i in best.tolist()]

    expected = by_hand(model, case, FOUR, batch, choose)
    sparsify(model, VTC("cls_topk", keep=KEEP)).begin_step(0)
    assert_same(backward(model, batch), expected)


@pytest.mark.parametrize("name", CLASS_TOKEN)
@pytest.mark.parametrize("kind", ["cls_topk", "cls_merge"])
def test_class_attention_is_that_of_the_towers_own_eager_attention(name, kind):
    case = CASES[name]
    model, batch = case.build(), case.batch(ROWS["one image"])
    assert model.config._attn_implementation == "sdpa"
    scheme = sparsify(model, VTC(kind=kind, keep=KEEP))
    scheme.begin_step(0)
    expected = backward(model, batch)
    model.set_attn_implementation("eager")
    scheme.begin_step(0)
    assert_same(backward(model, batch), expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3", "paligemma", "mistral3", "pixtral"])
def test_a_tower_without_class_token_is_an_error_at_once(name):
    with pytest.raises(ValueError, match=r"class token.*another VTC kind"):
        sparsify(CASES[name].build(), VTC(kind="cls_topk", keep=KEEP))


def test_class_attention_scores_follow_the_tokens_of_tiles():
    """LLaVA-NeXT cuts padding away and adds newlines; InternVL merges patches: a score must stay
    with its token. Checked with scores that are the tokens' own places."""
    case = CASES["llava_next"]
    model, batch = case.build(), case.batch([["big", 5, 6, 7]])
    entry = architecture_of(model)
    tiles = torch.arange(5 * 16, dtype=torch.float64).view(5, 16)
    result = entry.token_scores(model, batch, tiles)
    assert len(result) == case.tokens("big")
    assert result[:16].tolist() == list(range(16))
    # the whole of 8 x 8 patches lies in 2 x 2 tiles; the picture is 24 x 32, so 6 rows remain
    whole = tiles[1:].view(2, 2, 4, 4).permute(0, 2, 1, 3).reshape(8, 8)[1:7]
    rows = result[16:].view(6, 9)
    assert torch.equal(rows[:, :8], whole)

    case = CASES["internvl"]
    model = case.build()
    places = torch.arange(64, dtype=torch.float64).view(1, 64)
    result = architecture_of(model).token_scores(model, {}, places)
    expected = F.avg_pool2d(places.view(1, 1, 8, 8), 2).flatten()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next", "mistral3"])
@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ["avgpool2d", "text_guided"])
def test_packed_samples_give_the_loss_of_samples_on_their_own(name, implementation, kind):
    """Two samples in one row with restarting positions and no mask, as collators for packing make
    them, against one sample a row, in a step with all visual tokens too."""
    case = CASES[name]
    model = case.build()
    model.set_attn_implementation(implementation)
    rows = [[3, "big", 5, 6, 7], ["big", 9, 10, 11, 12]]
    apart = case.batch(rows)
    _, full = of_language_model(model, apart)
    lengths = apart["attention_mask"].sum(1).tolist()
    text = [torch.arange(n) for n in lengths]
    positions = torch.cat(text)[None]
    if name == "qwen2_vl":  # the text row, then time, height and width
        axes = [full["position_ids"][:, row, :n] for row, n in enumerate(lengths)]
        positions = torch.cat([positions[None], torch.cat(axes, 1)[:, None]])
    packed = {
        key: torch.cat([apart[key][row, :n] for row, n in enumerate(lengths)])[None]
        for key in apart
        if key in ("input_ids", "labels", "mm_token_type_ids")
    }
    packed["labels"][0, lengths[0]] = -100  # no sample predicts the first token of the next
    packed |= {k: v for k, v in apart.items() if k in ("pixel_values", "image_sizes")}
    if "image_grid_thw" in apart:
        packed["image_grid_thw"] = apart["image_grid_thw"]
    packed["position_ids"] = positions
    scheme = sparsify(model, VTC(kind=kind, keep=KEEP, dense_tail=0.5), total_steps=2)
    for step in range(2):
        scheme.begin_step(step)
        expected = backward(model, apart)
        scheme.begin_step(step)
        assert_same(backward(model, packed), expected)


# ---- LDS: what the layers really saw -------------------------------------------------------------


class Watch:
    """What the decoder layers of a model are called with and return."""

    def __init__(self, model, batch) -> None:
        """The model is still untouched: `start` is what its first layer gets, [B, T, D]."""
        self.visual = batch["input_ids"] == IMAGE
        self.calls: dict[int, tuple] = {}
        for index, layer in enumerate(decoder_layers(model)):
            layer.register_forward_hook(partial(self._record, index), with_kwargs=True)
        model(**batch)
        self.start = self.calls[0][0].detach()
        self.calls.clear()

    def _record(self, index, module, args, kwargs, output) -> None:
        self.calls[index] = args[0].detach(), kwargs, output.detach()

    def rows(self) -> list[list[int]]:
        """Which rows each layer saw, found again by what they held where text is (between layers
        Qwen3-VL adds features where images are)."""
        state, result = list(self.start), []
        for index in range(LAYERS):
            seen, _, after = self.calls[index]
            mine = []
            for vectors in seen:
                (row,) = [
                    r
                    for r, text in enumerate(~self.visual)
                    if torch.equal(vectors[text], state[r][text])
                ]
                mine.append(row)
            for row, vectors in zip(mine, after, strict=True):
                state[row] = vectors
            result.append(mine)
        return result

    def tokens(self) -> list[list[list[int]]]:
        """Which tokens of each row each layer saw, found again by their values."""
        state, result = self.start.clone(), []
        for index in range(LAYERS):
            seen, _, after = self.calls[index]
            mine = [
                [int((state[row] == vector).all(1).nonzero()[0, 0]) for vector in vectors]
                if len(vectors) < len(state[row])
                else list(range(len(vectors)))
                for row, vectors in enumerate(seen)
            ]
            for row, places in enumerate(mine):
                state[row, places] = after[row]
            result.append(mine)
        return result


@EVERY
@pytest.mark.parametrize("vtc", [None, VTC("avgpool2d", keep=KEEP)], ids=["all tokens", "vtc"])
def test_skipped_layers_might_as_well_not_be_there(name, vtc):
    ever = skipping_is_by_hand(CASES[name], ROWS[MIXED], vtc, pooled if vtc else None)
    assert ever >= {0, LAYERS - 1}  # none is protected


@EVERY
@pytest.mark.parametrize(
    ("implementation", "draw"), [("eager", "independent"), ("sdpa", "fixed_count")]
)
def test_each_sample_goes_through_its_own_layers_alone(name, implementation, draw):
    case = CASES[name]
    # transformers' own eager attention in double precision is NaN for a token that sees none, as
    # on the left or in a window of padding
    rows, side = (FOUR, "left") if implementation == "sdpa" else (ALIKE, "right")
    model, batch = case.build(), case.batch(rows, side)
    model.set_attn_implementation(implementation)
    watch, (_, dense) = Watch(model, batch), backward(model, batch)
    scheme = sparsify(model, lds=LDS("layerdrop", rate=0.5, unit="samples", draw=draw), seed=4)
    scheme.begin_step(0)
    result, seen = backward(model, batch), watch.rows()
    assert len(set(map(tuple, seen))) > 2 and all(len(rows) for rows in seen)
    if draw == "fixed_count":
        assert [len(rows) for rows in seen] == [2] * LAYERS
    assert scheme.metrics()["skipped"] == [1 - len(rows) / 4 for rows in seen]
    model.eval()
    off = [[i for i in range(LAYERS) if row not in seen[i]] for row in range(4)]
    expected = by_hand(model, case, rows, batch, off=off)
    model.train()
    assert result[1].keys() == dense.keys()  # every layer is trained
    assert_same(result, expected)
    for checkpointing in CHECKPOINTING:
        model.activation_checkpointing_enable(checkpointing)
        scheme.begin_step(0)
        assert_same(backward(model, batch), expected)
    unsparsify(model)
    model.activation_checkpointing_disable()
    expected = by_hand(model, case, rows, batch, pooled, off)
    sparsify(model, VTC("avgpool2d", keep=KEEP), scheme.lds, seed=4).begin_step(0)
    assert_same(backward(model, batch), expected)


@EVERY
@IMPLEMENTATIONS
def test_random_ltd_shows_each_layer_its_tokens_and_passes_the_rest(name, implementation):
    case = CASES[name]
    rows = "no image" if name == "qwen3_vl" else "one image"  # it adds features between layers
    model, batch = case.build(), case.batch(ROWS[rows])
    model.set_attn_implementation(implementation)
    watch = Watch(model, batch)
    scheme = sparsify(model, lds=LDS(policy="random_ltd", rate=0.5))
    scheme.begin_step(0)
    model(**batch).loss.backward()
    calls, length = watch.calls, batch["input_ids"].shape[1]
    seen = [calls[i][0].shape[1] for i in range(LAYERS)]
    assert seen == [length, length - round(length / 2), length - round(length / 2), length]
    # under the rows and columns of the mask, and with the positions, that its tokens have in the
    # last layer (the same kind of layer in Gemma 3)
    kwargs, given = calls[1][1], calls[3][1]
    for row, index in enumerate(watch.tokens()[1]):
        assert index == sorted(index)
        for mine, full in zip(
            kwargs["position_embeddings"], given["position_embeddings"], strict=True
        ):
            full = full.expand(*full.shape[:-3], 2, *full.shape[-2:])
            assert torch.equal(mine[..., row, :, :], full[..., row, index, :])
        if given["attention_mask"] is not None:
            full = given["attention_mask"].expand(2, -1, -1, -1)[row, 0]
            assert torch.equal(kwargs["attention_mask"][row, 0], full[index][:, index])


@EVERY
def test_dropbp_changes_no_output_and_cuts_attention_and_mlp_apart(name):
    case = CASES[name]
    model, batch = case.build(), case.batch(ROWS["one image"])
    plain, _ = backward(model, batch)
    reference, entry = case.build(), architecture_of(model)
    scheme, ways = sparsify(model, lds=LDS("dropbp", rate=0.4), seed=1), set()
    for step in (0, 1, 2):
        scheme.begin_step(step)
        result = backward(model, batch)
        torch.testing.assert_close(result[0], plain, **CLOSE)
        constant = []
        for index in range(LAYERS):
            off = scheme.decision.of(index)
            ways.add(off)
            for part in ("attention", "mlp"):
                if f"{part}_backward" in off:
                    named = getattr(entry, part)[0]
                    constant.append(getattr(decoder_layers(reference)[index], named))
                    cut = getattr(decoder_layers(model)[index], named)
                    assert all(p.grad is None for p in cut.parameters())
        with detached(constant):
            expected = backward(reference, batch)
        assert_same(result, expected)
    assert {frozenset({"attention_backward"}), frozenset({"mlp_backward"}), frozenset()} <= ways
    assert scheme.decision.off
    for checkpointing in CHECKPOINTING:
        model.activation_checkpointing_enable(checkpointing)
        scheme.begin_step(step)
        assert_same(backward(model, batch), expected)


@contextmanager
def detached(modules: list[nn.Module]) -> Iterator[None]:
    """What the modules return is a constant."""

    def forward(real, *args, **kwargs):
        output = real(*args, **kwargs)
        return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()

    for module in modules:
        module.forward = partial(forward, module.forward)
    yield
    for module in modules:
        del module.forward


@EVERY
@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_influence_is_that_of_what_each_layer_saw(name, unit):
    case = CASES[name]
    rows = FOUR
    if unit == "tokens":  # no two of which are alike: at most one of padding
        rows = ROWS["no image" if name == "qwen3_vl" else "one image"]
    model, batch = case.build(), case.batch(rows)
    watch = Watch(model, batch)
    lds = LDS("block_influence", rate=0.5, unit=unit, draw="fixed_count")
    scheme = sparsify(model, lds=lds)
    scheme.begin_step(0)
    model(**batch)
    real = batch["attention_mask"].tolist()
    expected = []
    for index, (before, _, after) in watch.calls.items():
        if unit == "samples":
            mine = [real[row] for row in watch.rows()[index]]
        else:
            mine = [
                [real[row][t] for t in places] for row, places in enumerate(watch.tokens()[index])
            ]
        total, count = influence(before, after, mine)
        expected.append(total / count)
    scheme.begin_step(1)
    assert scheme.skipper.measured.average == pytest.approx(expected, rel=1e-4)


# ---- all of it -----------------------------------------------------------------------------------


@EVERY
def test_forward_backward_generation_save_and_reload(name, tmp_path):
    case = CASES[name]
    model, batch = case.build(), case.batch(ROWS[MIXED])
    keys = list(model.state_dict())
    prompt = {k: v for k, v in case.batch([["big", 5, 6, 7]]).items() if k != "labels"}
    generate = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    lds = LDS("sts", rate=0.6, epsilon=0.5)
    scheme = sparsify(model, VTC("uniform", keep=KEEP), lds, total_steps=8, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, run = [], []
    for step in range(8):
        scheme.begin_step(step)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        run.append(scheme.metrics()["layers_run"])
        assert run[-1] == LAYERS - len(scheme.skipped)
    assert losses[-1] < losses[0] and sum(run[:4]) < sum(run[4:]) < 4 * LAYERS + 1
    assert scheme.metrics()["keep_ratio"] < 0.5

    unsparsify(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    after = model.eval().generate(**prompt, **generate)
    assert torch.equal(reloaded.generate(**prompt, **generate), after)
