"""Which layers LDS leaves out: schedules, depths, draws, policies, units and what is measured.

Expected values are worked out by hand or by the plain Python in this file.
"""

import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import influence
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny import CASES, LAYERS
from torch import nn

from sts import LDS, sparsify
from sts import lds as package
from sts.draws import keyed_generator, keyed_seed, keyed_torch_generator
from sts.lds import DEPTHS, DRAWS, UNITS, Depth, Unit, resolve, source_of
from sts.lds.block_influence import block_influence
from sts.lds.decision import Decision, LayerDecision, chances, decide, expected_work, skipped_share
from sts.lds.measure import Measured
from sts.lds.units import SomeRows, SomeTokens, kept_rows
from sts.schedule import SCHEDULES, keep_at, share_done, strength

MEASURED = [0.9, 0.3, 0.05, 0.2, 0.5, 0.1, 0.4, 0.7]
STEPS = 10_000
FALLING = sorted(name for name in SCHEDULES if name.startswith("falling"))
RISING = sorted(name for name in SCHEDULES if name.startswith("rising"))
FREE = ("independent", "fixed_count")  # draws that any chances can have
# depths whose weights are known here; others may be a user's
BY_FORMULA = ("alternate", "exponential", "linear", "slope", "uniform")
BY_HAND = (*BY_FORMULA, "block_influence")
BY_STEP = sorted(x for x, unit in UNITS.items() if unit.drawn_by_step and {*FREE} <= {*unit.draws})


def sigmas(chance, draws, count=5):
    """So far a frequency may be off: `count` standard deviations of a mean of `draws` switches."""
    return count * math.sqrt(chance * (1 - chance) / draws) + 1e-12


# ---- S(t) --------------------------------------------------------------------------------------

POINTS = {
    "constant": {0: 1, 0.37: 1, 1: 1},
    "rising_linear": {0: 0, 0.3: 0.3, 1: 1},
    "rising_cosine": {0: 0, 1 / 3: 0.25, 0.5: 0.5, 2 / 3: 0.75, 1: 1},
    "rising_staged": {0: 0, 0.24: 0, 0.25: 1 / 3, 0.49: 1 / 3, 0.5: 2 / 3, 0.75: 1, 1: 1},
    "rising_exponential": {0: 0, math.log(2) / 5: 0.5, 0.2: 0.632120558829, 1: 0.993262053001},
    "falling_linear": {0: 1, 0.3: 0.7, 1: 0},
    "falling_cosine": {0: 1, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1: 0},
    "falling_staged": {0: 1, 0.24: 1, 0.25: 2 / 3, 0.5: 1 / 3, 0.74: 1 / 3, 0.75: 0, 1: 0},
    "falling_quadratic": {0: 1, 0.25: 0.5625, 0.5: 0.25, 0.9: 0.01, 1: 0},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_at_known_points(schedule):
    for t, expected in POINTS[schedule].items():
        assert strength(t, schedule) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0, 1), st.floats(0, 1))
def test_schedules_go_one_way_and_stay_within_0_and_1(schedule, t, later):
    t, later = sorted((t, later))
    first, second = strength(t, schedule), strength(later, schedule)
    assert 0 <= first <= 1
    if schedule in RISING:
        assert first <= second
    elif schedule in FALLING:
        assert first >= second
    else:
        assert first == second


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 200), st.data())
@example("constant", 10, None)
def test_a_dense_tail_is_exactly_the_last_steps(schedule, total, data):
    dense = 1 if data is None else data.draw(st.integers(0, total))
    for step in range(total):
        result = strength(step / total, schedule, dense / total)
        without = strength(step / total, schedule)
        assert result == (0 if step >= total - dense else without)


def test_vtc_keeps_less_the_stronger_the_schedule():
    assert [keep_at(t, 0.25, "constant") for t in (0, 0.5, 1)] == [0.25] * 3
    assert [keep_at(t, 0.25, "falling_linear") for t in (0, 0.5, 1)] == [0.25, 0.625, 1]
    assert [keep_at(t, 0.5, "falling_quadratic") for t in (0, 0.5, 1)] == [0.5, 0.875, 1]
    staged = [keep_at(t, 0.1, "rising_staged") for t in (0, 0.25, 0.5, 0.75, 1)]
    assert staged == pytest.approx([1, 0.7, 0.4, 0.1, 0.1])
    assert [keep_at(t, 0.25, "constant", 0.2) for t in (0.79, 0.8, 1)] == [0.25, 1, 1]


def test_share_done_in_steps_and_in_whole_epochs():
    assert [share_done(step, 8) for step in (0, 1, 4, 7)] == [0, 0.125, 0.5, 0.875]
    epochs = [share_done(step, 12, "epochs", 4) for step in range(12)]
    assert epochs == [0] * 4 + [4 / 12] * 4 + [8 / 12] * 4
    assert [share_done(step, 5, "epochs", 5) for step in range(5)] == [0] * 5  # E = 1: no decay
    assert share_done(7, None) == share_done(7, None, "epochs", 4) == 0


# ---- D(l) --------------------------------------------------------------------------------------


def depth_by_hand(depth, layers, lds, measured):
    """D(l) of every layer, as the docs define it: a second writing."""
    if depth == "uniform":
        return [1.0 for _ in range(layers)]
    if depth == "linear":
        return [(n + 1) / layers for n in range(layers)]
    if layers == 1 and depth in ("slope", "exponential", "alternate"):
        return [1.0]
    if depth == "slope":
        return [1 + lds.epsilon * (2 * n - (layers - 1)) / (layers - 1) for n in range(layers)]
    if depth == "exponential":
        return [2 ** (n / (layers - 1)) - 1 for n in range(layers)]
    if depth == "alternate":
        return [0.0 if n % 2 == 0 else layers / (layers // 2) for n in range(layers)]
    assert depth == "block_influence"
    result = []
    for mine in measured:
        places = [i + 1 for i, x in enumerate(sorted(measured, reverse=True)) if x == mine]
        rank = sum(places) / len(places)
        result.append(lds.explore + (1 - lds.explore) * 2 * rank / (layers + 1))
    return result


def weights(depth, layers, measured=None, **more):
    lds = LDS("layerdrop", depth=depth, **more)
    return DEPTHS[depth].weights(layers, lds, measured or [math.inf] * layers)


def test_slope_is_the_papers_depth_based_adjustment():
    expected = [0.5, 9 / 14, 11 / 14, 13 / 14, 15 / 14, 17 / 14, 19 / 14, 1.5]
    result = weights("slope", 8, epsilon=0.5)
    assert result == pytest.approx(expected) and sum(result) / 8 == pytest.approx(1)
    assert weights("slope", 3, epsilon=1) == [0, 1, 2]
    assert weights("slope", 3, epsilon=-0.5) == [1.5, 1, 0.5]
    assert weights("slope", 5) == [1] * 5
    assert weights("slope", 1, epsilon=0.5) == [1]


def test_other_depths_at_known_points():
    assert weights("uniform", 3) == [1, 1, 1]
    assert weights("linear", 4) == [0.25, 0.5, 0.75, 1]
    root = math.sqrt(2)
    expected = [0, math.sqrt(root) - 1, root - 1, root * math.sqrt(root) - 1, 1]
    assert weights("exponential", 5) == pytest.approx(expected)
    assert weights("linear", 1) == weights("exponential", 1) == weights("uniform", 1) == [1]


def test_block_influence_skips_least_influence_most_and_explores():
    ranks = {2: 6, 5: 5, 3: 4, 1: 3, 6: 2, 4: 1}  # 6 = least influence among layers 1..6
    lds = LDS("block_influence", rate=0.4, explore=0.25)
    expected = [0.0] * 8
    for layer, rank in ranks.items():
        expected[layer] = 0.25 * 0.4 + 0.75 * 0.4 * 6 * rank / 21
    assert chances(lds, 8, 0, MEASURED) == pytest.approx(expected)
    assert sum(expected) == pytest.approx(6 * 0.4)


def test_block_influence_gives_ties_their_mean_rank():
    result = weights("block_influence", 3, [0.1, 0.1, 0.5], explore=0)
    assert result == pytest.approx([2 * rank / 4 for rank in (2.5, 2.5, 1)])
    assert weights("block_influence", 4, [0.2] * 4, explore=0) == pytest.approx([1] * 4)


def test_block_influence_is_uniform_before_any_measurement():
    lds = LDS("block_influence", rate=0.4, explore=0)
    assert chances(lds, 8, 0) == pytest.approx([0, *[0.4] * 6, 0])
    uniform = LDS("layerdrop", 0.4, draw="fixed_count", protect_first=1, protect_last=1)
    assert drawn(lds, steps=50, measured=None) == drawn(uniform, steps=50)


def test_block_influence_runs_what_was_never_measured():
    result = weights("block_influence", 4, [0.1, math.inf, 0.2, 0.3], explore=0)
    assert result[1] == min(result) < min(result[0], *result[2:])


def test_a_depth_that_nothing_measures_ignores_what_was_measured():
    for depth in BY_FORMULA:
        assert weights(depth, 8, MEASURED, epsilon=0.5) == weights(depth, 8, epsilon=0.5)


# ---- policies as their papers have them --------------------------------------------------------


def test_sts_is_the_papers_formula():
    lds = LDS("sts", rate=0.6, epsilon=0.5)
    for epoch, decay in ((0, 1), (1, 9 / 16), (2, 1 / 4), (3, 1 / 16), (4, 0)):
        adjusted = [0.5 + n / 7 for n in range(8)]  # 1 + eps (2 l - 7) / 7
        expected = [0.6 * decay * factor for factor in adjusted]
        assert chances(lds, 8, epoch / 4) == pytest.approx(expected)
    assert chances(lds, 8, 0)[0] == pytest.approx(0.3)
    assert chances(lds, 8, 0)[7] == pytest.approx(0.9)
    assert chances(lds, 3, 0.5) == pytest.approx([0.075, 0.15, 0.225])


@pytest.mark.parametrize(("policy", "unit"), [("layerdrop", "layer"), ("dropbp", "backward")])
def test_these_leave_out_their_unit_of_every_layer_alike_all_the_time(policy, unit):
    for t in (0, 0.5, 1):
        assert chances(LDS(policy, rate=0.2), 4, t) == (0.2,) * 4
    assert LDS(policy).unit == unit


def test_pld_is_progressive_layer_dropping():
    theta, gamma = 0.5, 0.001
    for step in (0, 100, 1000, 4999):  # of 5,000
        expected = [n / 6 * (1 - theta) * (1 - math.exp(-gamma * step)) for n in range(1, 7)]
        result = chances(LDS("pld", rate=1 - theta), 6, step / 5000)
        assert result == pytest.approx(expected, abs=1e-12)
    assert chances(LDS("pld", rate=0.5), 2, 0.2) == pytest.approx([0.158030139707, 0.316060279414])


def test_layerskip_rises_exponentially_with_depth_and_leaves_out_samples():
    lds = LDS("layerskip", rate=0.2)
    expected = [0.2 * (2 ** (n / 4) - 1) for n in range(5)]
    assert chances(lds, 5, 0) == chances(lds, 5, 1) == pytest.approx(expected)
    assert chances(lds, 3, 0.5) == pytest.approx([0, 0.2 * 0.414213562373, 0.2])
    assert lds.unit == "samples"


@pytest.mark.parametrize("policy", ["random_ltd", "block_influence"])
def test_these_protect_the_first_and_the_last_layer(policy):
    result = chances(LDS(policy, rate=0.4), 5, 0.5)
    assert result == pytest.approx([0, 0.4, 0.4, 0.4, 0])


def test_over_the_layers_after_a_protected_one_the_first_of_them_is_layer_0():
    lds = LDS("sts", rate=0.6, epsilon=0.5, protect_first=1, protect_last=2)
    assert chances(lds, 6, 0) == pytest.approx([0, 0.3, 0.6, 0.9, 0, 0])


# What the formula says in words, computed: "0.6 * (1 - t)^2 * (1 + 0.5 (2 l - 7) / 7)".
MATHS = {"cos": math.cos, "floor": math.floor, "e": math.e, "pi": math.pi}


def computed(text, **values):
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", text).replace("^", "**")
    return eval(text, {"__builtins__": {}}, MATHS | values)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("depth", ["uniform", "slope", "linear", "exponential", "alternate"])
def test_the_formula_in_words_is_what_is_computed(schedule, depth):
    parts = {"schedule": schedule, "depth": depth, "protect_first": 1, "protect_last": 2}
    lds = LDS("layerdrop", rate=0.5, epsilon=0.25, **parts)
    text = re.fullmatch(r"p_l\(t\) = (.*), l = 0 \.\. 5 for layers 1 \.\. 6 .*", lds.formula(9))
    for t in (0, 0.3, 0.8):
        expected = [computed(text[1], t=t, l=layer) for layer in range(6)]
        result = chances(lds, 9, t)
        assert result == pytest.approx([0, *expected, 0, 0], abs=1e-12)


# ---- decisions ---------------------------------------------------------------------------------


def drawn(lds, steps=STEPS, layers=8, t=0.0, seed=0, measured=None):
    return [decide(lds, layers, t, seed, step, measured) for step in range(steps)]


@pytest.mark.parametrize("draw", FREE)
@pytest.mark.parametrize(
    ("depth", "unit"),
    [*((depth, "layer") for depth in BY_HAND), *(("slope", unit) for unit in BY_STEP[:-1])],
)
def test_every_layer_is_off_as_often_as_the_formula_says(depth, draw, unit):
    first, last = (1, 1) if depth in ("block_influence", "uniform") else (0, 0)
    lds = LDS(
        "layerdrop",
        rate=0.5,
        schedule="falling_linear",
        depth=depth,
        draw=draw,
        unit=unit,
        epsilon=0.5,
        protect_first=first,
        protect_last=last,
        explore=0.25,
    )
    free = 8 - first - last
    inner = depth_by_hand(depth, free, lds, MEASURED[first : 8 - last])
    by_formula = [0.0] * first + [0.5 * 0.75 * weight for weight in inner] + [0.0] * last
    decisions = drawn(lds, t=0.25, measured=MEASURED)
    for layer, chance in enumerate(by_formula):
        assert all(d.chances[layer] == pytest.approx(chance) for d in decisions[:3])
        for share in UNITS[unit].shares:
            frequency = sum((layer, share) in d.off for d in decisions) / STEPS
            assert frequency == pytest.approx(chance, abs=sigmas(chance, STEPS))
    counts = [len(d.off) for d in decisions]
    pieces = [chance for chance in by_formula for _ in UNITS[unit].shares]
    mean, variance = sum(pieces), sum(p * (1 - p) for p in pieces)
    assert sum(counts) / STEPS == pytest.approx(mean, abs=5 * math.sqrt(variance / STEPS))
    if draw == "fixed_count":
        assert set(counts) == {math.floor(mean), math.ceil(mean)}
    else:
        assert np.var(counts) == pytest.approx(variance, rel=0.1)


def test_switches_of_an_independent_draw_know_nothing_of_each_other():
    decisions = drawn(LDS("sts", rate=0.5, epsilon=0.5), layers=6)
    by_formula = [0.25 + 0.1 * layer for layer in range(6)]  # 0.5 (1 + 0.5 (2 l - 5) / 5)
    for one in range(6):
        for other in range(one):
            both = by_formula[one] * by_formula[other]
            frequency = sum({one, other} <= {i for i, _ in d.off} for d in decisions) / STEPS
            assert frequency == pytest.approx(both, abs=sigmas(both, STEPS))


@pytest.mark.parametrize(("policy", "sets"), [("layerdrop", 20), ("dropbp", 924)])
def test_all_sets_of_a_size_are_possible(policy, sets):
    lds = LDS(policy, rate=0.5, draw="fixed_count", protect_first=1, protect_last=1)
    assert len({d.off for d in drawn(lds, steps=20 * sets)}) == sets  # of 6 layers, 12 sublayers


def test_apart_draws_no_neighbours_and_each_layer_as_often_as_its_chance_says():
    by_formula = [0.5, 0.5, 0.1, 0.6, 0.4, 0.0, 0.25, 0.75]  # neighbours' add up to 1 at most
    draws = [DRAWS["apart"](by_formula, keyed_generator(seed)) for seed in range(STEPS)]
    assert all(layer + 1 not in chosen for chosen in draws for layer in chosen)
    for layer, chance in enumerate(by_formula):
        frequency = sum(layer in chosen for chosen in draws) / STEPS
        assert frequency == pytest.approx(chance, abs=sigmas(chance, STEPS))
    assert DRAWS["apart"]([1.0] * 4, keyed_generator(0)) == {0, 2}, "no room for the others"


def test_spacing_skips_whole_layers_and_alternate_never_the_first():
    apart, alternate = LDS("apart", rate=0.5), LDS("sts", rate=0.5, depth="alternate")
    alternate.check_layers(12)
    for step in range(100):
        assert decide(alternate, 12, 0, 0, step).layers == {1, 3, 5, 7, 9, 11}
        layers = decide(apart, 12, 0, 0, step).layers
        assert layers and not {layer + 1 for layer in layers} & layers
    assert chances(LDS("layerdrop", rate=0.2, depth="alternate"), 5, 0) == (0, 0.5, 0, 0.5, 0)
    with pytest.raises(ValueError, match=r"at most 0\.5"):
        LDS("layerdrop", rate=0.6, depth="alternate")


def test_raptr_skips_as_many_layers_all_stage_long_and_fewer_in_the_next():
    lds = LDS("raptr", rate=0.6)
    for t, count in ((0.0, 6), (0.2, 6), (0.3, 4), (0.6, 2), (0.8, 0)):
        for step in range(20):
            layers = decide(lds, 12, t, 0, step).layers
            assert len(layers) == count and not layers & {0, 11}


def test_where_all_layers_would_be_off_the_one_with_the_smallest_chance_runs():
    """The paper's setting on a small decoder: that costs the first layer some of its chance."""
    lds = LDS("sts", rate=0.85, epsilon=0.1)
    by_formula = [0.85 * (0.9 + 0.2 * n / 7) for n in range(8)]
    decisions = drawn(lds)
    assert max(len(d.off) for d in decisions) == 7
    for layer, chance in enumerate(by_formula):
        chance -= math.prod(by_formula) if layer == 0 else 0
        frequency = sum((layer, "rows") in d.off for d in decisions) / STEPS
        assert frequency == pytest.approx(chance, abs=sigmas(chance, STEPS))


def largest_rate(depth, layers, free, lds):
    """Up to which rate every chance is one and a layer is left to run."""
    distinct = list(range(layers))  # measured: no two alike, the most uneven there can be
    uneven = max(
        max(depth_by_hand(depth, count, lds, distinct[:count])) for count in sorted({2, free})
    )
    total = sum(depth_by_hand(depth, free, lds, distinct[:free]))
    return min(1.0, 1 / uneven, (layers - 1) / total if total else 1.0)


@settings(max_examples=300, deadline=None)
@given(
    depth=st.sampled_from(BY_HAND),
    draw=st.sampled_from(FREE),
    unit=st.sampled_from(BY_STEP),
    layers=st.integers(1, 12),
    first=st.integers(0, 4),
    last=st.integers(0, 4),
    share=st.floats(0, 1),
    epsilon=st.floats(-1, 1),
    explore=st.floats(0, 1),
    step=st.integers(0, 10**9),
    data=st.data(),
)
def test_protected_layers_run_and_one_layer_always_runs(
    depth, draw, unit, layers, first, last, share, epsilon, explore, step, data
):
    free = layers - first - last
    assume(free > 0 and (depth != "slope" or epsilon))
    parts = {"depth": depth, "draw": draw, "unit": unit, "epsilon": epsilon, "explore": explore}
    parts |= {"protect_first": first, "protect_last": last}
    idle = LDS("layerdrop", **parts)
    rate = share * largest_rate(depth, layers, free, idle)
    lds = LDS("layerdrop", rate=rate, **parts)
    lds.check_layers(layers)
    influence = st.floats(0, 2) | st.just(math.inf)
    measured = data.draw(st.lists(influence, min_size=layers, max_size=layers))
    decision = decide(lds, layers, 0.5, 1, step, measured)
    assert all(first <= layer < layers - last for layer, _ in decision.off)
    assert all(share in UNITS[unit].shares for _, share in decision.off)
    assert len(decision.off) < layers * len(UNITS[unit].shares)
    inner = depth_by_hand(depth, free, lds, measured[first : layers - last])
    expected = [0.0] * first + [rate * weight for weight in inner] + [0.0] * last
    assert decision.chances == pytest.approx(expected, abs=1e-12)
    assert all(0 <= chance <= 1 for chance in decision.chances)
    if draw == "fixed_count":
        total = sum(expected) * len(UNITS[unit].shares)
        assert math.floor(total - 1e-9) <= len(decision.off) <= math.ceil(total + 1e-9)


@pytest.mark.parametrize("draw", FREE)
def test_draws_obey_certain_chances(draw):
    for seed in range(200):
        result = DRAWS[draw]([0.0, 1.0, 0.5, 1.0, 0.0], keyed_generator(seed))
        assert {1, 3} <= result <= {1, 2, 3}
        assert DRAWS[draw]([0.0] * 5, keyed_generator(seed)) == set()
        assert DRAWS[draw]([1.0] * 5, keyed_generator(seed)) == set(range(5))


@pytest.mark.parametrize("unit", sorted({"samples", "tokens"}))
def test_units_that_draw_in_each_micro_batch_have_no_layer_off_for_a_step(unit):
    lds = LDS("random_ltd", rate=0.5, unit=unit)
    assert decide(lds, 4, 0, 0, 7) == Decision((0.0, 0.5, 0.5, 0.0))


def test_nothing_is_off_without_a_rate_in_the_dense_tail_or_where_all_are_protected():
    idle = Decision((0.0,) * 4)
    assert decide(LDS(), 4, 0.5, 0, 0) == idle
    assert decide(LDS("sts", rate=0.0), 4, 0, 0, 0) == idle
    assert decide(LDS("sts", rate=0.5, epsilon=1), 4, 1, 0, 0) == idle
    assert decide(LDS("layerdrop", rate=0.5, dense_tail=0.25), 4, 0.75, 0, 0) == idle
    assert decide(LDS("layerdrop", protect_first=4), 4, 0.5, 0, 0) == idle


def test_what_is_off_of_a_layer_and_what_work_that_leaves():
    off = {(1, "attention_backward"), (2, "attention_backward"), (2, "mlp_backward")}
    decision = Decision((0.0, 0.5, 0.5), frozenset(off))
    both = {"attention_backward", "mlp_backward"}
    assert [decision.of(layer) for layer in range(3)] == [set(), {"attention_backward"}, both]
    work = [dict.fromkeys(decision.of(layer), 0.0) for layer in range(3)]
    assert skipped_share(LDS("dropbp"), work) == [0, 0.5, 1]
    assert skipped_share(LDS("layerskip"), [{}, {"rows": 0.75}]) == [0, 0.25]


def test_expected_work_is_what_the_formula_leaves():
    assert expected_work(LDS("sts", rate=0.6, epsilon=0.5), 3, 0.5) == [
        {"rows": pytest.approx(share)} for share in (0.925, 0.85, 0.775)
    ]
    ltd = expected_work(LDS("random_ltd", rate=0.25), 4, 0.5)
    assert ltd == [{}, {"tokens": 0.75}, {"tokens": 0.75}, {}]
    half = {"attention_backward": 0.5, "mlp_backward": 0.5}
    assert expected_work(LDS("dropbp", rate=0.5), 2, 0) == [half, half]


# ---- what a decision depends on ----------------------------------------------------------------


def all_random_states():
    return random.getstate(), torch.random.get_rng_state().tolist(), str(np.random.get_state())


@pytest.mark.parametrize("policy", ["sts", "dropbp", "block_influence"])
def test_a_decision_depends_on_settings_seed_and_step_alone(policy):
    lds = LDS(policy, rate=0.4, epsilon=0.5)
    ahead = drawn(lds, 20, measured=MEASURED)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = all_random_states()
    assert drawn(lds, 20, measured=MEASURED) == ahead
    assert decide(lds, 8, 0, 0, 13, MEASURED) == ahead[13]  # without those before
    assert drawn(lds, 20, measured=MEASURED, seed=1) != ahead
    assert len({d.off for d in ahead}) > 5
    assert all_random_states() == states


def test_what_is_drawn_in_a_micro_batch_moves_no_other_stream():
    states = all_random_states()
    for draw in FREE:
        part = part_of(0.5, draw, seed=3)
        assert kept_rows(16, part).tolist() == kept_rows(16, part).tolist()
    one, same = (SomeTokens(Adds(), part_of(0.5, seed=3)) for _ in range(2))
    hidden = torch.zeros(2, 9, 1)
    assert torch.equal(one(hidden), same(hidden))
    assert all_random_states() == states


def test_keyed_streams_differ_where_their_keys_do():
    keys = [(0, 1), (1, 0), (0, 1, "layer"), (0, 1, 0, "layer", 1), (0, 1, 1, "layer", 0)]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= keyed_seed(*key) < 2**53 for key in keys)
    one, other = (torch.rand(3, generator=keyed_torch_generator(*keys[0])) for _ in range(2))
    assert torch.equal(one, other)


def sets(lds, **more):
    return [sorted(layer for layer, _ in d.off) for d in drawn(lds, 4, **more)]


def test_decisions_stay_the_same_across_versions():
    """A resumed or repeated run must not change its mind: these sets are part of the contract."""
    sts, uniform = LDS("sts", rate=0.6, epsilon=0.5), LDS("layerdrop", 0.5, draw="fixed_count")
    assert sets(sts) == [[2, 4, 6, 7], [0, 3, 5, 6], [5, 6, 7], [1, 3, 4, 5, 6, 7]]
    frozen = [[1, 2, 4, 6], [0, 2, 3, 7], [2, 3, 4, 5], [2, 3, 6, 7]]
    assert sets(uniform, seed=1) == frozen
    frozen = [[1, 2, 5], [2, 3, 6], [1, 2, 4], [1, 2, 5]]
    assert sets(LDS("block_influence", rate=0.5), measured=MEASURED) == frozen
    assert [sorted(d.off) for d in drawn(LDS("dropbp", rate=0.4), 2, layers=3)] == [
        [(1, "attention_backward"), (2, "attention_backward")],
        [(0, "attention_backward"), (1, "mlp_backward")],
    ]
    assert keyed_seed(0, "layers") == 2666961650963621
    assert keyed_seed(7, 3, 0, "layer", 1) == 3586920488241817


# ---- units -------------------------------------------------------------------------------------


def part_of(chance, draw="fixed_count", seed=0, rescale=False, off=frozenset()):
    generator = lambda: torch.Generator().manual_seed(seed)  # noqa: E731
    return LayerDecision(chance, frozenset(off), draw, rescale, generator)


class Adds(nn.Module):
    """A layer that adds 2 to what it sees, and keeps it."""

    def forward(self, hidden, **kwargs):
        self.seen, self.kwargs = hidden, kwargs
        return hidden + 2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.floats(0, 1), st.sampled_from(FREE), st.integers(0, 10**6))
def test_at_least_one_row_is_kept_and_rows_ascend(rows, chance, draw, seed):
    kept = kept_rows(rows, part_of(chance, draw, seed)).tolist()
    assert kept == sorted(set(kept)) and set(kept) <= set(range(rows)) and kept
    if draw == "fixed_count":
        by_formula = chance * rows
        assert max(1, rows - math.ceil(by_formula + 1e-6)) <= len(kept)
        assert len(kept) <= max(1, rows - math.floor(by_formula - 1e-6))


@pytest.mark.parametrize("draw", FREE)
@pytest.mark.parametrize(("rows", "chance"), [(5, 0.3), (4, 0.5), (3, 0.6), (8, 0.85)])
def test_every_row_is_left_out_as_often_as_the_chance_says(rows, chance, draw):
    kept = [kept_rows(rows, part_of(chance, draw, seed)).tolist() for seed in range(4000)]
    expected = chance
    if draw == "independent":  # where all would be out, one of them stays
        expected -= chance**rows / rows
    else:
        assert {rows - len(k) for k in kept} == {
            math.floor(chance * rows), math.ceil(chance * rows)
        }  # fmt: skip
    for row in range(rows):
        out = sum(row not in k for k in kept) / 4000
        assert out == pytest.approx(expected, abs=sigmas(expected, 4000))


@pytest.mark.parametrize("draw", FREE)
def test_rows_that_are_left_out_go_through(draw):
    hidden = torch.arange(24.0).reshape(6, 2, 2)
    layer = Adds()
    replacement = SomeRows(layer, part_of(0.5, draw, seed=5))
    mask = torch.arange(12).reshape(6, 2)
    out = replacement(hidden, position_ids=mask)
    kept = [row for row in range(6) if not torch.equal(out[row], hidden[row])]
    assert 0 < len(kept) < 6
    assert torch.equal(out[kept], hidden[kept] + 2) and torch.equal(layer.seen, hidden[kept])
    assert torch.equal(layer.kwargs["position_ids"], mask[kept])
    assert torch.equal(replacement.select(mask), mask[kept])
    assert replacement.work == {"rows": len(kept) / 6}


@pytest.mark.parametrize(("length", "chance"), [(12, 0.25), (7, 0.5), (10, 0.33), (3, 0.95)])
def test_every_token_is_seen_as_often_as_the_chance_says_and_the_count_is_fixed(length, chance):
    count = max(1, length - round(chance * length))
    layer, rows, calls = Adds(), 50, 200
    hidden = torch.arange(float(length)).expand(rows, length)[..., None]
    seen, sets_seen = torch.zeros(length), set()
    for seed in range(calls):
        replacement = SomeTokens(layer, part_of(chance, seed=seed))
        out = replacement(hidden)
        positions = layer.seen[..., 0].long()
        assert positions.shape == (rows, count) and (positions.diff(dim=1) > 0).all()
        assert replacement.work == {"tokens": count / length}
        changed = torch.zeros(rows, length).scatter(1, positions, 2.0)
        assert torch.equal(out[..., 0], hidden[..., 0] + changed)
        seen += changed.sum(0) / 2
        sets_seen |= {tuple(row) for row in positions.tolist()}
    share = count / length
    off = (seen / (rows * calls) - share).abs().max()
    assert off <= sigmas(share, rows * calls)
    assert len(sets_seen) == math.comb(length, count) or len(sets_seen) > 100


def test_what_some_tokens_saw_of_a_mask():
    hidden = torch.arange(8.0).expand(2, 8)[..., None]
    replacement = SomeTokens(layer := Adds(), part_of(0.5))
    mask = torch.arange(16).reshape(2, 8)
    assert replacement.select(mask) is mask  # before any call
    replacement(hidden)
    assert torch.equal(
        replacement.select(mask), layer.seen[..., 0].long() + torch.tensor([[0], [8]])
    )


# ---- rescaling: what is left stands for all ----------------------------------------------------


def test_in_the_mean_a_rescaled_layer_adds_what_it_does():
    lds, layer = LDS("layerdrop", rate=0.4, rescale=True), Adds()
    make, added = resolve(UNITS["layer"].replacement), [0.0] * 8
    hidden = torch.zeros(1, 1, 1)
    for decision in drawn(lds, steps=2000):
        for i in range(8):
            part = part_of(decision.chances[i], rescale=True, off=decision.of(i))
            added[i] += make(layer, part)(hidden).item() / 2000
    deviation = 2 * math.sqrt(0.4 / 0.6 / 2000)  # of 2 / (1 - p) with probability 1 - p, else 0
    assert added == pytest.approx([2] * 8, abs=5 * deviation)


@pytest.mark.parametrize("draw", FREE)
def test_in_the_mean_rescaled_samples_add_what_they_do(draw):
    hidden, layer, total = torch.zeros(16, 1, 1), Adds(), torch.zeros(16)
    for seed in range(2000):
        total += SomeRows(layer, part_of(0.4, draw, seed, rescale=True))(hidden).flatten()
    deviation = 2 * math.sqrt(0.4 / 0.6 / 2000)
    assert (total / 2000).tolist() == pytest.approx([2] * 16, abs=5 * deviation)


@pytest.mark.parametrize("draw", FREE)
def test_a_micro_batch_of_one_row_which_always_runs_is_not_made_larger(draw):
    total = 0.0
    for seed in range(500):
        replacement = SomeRows(Adds(), part_of(0.4, draw, seed, rescale=True))
        total += replacement(torch.zeros(1, 1, 1)).item()
    assert total / 500 == pytest.approx(2, abs=5 * 2 * math.sqrt(0.4 / 0.6 / 500))


def test_rescaled_samples_are_finite_whatever_rate_is_accepted():
    lds = LDS("layerskip", rate=1.0, rescale=True)
    lds.check_layers(4)
    chance = chances(lds, 4, 0)[3]
    assert SomeRows(Adds(), part_of(chance, rescale=True))(torch.zeros(4, 1, 1)).isfinite().all()


def test_a_layer_that_is_off_is_the_identity_and_without_rescaling_one_that_runs_is_itself():
    make, hidden = resolve(UNITS["layer"].replacement), torch.zeros(1, 1, 1)
    off = make(layer := Adds(), part_of(0.5, off={"rows"}))
    assert off(hidden) is hidden and off.work == {"rows": 0.0} and not hasattr(layer, "seen")
    assert make(layer, part_of(0.5)) is None


# ---- measured depths ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [9, 64, 65, 130])
@pytest.mark.parametrize("masked", [True, False])
def test_block_influence_is_measured_as_defined(length, masked):
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 2, length, 5, generator=generator)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, : length // 2] = False
    mask = mask if masked else None
    expected, count = influence(before, after, mask)
    result = block_influence(before.requires_grad_(), after, mask)
    assert result.tolist() == pytest.approx([expected, count], rel=1e-5)
    assert not result.requires_grad


def test_a_measured_depth_is_a_moving_average_of_each_steps_mean():
    layers = [Adds(), Adds(), Adds()]
    generator = torch.Generator().manual_seed(0)
    measured = Measured(DEPTHS["block_influence"], 3, ema=0.75)
    assert measured.is_needed and measured.average == [math.inf] * 3
    expected = [math.inf] * 3
    for step in range(3):
        sums = [(0.0, 0.0)] * 3
        for _ in range(2):  # micro-batches
            hidden = torch.randn(2, 4, 5, generator=generator)
            mask = torch.rand(2, 4, generator=generator) < 0.8
            hooks = list(measured.hooks(layers, lambda layer, mask=mask: mask))
            for index in (0, 1) if step == 1 else (0,):  # the second in one step, the third never
                out = layers[index](hidden)
                more = influence(hidden, out, mask)
                sums[index] = tuple(map(sum, zip(sums[index], more, strict=True)))
            for hook in hooks:
                hook.remove()
        measured.fold(torch.device("cpu"))
        for index, (total, count) in enumerate(sums):
            if count:
                old, new = expected[index], total / count
                expected[index] = new if old == math.inf else 0.75 * old + 0.25 * new
        assert measured.average == pytest.approx(expected, rel=1e-4)
    assert measured.average[2] == math.inf


def test_measured_is_kept_between_fold_and_state():
    depth = Depth(DEPTHS["uniform"].weights, "1", of_gradients=lambda layer: torch.tensor([6.0, 2]))
    layer = nn.Linear(1, 1)
    layer(torch.ones(1)).backward()
    one, other = (Measured(depth, 2, ema=0.5) for _ in range(2))
    one.gradients([layer, nn.Linear(1, 1)])
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    other.fold(torch.device("cpu"))
    assert other.average == [3, math.inf] and one.average == [math.inf] * 2
    with pytest.raises(ValueError, match="layers in state=2: expected 3"):
        Measured(depth, 3, ema=0.5).load_state_dict(one.state_dict())


def test_a_depth_that_measures_nothing_says_so():
    assert not Measured(DEPTHS["slope"], 2, ema=0.5).is_needed


# ---- a policy of one's own ---------------------------------------------------------------------


RATE = 0.4


def least_gradient(layers, lds, measured):
    """Skip most what lately had the least gradient."""
    known = [0.0 if math.isinf(x) else x for x in measured]
    return [1 / (1 + x) for x in known]


def gradient_norm(layer):
    squares = [p.grad.double().square().sum() for p in layer.parameters() if p.grad is not None]
    return torch.stack([torch.stack(squares).sum().sqrt(), torch.tensor(1.0)])


@pytest.fixture
def by_gradient(monkeypatch):
    """The depth "by_gradient", and the layers that it was shown."""
    shown = []

    def of_gradients(layer):
        shown.append(layer)
        return gradient_norm(layer)

    depth = Depth(least_gradient, "1 / (1 + gradient norm)", of_gradients=of_gradients)
    monkeypatch.setitem(package.DEPTHS, "by_gradient", depth)
    return shown


def begun(**more):
    model = CASES["llava"].build()
    lds = LDS("layerdrop", rate=RATE, depth="by_gradient", ema=0.5)
    return model, sparsify(model, lds=lds, **more)


def one_step(model, scheme, step):
    """A step of two micro-batches, and the norm of each layer's gradient after it."""
    model.zero_grad()
    scheme.begin_step(step)
    for word in (5, 6):
        model(**CASES["llava"].batch([["big", word, 7, 8, 9]])).loss.backward()
    norms = []
    for layer in scheme.skipper.layers:
        grads = [p.grad.flatten() for p in layer.parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(float(g @ g) for g in grads)) if grads else None)
    return norms


def test_a_depth_may_look_at_gradients_once_a_step(by_gradient):
    model, scheme = begun()
    expected, skipped = [math.inf] * LAYERS, []
    for step in range(6):
        norms = one_step(model, scheme, step)
        assert scheme.decision.chances == pytest.approx(
            [RATE / (1 + (0 if x == math.inf else x)) for x in expected]
        )
        assert by_gradient == []
        scheme.after_backward()
        ran = [i for i in range(LAYERS) if i not in scheme.skipped]
        assert by_gradient == [scheme.skipper.layers[i] for i in ran]
        assert [i for i, norm in enumerate(norms) if norm is not None] == ran
        by_gradient.clear()
        skipped.append(scheme.skipped)
        for i in ran:
            old = expected[i]
            expected[i] = norms[i] if old == math.inf else (old + norms[i]) / 2
    scheme.begin_step(6)
    assert scheme.state_dict()["average"] == pytest.approx(expected, rel=1e-5)
    assert any(skipped) and math.inf not in expected


def test_to_forget_to_show_the_gradients_is_an_error(by_gradient):
    model, scheme = begun()
    one_step(model, scheme, 0)
    with pytest.raises(RuntimeError, match=r"call scheme\.after_backward\(\) after the last"):
        scheme.begin_step(1)


def test_other_depths_need_no_call_after_backward():
    model = CASES["llava"].build()
    scheme = sparsify(model, lds=LDS("block_influence", rate=0.3))
    for step in range(4):
        one_step(model, scheme, step)
    scheme.after_backward()  # and may have one
    scheme.begin_step(4)
    assert all(0 < x < math.inf for x in scheme.state_dict()["average"])


def test_what_was_measured_survives_its_state(by_gradient):
    model, scheme = begun()
    for step in range(3):
        one_step(model, scheme, step)
        scheme.after_backward()
    state = copy.deepcopy(scheme.state_dict())
    assert state["step"] == 2
    _, resumed = begun()
    resumed.load_state_dict(state)
    _, fresh = begun()
    for each in (scheme, resumed, fresh):
        each.begin_step(3)
    assert resumed.state_dict() == scheme.state_dict()
    assert resumed.decision == scheme.decision != fresh.decision


MINE = """
from sts.lds import Depth, Policy, Unit


def least_gradient(layers, lds, measured):
    return [1.0 if x > 1e9 else 1 / (1 + x) for x in measured]


def norm(layer):
    import torch

    total = sum(p.grad.square().sum() for p in layer.parameters())
    return torch.stack([total.sqrt(), torch.tensor(1.0)])


DEPTH = Depth(least_gradient, "1 / (1 + |gradient|)", of_gradients=norm)
POLICY = Policy(depth="mine", draw="fixed_count", protect_first=1)
UNIT = Unit(("mlp_backward",), True, hooks="sts.lds.mine:hooks")
"""


def test_one_file_is_a_new_policy_depth_and_unit_without_torch(tmp_path):
    source = Path(package.__file__).parents[1]
    shutil.copytree(source, tmp_path / "sts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "sts/lds/mine.py").write_text(MINE)
    code = """
import sys

sys.modules["torch"] = None
from sts.lds import DEPTHS, POLICIES, UNITS, source_of
from sts.lds.decision import chances, decide
from sts.settings import LDS

lds = LDS("mine", rate=0.5)
assert (lds.depth, lds.draw, lds.unit, lds.protect_first) == ("mine", "fixed_count", "layer", 1)
assert "mine" in DEPTHS and "mine" in POLICIES and source_of("mine").name == "mine.py"
lds.check_layers(4)
assert "0.5 * 1 * 1 / (1 + |gradient|), l = 0 .. 2" in lds.formula(4), lds.formula(4)
assert chances(lds, 4, 0) == (0, 0.5, 0.5, 0.5)
assert chances(lds, 4, 0, [9.0, 0.0, 1.0, 4.0]) == (0, 0.5, 0.25, 0.1)
halves = LDS("layerdrop", rate=0.5, unit="mine")
assert {share for _, share in decide(halves, 4, 0, 0, 0).off} == {"mlp_backward"}
try:
    LDS("theirs")
except ValueError as error:
    assert "mine" in str(error), error
else:
    raise AssertionError
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_the_file_of_a_policy():
    assert source_of("block_influence").name == "block_influence.py"
    assert source_of("sts") is source_of("slope") is source_of("units") is None


def test_a_unit_may_be_put_into_the_table_as_a_function(monkeypatch):
    def doubled(layer, part):
        return (lambda hidden: 2 * hidden) if part.off else None

    monkeypatch.setitem(UNITS, "doubled", Unit(("rows",), True, replacement=doubled))
    lds = LDS("layerdrop", rate=0.5, unit="doubled")
    decision = decide(lds, 4, 0, 0, 1)
    made = [resolve(UNITS["doubled"].replacement)(None, part_of(0.5, off=decision.of(i)))
            for i in range(4)]  # fmt: skip
    off = {i for i, one in enumerate(made) if one}
    assert off == {i for i, _ in decision.off} and 0 < len(off) < 4
