"""STS on every architecture, against the same model fed a sequence that was shortened by hand."""

import math
from functools import partial

import pytest
import torch
from tiny import CASES, IMAGE, PAD
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sts import LDS, VTC, sparsify, unsparsify
from sts.architectures import ARCHITECTURES, architecture_of
from sts.vtc._shared import pooled_grid

EVERY = pytest.mark.parametrize("name", sorted(CASES))
ROWS = {
    "several images, none, and of two sizes": [
        [3, "big", 5, "small", 6, 7, 8],
        [9, 10, 11, 12],
        ["small", 14, 15, 16],
    ],
    "one image": [["big", 5, 6, 7, 8], ["big", 9, 10, 11]],
    "no image": [[3, 4, 5], [6, 7, 8, 9]],
}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # the loss itself is computed in float32


def test_every_entry_has_a_tiny_model():
    assert {case.build().config.model_type for case in CASES.values()} == set(ARCHITECTURES)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def of_language_model(model, batch):
    """What the untouched model hands to its language model."""
    seen = {}

    def catch(module, args, kwargs):
        seen.update(kwargs)

    language_model = model.get_submodule(architecture_of(model).language_model)
    handle = language_model.register_forward_pre_hook(catch, with_kwargs=True)
    model(**batch)
    handle.remove()
    return language_model, seen


def pooled_by_hand(case, names, first, keep):
    """(tokens averaged, place) of each token that is left of a row's images, the row's visual
    tokens being at places `first` (a list)."""
    left, start = [], 0
    for height, width, newline in [grid for name in names for grid in case.images[name]]:
        stride = width + newline
        if width:
            rows, columns = pooled_grid(height, width, keep)
            for row in range(rows):
                ys = range(math.floor(row * height / rows), math.ceil((row + 1) * height / rows))
                for column in range(columns):
                    xs = range(
                        math.floor(column * width / columns),
                        math.ceil((column + 1) * width / columns),
                    )
                    cell = [start + y * stride + x for y in ys for x in xs]
                    y, x = (ys[0] + ys[-1]) // 2, (xs[0] + xs[-1]) // 2
                    left.append(([first[i] for i in cell], first[start + y * stride + x]))
                if newline:
                    y = (ys[0] + ys[-1]) // 2
                    end = first[start + y * stride + width]
                    left.append(([end], end))
        start += height * stride
    return left


def shortened_by_hand(model, case, rows, batch, keep):
    """Loss and gradients of each row alone, without padding, its images average-pooled."""
    model.zero_grad()
    language_model, full = of_language_model(model, batch)
    entry = architecture_of(model)
    positions, mask = full.get("position_ids"), full.get("attention_mask")
    every = full["inputs_embeds"]
    if positions is None:
        positions = torch.arange(every.shape[1])[None]
    visual_before, total, count = 0, 0.0, 0
    for row, items in enumerate(rows):
        ids = batch["input_ids"][row]
        attended = batch["attention_mask"][row].bool()
        visual = (ids == IMAGE).nonzero()[:, 0].tolist()
        pooled = pooled_by_hand(case, [x for x in items if isinstance(x, str)], visual, keep)
        means = {place: sources for sources, place in pooled}
        places = [t for t in range(len(ids)) if attended[t] and (ids[t] != IMAGE or t in means)]
        vectors = [every[row, means.get(t, [t])].mean(0) for t in places]
        inputs = {
            "inputs_embeds": torch.stack(vectors)[None],
            "position_ids": positions[..., min(row, positions.shape[-2] - 1), :][..., None, places],
            "attention_mask": torch.ones(1, len(places), dtype=torch.long),
        }
        if isinstance(mask, dict):
            inputs["attention_mask"] = {
                kind: one if one is None else one[row : row + 1][:, :, places][..., places]
                for kind, one in mask.items()
            }
        elif mask is not None and mask.ndim == 4:
            inputs["attention_mask"] = mask[row : row + 1][:, :, places][..., places]
        if entry.visual_mask and full.get(entry.visual_mask) is not None:
            inputs[entry.visual_mask] = (ids[places] == IMAGE)[None]
            inputs[entry.visual_features] = [
                torch.stack(
                    [
                        features[[visual_before + visual.index(s) for s in means[t]]].mean(0)
                        for t in places
                        if t in means
                    ]
                )
                if means
                else features[:0]
                for features in full[entry.visual_features]
            ]
        visual_before += len(visual)
        hidden = language_model(**inputs, use_cache=False)[0]
        labels = batch["labels"][row][places]
        for i in range(1, len(places)):
            if labels[i] != -100:
                logits = model.get_output_embeddings()(hidden[0, i - 1])
                total = total - logits.float().log_softmax(-1)[labels[i]]
                count += 1
    loss = total / count
    loss.backward()
    return loss.detach(), gradients(model)


@EVERY
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_vtc_equals_the_sequence_shortened_by_hand(name, side, rows):
    case = CASES[name]
    model, batch = case.build(), case.batch(rows, side)
    expected = shortened_by_hand(model, case, rows, batch, keep=0.25)
    sparsify(model, VTC(kind="avgpool2d", keep=0.25)).begin_step(0)
    assert_same(backward(model, batch), expected)


@EVERY
def test_forward_backward_generation_save_and_reload(name, tmp_path):
    case = CASES[name]
    model, batch = case.build(), case.batch(ROWS["several images, none, and of two sizes"])
    keys = list(model.state_dict())
    prompt = {k: v for k, v in case.batch([["big", 5, 6, 7]]).items() if k != "labels"}
    generate = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    before = model.eval().generate(**prompt, **generate)

    model.train()
    scheme = sparsify(
        model, VTC(kind="avgpool2d", keep=0.25), LDS("layerdrop", rate=0.5, draw="fixed_count", protect_first=1, protect_last=1), seed=1
    )
    assert torch.equal(model.eval().generate(**prompt, **generate), before)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(6):
        scheme.begin_step(step)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        skipped = [f".layers.{i}." for i in scheme.skipped]
        for parameter, value in model.named_parameters():
            if any(part in parameter for part in skipped) and "vision" not in parameter:
                assert value.grad is None, parameter
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert scheme.metrics()["keep_ratio"] < 0.5 and scheme.metrics()["layers_run"] == 3

    unsparsify(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    after = model.eval().generate(**prompt, **generate)
    assert torch.equal(reloaded.generate(**prompt, **generate), after)


@EVERY
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_loss_without_vtc_and_lds_is_the_models_own(name, side):
    case = CASES[name]
    model, batch = case.build(), case.batch(ROWS["one image"], side)
    expected = backward(model, batch)
    sparsify(model).begin_step(0)
    assert_same(backward(model, batch), expected)


@EVERY
def test_skipped_layers_might_as_well_not_be_there(name):
    case = CASES[name]
    model, batch = case.build(), case.batch(ROWS["one image"])
    scheme = sparsify(model, lds=LDS("layerdrop", rate=0.5, draw="fixed_count", protect_first=1, protect_last=1), seed=1)
    scheme.begin_step(0)
    (skipped,) = scheme.skipped
    found = backward(model, batch)
    unsparsify(model)
    layer = model.get_submodule(architecture_of(model).language_model).layers[skipped]
    layer.forward = lambda hidden, *args, **kwargs: hidden
    assert_same(found, backward(model, batch))


@EVERY
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_random_ltd_shows_each_layer_its_tokens_and_passes_the_rest(name, implementation):
    case = CASES[name]
    rows = "no image" if name == "qwen3_vl" else "one image"  # it adds features between layers
    model, batch = case.build(), case.batch(ROWS[rows])
    model.set_attn_implementation(implementation)
    language_model = model.get_submodule(architecture_of(model).language_model)
    scheme = sparsify(model, lds=LDS(policy="random_ltd", rate=0.5))
    scheme.begin_step(0)
    length = batch["input_ids"].shape[1]
    calls = {}

    def record(index, module, args, kwargs, output):
        calls[index] = args[0], kwargs, output

    for index, layer in enumerate(language_model.layers):
        layer.register_forward_hook(partial(record, index), with_kwargs=True)
    model(**batch).loss.backward()
    seen = [calls[i][0].shape[1] for i in range(4)]
    assert seen == [length, length - round(length / 2), length - round(length / 2), length]
    # the second layer by hand: its tokens, found again by value, under the rows and columns of the
    # mask that they have in the last layer's (the same kind of layer in Gemma 3)
    hidden, kwargs, _ = calls[1]
    whole, given = calls[0][2], calls[3][1]
    for row in range(len(whole)):
        index = [int((whole[row] == vector).all(1).nonzero()[0, 0]) for vector in hidden[row]]
        assert index == sorted(index)
        for mine, full in zip(
            kwargs["position_embeddings"], given["position_embeddings"], strict=True
        ):
            full = full.expand(*full.shape[:-3], len(whole), *full.shape[-2:])
            assert torch.equal(mine[..., row, :, :], full[..., row, index, :])
        if given["attention_mask"] is not None:
            full = given["attention_mask"].expand(len(whole), -1, -1, -1)[row, 0]
            assert torch.equal(kwargs["attention_mask"][row, 0], full[index][:, index])


@EVERY
def test_dropbp_changes_no_output_and_cuts_gradients(name):
    case = CASES[name]
    model, batch = case.build(), case.batch(ROWS["one image"])
    plain, _ = backward(model, batch)
    scheme = sparsify(model, lds=LDS(policy="dropbp", rate=0.5), seed=1)
    scheme.begin_step(0)
    (cut,) = scheme.skipped
    loss, grads = backward(model, batch)
    torch.testing.assert_close(loss, plain, **CLOSE)
    prefix = f"{architecture_of(model).language_model}.layers.{cut}."
    assert not [key for key in grads if key.startswith(prefix)]
    # the gradient below equals that of a layer whose branch is a constant
    unsparsify(model)
    layer = model.get_submodule(architecture_of(model).language_model).layers[cut]
    real = layer.forward

    def constant(hidden, *args, **kwargs):
        return hidden + (real(hidden, *args, **kwargs) - hidden).detach()

    layer.forward = constant
    assert_same((loss, grads), backward(model, batch))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next", "mistral3"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["avgpool2d", "random"])
def test_packed_samples_give_the_loss_of_samples_on_their_own(name, implementation, kind):
    """Two samples in one row with restarting positions and no mask, as collators for packing make
    them, against one sample a row."""
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
    scheme = sparsify(model, VTC(kind=kind, keep=0.25))
    scheme.begin_step(0)
    expected = backward(model, apart)
    scheme.begin_step(0)
    assert_same(backward(model, packed), expected)


def test_an_unknown_architecture_is_told_what_an_entry_needs():
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=8,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(model_type='llama'\).*grids"):
        sparsify(model)


def test_class_attention_scores_follow_the_tokens_of_tiles():
    """LLaVA-NeXT cuts padding away and adds newlines; InternVL merges patches: a score must stay
    with its token. Checked with scores that are the tokens' own places."""
    case = CASES["llava_next"]
    model, batch = case.build(), case.batch([["big", 5, 6, 7]])
    entry = architecture_of(model)
    tiles = torch.arange(5 * 16, dtype=torch.float64).view(5, 16)
    found = entry.token_scores(model, batch, tiles)
    assert len(found) == case.tokens("big")
    assert found[:16].tolist() == list(range(16))
    # the whole of 8 x 8 patches lies in 2 x 2 tiles; the picture is 24 x 32, so 6 rows remain
    whole = tiles[1:].view(2, 2, 4, 4).permute(0, 2, 1, 3).reshape(8, 8)[1:7]
    rows = found[16:].view(6, 9)
    assert torch.equal(rows[:, :8], whole)

    case = CASES["internvl"]
    model = case.build()
    places = torch.arange(64, dtype=torch.float64).view(1, 64)
    found = architecture_of(model).token_scores(model, {}, places)
    expected = F.avg_pool2d(places.view(1, 1, 8, 8), 2).flatten()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llava", "vipllava", "llava_next", "internvl"])
@pytest.mark.parametrize("kind", ["cls_topk", "cls_merge"])
def test_class_attention_kinds_run_without_eager_attention(name, kind):
    case = CASES[name]
    model, batch = case.build(), case.batch(ROWS["one image"])
    assert model.config._attn_implementation == "sdpa"
    scheme = sparsify(model, VTC(kind=kind, keep=0.25))
    scheme.begin_step(0)
    loss, grads = backward(model, batch)
    assert torch.isfinite(loss) and scheme.metrics()["keep_ratio"] < 0.35
    # the same scores from the tower's own eager attention choose the same tokens
    model.zero_grad()
    model.set_attn_implementation("eager")
    scheme.begin_step(0)
    assert_same(backward(model, batch), (loss, grads))


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3", "paligemma", "mistral3"])
def test_a_tower_without_class_token_is_an_error_at_once(name):
    with pytest.raises(ValueError, match=r"class token.*another VTC kind"):
        sparsify(CASES[name].build(), VTC(kind="cls_topk", keep=0.25))
