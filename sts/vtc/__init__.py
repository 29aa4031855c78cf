"""Visual token compression (VTC): fewer visual tokens, on tensors of [batch, tokens, dim].

A kind is a function, and a new one is one file here: `sts/vtc/mine.py` with

    def mine(tokens: Tensor, keep: float, *, grid: tuple[int, int]) -> Outputs: ...

Of INPUTS it gets exactly what it names after `tokens` and `keep`. A kind with weights of its own is
an `nn.Module` class, made with the width of the tokens: `__init__(self, dim)` and `forward(self,
tokens, keep, *, ...) -> Outputs`. Without a file: `sts.vtc.KINDS["mine"] = mine`. Scores and
similarities decide which tokens go together and carry no gradient; the outputs of the kinds here
are linear in the tokens, so gradients reach every token that an output holds.

The paper's kinds are `uniform`, `random` and `text_guided`; all others are alternatives beside them
(see the modules). This module imports no torch: names are checked where there is none.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sts.checks import expect

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FAMILIES: dict[str, tuple[str, ...]] = {  # module here -> its kinds
    "sampling": ("uniform", "random", "cls_topk", "diverse"),
    "text": ("text_guided", "text_guided_max"),
    "pooling": ("avgpool2d", "avgpool1d", "pixel_shuffle"),
    "merging": ("cls_merge", "bipartite"),
}

# What a kind may name: the grid (height, width) of the tokens; scores [B, N], the attention that
# the vision tower's class token pays each token; text [B, T, D], the embeddings of the sample's
# text, and text_mask [B, T], which of them are text; generator, of random numbers.
INPUTS = ("grid", "scores", "text", "text_mask", "generator")


class Outputs(NamedTuple):
    """What a kind makes of tokens [B, N, D].

    positions: the tokens at which the outputs stand, [B, k], long; ascending where real.
    apply: [B, N, C] -> [B, k, C], what the kind does to any features laid out like the tokens.
    tokens: the outputs [B, k, D] if they are not `apply(tokens)` (a kind with weights of its own).
    real: [B, k], bool: which outputs count, where samples keep different numbers; None: all do.
    selects: the outputs are the tokens at `positions` and nothing else.
    """

    positions: Tensor
    apply: Callable[[Tensor], Tensor]
    tokens: Tensor | None = None
    real: Tensor | None = None
    selects: bool = False


def none(tokens: Tensor, keep: float) -> Outputs:
    """All tokens, whatever `keep` says."""
    import torch

    everything = torch.arange(tokens.shape[1], device=tokens.device)
    return Outputs(everything.expand(len(tokens), -1), lambda x: x)


def discovered(folders: Iterable[str]) -> dict[str, str]:
    """Kind -> module of the kinds that have a file of their own in the folders of this package.

    Raises ValueError for one that has the name of a kind above.
    """
    names = [module.name for module in pkgutil.iter_modules(folders)]
    own = [name for name in names if name not in FAMILIES and not name.startswith("_")]
    for name in own:
        taken = name == "none" or any(name in names for names in FAMILIES.values())
        expect(not taken, "kind", name, f"another name for sts/vtc/{name}.py: this one is taken")
    return dict(zip(own, own, strict=True))


# Name -> the module here that holds it, or the kind itself.
KINDS: dict[str, str | Callable[..., Outputs]] = {
    "none": none,
    **{name: module for module, names in FAMILIES.items() for name in names},
    **discovered(__path__),
}


def kind_of(name: str) -> Callable[..., Outputs] | type:
    """The kind called `name`: a function, or a class with weights of its own.

    Raises ValueError for an unknown name, and for a file that doesn't hold its kind.
    """
    expect(name in KINDS, "kind", name, f"one of {', '.join(KINDS)}")
    kind = KINDS[name]
    if isinstance(kind, str):
        module = import_module(f"{__name__}.{kind}")
        expect(hasattr(module, name), "kind", name, f"a function of that name in {module.__file__}")
        kind = getattr(module, name)
    return kind


def wants(kind: str | Callable) -> frozenset[str]:
    """Which of INPUTS a kind (or its name) takes: what it names after `tokens` and `keep`.

    Raises ValueError for a kind that names anything else.
    """
    function = kind_of(kind) if isinstance(kind, str) else kind
    called = getattr(function, "forward", function)
    first = 3 if isinstance(function, type) else 2  # a class has self before tokens, keep
    named = list(signature(called).parameters)[first:]
    accepted = f"only (tokens, keep) and names of {', '.join(INPUTS)}"
    expect(set(named) <= set(INPUTS), f"inputs of kind {_name(kind)!r}", named, accepted)
    return frozenset(named)


def source_of(name: str) -> Path | None:
    """The file in which a kind lives; None for `none` and for one that was put into KINDS."""
    expect(name in KINDS, "kind", name, f"one of {', '.join(KINDS)}")
    kind = KINDS[name]
    return Path(find_spec(f"{__name__}.{kind}").origin) if isinstance(kind, str) else None


def compress(
    kind: str | Callable[..., Outputs],
    tokens: Tensor,
    keep: float,
    grid: tuple[int, int],
    *,
    scores: Tensor | None = None,
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Outputs]:
    """Compress `tokens` [B, N, D] of a grid (h, w), N = h * w, to about `keep` of them.

    kind: a name, a function, or an instance of a class with weights. scores [B, N], text [B, T, D],
    text_mask [B, T] (bool) and generator are needed where the kind wants them. Returns the outputs
    [B, k, D], 1 <= k <= N, and where they come from; keep = 1 returns `tokens` itself. Raises
    ValueError for an unknown kind, a keep outside (0, 1], a grid that is not N tokens, an input
    that is missing or of another shape, and a kind that doesn't return what Outputs says.
    """
    function = kind_of(kind) if isinstance(kind, str) else kind
    made = not isinstance(function, type)
    expect(made, "kind", kind, "an instance of the class, which has weights: made with (dim)")
    expect(0 < keep <= 1, "keep", keep, "a number in (0, 1]")
    expect(
        tokens.ndim == 3 and grid[0] * grid[1] == tokens.shape[1],
        "grid",
        tuple(grid),
        f"height * width = tokens of [batch, tokens, dim] = {list(tokens.shape)}",
    )
    if keep == 1 or function is none:
        return tokens, none(tokens, keep)
    inputs = {"scores": scores, "text": text, "text_mask": text_mask}
    wanted = wants(kind)
    _check_inputs(_name(kind), wanted, tokens, inputs | {"generator": generator})
    inputs = {name: None if x is None else x.to(tokens.device) for name, x in inputs.items()}
    inputs |= {"grid": grid, "generator": generator}
    outputs = function(tokens, keep, **{name: inputs[name] for name in wanted})
    _check_outputs(_name(kind), tokens, outputs)
    compressed = outputs.apply(tokens) if outputs.tokens is None else outputs.tokens
    expected = [*outputs.positions.shape, tokens.shape[2]]
    shape = list(compressed.shape)
    expect(shape == expected, f"outputs of kind {_name(kind)!r}", shape, f"{expected}")
    return compressed, outputs


def _name(kind: str | Callable) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)


def _check_inputs(name: str, wanted: frozenset[str], tokens: Tensor, given: dict[str, Any]) -> None:
    """Raise a ValueError for an input that a kind wants and that is missing or misshapen."""
    batch, length, dim = tokens.shape
    texts = ((given["text"], 3), (given["text_mask"], 2))
    counts = [x.shape[1] for x, axes in texts if x is not None and x.ndim == axes]
    count = counts[0] if counts else "T"
    shapes = {
        "scores": ("[batch, tokens]", [batch, length]),
        "text": ("[batch, text tokens, dim]", [batch, count, dim]),
        "text_mask": ("[batch, text tokens]", [batch, count]),
    }
    for key, (axes, expected) in shapes.items():
        if key in wanted:
            shape = None if given[key] is None else list(given[key].shape)
            accepted = f"{axes} = {expected} for kind {name!r}"
            expect(shape == expected, f"{key}.shape", shape, accepted)
    if "text_mask" in wanted:
        kind = str(given["text_mask"].dtype)
        expect(kind == "torch.bool", "text_mask.dtype", kind, "torch.bool: where text is")
    if "generator" in wanted:
        accepted = f"a torch.Generator for kind {name!r}"
        expect(given["generator"] is not None, "generator", None, accepted)


def _check_outputs(name: str, tokens: Tensor, outputs: Outputs) -> None:
    """Raise a ValueError for Outputs that aren't what their docstring says, as far as is cheap."""
    batch, length = tokens.shape[:2]
    kind = type(outputs).__name__
    expect(isinstance(outputs, Outputs), f"outputs of kind {name!r}", kind, "sts.vtc.Outputs")
    positions, real = outputs.positions, outputs.real
    found = [str(positions.dtype), *positions.shape]
    ok = found[:2] == ["torch.int64", batch] and len(found) == 3 and 1 <= found[2] <= length
    accepted = f"long, [{batch}, 1..{length}]"
    expect(ok, f"positions of kind {name!r}", found, accepted)
    if positions.device.type == "cpu":  # anywhere else it would wait for the device
        low, high = int(positions.min()), int(positions.max())
        accepted = f"within 0..{length - 1}"
        expect(0 <= low <= high < length, f"positions of kind {name!r}", (low, high), accepted)
    if real is not None:
        found, accepted = [str(real.dtype), *real.shape], ["torch.bool", *positions.shape]
        expect(found == accepted, f"real of kind {name!r}", found, f"{accepted}")
