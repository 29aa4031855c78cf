"""What VTC and LDS may be told: one definition, for the library and for the pipeline's YAML.

Each setting says what it accepts and what it does; the checks, the Args of the docstrings and the
JSON schema (sts/pipeline/config/schemas.py) are made of that. No torch and no pydantic: the
workflow reads settings in any environment. A value that is not accepted raises ValueError with its
name, itself and what is accepted.
"""

import math
from dataclasses import dataclass, field, fields
from inspect import cleandoc
from typing import Any

from sts.checks import FLAG, LAYERS, expect, interval, one_of
from sts.lds import DEPTHS, DRAWS, POLICIES, UNITS
from sts.schedule import SCHEDULES
from sts.vtc import KINDS

IGNORE_INDEX = -100  # label that is no target, as in torch's cross entropy
SHARE = interval(0, 1)


def setting(default: Any, accepted: Any, help: str, *, neutral: bool = False) -> Any:
    """A field of VTC or LDS.

    Args:
        default: Its value if it is not set; None: that of the policy.
        accepted: What it may be: a Rule of sts/checks.py.
        help: What it does, in a sentence.
        neutral: At its default the setting does nothing. There it is no part of what a result
            depends on, so that a new setting changes no result.
    """
    metadata = {"accepted": accepted, "help": help} | ({"neutral": default} if neutral else {})
    return field(default=default, metadata=metadata)


def _with_args(kind: type) -> type:
    """Add to the docstring of VTC or LDS what its settings say of themselves."""
    about = [(f.name, f.metadata["help"], str(f.metadata["accepted"])) for f in fields(kind)]
    lines = [f"    {name}: {help}; {accepted}." for name, help, accepted in about]
    kind.__doc__ = "\n".join([cleandoc(kind.__doc__), "", "Args:", *lines])
    return kind


class _Settings:
    """What VTC and LDS share: the check of each setting, a strength S(t) and a dense tail."""

    schedule: str | None
    dense_tail: float

    def _check_each(self) -> None:
        for setting in fields(self):
            value, accepted = getattr(self, setting.name), setting.metadata["accepted"]
            name = f"{type(self).__name__}.{setting.name}"
            expect(accepted.accepts(value), name, value, str(accepted))

    @property
    def timed(self) -> bool:
        """Whether its strength changes over the stage."""
        return self.schedule != "constant" or self.dense_tail > 0


@_with_args
@dataclass(frozen=True)
class VTC(_Settings):
    """Visual token compression of one stage."""

    # fmt: off
    kind: str = setting("none", one_of(KINDS), "How tokens are chosen or merged: sts/vtc")
    keep: float = setting(1.0, interval(0, 1, excluded=(0,)),
        "Share of the visual tokens that reaches the language model")
    schedule: str = setting("constant", one_of(SCHEDULES),
        "S(t); at t the share 1 - (1 - keep) S(t) is kept", neutral=True)
    dense_tail: float = setting(0.0, SHARE, "Last share of the stage with all tokens", neutral=True)
    positions: str = setting("keep", one_of(("keep", "mean")),
        "Position ids of the outputs: those of the tokens they stand at (keep), or what the kind "
        "makes of all tokens' (mean)", neutral=True)
    text: str = setting("all", one_of(("all", "prompt")),
        "For kinds that look at text: all of the sample's, or its prompt alone (no answer tokens)",
        neutral=True)
    # fmt: on

    def __post_init__(self) -> None:
        self._check_each()
        is_possible = self.kind != "none" or self.keep == 1
        expect(is_possible, "VTC.keep", self.keep, "1.0 where VTC.kind is none")


@_with_args
@dataclass(frozen=True)
class LDS(_Settings):
    """Layer dynamic skipping of one stage: p_l(t) = rate x S(t) x D(l).

    A policy is a named choice of schedule, depth, draw, unit and protected layers; a part that is
    set here takes the place of the policy's.
    """

    # fmt: off
    policy: str = setting("none", one_of(POLICIES), "A choice of the parts below: sts/lds")
    rate: float = setting(0.0, SHARE, "The paper's alpha; no chance p_l may be above 1")
    schedule: str | None = setting(None, one_of(SCHEDULES), "S(t), over the stage")
    depth: str | None = setting(None, one_of(DEPTHS), "D(l), over layers that are not protected")
    draw: str | None = setting(None, one_of(DRAWS), "How layers are drawn by their chances")
    unit: str | None = setting(None, one_of(UNITS), "What is skipped")
    epsilon: float = setting(0.0, interval(-1, 1),
        "Of depth `slope`: how much more deep layers are skipped; no policy sets it, and `slope` "
        "wants one other than 0", neutral=True)
    protect_first: int | None = setting(None, LAYERS, "First layers, which always run")
    protect_last: int | None = setting(None, LAYERS, "Last layers, which always run")
    dense_tail: float = setting(0.0, SHARE, "Last share of the stage with all layers", neutral=True)
    clock: str = setting("steps", one_of(("steps", "epochs")),
        "t moves with optimizer steps or with whole epochs", neutral=True)
    rescale: bool = setting(False, FLAG,
        "What a layer adds is divided by 1 - p_l where it is not skipped", neutral=True)
    explore: float = setting(0.1, SHARE,
        "Of a measured depth: the share of skipping that is uniform")
    ema: float = setting(0.9, interval(0, 1, excluded=(1,)),
        "Of a measured depth: memory of the moving average")
    # fmt: on

    def __post_init__(self) -> None:
        policies = one_of(POLICIES)
        expect(policies.accepts(self.policy), "LDS.policy", self.policy, str(policies))
        for part, value in POLICIES[self.policy]._asdict().items():
            if getattr(self, part) is None:
                object.__setattr__(self, part, value)
        self._check_each()
        unit = UNITS[self.unit]
        accepted = f"{one_of(unit.draws)} for unit {self.unit!r}"
        expect(self.draw in unit.draws, "LDS.draw", self.draw, accepted)
        names = ", ".join(name for name, unit in UNITS.items() if unit.rescales)
        accepted = f"false for unit {self.unit!r}; units: {names}"
        expect(unit.rescales or not self.rescale, "LDS.rescale", self.rescale, accepted)
        is_possible = self.policy != "none" or self.rate == 0
        expect(is_possible, "LDS.rate", self.rate, "0.0 where LDS.policy is none")
        is_sloped = self.depth != "slope" or self.epsilon != 0 or self.rate == 0
        accepted = "another number for depth 'slope' (row sts: 1.0); depth='uniform' has none"
        expect(is_sloped, "LDS.epsilon", self.epsilon, accepted)
        self._check_chances(2)

    @property
    def leaves_out(self) -> bool:
        """Whether skipped layers have no gradient in their step, so that DDP must look for them."""
        return self.rate > 0 and not UNITS[self.unit].trains_all

    def check_layers(self, num_layers: int) -> None:
        """Check the settings against a language model of `num_layers` decoder layers.

        Raises:
            ValueError: More layers are protected than there are, none is left to skip, a chance is
                above 1, or no layer might run.
        """
        for name in ("protect_first", "protect_last"):
            value = getattr(self, name)
            expect(value <= num_layers, f"LDS.{name}", value, f"at most {num_layers} layers")
        if not self.rate:
            return
        protected = self.protect_first + self.protect_last
        free = num_layers - protected
        accepted = f"fewer than the {num_layers} layers of the model (or rate=0)"
        expect(free > 0, "LDS.protect_first + protect_last", protected, accepted)
        self._check_chances(free)
        total = sum(DEPTHS[self.depth].weights(free, self, range(free)))
        most = (num_layers - 1) / total if total else 1.0
        is_possible = UNITS[self.unit].trains_all or self.rate <= most + 1e-9
        accepted = f"at most {_down(most)}, so that one of {num_layers} layers always runs"
        expect(is_possible, "LDS.rate", self.rate, accepted)

    def _check_chances(self, layers: int) -> None:
        """Raise ValueError for a chance above 1, at the most uneven measurement there is."""
        largest = max(DEPTHS[self.depth].weights(layers, self, range(layers)))
        likeliest = self.rate * largest
        accepted = (
            f"at most {_down(1 / max(largest, 1))}: with depth={self.depth!r} and "
            f"epsilon={self.epsilon} the likeliest layer would be skipped with probability "
            f"{likeliest:.3g}"
        )
        expect(likeliest <= 1 + 1e-9, "LDS.rate", self.rate, accepted)

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
    """A limit in three digits, rounded down so that it is accepted itself."""
    return f"{math.floor(1000 * limit + 1e-9) / 1000:g}"


# The scheme's default values, which are those of row `sts` of workflow/ablations.yaml. The paper's
# are: one of its three kinds of VTC (uniform, random, text_guided) in alignment, the formula of
# policy `sts` in instruction tuning. Its sources that we know give no values, so these are our
# choices: the kind, keep, rate (alpha) and epsilon. Policy `sts` has none of its own and is refused
# without one: at epsilon 0 every layer is alike, which is not the paper's depth adjustment.
STS_VTC = VTC("random", keep=0.5)
STS_LDS = LDS("sts", rate=0.5, epsilon=1.0)
