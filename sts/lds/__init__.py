"""Layer dynamic skipping (LDS): layer l is skipped with the chance p_l(t) = rate x S(t) x D(l).

The parts of the formula are independent: schedule S(t), depth D(l), draw and unit. A policy is a
named choice of parts. Importing this package needs no torch: the workflow reads the names anywhere.

One file `sts/lds/NAME.py` adds any of these under NAME, and nothing else has to be edited:
    POLICY = Policy(...)    a choice of parts
    DEPTH = Depth(...)      a D(l); sts/lds/block_influence.py is one that is measured
    UNIT = Unit(...)        something else to skip
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
    """A named choice of parts; sts.settings.LDS describes them."""

    schedule: str = "constant"
    depth: str = "uniform"
    draw: str = "independent"
    unit: str = "layer"
    protect_first: int = 0
    protect_last: int = 0


class Unit(NamedTuple):
    """What is skipped of a layer.

    Attributes:
        shares: The shares of a layer's work (decision.SHARES) that are below 1 where it is skipped.
        drawn_by_step: Each share is on or off for a whole step; else a part of it is skipped, drawn
            anew in each micro-batch.
        replacement: (layer, decision.LayerDecision) -> what is called instead of a layer that may
            be skipped, or None; a function or "module:name".
        hooks: (layer, LayerDecision) -> handles of hooks that stay for the step, also while
            checkpointing computes activations again; a function or "module:name".
        draws: The draws that the unit can take.
        rescales: Whether it can divide what is left by 1 - p.
        trains_all: Every layer has a gradient in every step.
    """

    shares: tuple[str, ...]
    drawn_by_step: bool
    replacement: str | Callable | None = None
    hooks: str | Callable | None = None
    draws: tuple[str, ...] = ("independent", "fixed_count")
    rescales: bool = False
    trains_all: bool = False


UNITS: dict[str, Unit] = {
    # the paper's: the layer for the whole batch
    "layer": Unit(("rows",), True, "sts.lds.units:skip_layer", rescales=True),
    # a share of the samples: torchtune's layer dropout, DINOv2's efficient stochastic depth
    "samples": Unit(("rows",), False, "sts.lds.units:SomeRows", rescales=True, trains_all=True),
    # a share of each sample's tokens: random-LTD (arXiv 2211.11586)
    "tokens": Unit(
        ("tokens",), False, "sts.lds.units:SomeTokens", draws=("fixed_count",), trains_all=True
    ),
    # the backward of attention and MLP, drawn apart: DropBP (arXiv 2402.17812)
    "backward": Unit(
        ("attention_backward", "mlp_backward"), True, hooks="sts.lds.units:skip_backward"
    ),
}

POLICIES: dict[str, Policy] = {
    "none": Policy(),
    # the paper (arXiv 2509.18150): rate is alpha; each layer has its own switch, none is protected
    "sts": Policy(schedule="falling_quadratic", depth="slope"),
    # LayerDrop (arXiv 1909.11556): every layer alike
    "layerdrop": Policy(),
    # progressive layer dropping (arXiv 2010.13369): rate is 1 - theta, of the deepest layer
    "pld": Policy(schedule="rising_exponential", depth="linear"),
    # LayerSkip (arXiv 2404.16710): rate is that of the deepest layer; each sample skips on its own
    "layerskip": Policy(depth="exponential", unit="samples"),
    # DropBP (arXiv 2402.17812), without its sensitivities: rate is that of every sublayer
    "dropbp": Policy(unit="backward"),
    # random-LTD (arXiv 2211.11586): the first and the last layer see every token
    "random_ltd": Policy(draw="fixed_count", unit="tokens", protect_first=1, protect_last=1),
}

_MODULES = {"parts", "decision", "units", "measure", "distributed", "skipper"}
_TABLES = {"POLICY": POLICIES, "DEPTH": DEPTHS, "UNIT": UNITS}


def _register(name: str) -> None:
    """Add what the file `name` defines. ValueError if that is nothing, or the name is taken."""
    module = import_module(f"sts.lds.{name}")
    parts = [part for part in _TABLES if hasattr(module, part)]
    expect(bool(parts), f"sts/lds/{name}.py", parts, f"one or more of {', '.join(_TABLES)}")
    for part in parts:
        is_free = name not in _TABLES[part]
        expect(is_free, f"sts/lds/{name}.py: {part}", name, "a file name that is no known name")
        _TABLES[part][name] = getattr(module, part)


for _file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    if _file.stem not in _MODULES:
        _register(_file.stem)


def source_of(name: str) -> Path | None:
    """The file of a policy, depth or unit; None for those of this package's own modules."""
    file = Path(__file__).with_name(f"{name}.py")
    return file if name not in _MODULES and file.exists() else None


def resolve(reference: str | Callable) -> Callable:
    """A callable, or the one that "module:name" names."""
    if callable(reference):
        return reference
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
