"""STS on a real Hugging Face LLaVA: what a step decides, counts and leaves alone.

That its sequences and layers are the right ones is shown for every architecture in
test_architectures.py.
"""

import copy
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from by_hand import assert_same, backward, decoder_layers, doing_nothing, gradients
from tiny import CASES, IMAGE, LAYERS
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sts import LDS, VTC, sparsify, unsparsify
from sts.architectures import ARCHITECTURES
from sts.architectures._base import square_tiles
from sts.lds.decision import LayerDecision
from sts.lds.units import kept_rows, log
from sts.scheme import SCHEME
from sts.vtc import KINDS, Outputs
from sts.vtc.pooling import avgpool2d

CASE = CASES["llava"]
ONE_IMAGE = [["big", 5, 6, 7, 8], ["big", 9, 10, 11]]
MIXED = [[3, "big", 5, "big", 6, 7, 8], [9, 10, 11, 12], [13, "big", 14, 15]]
POOLED = VTC("avgpool2d", keep=0.25)
HALF = LDS("layerdrop", rate=0.5, draw="fixed_count")  # two of four layers, another two each step
UNITS = {
    "layer": HALF,
    "samples": LDS("layerskip", rate=0.9),
    "tokens": LDS("random_ltd", rate=0.5),
    "backward": LDS("dropbp", rate=0.5),
    "block_influence": LDS("block_influence", rate=0.5),
}
EVERY_UNIT = pytest.mark.parametrize("lds", UNITS.values(), ids=UNITS)
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def checkpoint_layers(model, arguments):
    """By the name that transformers has for it: another one before 5.20."""
    has_new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing_enable" if has_new else "gradient_checkpointing_enable"
    getattr(model, name)(arguments)


def build(dtype=torch.float64):
    return CASE.build(dtype)


def begun(model, vtc=None, lds=None, step=0, **kwargs):
    scheme = sparsify(model, vtc, lds, **kwargs)
    scheme.begin_step(step)
    return scheme


# --- VTC -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["avgpool2d", "random", "cls_topk"])
def test_the_language_model_gets_a_shorter_sequence(kind):
    model, batch, lengths = build(), CASE.batch(MIXED), []
    decoder_layers(model)[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    scheme = begun(model, VTC(kind, keep=0.25))
    model(**batch)
    assert lengths == [2 * 4 + 5]
    metrics = scheme.metrics()
    assert metrics["keep_ratio"] == 0.25
    assert metrics["visual_tokens"] == 3 * 4 / 3
    assert metrics["tokens"] == 13
    assert metrics["answer_tokens"] == 2


@pytest.mark.parametrize("num_items", [None, 40])
def test_careless_labels_keep_their_scale(num_items):
    """Placeholders and padding are targets, as in a collator that copies input_ids: a token that
    was dropped is predicted by the last one that was kept before it, so that none is lost."""
    model, batch = build(), CASE.batch(ONE_IMAGE)
    batch["labels"] = batch["input_ids"].clone()
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    scheme = begun(model, VTC("uniform", keep=0.25))
    result = backward(model, batch, **extra)
    assert scheme.metrics()["answer_tokens"] == 19
    unsparsify(model)

    seen = {}
    language_model = model.model.language_model
    catch = language_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model.zero_grad()
    model(**batch)
    catch.remove()
    kept = [0, 2, 8, 10, 16, 17, 18, 19]  # every second row and column of 4 x 4, and the text
    losses = []
    for row in range(2):
        real = [t for t in kept if batch["attention_mask"][row, t]]
        hidden = language_model(
            inputs_embeds=seen["inputs_embeds"][row : row + 1, real],
            position_ids=torch.tensor([real]),
            attention_mask=torch.ones(1, len(real), dtype=torch.long),
        )[0][0]
        for target in range(1, 20):
            before = max(t for t in real if t < target)
            scores = model.lm_head(hidden[real.index(before)]).float().log_softmax(-1)
            losses.append(-scores[batch["labels"][row, target]])
    loss = torch.stack(losses).sum() / (num_items or len(losses))
    loss.backward()
    assert_same(result, (loss.detach(), gradients(model)))


@pytest.mark.parametrize(
    ("vtc", "lds"), [(VTC("random", keep=0.25), None), (None, LDS("random_ltd", rate=0.5))]
)
def test_random_tokens_differ_by_step_and_inputs_and_repeat(vtc, lds):
    text = [[[*row[:1], *(t + 1 for t in row[1:-2]), *row[-2:]] for row in ONE_IMAGE], ONE_IMAGE]

    def losses(seed):
        model = build()
        scheme = sparsify(model, vtc, lds, seed=seed)
        result = []
        for step in (0, 1):
            scheme.begin_step(step)
            torch.manual_seed(len(result))  # the global stream plays no part
            result += [model(**CASE.batch(rows)).loss.item() for rows in text * 2]
        return result

    assert losses(0) == losses(0) != losses(1)
    assert len(set(losses(0))) == 4  # the second time the same inputs draw alike


class Mixing(nn.Module):
    """A kind with weights of its own: a linear layer on pooled tokens, which begins as nothing."""

    def __init__(self, dim):
        super().__init__()
        self.mix = nn.Linear(dim, dim)
        nn.init.zeros_(self.mix.weight)
        torch.nn.init.normal_(self.mix.bias, std=1e-9)  # from torch's global stream

    def forward(self, tokens, keep, *, grid):
        outputs = avgpool2d(tokens, keep, grid=grid)
        pooled = outputs.apply(tokens)
        return Outputs(outputs.positions, outputs.apply, pooled + self.mix(pooled))


def test_a_kind_with_weights_is_a_submodule_of_the_model_while_it_is_sparse(monkeypatch, tmp_path):
    monkeypatch.setitem(KINDS, "mixing", Mixing)
    model, batch = build(), CASE.batch(MIXED)
    keys, attributes = list(model.state_dict()), set(vars(model))
    begun(model, POOLED)
    expected = backward(model, batch)
    unsparsify(model)

    stream = torch.random.get_rng_state()
    scheme = begun(model, VTC("mixing", keep=0.25), seed=3)
    assert torch.equal(torch.random.get_rng_state(), stream)
    mine = model.visual_token_compressor
    assert isinstance(mine, Mixing) and mine.mix.weight.dtype == torch.float64
    sparsify(twin := build(), scheme.vtc, seed=3)
    assert torch.equal(twin.visual_token_compressor.mix.bias, mine.mix.bias)  # by the seed alone
    loss, grads = backward(model, batch)
    own = {name for name in grads if name.startswith("visual_token_compressor.")}
    assert own == {"visual_token_compressor.mix.weight", "visual_token_compressor.mix.bias"}
    assert all(grads[name].abs().sum() > 0 for name in own)
    others = {name: grad for name, grad in grads.items() if name not in own}
    assert_same((loss, others), expected)  # as long as it adds nothing

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    assert mine.mix.weight.abs().sum() > 0
    assert scheme.metrics()["keep_ratio"] == 0.25
    unsparsify(model)
    assert not hasattr(model, "visual_token_compressor")
    assert list(model.state_dict()) == keys and set(vars(model)) == attributes
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info.values())
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


# --- the loss --------------------------------------------------------------------------------


def test_no_logits_on_visual_tokens():
    model, batch, shapes = build(), CASE.batch(ONE_IMAGE), []
    begun(model)
    model(**batch)  # in the first forward the head is asked with a few tokens more
    model.lm_head.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    output = model(**batch)
    assert shapes == [(1, 4, 64)] and output.logits is None
    assert type(output).__name__ == "LlavaCausalLMOutputWithPast"


@pytest.mark.parametrize("num_items", [7, torch.tensor(7)])
def test_the_loss_is_the_sum_over_num_items_as_in_the_plain_model(num_items):
    model, batch = build(), CASE.batch(MIXED)
    expected = backward(model, batch, num_items_in_batch=num_items)
    begun(model)
    assert_same(backward(model, batch, num_items_in_batch=num_items), expected)


def test_mean_loss_over_accumulated_micro_batches_with_num_items():
    model = build()
    full = CASE.batch(MIXED)
    begun(model, POOLED)
    expected = backward(model, full, num_items_in_batch=6)
    parts, images = [CASE.batch([row]) for row in MIXED], iter(full["pixel_values"])
    for row, part in zip(MIXED, parts, strict=True):
        if row.count("big"):
            part["pixel_values"] = torch.stack([next(images) for _ in range(row.count("big"))])
    model.zero_grad()
    loss = sum(model(**part, num_items_in_batch=6).loss for part in parts)
    loss.backward()
    assert_same((loss.detach(), gradients(model)), expected)


# --- LDS -------------------------------------------------------------------------------------


CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("vtc", [None, POOLED])
@pytest.mark.parametrize("frozen", [False, True])
def test_lds_equals_a_model_without_those_layers(checkpointing, vtc, frozen):
    model, batch = build(), CASE.batch(MIXED)
    if frozen:
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    twin, calls = copy.deepcopy(model), []
    scheme = begun(model, vtc, HALF, step=3)
    assert len(scheme.skipped) == 2
    begun(twin, vtc)
    with doing_nothing(decoder_layers(twin), scheme.skipped):
        expected = backward(twin, batch, use_cache=False)
    for i, layer in enumerate(decoder_layers(model)):
        # On a submodule: hooks on the layer itself stay outside of HF's checkpointed region.
        layer.mlp.register_forward_pre_hook(lambda m, a, i=i: calls.append(i))
    if checkpointing:
        checkpoint_layers(model, checkpointing)
    assert_same(backward(model, batch), expected, **EXACT)
    runs = 2 if checkpointing else 1
    for layer in range(LAYERS):
        assert calls.count(layer) == (0 if layer in scheme.skipped else runs)
    for layer in scheme.skipped:
        grads = [p.grad for p in decoder_layers(model)[layer].parameters()]
        assert grads and all(grad is None for grad in grads)


def test_the_optimizer_leaves_skipped_layers_and_their_moments_alone():
    model, batch = build(), CASE.batch(ONE_IMAGE)
    scheme = sparsify(model, lds=HALF)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(4):
        scheme.begin_step(step)
        before = copy.deepcopy(decoder_layers(model).state_dict())
        moments = copy.deepcopy(optimizer.state)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        for name, parameter in decoder_layers(model).named_parameters():
            skipped = int(name.split(".")[0]) in scheme.skipped
            assert torch.equal(parameter, before[name]) == skipped
            if skipped and parameter in moments:
                for key, value in moments[parameter].items():
                    assert torch.equal(optimizer.state[parameter][key], value)


def test_rescaling_divides_what_a_layer_adds_by_its_chance_to_run():
    model, row = build(), CASE.batch([ONE_IMAGE[0]])
    lds = LDS("layerdrop", rate=0.5, depth="slope", epsilon=0.5, rescale=True)
    scheme = begun(model, lds=lds, step=1)
    chances = [0.5 * (1 + 0.5 * (2 * i - 3) / 3) for i in range(LAYERS)]
    assert list(scheme.decision.chances) == pytest.approx(chances)
    assert 0 < len(scheme.skipped) < LAYERS
    result = backward(model, row)
    unsparsify(model)

    def rescaled(real, chance, hidden, *args, **kwargs):
        return hidden + (real(hidden, *args, **kwargs) - hidden) / (1 - chance)

    for index, layer in enumerate(decoder_layers(model)):
        layer.forward = partial(rescaled, layer.forward, chances[index])
        if index in scheme.skipped:
            layer.forward = lambda hidden, *args, **kwargs: hidden
    begun(model)
    assert_same(result, backward(model, row))


@EVERY_UNIT
@pytest.mark.parametrize("vtc", [None, POOLED], ids=["all tokens", "vtc"])
def test_hidden_states_are_those_of_every_layer_and_token(lds, vtc):
    model, batch = build(), CASE.batch(ONE_IMAGE)
    scheme = begun(model, vtc, lds, seed=1)
    output = model(**batch, output_hidden_states=True)
    states = output.hidden_states
    assert [state.shape for state in states] == [(2, 20, 24)] * (LAYERS + 1)
    for layer in range(LAYERS - 1):  # after the last one comes the norm
        unmoved = torch.equal(states[layer], states[layer + 1])
        assert unmoved == (lds.unit == "layer" and layer in scheme.skipped)
    unsparsify(model)
    assert len(model.eval()(**batch, output_hidden_states=True).hidden_states) == LAYERS + 1


@pytest.mark.parametrize("lds", [HALF, UNITS["samples"], UNITS["tokens"]], ids=lambda x: x.unit)
def test_attentions_have_a_place_for_every_layer(lds):
    model, batch = build(), CASE.batch(ONE_IMAGE)
    model.set_attn_implementation("eager")
    plain = model(**batch, output_attentions=True).attentions
    scheme = begun(model, None, lds, seed=1)
    result = model(**batch, output_attentions=True).attentions
    skipped = [share > 0 for share in scheme.metrics()["skipped"]]
    assert any(skipped) and len(plain) == LAYERS
    assert [attention is None for attention in result] == skipped
    first = skipped.index(True)
    assert all(map(torch.equal, result[:first], plain))


@pytest.mark.parametrize(("rows", "rate", "share"), [(1, 0.5, 0.0), (2, 0.8, 0.48), (8, 0.8, 0.8)])
def test_samples_say_where_few_rows_leave_out_less_than_the_chance(rows, rate, share, caplog):
    decision = LayerDecision(rate, frozenset(), "independent", False, torch.Generator)
    generator = torch.Generator().manual_seed(0)
    decision = replace(decision, generator=lambda: generator)
    log.warning_once.cache_clear()
    kept = [len(kept_rows(rows, decision)) for _ in range(2000)]
    assert 1 - sum(kept) / len(kept) / rows == pytest.approx(share, abs=0.03)
    assert ("keeps at least one row" in caplog.text) == (share < rate)


def idle_model():
    """Its second layer of four does nothing."""
    model = build()
    with torch.no_grad():
        decoder_layers(model)[1].mlp.down_proj.weight.zero_()
        decoder_layers(model)[1].self_attn.o_proj.weight.zero_()
    return model


def test_block_influence_learns_which_layers_do_nothing_and_resumes():
    batch = CASE.batch(ONE_IMAGE)
    lds = LDS("block_influence", rate=0.5, explore=0.1, ema=0.5)
    scheme, skipped, state = sparsify(model := idle_model(), lds=lds), [], None
    for step in range(60):
        if step == 20:
            state = copy.deepcopy(scheme.state_dict())
        scheme.begin_step(step)
        skipped.append(scheme.skipped)
        model(**batch)
    average = scheme.skipper.measured.average
    assert average[1] < 1e-6 < min(average[0], *average[2:])
    counts = [sum(layer in s for s in skipped) for layer in range(LAYERS)]
    assert counts[0] == counts[3] == 0 and counts[1] > counts[2] > 0

    assert set(state) == {"step", "average", "sums"} and state["step"] == 19
    resumed = sparsify(model := idle_model(), lds=lds)
    resumed.load_state_dict(state)
    for step in range(20, 60):
        resumed.begin_step(step)
        assert resumed.skipped == skipped[step]
        model(**batch)
    assert resumed.skipper.measured.average == average


# --- over time -------------------------------------------------------------------------------


def test_the_papers_scheme_follows_its_formula_over_the_stage():
    lds = LDS("sts", rate=0.6, epsilon=0.5, dense_tail=0.1)
    vtc = VTC("uniform", keep=0.25, schedule="falling_linear", dense_tail=0.2)
    scheme, left_out, keep = sparsify(build(), vtc, lds, total_steps=1000), 0, []
    for step in range(1000):
        scheme.decide(step)
        metrics = scheme.metrics()
        t = step / 1000
        expected = [0.6 * (1 - t) ** 2 * (1 + 0.5 * (2 * i - 3) / 3) for i in range(LAYERS)]
        assert metrics["asked"] == pytest.approx(expected if step < 900 else [0] * LAYERS)
        keep.append(scheme.keep)
        left_out += len(scheme.skipped)
    assert keep[0] == 0.25 and keep == sorted(keep) and keep[800:] == [1.0] * 200
    assert keep[400] == pytest.approx(1 - 0.75 * 0.6)
    assert left_out == pytest.approx(LAYERS * 0.6 * 1000 / 3, rel=0.1)
    with pytest.raises(ValueError, match=r"step=1000.*0\.\.999"):
        scheme.decide(1000)


def test_with_the_clock_in_epochs_chances_move_once_an_epoch():
    lds = LDS("layerdrop", rate=0.6, schedule="falling_quadratic", clock="epochs")
    scheme = sparsify(build(), lds=lds, total_steps=12, steps_per_epoch=4)
    by_formula = []
    for step in range(12):
        scheme.decide(step)
        by_formula.append(scheme.metrics()["asked"][0])
    assert by_formula == pytest.approx([0.6 * (1 - step // 4 / 3) ** 2 for step in range(12)])


# --- what is counted -------------------------------------------------------------------------


@EVERY_UNIT
def test_metrics_count_what_the_layers_did(lds):
    """Over two micro-batches of unlike size; counted from outside, by hooks on the layers."""
    model, parts = build(), [CASE.batch(MIXED), CASE.batch(ONE_IMAGE)]
    scheme = begun(model, POOLED, lds, seed=1)
    tokens = [0.0] * LAYERS

    def count(index, module, args):
        tokens[index] += args[0].shape[0] * args[0].shape[1] / longest

    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(partial(count, index))
    for part in parts:
        visual = (part["input_ids"] == IMAGE).sum(1)
        longest = int((part["attention_mask"].sum(1) - visual + visual // 4).max())
        model(**part).loss.backward()
    share = [n / 5 for n in tokens]  # of five samples
    metrics = scheme.metrics()
    work = [one.get("rows", 1.0) * one.get("tokens", 1.0) for one in metrics["work"]]
    assert work == pytest.approx(share)
    assert metrics["layers_run"] == pytest.approx(sum(share))
    skipped = [1 - n for n in share]
    if lds.unit == "backward":
        assert share == [1.0] * LAYERS
        for index, layer in enumerate(decoder_layers(model)):
            parts = (layer.self_attn, layer.mlp)
            skipped[index] = sum(next(part.parameters()).grad is None for part in parts) / 2
    assert metrics["skipped"] == pytest.approx(skipped)
    assert sum(skipped) > 0 and metrics["asked"] == list(scheme.decision.chances)


# --- several processes -----------------------------------------------------------------------


LEARNING = LDS("block_influence", rate=0.5)


def train_rank(rank, store, results):
    """Some steps of one of two processes; saves what both must agree on."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    model = build()
    scheme = sparsify(model, POOLED, LEARNING)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    skipped = []
    for step in range(4):
        scheme.begin_step(step)
        skipped.append(scheme.skipped)
        loss, grads = backward(parallel, CASE.batch([ONE_IMAGE[rank]]))
    average = scheme.skipper.measured.average
    result = {"skipped": skipped, "average": average, "grads": grads, "loss": loss}
    torch.save(result, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_and_decide_alike_and_train_as_one(tmp_path):
    torch.multiprocessing.spawn(train_rank, (tmp_path / "store", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in (0, 1))
    assert first["skipped"] == second["skipped"]
    assert first["average"] == second["average"]

    batches = [CASE.batch([row]) for row in ONE_IMAGE]
    scheme = sparsify(model := build(), POOLED, LEARNING)
    for step in range(4):
        scheme.begin_step(step)
        assert scheme.skipped == first["skipped"][step]
        model.zero_grad()
        for batch in batches:
            (model(**batch).loss / 2).backward()
    assert scheme.skipper.measured.average == pytest.approx(first["average"], rel=1e-5)
    expected = {f"module.{name}": grad for name, grad in gradients(model).items()}
    for result in (first, second):
        assert_same((result["loss"], result["grads"]), (result["loss"], expected))


# --- off means off ---------------------------------------------------------------------------


CLASS_TOKEN = VTC("cls_topk", keep=0.25)


@EVERY_UNIT
def test_eval_and_training_afterwards_are_bit_identical(lds):
    model, batch = build(torch.float32), CASE.batch(MIXED)
    batch["pixel_values"] = batch["pixel_values"].float()
    plain = copy.deepcopy(model)
    keys, attributes, hooks = list(model.state_dict()), set(vars(model)), hook_count(model)
    scheme = begun(model, CLASS_TOKEN, lds, seed=1)
    model(**batch).loss.backward()
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)
    prompt = {k: v[:, :-2] for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    prompt["pixel_values"] = batch["pixel_values"]
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **settings), plain.generate(**prompt, **settings))
    model.train(), plain.train()
    unsparsify(model)
    assert hook_count(model) == hooks and set(vars(model)) == attributes
    result, expected = backward(model, batch), backward(plain, batch)
    assert_same(result, expected, rtol=0, atol=0)
    assert not scheme.attached


def hook_count(model):
    """Hooks on the model, without those that transformers installs to capture hidden states."""
    hooks = [
        h
        for m in model.modules()
        for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    return len([h for h in hooks if "output_capturing" not in getattr(h, "__qualname__", "")])


@EVERY_UNIT
def test_gradients_of_a_forward_in_eval_mode_are_the_plain_ones(lds):
    model, batch = build(), CASE.batch(ONE_IMAGE)
    expected = backward(model.eval(), batch)
    begun(model.train(), POOLED, lds, seed=1)
    model(**batch).loss.backward()
    assert_same(backward(model.eval(), batch), expected, **EXACT)


PLACES = ["model.vision_tower", "model.language_model.layers.3.mlp", "lm_head"]


@pytest.mark.parametrize(
    ("lds", "error", "place"),
    [
        *((lds, KeyboardInterrupt, PLACES[1]) for lds in UNITS.values()),
        *((HALF, error, place) for error in (RuntimeError, SystemExit) for place in PLACES),
    ],
)
def test_every_way_out_of_a_forward_gives_the_model_back(lds, error, place):
    model, batch = build(), CASE.batch(ONE_IMAGE)
    expected, hooks, layers = backward(model, batch), hook_count(model), decoder_layers(model)

    def fail(*_):
        raise error("there")

    module = model.get_submodule(place)
    for leave in ("with", "unsparsify", "begin_step"):
        scheme = begun(model, CLASS_TOKEN, lds, seed=1)
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(error, match="there"):
            if leave == "with":
                with scheme:
                    model(**batch)
            model(**batch)
        handle.remove()
        if leave == "begin_step":
            assert scheme.metrics()["tokens"] == 0  # a micro-batch counts when it is through
            scheme.begin_step(1)  # which doesn't blame another model
            twin = begun(build(), CLASS_TOKEN, lds, step=1, seed=1).model
            assert_same(backward(model, batch), backward(twin, batch))
        if leave != "with":
            unsparsify(model)
        assert hook_count(model) == hooks and decoder_layers(model) is layers
        assert_same(backward(copy.deepcopy(model), batch), expected)


@pytest.mark.parametrize("lds", list(UNITS.values())[:4], ids=list(UNITS)[:4])
@pytest.mark.parametrize("vtc", [None, POOLED], ids=["all tokens", "vtc"])
def test_a_loss_of_ones_own_from_the_logits_is_that_of_the_model(lds, vtc):
    """No labels reach the forward, as with label smoothing: logits are as many as tokens."""
    model, batch = build(), CASE.batch(MIXED)
    scheme = begun(model, vtc, lds, seed=1)
    expected, metrics = backward(model, batch), scheme.metrics()
    labels = batch.pop("labels")
    scheme.begin_step(0)
    model.zero_grad()
    logits = model(**batch).logits
    assert logits.shape[:2] == labels.shape
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    loss.backward()
    assert_same((loss.detach(), gradients(model)), expected)
    again = scheme.metrics()
    assert again.pop("answer_tokens") == labels.shape[1] and metrics.pop("answer_tokens") == 2
    assert again == metrics


# --- forwards of the same inputs --------------------------------------------------------------

RANDOM = VTC("random", keep=0.25)


@EVERY_UNIT
def test_a_forward_without_gradients_is_as_sparse_and_no_part_of_the_step(lds):
    """As of a reference, which is the same model without its adapters."""
    model, batch = build(), CASE.batch(ONE_IMAGE)
    scheme = begun(model, RANDOM, lds, seed=1)
    expected = backward(model, batch)
    metrics, state = scheme.metrics(), scheme.state_dict()
    twin = begun(other := build(), RANDOM, lds, seed=1)
    with torch.no_grad():
        assert other(**batch).loss == expected[0]
    assert twin.metrics()["tokens"] == 0
    assert_same(backward(other, batch), expected, rtol=0, atol=0)
    with torch.no_grad():
        assert other(**batch).loss == expected[0]
    assert (twin.metrics(), twin.state_dict()) == (metrics, state)


@pytest.mark.parametrize("reentrant", [False, True])
@EVERY_UNIT
def test_a_model_that_a_backward_computes_again_draws_alike_and_counts_once(lds, reentrant):
    def run(batch, weight, compute=lambda function, *args: function(*args)):
        model, loss = build(), 0
        scheme = begun(model, RANDOM, lds, seed=1)
        for part in ({"labels": batch["labels"]}, {}):  # micro-batches of the same inputs
            loss = loss + compute(lambda b, w: model(**b).loss + 0 * w, batch | part, weight)
        loss.backward()
        return (loss.detach(), gradients(model)), scheme.metrics(), scheme.state_dict()

    def again(function, *args):
        return checkpoint(function, *args, use_reentrant=reentrant)

    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    batch = CASE.batch(ONE_IMAGE)
    expected, metrics, state = run(batch, weight)
    result, *counted = run(batch, weight, again)
    assert_same(result, expected, **EXACT)
    assert counted[0] == metrics
    assert torch.tensor(counted[1]["sums"]).equal(torch.tensor(state["sums"]))


@pytest.mark.parametrize("leave", [lambda s: s.begin_step(1), lambda s: unsparsify(s.model)])
def test_a_backward_that_computes_layers_again_comes_in_its_step(leave):
    model, batch = build(), CASE.batch(ONE_IMAGE)
    checkpoint_layers(model, {"use_reentrant": True})
    scheme = begun(model, lds=LDS("dropbp", rate=0.5), seed=1)
    loss = model(**batch).loss
    leave(scheme)
    with pytest.raises(RuntimeError, match=r"'backward' under re-entrant.*next scheme.begin_step"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_that_computes_the_model_again_comes_in_its_step(reentrant):
    model, batch = build(), CASE.batch(ONE_IMAGE)
    scheme = begun(model, lds=HALF)
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = checkpoint(lambda w: model(**batch).loss + 0 * w, weight, use_reentrant=reentrant)
    error = "no backward computed again" if reentrant else "a forward of another step again"
    with pytest.raises(RuntimeError, match=error):
        scheme.begin_step(1)
        loss.backward()


def test_a_language_model_that_is_checkpointed_after_sparsify_is_refused():
    """A backward that computes it alone has not what is drawn by, nor the places of answers."""
    model, batch = build(), CASE.batch(ONE_IMAGE)
    begun(model, lds=UNITS["samples"])
    model.model.language_model = checkpoint_wrapper(model.model.language_model)
    with pytest.raises(RuntimeError, match=r"LlamaModel, which doesn't see the tokens"):
        model(**batch).loss.backward()


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_in_training_mode_is_that_of_the_plain_model(use_cache):
    model, batch = build(), CASE.batch(ONE_IMAGE)
    batch = {
        name: value[:1, :18] if value.ndim == 2 else value[:1] for name, value in batch.items()
    }
    del batch["labels"]
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**batch, **settings)
    begun(model, RANDOM, HALF)
    result = model.generate(**batch, **settings)
    assert all(map(torch.equal, result.logits, expected.logits))


def test_positional_inputs_and_tuples_work_as_in_the_plain_model():
    model, batch = build(), CASE.batch(ONE_IMAGE)
    begun(model, POOLED)
    expected = model(**batch).loss
    ids, pixels = batch.pop("input_ids"), batch.pop("pixel_values")
    assert torch.equal(model(ids, pixels, **batch, return_dict=False)[0], expected)


def test_a_copy_of_a_sparse_model_has_a_scheme_of_its_own():
    model, batch = build(), CASE.batch(ONE_IMAGE)
    begun(model, POOLED)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(**batch).loss != model(**batch).loss
    unsparsify(twin)
    assert SCHEME not in vars(twin) and SCHEME in vars(model)


def test_saves_and_loads_like_the_plain_model(tmp_path):
    model, batch = build(), CASE.batch(ONE_IMAGE)
    begun(model, CLASS_TOKEN, LEARNING)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


@EVERY_UNIT
def test_autocast_computes_in_low_precision_and_keeps_the_loss_in_float32(lds):
    model, batch, dtypes = build(dtype=torch.float32), CASE.batch(ONE_IMAGE), []
    batch["pixel_values"] = batch["pixel_values"].float()
    model.lm_head.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    begun(model, POOLED, lds)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert set(dtypes) == {torch.bfloat16} and loss.dtype == torch.float32


@pytest.mark.parametrize("lds", [LDS("sts", rate=0.3, epsilon=1), *UNITS.values()])
def test_global_random_streams_do_not_move(lds):
    model, batch = build(), CASE.batch(MIXED)
    scheme = sparsify(model, VTC("random", keep=0.25), lds, total_steps=8)
    states = torch.random.get_rng_state(), random.getstate()
    scheme.begin_step(0)
    model(**batch).loss.backward()
    assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_a_label_on_a_rows_first_token_counts_as_in_the_plain_model():
    """Padded on the left, it is predicted from the padding before it. Row 1 has no image."""
    model, batch = build(), CASE.batch([["big", 5, 6, 7], [8, 9, 10]], "left")
    batch["labels"][:] = -100
    batch["labels"][1, -3:] = batch["input_ids"][1, -3:]
    expected, _ = backward(model, batch)
    scheme = begun(model, POOLED)
    torch.testing.assert_close(backward(model, batch)[0], expected)
    assert scheme.metrics()["keep_ratio"] == 0.25


@pytest.mark.parametrize("vtc", [None, POOLED], ids=["plain", "vtc"])
def test_text_alone_leaves_a_projector_without_gradient(vtc):
    model = build().requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_()
    begun(model, vtc)
    model(**CASE.batch([[3, 4, 5], [6, 7, 8, 9]])).loss.backward()
    assert all(p.grad is None for p in projector.parameters())
    model(**CASE.batch(ONE_IMAGE)).loss.backward()  # of the same step
    assert all(p.grad is not None for p in projector.parameters())


# --- bad input -------------------------------------------------------------------------------


def test_grids_that_are_not_the_visual_tokens_are_an_error(monkeypatch):
    tiles = replace(ARCHITECTURES["llava"], grids=partial(square_tiles, lambda config: 4))
    monkeypatch.setitem(ARCHITECTURES, "llava", tiles)
    model, batch = build(), CASE.batch([["big", IMAGE, 5, 6]])  # strategy full: a class token too
    begun(model, POOLED)
    with pytest.raises(ValueError, match=r"17 image placeholders.*16 tokens.*\(4, 4, False\)"):
        model(**batch, vision_feature_select_strategy="full")


def test_visual_tokens_of_no_known_grid_are_a_sequence():
    model, batch = build(), CASE.batch([["big", IMAGE, 5, 6]])
    scheme = begun(model, VTC("avgpool1d", keep=0.25))
    model(**batch, vision_feature_select_strategy="full").loss.backward()
    assert scheme.metrics()["visual_tokens"] == 4
