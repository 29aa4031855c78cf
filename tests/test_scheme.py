"""STS on real Hugging Face classes: against hand-made short sequences and thinner models."""

import copy
import logging
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from sts import LDS, VTC, sparsify, unsparsify
from sts.compressor import compress
from sts.scheme import block_influence

IMAGE, PAD, SIDE, LAYERS = 60, 0, 4, 6
PATCHES = SIDE * SIDE
CLASSES = {
    "llava": (LlavaForConditionalGeneration, LlavaConfig),
    "vipllava": (VipLlavaForConditionalGeneration, VipLlavaConfig),
}


def build(architecture="llava", vision=CLIPVisionConfig, dtype=torch.float64, **text):
    torch.manual_seed(0)
    model_class, config_class = CLASSES[architecture]
    config = config_class(
        vision_config=vision(
            image_size=SIDE * 4,
            patch_size=4,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
        ),
        text_config=LlamaConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            pad_token_id=PAD,
            **text,
        ),
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2 if architecture == "llava" else [-2, 1],
    )
    model = model_class(config).to(dtype).train()
    with (
        torch.no_grad()
    ):  # random initial weights are so small that every layer does next to nothing
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def batch_of(rows, side="right", seed=0):
    """`rows` are lists of ints (text) and "image"; the last two tokens of a row are its answer."""
    ids = [[t for x in row for t in ([IMAGE] * PATCHES if x == "image" else [x])] for row in rows]
    images = sum(row.count("image") for row in rows)
    length = max(map(len, ids))
    full = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in ids:
        pad = length - len(row)
        labels = [-100] * (len(row) - 2) + row[-2:]
        for key, values, fill in (
            ("input_ids", row, PAD),
            ("attention_mask", [1] * len(row), 0),
            ("labels", labels, -100),
        ):
            padding = [fill] * pad
            full[key].append(values + padding if side == "right" else padding + values)
    batch = {key: torch.tensor(value) for key, value in full.items()}
    if images:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(images, 3, SIDE * 4, SIDE * 4, generator=generator)
        batch["pixel_values"] = pixels.double()
    return batch


ONE_IMAGE = [["image", 5, 6, 7, 8], ["image", 9, 10, 11]]
MIXED = [[3, "image", 5, "image", 6, 7, 8], [9, 10, 11, 12], [13, "image", 14, 15]]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, batch, **kwargs):
    model.zero_grad()
    output = model(**batch, **kwargs)
    output.loss.backward()
    return output.loss.detach(), gradients(model)


def assert_same(found, expected, **tolerance):
    (loss, grads), (expected_loss, expected_grads) = found, expected
    torch.testing.assert_close(loss, expected_loss, **tolerance)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], **tolerance)


def begun(model, vtc=None, lds=None, step=0, **kwargs):
    scheme = sparsify(model, vtc, lds, **kwargs)
    scheme.begin_step(step)
    return scheme


# --- VTC -------------------------------------------------------------------------------------


def clip_scores(model, pixels):
    """Class attention by the tower's own eager attention, [images, patches]."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    outputs = tower(pixels, output_attentions=True)
    deepest = -2 if isinstance(model.config.vision_feature_layer, int) else 1
    return outputs.attentions[deepest].mean(1)[:, 0, 1:]


def by_hand(model, batch, kind, keep, positions):
    """Loss and gradients of each row alone, unpadded, with its visual tokens replaced."""
    model.zero_grad()
    total, count, image = 0.0, 0, 0
    features, scores = [], None
    if "pixel_values" in batch:
        features = model.get_image_features(
            batch["pixel_values"],
            vision_feature_layer=model.config.vision_feature_layer,
            **(
                {"vision_feature_select_strategy": "default"}
                if model.config.model_type == "llava"
                else {}
            ),
        ).pooler_output
        scores = clip_scores(model, batch["pixel_values"])
    embed = model.get_input_embeddings()
    for row in range(len(batch["input_ids"])):
        vectors, places, labels = [], [], []
        t = 0
        while t < batch["input_ids"].shape[1]:
            token = batch["input_ids"][row, t]
            if not batch["attention_mask"][row, t]:
                t += 1
            elif token == IMAGE:
                grid = (SIDE, SIDE)
                out, kept, _ = compress(
                    kind,
                    features[image][None],
                    keep,
                    grid,
                    scores=None if scores is None else scores[image][None],
                )
                where = kept[0].double() + t
                if positions == "mean" and kind == "avgpool2d":
                    index = torch.arange(PATCHES).view(1, SIDE, SIDE).double()
                    size = round((keep * PATCHES) ** 0.5)
                    where = F.adaptive_avg_pool2d(index, size).flatten() + t
                vectors += list(out[0])
                places += where.tolist()
                labels += [-100] * out.shape[1]
                image += 1
                t += PATCHES
            else:
                vectors.append(embed(token))
                places.append(float(t))
                labels.append(int(batch["labels"][row, t]))
                t += 1
        hidden = model.model.language_model(
            inputs_embeds=torch.stack(vectors)[None],
            attention_mask=torch.ones(1, len(vectors), dtype=torch.long),
            position_ids=torch.tensor(places)[None],
        )[0]
        for i in range(1, len(labels)):
            if labels[i] != -100:
                logits = model.lm_head(hidden[0, i - 1])
                total = total - logits.float().log_softmax(-1)[labels[i]]
                count += 1
    loss = total / count
    loss.backward()
    return loss.detach(), gradients(model)


TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # the loss itself is computed in float32


@pytest.mark.parametrize("architecture", sorted(CLASSES))
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rows", [ONE_IMAGE, MIXED, [[3, 4, 5], [6, 7, 8, 9]]])
@pytest.mark.parametrize(
    ("kind", "positions"), [("avgpool2d", "keep"), ("avgpool2d", "mean"), ("cls_topk", "keep")]
)
def test_vtc_equals_the_short_sequence_fed_by_hand(architecture, side, rows, kind, positions):
    model, batch = build(architecture), batch_of(rows, side)
    expected = by_hand(model, batch, kind, 0.25, positions)
    begun(model, VTC(kind=kind, keep=0.25, positions=positions))
    assert_same(backward(model, batch), expected, **TOLERANCE)
    if "pixel_values" in batch:
        assert expected[1]["model.multi_modal_projector.linear_1.weight"].abs().sum() > 0


@pytest.mark.parametrize("kind", ["avgpool2d", "random", "cls_topk"])
def test_the_language_model_gets_a_shorter_sequence(kind):
    model, batch, lengths = build(), batch_of(MIXED), []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    scheme = begun(model, VTC(kind=kind, keep=0.25))
    model(**batch)
    assert lengths == [2 * 4 + 5]
    metrics = scheme.metrics()
    assert metrics["keep_ratio"] == 0.25
    assert metrics["visual_tokens"] == 3 * 4 / 3
    assert metrics["tokens"] == 13
    assert metrics["answer_tokens"] == 2


def test_what_is_dropped_is_never_a_target():
    model, batch = build(), batch_of(MIXED)
    batch["labels"] = batch["input_ids"].clone()  # careless: placeholders and padding are targets
    scheme = begun(model, VTC(kind="avgpool2d", keep=0.25))
    model(**batch)
    assert scheme.metrics()["answer_tokens"] == ((13 - 1) + (4 - 1) + (7 - 1)) / 3


def test_random_differs_by_step_and_micro_batch_and_repeats():
    def losses(seed):
        model = build()
        scheme = sparsify(model, VTC(kind="random", keep=0.25), seed=seed)
        found = []
        for step in (0, 1):
            scheme.begin_step(step)
            torch.manual_seed(len(found))  # the global stream plays no part
            found += [model(**batch_of(ONE_IMAGE)).loss.item() for _ in range(2)]
        return found

    assert losses(0) == losses(0) != losses(1)
    assert len(set(losses(0))) == 4


def test_no_logits_on_visual_tokens():
    model, batch, shapes = build(), batch_of(ONE_IMAGE), []
    model.lm_head.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    begun(model)
    output = model(**batch)
    assert shapes == [(4, 64)] and output.logits is None
    assert type(output).__name__ == "LlavaCausalLMOutputWithPast"


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_path_alone_equals_the_plain_model(num_items, side):
    model, batch = build(), batch_of(MIXED, side)
    kwargs = {} if num_items is None else {"num_items_in_batch": num_items}
    expected = backward(model, batch, **kwargs)
    begun(model)
    assert_same(backward(model, batch, **kwargs), expected, **TOLERANCE)


def test_mean_loss_over_accumulated_micro_batches_with_num_items():
    model = build()
    whole, parts = batch_of(MIXED), []
    begun(model, VTC(kind="avgpool2d", keep=0.25))
    expected = backward(model, whole, num_items_in_batch=6)
    for row in MIXED:
        parts.append(batch_of([row]))
    images = iter(whole["pixel_values"])
    for row, part in zip(MIXED, parts, strict=True):
        if row.count("image"):
            part["pixel_values"] = torch.stack([next(images) for _ in range(row.count("image"))])
    model.zero_grad()
    loss = sum(model(**part, num_items_in_batch=6).loss for part in parts)
    loss.backward()
    assert_same((loss.detach(), gradients(model)), expected, **TOLERANCE)


# --- LDS -------------------------------------------------------------------------------------


def without_layers(model, skipped):
    thin = copy.deepcopy(model)
    language_model = thin.model.language_model
    kept = [layer for i, layer in enumerate(language_model.layers) if i not in skipped]
    language_model.layers = nn.ModuleList(kept)
    language_model.config.num_hidden_layers = len(kept)
    return thin


def rename(grads, skipped):
    """Gradients of the thin model under the layer numbers of the whole one."""
    numbers = [i for i in range(LAYERS) if i not in skipped]
    prefix, renamed = "model.language_model.layers.", {}
    for name, grad in grads.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{numbers[int(number)]}.{rest}"
        renamed[name] = grad
    return renamed


CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("vtc", [None, VTC(kind="avgpool2d", keep=0.25)])
@pytest.mark.parametrize("frozen", [False, True])
def test_lds_equals_a_model_without_those_layers(checkpointing, vtc, frozen):
    model, batch = build(), batch_of(MIXED)
    if frozen:
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    thin, calls = copy.deepcopy(model), []
    scheme = begun(model, vtc, LDS(policy="uniform", rate=0.5), step=3)
    assert len(scheme.skipped) == 2
    thin = without_layers(thin, scheme.skipped)
    begun(thin, vtc)
    expected, expected_grads = backward(thin, batch)
    for i, layer in enumerate(model.model.language_model.layers):
        # On a submodule: hooks on the layer itself stay outside of HF's checkpointed region.
        layer.mlp.register_forward_pre_hook(lambda m, a, i=i: calls.append(i))
    if checkpointing:
        model.activation_checkpointing_enable(checkpointing)
    found = backward(model, batch)
    assert_same(found, (expected, rename(expected_grads, scheme.skipped)), rtol=1e-9, atol=1e-12)
    runs = 2 if checkpointing else 1
    for layer in range(LAYERS):
        assert calls.count(layer) == (0 if layer in scheme.skipped else runs)
    for layer in scheme.skipped:
        grads = [p.grad for p in model.model.language_model.layers[layer].parameters()]
        assert grads and all(grad is None for grad in grads)


def test_the_optimizer_leaves_skipped_layers_and_their_moments_alone():
    model, batch = build(), batch_of(ONE_IMAGE)
    scheme = sparsify(model, lds=LDS(policy="uniform", rate=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(4):
        scheme.begin_step(step)
        before = copy.deepcopy(model.model.language_model.layers.state_dict())
        moments = copy.deepcopy(optimizer.state)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        for name, parameter in model.model.language_model.layers.named_parameters():
            skipped = int(name.split(".")[0]) in scheme.skipped
            assert torch.equal(parameter, before[name]) == skipped
            if skipped and parameter in moments:
                for key, value in moments[parameter].items():
                    assert torch.equal(optimizer.state[parameter][key], value)


def test_layers_are_whole_again_after_an_error():
    model, batch = build(), batch_of(ONE_IMAGE)
    layers = model.model.language_model.layers
    scheme = begun(model, VTC(kind="cls_topk", keep=0.25), LDS(policy="need", rate=0.5))
    hooks = hook_count(model)

    def fail(*_):
        assert model.model.language_model.layers is not layers and scheme.skipped
        raise RuntimeError("in the last layer")

    layers[-1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the last layer"):
        model(**batch)
    assert hook_count(model) == hooks + 1
    assert model.model.language_model.layers is layers


def test_hidden_states_asked_for_while_skipping_do_not_break_later_ones():
    model, batch = build(), batch_of(ONE_IMAGE)
    begun(model, lds=LDS(policy="uniform", rate=0.5))
    states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS - 2 + 1
    assert len(model.eval()(**batch, output_hidden_states=True).hidden_states) == LAYERS + 1


def test_influence_is_measured_as_defined():
    before, after = torch.randn(2, 9, 5), torch.randn(2, 9, 5)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    expected, count = 0.0, 0
    for row in range(2):
        for t in range(9):
            if mask[row, t]:
                x, y = before[row, t].double(), after[row, t].double()
                expected += 1 - (x @ y / (x @ x).sqrt() / (y @ y).sqrt())
                count += 1
    total, found = block_influence(before, after, mask)
    assert found == count
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)


def test_need_learns_which_layers_do_nothing_and_resumes():
    batch, lds = batch_of(ONE_IMAGE), LDS(policy="need", rate=0.5, explore=0.1, ema=0.5)

    def idle_model():
        model = build()
        with torch.no_grad():
            for layer in (2, 3):
                model.model.language_model.layers[layer].mlp.down_proj.weight.zero_()
                model.model.language_model.layers[layer].self_attn.o_proj.weight.zero_()
        return model

    scheme = sparsify(model := idle_model(), lds=lds)
    skipped, state = [], None
    for step in range(60):
        if step == 20:
            state = copy.deepcopy(scheme.state_dict())
        scheme.begin_step(step)
        skipped.append(scheme.skipped)
        with torch.no_grad():
            model(**batch)
    assert max(scheme.influence[2:4]) < 1e-6 < min(scheme.influence[:2] + scheme.influence[4:])
    counts = [sum(layer in s for s in skipped) for layer in range(LAYERS)]
    assert counts[0] == counts[5] == 0 and min(counts[2:4]) > max(counts[1], counts[4]) > 0

    resumed = sparsify(model := idle_model(), lds=lds)
    resumed.load_state_dict(state)
    for step in range(20, 60):
        resumed.begin_step(step)
        assert resumed.skipped == skipped[step]
        with torch.no_grad():
            model(**batch)
    assert resumed.influence == scheme.influence


def test_schedules_follow_the_stage_and_end_dense():
    model = build()
    vtc = VTC(kind="avgpool2d", keep=0.25, schedule="linear", anneal=0.2)
    lds = LDS(policy="uniform", rate=0.5, schedule="linear", anneal=0.2)
    scheme = sparsify(model, vtc, lds, total_steps=100)
    keep, layers = [], []
    for step in range(100):
        scheme.begin_step(step)
        keep.append(scheme.keep)
        layers.append(scheme.metrics()["layers_run"])
    assert keep[0] == 0.25 and keep == sorted(keep) and keep[80:] == [1.0] * 20
    assert layers[0] == LAYERS and layers[80:] == [LAYERS] * 20
    assert sum(LAYERS - n for n in layers) == pytest.approx(
        4 * sum(0.005 * s for s in range(80)), abs=9
    )
    with pytest.raises(ValueError, match=r"step=100.*0\.\.99"):
        scheme.begin_step(100)


def train_rank(rank, store, results):
    """Three steps of one of two processes; saves what both must agree on."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    model = build()
    scheme = sparsify(model, VTC(kind="avgpool2d", keep=0.25), LDS(policy="need", rate=0.5))
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    skipped = []
    for step in range(4):
        scheme.begin_step(step)
        skipped.append(scheme.skipped)
        loss, grads = backward(parallel, batch_of([ONE_IMAGE[rank]], seed=rank))
    found = {"skipped": skipped, "influence": scheme.influence, "grads": grads, "loss": loss}
    torch.save(found, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_decide_alike_and_train_as_one(tmp_path):
    torch.multiprocessing.spawn(train_rank, (tmp_path / "store", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in (0, 1))
    assert first["skipped"] == second["skipped"]
    assert first["influence"] == second["influence"]

    batches = [batch_of([row], seed=i) for i, row in enumerate(ONE_IMAGE)]
    model = build()
    scheme = sparsify(model, VTC(kind="avgpool2d", keep=0.25), LDS(policy="need", rate=0.5))
    for step in range(4):
        scheme.begin_step(step)
        assert scheme.skipped == first["skipped"][step]
        model.zero_grad()
        for batch in batches:
            (model(**batch).loss / 2).backward()
    assert scheme.influence == pytest.approx(first["influence"], rel=1e-5)
    expected = {f"module.{name}": grad for name, grad in gradients(model).items()}
    for found in (first, second):
        assert_same((found["loss"], found["grads"]), (found["loss"], expected), **TOLERANCE)


# --- off means off ---------------------------------------------------------------------------


BOTH = {"vtc": VTC(kind="cls_topk", keep=0.25), "lds": LDS(policy="need", rate=0.5)}


@pytest.mark.parametrize("architecture", sorted(CLASSES))
def test_eval_and_training_afterwards_are_bit_identical(architecture):
    model, batch = build(architecture, dtype=torch.float32), batch_of(MIXED)
    batch["pixel_values"] = batch["pixel_values"].float()
    plain = copy.deepcopy(model)
    keys, attributes, hooks = list(model.state_dict()), set(vars(model)), hook_count(model)
    scheme = begun(model, **BOTH)
    model(**batch).loss.backward()
    assert list(model.state_dict()) == keys
    assert torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)
    prompt = {k: v[:, :-2] for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    prompt["pixel_values"] = batch["pixel_values"]
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **settings), plain.generate(**prompt, **settings))
    model.train(), plain.train()
    unsparsify(model)
    assert hook_count(model) == hooks and set(vars(model)) == attributes
    found, expected = backward(model, batch), backward(plain, batch)
    assert_same(found, expected, rtol=0, atol=0)
    assert not scheme.attached


def hook_count(model):
    """Hooks on the model, without those that transformers installs to capture hidden states."""
    hooks = [
        h
        for m in model.modules()
        for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    return len([h for h in hooks if "output_capturing" not in getattr(h, "__qualname__", "")])


def test_training_forward_without_labels_is_the_plain_one_and_says_so(caplog):
    model, batch = build(), batch_of(ONE_IMAGE)
    del batch["labels"]
    expected = model(**batch).logits
    begun(model, **BOTH)
    with caplog.at_level(logging.WARNING, logger="sts"):
        assert torch.equal(model(**batch).logits, expected)
        model(**batch)
    assert [r.message for r in caplog.records].count(
        "sts: forward in training mode without labels: the scheme does not act"
    ) == 1


def test_positional_inputs_and_tuples_work_as_in_the_plain_model():
    model, batch = build(), batch_of(ONE_IMAGE)
    begun(model, VTC(kind="avgpool2d", keep=0.25))
    expected = model(**batch).loss
    ids, pixels = batch.pop("input_ids"), batch.pop("pixel_values")
    assert torch.equal(model(ids, pixels, **batch, return_dict=False)[0], expected)


def test_a_copy_of_a_sparse_model_has_a_scheme_of_its_own():
    model, batch = build(), batch_of(ONE_IMAGE)
    begun(model, VTC(kind="avgpool2d", keep=0.25))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(**batch).loss != model(**batch).loss
    unsparsify(twin)
    assert "forward" not in vars(twin) and "forward" in vars(model)


def test_saves_and_loads_like_the_plain_model(tmp_path):
    model, batch = build(), batch_of(ONE_IMAGE)
    begun(model, **BOTH)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_accelerate_autocast_on_top():
    accelerate = pytest.importorskip("accelerate")
    model, batch = build(dtype=torch.float32), batch_of(ONE_IMAGE)
    batch["pixel_values"] = batch["pixel_values"].float()
    dtypes = []
    model.lm_head.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    begun(model, VTC(kind="avgpool2d", keep=0.25))
    accelerate.state.AcceleratorState._reset_state(True)  # other tests leave theirs behind
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    loss = prepared(**batch).loss
    accelerator.backward(loss)
    assert dtypes == [torch.bfloat16] and loss.dtype == torch.float32
    with pytest.raises(ValueError, match="already wrapped"):
        sparsify(model)
    unsparsify(accelerator.unwrap_model(prepared))
    assert prepared(**batch).logits.shape == (2, 20, 64)
    accelerate.state.AcceleratorState._reset_state(True)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: VTC(kind="pool"), "VTC.kind='pool'.*avgpool2d"),
        (lambda: VTC(keep=0), r"VTC.keep=0.*\(0, 1\]"),
        (lambda: VTC(schedule="step"), "VTC.schedule='step'.*constant"),
        (lambda: VTC(anneal=2), r"VTC.anneal=2.*\[0, 1\]"),
        (lambda: VTC(positions="new"), "VTC.positions='new'.*keep or mean"),
        (lambda: LDS(policy="all"), "LDS.policy='all'.*uniform"),
        (lambda: LDS(rate=1), r"LDS.rate=1.*\[0, 1\)"),
        (lambda: LDS(protect_last=-1), "LDS.protect_last=-1.*0 or more"),
        (lambda: LDS(explore=-1), r"LDS.explore=-1.*\[0, 1\]"),
        (lambda: LDS(ema=1), r"LDS.ema=1.*\[0, 1\)"),
        (
            lambda: sparsify(build(), lds=LDS(policy="uniform", rate=0.5, protect_first=6)),
            "6.*model",
        ),
        (
            lambda: sparsify(
                build(), lds=LDS(policy="uniform", rate=0.95, protect_first=0, protect_last=0)
            ),
            "rate=0.95.*at most 0.833",
        ),
        (lambda: sparsify(build(), VTC(keep=0.5, anneal=0.1)), "total_steps=None.*number of"),
        (lambda: sparsify(build(), total_steps=0), "total_steps=0.*number of"),
        (lambda: sparsify(LlamaForCausalLM(build().config.text_config)), "'llama'.*llava.*entry"),
        (lambda: sparsify(nn.Linear(2, 2)), "Linear.*not a known"),
        (lambda: sparsify(build().model), "LlavaModel.*not a known"),
        (
            lambda: sparsify(build(vision=SiglipVisionConfig), VTC(kind="cls_topk", keep=0.5)),
            "class token.*SiglipVisionModel",
        ),
        (lambda: unsparsify(build()), "no scheme"),
    ],
)
def test_bad_settings_name_argument_value_and_what_is_accepted(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_sparsify_twice_is_an_error():
    model = build()
    sparsify(model)
    with pytest.raises(ValueError, match=r"already wrapped.*unsparsify"):
        sparsify(model)


def test_forward_before_begin_step_is_an_error():
    model = build()
    sparsify(model)
    with pytest.raises(RuntimeError, match="begin_step"):
        model(**batch_of(ONE_IMAGE))


def without(batch, *keys, **more):
    return {key: value for key, value in batch.items() if key not in keys} | more


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda b: without(b, "pixel_values"), "32 image placeholders.*no images.*pixel_values"),
        (lambda b: without(b, pixel_values=b["pixel_values"][:1]), "match|placeholders"),
        (
            lambda b: without(b, position_ids=torch.arange(3)[None]),
            r"position_ids.shape=\[1, 3\].*\[2, 20\]",
        ),
        (lambda b: without(b, attention_mask=torch.ones(2, 3)), r"attention_mask.shape=\[2, 3\]"),
        (
            lambda b: without(
                b, "input_ids", "pixel_values", inputs_embeds=torch.zeros(2, 20, 24).double()
            ),
            "input_ids=None",
        ),
    ],
)
def test_bad_batches_are_errors(change, named):
    model = build()
    begun(model, VTC(kind="cls_topk", keep=0.25))
    with pytest.raises((ValueError, RuntimeError), match=named):
        model(**change(batch_of(ONE_IMAGE)))


def test_visual_tokens_that_are_no_grid_are_an_error():
    model, batch = build(), batch_of([["image", IMAGE, 5, 6]])  # strategy full: a class token too
    begun(model, VTC(kind="avgpool2d", keep=0.25))
    with pytest.raises(ValueError, match=r"17 image placeholders.*16 tokens.*\(4, 4, False\)"):
        model(**batch, vision_feature_select_strategy="full")


def test_state_of_another_model_is_an_error():
    scheme = sparsify(build())
    state = scheme.state_dict() | {"influence": [0.1] * 3}
    with pytest.raises(ValueError, match=r"layers in state=3.*6"):
        scheme.load_state_dict(state)


def test_global_random_streams_do_not_move():
    model, batch = build(), batch_of(MIXED)
    scheme = sparsify(model, VTC(kind="random", keep=0.25), LDS(policy="linear", rate=0.3))
    states = torch.random.get_rng_state(), random.getstate()
    scheme.begin_step(0)
    model(**batch).loss.backward()
    assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]
