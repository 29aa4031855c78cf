"""What VTC and LDS may be told: one definition, for the library and for the pipeline's YAML.

No torch and no pydantic: the workflow reads settings in any environment. A value that is not
accepted raises ValueError with its name, itself and what is accepted.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from sts.checks import expect
from sts.lds import DEPTHS, DRAWS, POLICIES, UNITS
from sts.schedule import SCHEDULES
from sts.vtc import KINDS

IGNORE_INDEX = -100  # label that is no target, as in torch's cross entropy
POSITIONS = ("keep", "mean")
TEXTS = ("all", "prompt")
CLOCKS = ("steps", "epochs")


def neutral(value: Any) -> Any:
    """A default at which a setting does nothing. There it is no part of what a result depends on,
    so that a new setting changes no result; a default that is not its neutral value does."""
    return field(default=value, metadata={"neutral": value})


class _OverAStage:
    """What VTC and LDS share: a strength S(t) and a dense tail."""

    schedule: str | None
    dense_tail: float

    @property
    def timed(self) -> bool:
        """Whether it depends on how far the stage is."""
        return self.schedule != "constant" or self.dense_tail > 0


@dataclass(frozen=True)
class VTC(_OverAStage):
    """Visual token compression of one stage.

    kind: a key of sts.vtc.KINDS. keep: share of the visual tokens that reaches the language model,
    in (0, 1]. schedule: S(t), a key of SCHEDULES; at t the share 1 - (1 - keep) S(t) is kept.
    dense_tail: last share of the stage with all tokens. positions: outputs take the position ids of
    the tokens they stand at (keep), or what the kind makes of all of them (mean). text: for kinds
    that look at text, all of the sample's or its prompt alone (no answer tokens).
    """

    kind: str = "none"
    keep: float = 1.0
    schedule: str = neutral("constant")
    dense_tail: float = neutral(0.0)
    positions: str = neutral("keep")
    text: str = neutral("all")

    def __post_init__(self) -> None:
        _one_of("VTC.kind", self.kind, KINDS)
        _number("VTC.keep", self.keep, "a number in (0, 1]", lambda x: 0 < x <= 1)
        _one_of("VTC.schedule", self.schedule, SCHEDULES)
        _share("VTC.dense_tail", self.dense_tail)
        _one_of("VTC.positions", self.positions, POSITIONS)
        _one_of("VTC.text", self.text, TEXTS)
        nothing = self.kind == "none" and self.keep < 1
        expect(not nothing, "VTC.keep", self.keep, "1.0 where VTC.kind is none")


@dataclass(frozen=True)
class LDS(_OverAStage):
    """Layer dynamic skipping of one stage: p_l(t) = rate x S(t) x D(l).

    policy: a key of sts.lds.POLICIES, a named choice of the parts below; a part given here takes
    the place of the policy's. rate: alpha in the paper, in [0, 1]; every chance p_l must be one.
    schedule: S(t), a key of SCHEDULES. depth: D(l), a key of DEPTHS, over the layers that are not
    protected; epsilon: of depth `slope`, in [-1, 1]. draw: a key of DRAWS. unit: what is left out,
    a key of UNITS. protect_first, protect_last: layers that always run. dense_tail: last share of
    the stage with all layers. clock: t moves with optimizer steps or with whole epochs. rescale:
    what a layer adds is divided by 1 - p_l where it is not left out. explore, ema: for a measured
    depth, the share of uniform skipping and the memory of the moving average.
    """

    policy: str = "none"
    rate: float = 0.0
    schedule: str | None = None
    depth: str | None = None
    draw: str | None = None
    unit: str | None = None
    epsilon: float = neutral(0.0)
    protect_first: int | None = None
    protect_last: int | None = None
    dense_tail: float = neutral(0.0)
    clock: str = neutral("steps")
    rescale: bool = neutral(False)
    explore: float = 0.1
    ema: float = 0.9

    def __post_init__(self) -> None:
        _one_of("LDS.policy", self.policy, POLICIES)
        policy = POLICIES[self.policy]
        for part in policy._fields:
            if getattr(self, part) is None:
                object.__setattr__(self, part, getattr(policy, part))
        _share("LDS.rate", self.rate)
        _one_of("LDS.schedule", self.schedule, SCHEDULES)
        _one_of("LDS.depth", self.depth, DEPTHS)
        _one_of("LDS.unit", self.unit, UNITS)
        _one_of("LDS.draw", self.draw, DRAWS)
        _one_of("LDS.draw", self.draw, UNITS[self.unit].draws, f" for unit {self.unit!r}")
        _number("LDS.epsilon", self.epsilon, "a number in [-1, 1]", lambda x: -1 <= x <= 1)
        for name in ("protect_first", "protect_last"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            expect(whole, f"LDS.{name}", value, "0 or more layers")
        _share("LDS.dense_tail", self.dense_tail)
        _one_of("LDS.clock", self.clock, CLOCKS)
        expect(isinstance(self.rescale, bool), "LDS.rescale", self.rescale, "true or false")
        can = UNITS[self.unit].rescales or not self.rescale
        whole = ", ".join(name for name, unit in UNITS.items() if unit.rescales)
        expect(can, "LDS.rescale", self.rescale, f"false for unit {self.unit!r}; units: {whole}")
        _share("LDS.explore", self.explore)
        _number("LDS.ema", self.ema, "a number in [0, 1)", lambda x: 0 <= x < 1)
        nothing = self.policy == "none" and self.rate > 0
        expect(not nothing, "LDS.rate", self.rate, "0.0 where LDS.policy is none")
        self._check_chances(2)

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError for what a language model of `num_layers` decoder layers can't have."""
        for name in ("protect_first", "protect_last"):
            value = getattr(self, name)
            expect(value <= num_layers, f"LDS.{name}", value, f"at most {num_layers} layers")
        if not self.rate:
            return
        free = num_layers - self.protect_first - self.protect_last
        expect(
            free > 0,
            "LDS.protect_first + protect_last",
            self.protect_first + self.protect_last,
            f"fewer than the {num_layers} layers of the model (or rate=0)",
        )
        self._check_chances(free)
        mean = sum(DEPTHS[self.depth].weights(free, self, range(free)))
        most = (num_layers - 1) / mean if mean else 1.0
        expect(
            UNITS[self.unit].trains_all or self.rate <= most + 1e-9,
            "LDS.rate",
            self.rate,
            f"at most {_down(most)}, so that one of {num_layers} layers always runs",
        )

    def _check_chances(self, layers: int) -> None:
        """Every chance must be a probability: with the most uneven measurement there can be."""
        largest = max(DEPTHS[self.depth].weights(layers, self, range(layers)))
        likeliest = self.rate * largest
        expect(
            likeliest <= 1 + 1e-9,
            "LDS.rate",
            self.rate,
            f"at most {_down(1 / max(largest, 1))}: with depth={self.depth!r} and "
            f"epsilon={self.epsilon} the likeliest layer would be left out with probability "
            f"{likeliest:.3g}",
        )

    def formula(self, num_layers: int) -> str:
        """p_l(t) with its values, in words, for a language model of `num_layers` layers."""
        free = num_layers - self.protect_first - self.protect_last
        depth = DEPTHS[self.depth].text if free > 1 else "1"  # of a layer alone every D is 1
        depth = depth.format(epsilon=self.epsilon, last=free - 1, layers=free)
        shift = f", l = 0 .. {free - 1}"
        if free < num_layers:
            last = num_layers - self.protect_last - 1
            shift += f" for layers {self.protect_first} .. {last} (the others always run)"
        tail = f"; 0 in the last {self.dense_tail:g} of the stage" if self.dense_tail else ""
        return (
            f"p_l(t) = {self.rate:g} * {SCHEDULES[self.schedule].text} * {depth}{shift}{tail}; "
            f"t in {self.clock}; draw: {self.draw}; unit: {self.unit}"
        )


def _down(limit: float) -> str:
    """A limit in three digits, of which it is never said that it is not accepted."""
    return f"{math.floor(1000 * limit + 1e-9) / 1000:g}"


def _number(name: str, value: object, accepted: str, fits) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    expect(number and fits(value), name, value, accepted)


def _share(name: str, value: object) -> None:
    _number(name, value, "a number in [0, 1]", lambda x: 0 <= x <= 1)


def _one_of(name: str, value: object, known, why: str = "") -> None:
    ok = isinstance(value, str) and value in known
    expect(ok, name, value, f"one of {', '.join(known)}{why}")


# The scheme's default values, which are those of row `sts` of workflow/ablations.yaml. The paper's
# are: one of its three kinds of VTC (uniform, random, text_guided) in alignment, the formula of
# policy `sts` in instruction tuning. Its sources that we know give no values, so these are our
# choices: the kind, keep, rate (alpha) and epsilon. Epsilon is no part of the policy:
# LDS("sts", rate=0.5) has epsilon 0, every layer alike, and is not the paper's depth adjustment.
STS_VTC = VTC("random", keep=0.5)
STS_LDS = LDS("sts", rate=0.5, epsilon=1.0)
