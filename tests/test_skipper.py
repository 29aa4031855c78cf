"""Which layers are skipped: rates, protection, reproducibility."""

import math
import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sts.schedule import SCHEDULES
from sts.skipper import POLICIES, rate_at, skipped_layers

STATS = [0.9, 0.3, 0.05, 0.2, 0.5, 0.1, 0.4, 0.7]
SKIPPING = sorted(name for name, p in POLICIES.items() if name != "none" and p.acts_on != "tokens")


def draws(policy, steps, **settings):
    settings = {"num_layers": 8, "rate": 0.4, "seed": 0, "stats": STATS} | settings
    return [skipped_layers(policy, step=step, **settings) for step in range(steps)]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.85])
@pytest.mark.parametrize("policy", SKIPPING)
def test_realised_rate_over_10000_steps(policy, rate, exact):
    counts = [len(s) for s in draws(policy, 10_000, rate=rate, exact=exact)]
    error = math.sqrt(6 * rate * (1 - rate)) / 100  # at most a Bernoulli's, of 10,000 means
    assert sum(counts) / 10_000 == pytest.approx(6 * rate, abs=4 * error)
    if exact:
        assert set(counts) == {math.floor(6 * rate), math.ceil(6 * rate)}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["none", *SKIPPING]),
    st.integers(1, 12),
    st.floats(0, 0.99),
    st.integers(0, 4),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 10**9),
    st.data(),
)
def test_protected_layers_run_and_one_layer_always_runs(
    policy, layers, rate, first, last, exact, step, data
):
    skippable = layers - first - last
    assume(skippable > 0 and rate * skippable <= layers - 1)
    influence = st.floats(0, 2) | st.just(math.inf)
    stats = data.draw(st.lists(influence, min_size=layers, max_size=layers))
    skipped = skipped_layers(
        policy,
        num_layers=layers,
        rate=rate,
        seed=1,
        step=step,
        protect_first=first,
        protect_last=last,
        exact=exact,
        stats=stats,
    )
    assert all(first <= layer < layers - last for layer in skipped)
    assert len(skipped) < layers
    if exact and policy != "none":
        assert len(skipped) in (math.floor(rate * skippable), math.ceil(rate * skippable))


def shares(policy, **settings):
    """How often each layer is skipped."""
    skipped = draws(policy, 10_000, **settings)
    return [sum(layer in s for s in skipped) / 10_000 for layer in range(8)]


@pytest.mark.parametrize("exact", [True, False])
def test_uniform_skips_every_layer_alike(exact):
    assert shares("uniform", exact=exact) == pytest.approx([0, *[0.4] * 6, 0], abs=0.02)


@pytest.mark.parametrize("exact", [True, False])
def test_linear_rises_with_depth(exact):
    weights = [2, 3, 4, 5, 6, 7]  # depth of layers 1..6, counted from 1
    expected = [0.4 * 6 * w / sum(weights) for w in weights]
    assert shares("linear", exact=exact) == pytest.approx([0, *expected, 0], abs=0.02)


def test_linear_gives_what_exceeds_one_to_the_others():
    found = shares("linear", rate=0.9)
    assert found[3:7] == [1, 1, 1, 1]
    assert found[1:3] == pytest.approx([1.4 * 2 / 5, 1.4 * 3 / 5], abs=0.02)


@pytest.mark.parametrize("exact", [True, False])
def test_need_skips_least_influence_most_and_explores(exact):
    ranks = {2: 6, 5: 5, 3: 4, 1: 3, 6: 2, 4: 1}  # 6 = least influence among layers 1..6
    expected = [0.0] * 8
    for layer, rank in ranks.items():
        expected[layer] = 0.25 * 0.4 + 0.75 * 0.4 * 6 * rank / 21
    assert shares("need", exact=exact, explore=0.25) == pytest.approx(expected, abs=0.02)


def test_need_gives_ties_their_mean_rank():
    found = POLICIES["need"].probabilities([0, 1, 2], 0.5, [0.1, 0.1, 0.5], explore=0)
    assert found == pytest.approx([1.5 * rank / 6 for rank in (2.5, 2.5, 1)])


def test_need_is_uniform_before_any_measurement():
    assert shares("need", stats=None) == pytest.approx([0, *[0.4] * 6, 0], abs=0.02)
    assert draws("need", 50, stats=None) == draws("uniform", 50, stats=None)


def test_need_runs_what_was_never_measured():
    found = shares("need", stats=[0.1, 0.1, math.inf, 0.1, 0.1, 0.1, 0.1, 0.1], explore=0)
    assert found[2] < min(found[1], *found[3:7])


def test_all_sets_of_a_size_are_possible_under_uniform():
    assert len(set(draws("uniform", 2000, rate=0.5))) == math.comb(6, 3)


def test_a_decision_depends_on_seed_and_step_alone():
    ahead = draws("need", 20)
    random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), torch.random.get_rng_state()
    assert draws("need", 20) == ahead
    assert skipped_layers("need", num_layers=8, rate=0.4, seed=0, step=13, stats=STATS) == ahead[13]
    assert draws("need", 20, seed=1) != ahead
    assert random.getstate() == states[0] and torch.equal(torch.random.get_rng_state(), states[1])


def test_decisions_stay_the_same_across_versions():
    """A resumed or repeated run must not change its mind: these sets are part of the contract."""
    frozen = [[1, 5, 6], [3, 5, 6], [1, 2, 4], [2, 3, 6]]
    assert [sorted(s) for s in draws("uniform", 4, rate=0.5)] == frozen


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"policy": "all"}, "policy='all'.*uniform"),
        ({"rate": 1.0}, r"rate=1.0.*\[0, 1\)"),
        ({"rate": -0.1}, r"rate=-0.1.*\[0, 1\)"),
        ({"rate": 0.95, "protect_first": 0, "protect_last": 0}, "rate=0.95.*at most 0.875"),
        ({"protect_first": 4, "protect_last": 4}, r"protect_first \+ protect_last=8.*fewer than"),
        ({"protect_first": -1}, "protect_first=-1.*0..8"),
        ({"stats": [0.1] * 7}, r"len\(stats\)=7.*num_layers = 8"),
        ({"explore": 2}, r"explore=2.*\[0, 1\]"),
    ],
)
def test_bad_input_names_argument_value_and_what_is_accepted(arguments, named):
    valid = {"policy": "uniform", "num_layers": 8, "rate": 0.4, "seed": 0, "step": 0}
    with pytest.raises(ValueError, match=named):
        skipped_layers(**valid | arguments)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 1),
    st.floats(0, 0.99),
    st.sampled_from(SCHEDULES),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_rate_rises_to_rate_then_anneals(fraction, rate, schedule, anneal, earlier):
    value = rate_at(fraction, rate, schedule, anneal)
    assert 0 <= value <= rate
    if anneal and fraction >= 1 - anneal:
        assert value == 0
    else:
        assert rate_at(min(fraction, earlier), rate, schedule, anneal) <= value


def test_rate_schedules_at_known_points():
    assert [rate_at(f, 0.5, "constant") for f in (0, 0.5, 1)] == [0.5] * 3
    assert [rate_at(f, 0.5, "linear") for f in (0, 0.5, 1)] == [0, 0.25, 0.5]
    assert [rate_at(f, 0.6, "staged") for f in (0, 0.25, 0.5, 0.75)] == pytest.approx(
        [0, 0.2, 0.4, 0.6]
    )
    assert rate_at(0.5, 0.5, "cosine") == pytest.approx(0.25)
    assert [rate_at(s / 10, 0.5, "constant", 0.2) for s in (7, 8, 9)] == [0.5, 0, 0]
