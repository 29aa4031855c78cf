"""What VTC and LDS may be told, and how what they may not be told is refused."""

import math
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path

import pytest

from sts import LDS, VTC
from sts.checks import NotAccepted
from sts.hosts import callback_of
from sts.lds import DEPTHS, POLICIES

ROOT = Path(__file__).parents[2]
SHARE, OPEN = "a number in [0, 1]", "a number in (0, 1]"
PARTS = ("schedule", "depth", "draw", "unit", "protect_first", "protect_last")

REFUSED = [  # settings, the name, what is accepted
    (VTC, {"kind": "best"}, "kind", "one of none, uniform, random"),
    (VTC, {"kind": ["uniform"]}, "kind", "one of none, uniform"),
    (VTC, {"kind": LDS()}, "kind", "one of none, uniform"),
    (VTC, {"kind": "uniform", "keep": 0}, "keep", OPEN),
    (VTC, {"kind": "uniform", "keep": 1.01}, "keep", OPEN),
    (VTC, {"kind": "uniform", "keep": True}, "keep", OPEN),
    (VTC, {"kind": "uniform", "keep": math.nan}, "keep", OPEN),
    (VTC, {"keep": 0.25}, "keep", "1.0 where VTC.kind is none"),
    (VTC, {"schedule": None}, "schedule", "one of constant, rising_linear"),
    (VTC, {"positions": "all"}, "positions", "one of keep, mean"),
    (VTC, {"text": "answer"}, "text", "one of all, prompt"),
    (LDS, {"policy": 0.5}, "policy", "one of none, sts"),
    (LDS, {"policy": None}, "policy", "one of none, sts"),
    (LDS, {"policy": "sts", "rate": 1.5}, "rate", SHARE),
    (LDS, {"policy": "sts", "rate": None}, "rate", SHARE),
    (LDS, {"rate": 0.5}, "rate", "0.0 where LDS.policy is none"),
    (LDS, {"rate": 0.5, "depth": "slope"}, "rate", "0.0 where LDS.policy is none"),
    (LDS, {"depth": "deep"}, "depth", "one of uniform, slope, linear, exponential"),
    (LDS, {"draw": "exact"}, "draw", "one of independent, fixed_count"),
    (LDS, {"unit": "rows"}, "unit", "one of layer, samples, tokens, backward"),
    (LDS, {"unit": "tokens"}, "draw", "one of fixed_count for unit 'tokens'"),
    (LDS, {"policy": "random_ltd", "draw": "independent"}, "draw", "one of fixed_count for unit"),
    (LDS, {"epsilon": 1.1}, "epsilon", "a number in [-1, 1]"),
    (
        LDS,
        {"policy": "sts", "rate": 0.5, "epsilon": 0.0},
        "epsilon",
        "another number for depth 'slope' (row sts: 1.0)",
    ),
    (LDS, {"protect_first": -1}, "protect_first", "0 or more layers"),
    (LDS, {"protect_last": 1.0}, "protect_last", "0 or more layers"),
    (LDS, {"clock": "hours"}, "clock", "one of steps, epochs"),
    (LDS, {"rescale": 1}, "rescale", "true or false"),
    (LDS, {"policy": "random_ltd", "rescale": True}, "rescale", "'tokens'; units: layer, samples"),
    (LDS, {"policy": "dropbp", "rescale": True}, "rescale", "'backward'; units: layer, samples"),
    (LDS, {"ema": 1}, "ema", "a number in [0, 1)"),
]


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, setting.name) for kind in (VTC, LDS) for setting in fields(kind)]
)
def test_every_setting_refuses_by_name_what_it_does_not_accept(kind, name):
    (accepted,) = [item.metadata["accepted"] for item in fields(kind) if item.name == name]
    wrong = [value for value in (-2, 2.5, "x", "0.5", [1], math.inf) if not accepted.accepts(value)]
    assert len(wrong) >= 5 and accepted.accepts(True) is (name == "rescale")
    for value in wrong:
        with pytest.raises(NotAccepted) as refusal:
            kind(**{name: value})
        assert str(refusal.value) == f"{kind.__name__}.{name}={value!r}: expected {accepted}"


def value_of(name, values):
    """The value of a setting: among `values`, or the policy's part."""
    return values[name] if name in values else getattr(POLICIES[values.get("policy", "none")], name)


@pytest.mark.parametrize(("kind", "values", "name", "accepted"), REFUSED)
def test_what_is_refused_is_named_with_its_value_and_what_is_accepted(kind, values, name, accepted):
    with pytest.raises(ValueError) as refusal:
        kind(**values)
    text = str(refusal.value)
    assert text.startswith(f"{kind.__name__}.{name}={value_of(name, values)!r}: expected ")
    assert accepted in text
    assert isinstance(refusal.value, NotAccepted)
    assert refusal.value.name == f"{kind.__name__}.{name}"


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (VTC, {"kind": "uniform", "keep": 1}),
        (VTC, {"kind": "uniform", "keep": 1e-6}),
        (VTC, {"kind": "text_guided", "keep": 0.5, "text": "prompt", "positions": "mean"}),
        (VTC, {"dense_tail": 1}),
        (LDS, {"policy": "layerdrop", "rate": 1}),
        (LDS, {"policy": "sts", "rate": 0.5, "epsilon": 1}),
        (LDS, {"policy": "sts", "rate": 0.5, "epsilon": -1}),
        (LDS, {"policy": "layerskip", "rate": 0.5, "rescale": True}),
        (LDS, {"policy": "layerdrop", "rate": 0.5, "rescale": True, "clock": "epochs"}),
        (LDS, {"policy": "block_influence", "ema": 0, "explore": 1}),
        (LDS, {"protect_first": 0, "protect_last": 100, "dense_tail": 0}),
    ],
)
def test_the_ends_of_what_is_accepted(kind, values):
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_nothing_is_left_out_by_default():
    assert (VTC().kind, VTC().keep, LDS().policy, LDS().rate) == ("none", 1.0, "none", 0.0)
    assert not VTC().timed and not LDS().timed
    assert VTC("uniform", 0.25) == VTC(kind="uniform", keep=0.25)
    assert LDS("pld", 0.5) == LDS(policy="pld", rate=0.5)


def test_settings_do_not_change():
    for made, name in ((VTC(), "keep"), (LDS(), "rate")):
        with pytest.raises(FrozenInstanceError):
            setattr(made, name, 0.5)
    assert len({LDS("dropbp", 0.5), LDS("dropbp", 0.5), LDS("pld", 0.5)}) == 2  # they can be keys


# ---- chances must be chances -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "limit", "likeliest"),
    [
        ({"policy": "sts", "rate": 0.8, "epsilon": 0.5}, "0.666", "1.2"),  # 0.8 (1 + 0.5)
        ({"policy": "sts", "rate": 0.8, "epsilon": -0.5}, "0.666", "1.2"),  # then the first layer
        ({"policy": "sts", "rate": 1, "epsilon": 0.25}, "0.8", "1.25"),
        ({"policy": "block_influence", "rate": 1.0, "explore": 0}, "0.75", "1.33"),  # ranks 2, 1
    ],
)
def test_a_chance_above_one_is_refused_with_both_numbers(values, limit, likeliest):
    with pytest.raises(ValueError) as refusal:
        LDS(**values)
    text = str(refusal.value)
    assert text.startswith(f"LDS.rate={values['rate']!r}: expected at most {limit}: ")
    assert text.endswith(f"probability {likeliest}")
    epsilon = values.get("epsilon", 0.0)
    assert f"epsilon={epsilon}" in text and f"depth={LDS(values['policy']).depth!r}" in text


@pytest.mark.parametrize("epsilon", [0.1, 0.3, 0.7, 1, -0.3])
def test_alpha_may_be_as_large_as_epsilon_lets_it(epsilon):
    rate = 1 / (1 + abs(epsilon))
    LDS("sts", rate=rate, epsilon=epsilon).check_layers(16)
    with pytest.raises(ValueError, match=r"LDS\.rate="):
        LDS("sts", rate=rate + 1e-6, epsilon=epsilon)


def test_the_limit_that_is_named_is_accepted():
    LDS("sts", rate=0.666, epsilon=0.5)
    LDS("layerdrop", rate=0.916).check_layers(12)


def test_a_depth_that_leaves_every_layer_alone_is_accepted(monkeypatch):
    third = DEPTHS["uniform"]._replace(weights=lambda layers, lds, m: [i % 3 // 2 for i in m])
    monkeypatch.setitem(DEPTHS, "third", third)
    LDS("layerdrop", rate=0.5, depth="third").check_layers(6)


@pytest.mark.parametrize(
    ("values", "layers", "named"),
    [
        ({"policy": "layerdrop", "protect_first": 9}, 8, "LDS.protect_first=9: .* most 8 layers"),
        ({"policy": "layerdrop", "protect_last": 9}, 8, "LDS.protect_last=9: .* most 8 layers"),
        (
            {"policy": "layerdrop", "rate": 0.4, "protect_first": 4, "protect_last": 4},
            8,
            r"LDS.protect_first \+ protect_last=8: expected fewer than the 8 layers",
        ),
        ({"policy": "block_influence", "rate": 0.4}, 2, r"protect_last=2: .* fewer than the 2"),
        ({"policy": "layerdrop", "rate": 0.95}, 8, "LDS.rate=0.95: .* most 0.875, .* one of 8"),
        ({"policy": "layerdrop", "rate": 0.1}, 1, "LDS.rate=0.1: expected at most 0, .* one of 1"),
        (  # least influence of 6 layers: 2 x 6 / 7
            {"policy": "block_influence", "rate": 0.7, "explore": 0},
            8,
            "LDS.rate=0.7: expected at most 0.583: .* probability 1.2$",
        ),
    ],
)
def test_what_a_model_cant_have_is_refused(values, layers, named):
    lds = LDS(**values)
    with pytest.raises(ValueError, match=named):
        lds.check_layers(layers)


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        ({"policy": "layerdrop", "rate": 0.875}, 8),
        ({"policy": "layerdrop", "rate": 1.0, "protect_first": 1}, 8),  # that one always runs
        ({"policy": "layerdrop", "rate": 0.5}, 2),
        ({"policy": "pld", "rate": 1.0}, 8),
        ({"policy": "layerskip", "rate": 1.0}, 8),
        ({"policy": "random_ltd", "rate": 1.0}, 3),
        ({"policy": "layerdrop", "rate": 1.0, "unit": "samples"}, 1),  # some row always runs
        ({"policy": "sts", "rate": 0.85, "epsilon": 0.1}, 8),
        ({"policy": "layerdrop", "protect_first": 4, "protect_last": 4}, 8),  # a rate of 0
        ({"policy": "none"}, 1),
    ],
)
def test_what_a_model_can_have_is_accepted(values, layers):
    LDS(**values).check_layers(layers)


# ---- parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_settings_survive_a_file_and_parts_that_are_not_set_are_the_policys(policy):
    made = LDS(policy)
    assert LDS(**asdict(made)) == made
    assert LDS(**{"policy": policy, **dict.fromkeys(PARTS)}) == made


def test_a_part_takes_the_place_of_the_policys():
    parts = {"schedule": "rising_cosine", "depth": "linear", "draw": "fixed_count"}
    parts |= {"unit": "samples", "protect_first": 2, "protect_last": 3}
    made = LDS("sts", rate=0.5, epsilon=1, **parts)
    assert {part: getattr(made, part) for part in PARTS} == parts
    some = LDS("sts", depth="uniform")
    assert (some.schedule, some.depth, some.draw) == ("falling_quadratic", "uniform", "independent")
    none = LDS("random_ltd", protect_first=0)  # no longer the policy's 1
    assert (none.protect_first, none.protect_last) == (0, 1)


def test_what_depends_on_how_far_the_stage_is():
    assert LDS("sts").timed and LDS("pld").timed
    assert not LDS("layerdrop", rate=0.5).timed and not LDS("sts", schedule="constant").timed
    assert LDS("layerdrop", dense_tail=0.1).timed
    assert VTC("uniform", 0.5, schedule="rising_staged").timed and VTC(dense_tail=0.5).timed


def test_the_formula_names_the_papers_values():
    sts = LDS("sts", rate=0.6, epsilon=0.5)
    assert sts.formula(8) == (
        "p_l(t) = 0.6 * (1 - t)^2 * (1 + 0.5 (2 l - 7) / 7), l = 0 .. 7; "
        "t in steps; draw: independent; unit: layer"
    )
    more = {"protect_first": 1, "protect_last": 2, "dense_tail": 0.25, "clock": "epochs"}
    assert LDS("sts", rate=0.85, epsilon=0.1, draw="fixed_count", **more).formula(8) == (
        "p_l(t) = 0.85 * (1 - t)^2 * (1 + 0.1 (2 l - 4) / 4), l = 0 .. 4 for layers 1 .. 5 "
        "(the others always run); 0 in the last 0.25 of the stage; "
        "t in epochs; draw: fixed_count; unit: layer"
    )


# ---- no torch ----------------------------------------------------------------------------------


WITHOUT_TORCH = """
import sys

for name in ("torch", "transformers", "pydantic", "numpy"):
    sys.modules[name] = None
from sts import LDS, VTC
from sts.lds import POLICIES
from sts.lds.decision import decide, expected_work
from sts.vtc import KINDS

for policy in POLICIES:
    lds = LDS(policy, rate=0.0 if policy == "none" else 0.5, epsilon=0.5)
    lds.check_layers(8), lds.formula(8), decide(lds, 8, 0.5, 0, 0), expected_work(lds, 8, 0.5)
for kind in KINDS:
    VTC(kind)
"""


def test_settings_need_neither_torch_nor_pydantic():
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (None, "sts=None: expected a mapping"),
        ({"vtx": {}}, "sts='vtx': expected one of vtc, lds, seed"),
        ({"vtc": {"kind": "uniform", "keep": 2}}, "VTC.keep=2"),
        ({"vtc": {"kind": "uniform"}}, "expected vtc.keep below 1 or an lds.rate"),
    ],
)
def test_what_a_host_is_told_is_checked(settings, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        callback_of(settings)


def test_a_host_gets_the_settings():
    settings = {"vtc": {"kind": "uniform", "keep": 0.5}, "lds": {"policy": "pld", "rate": 0.5}}
    callback = callback_of(settings | {"seed": 3})
    assert callback.vtc == VTC("uniform", keep=0.5) and callback.lds == LDS("pld", rate=0.5)
    assert callback.seed == 3
