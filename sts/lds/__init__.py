"""Layer dynamic skipping (LDS): p_l(t) = rate x S(t) x D(l), the chance that layer l is left out.

Time S, depth D, draw and unit are independent parts; a policy is a named choice of them. No torch
is needed to import this package: the workflow reads the names in any environment.

One file `sts/lds/NAME.py` adds any of these under NAME, and nothing else has to be edited:
    POLICY = Policy(...)    a choice of parts
    DEPTH = Depth(...)      a D(l), also one that is measured: sts/lds/block_influence.py
    UNIT = Unit(...)        something else to leave out
It may import torch inside its functions only.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from sts.checks import expect
from sts.lds.parts import DEPTHS, DRAWS, Depth

__all__ = ["DEPTHS", "DRAWS", "POLICIES", "UNITS", "Depth", "Policy", "Unit", "source_of"]


class Policy(NamedTuple):
    """A named choice of parts (sts.settings.LDS says what each is)."""

    schedule: str = "constant"
    depth: str = "uniform"
    draw: str = "independent"
    unit: str = "layer"
    protect_first: int = 0
    protect_last: int = 0


class Unit(NamedTuple):
    """What is left out of a layer.

    lowers: the shares of a layer's work (decision.SHARES) that are less than 1 where it is left
    out. drawn_by_step: each of them is on or off for a whole step; else a part of it, in each
    micro-batch anew. stand_in: (layer, decision.Part) -> what is called instead of the layer, or
    None; hooks: (layer, Part) -> handles of hooks that stay for the step, also while activations
    are computed again; both callables or "module:name". draws: the draws it can take. rescales:
    whether it can divide what is left by 1 - p. trains_all: every layer has a gradient in every
    step.
    """

    lowers: tuple[str, ...]
    drawn_by_step: bool
    stand_in: str | Callable | None = None
    hooks: str | Callable | None = None
    draws: tuple[str, ...] = ("independent", "fixed_count")
    rescales: bool = False
    trains_all: bool = False


UNITS: dict[str, Unit] = {
    # the paper's: the layer for the whole batch
    "layer": Unit(("rows",), True, stand_in="sts.lds.units:whole_layer", rescales=True),
    # a share of the samples: torchtune's layer dropout, DINOv2's efficient stochastic depth
    "samples": Unit(
        ("rows",), False, stand_in="sts.lds.units:some_rows", rescales=True, trains_all=True
    ),
    # a share of each sample's tokens: random-LTD (arXiv 2211.11586)
    "tokens": Unit(
        ("tokens",),
        False,
        stand_in="sts.lds.units:some_tokens",
        draws=("fixed_count",),
        trains_all=True,
    ),
    # the backward of attention and MLP, drawn apart: DropBP (arXiv 2402.17812)
    "backward": Unit(
        ("attention_backward", "mlp_backward"), True, hooks="sts.lds.units:without_backward"
    ),
}

POLICIES: dict[str, Policy] = {
    "none": Policy(),
    # the paper (arXiv 2509.18150): rate is alpha; every layer its own switch, none protected
    "sts": Policy(schedule="falling_quadratic", depth="slope"),
    # LayerDrop (arXiv 1909.11556): every layer alike
    "layerdrop": Policy(),
    # progressive layer dropping (arXiv 2010.13369): rate is 1 - theta, of the deepest layer
    "pld": Policy(schedule="rising_exponential", depth="linear"),
    # LayerSkip (arXiv 2404.16710): rate is the deepest layer's; samples are left out on their own
    "layerskip": Policy(depth="exponential", unit="samples"),
    # DropBP (arXiv 2402.17812), without its sensitivities: rate is that of every sublayer
    "dropbp": Policy(unit="backward"),
    # random-LTD (arXiv 2211.11586): the first and the last layer see every token
    "random_ltd": Policy(draw="fixed_count", unit="tokens", protect_first=1, protect_last=1),
}

_ROOMS = {"parts", "decision", "units", "measure", "distributed", "skipper"}
_TABLES = {"POLICY": POLICIES, "DEPTH": DEPTHS, "UNIT": UNITS}


def _take_up(name: str) -> None:
    """Enter what the file `name` adds. ValueError if it adds nothing, or the name is taken."""
    module = import_module(f"sts.lds.{name}")
    added = [part for part in _TABLES if hasattr(module, part)]
    expect(bool(added), f"sts/lds/{name}.py", added, f"one or more of {', '.join(_TABLES)}")
    for part in added:
        taken = name in _TABLES[part]
        expect(not taken, f"sts/lds/{name}.py: {part}", name, "a file name that is no known name")
        _TABLES[part][name] = getattr(module, part)


for _file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    if _file.stem not in _ROOMS:
        _take_up(_file.stem)


def source_of(name: str) -> Path | None:
    """The file of a policy, depth or unit that has one of its own."""
    file = Path(__file__).with_name(f"{name}.py")
    return file if name not in _ROOMS and file.exists() else None


def resolve(reference: str | Callable) -> Callable:
    """A callable, or the one that "module:name" names."""
    if callable(reference):
        return reference
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
