"""Visual token compression (VTC): fewer visual tokens, on tensors of [batch, tokens, dim].

A kind is a function in one file here, `sts/vtc/mine.py`:

    def mine(tokens: Tensor, keep: float, *, grid: tuple[int, int]) -> Outputs: ...

After `tokens` and `keep` it names those of INPUTS that it needs, and gets just these. A kind with
weights of its own is an `nn.Module` class: `__init__(self, dim)`, where dim is the width of the
tokens, and `forward(self, tokens, keep, *, ...) -> Outputs`. A kind without a file:
`sts.vtc.KINDS["mine"] = mine`.

Scores and similarities decide which tokens go together and carry no gradient. The outputs of the
kinds here are linear in the tokens, so a gradient reaches every token that an output holds.

The paper's kinds are `uniform`, `random` and `text_guided`; the others are alternatives to them.
This module imports no torch: names are checked where there is none.
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

INPUTS = {  # what a kind may name
    "grid": "(height, width) of the tokens",
    "scores": "[batch, tokens], the attention that the vision tower's class token pays to each",
    "text": "[batch, text tokens, dim], the embeddings of the sample's text",
    "text_mask": "[batch, text tokens], bool, which of them are text and not padding",
    "generator": "a torch.Generator",
}


class Outputs(NamedTuple):
    """What a kind makes of tokens [B, N, D].

    Attributes:
        positions: The token at whose place each output stands, [B, k], long, ascending.
        apply: [B, N, C] -> [B, k, C]: does the same to any features laid out like the tokens.
        tokens: The outputs [B, k, D] of a kind with weights; None: they are `apply(tokens)`.
        real: Which outputs are no padding, [B, k], bool, where samples keep different numbers of
            tokens; None: all are.
        selects: The outputs are the tokens at `positions`, unchanged.
    """

    positions: Tensor
    apply: Callable[[Tensor], Tensor]
    tokens: Tensor | None = None
    real: Tensor | None = None
    selects: bool = False


def none(tokens: Tensor, keep: float) -> Outputs:
    """All tokens, whatever `keep` says."""
    import torch

    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return Outputs(positions.expand(len(tokens), -1), lambda x: x)


def discover(folders: Iterable[str]) -> dict[str, str]:
    """The kinds that have a file of their own in these folders: kind -> module.

    Raises:
        ValueError: A file has the name of a kind above.
    """
    modules = [module.name for module in pkgutil.iter_modules(folders)]
    kinds = [name for name in modules if name not in FAMILIES and not name.startswith("_")]
    taken = {"none"}.union(*FAMILIES.values())
    for name in kinds:
        accepted = f"another name for sts/vtc/{name}.py: this one is taken"
        expect(name not in taken, "kind", name, accepted)
    return {name: name for name in kinds}


# Name -> the module here that holds it, or the kind itself.
KINDS: dict[str, str | Callable[..., Outputs]] = {
    "none": none,
    **{name: module for module, names in FAMILIES.items() for name in names},
    **discover(__path__),
}


def _entry(name: str) -> str | Callable[..., Outputs]:
    expect(name in KINDS, "kind", name, f"one of {', '.join(KINDS)}")
    return KINDS[name]


def kind_of(name: str) -> Callable[..., Outputs] | type:
    """The kind called `name`: a function, or a class with weights of its own.

    Raises:
        ValueError: The name is unknown, or its file doesn't hold it.
    """
    kind = _entry(name)
    if isinstance(kind, str):
        module = import_module(f"{__name__}.{kind}")
        expect(hasattr(module, name), "kind", name, f"a function of that name in {module.__file__}")
        kind = getattr(module, name)
    return kind


def source_of(name: str) -> Path | None:
    """The file of a kind; None for `none` and for a kind that was put into KINDS."""
    kind = _entry(name)
    return Path(find_spec(f"{__name__}.{kind}").origin) if isinstance(kind, str) else None


def wants(kind: str | Callable) -> frozenset[str]:
    """Which of INPUTS a kind (or its name) wants: the parameters after `tokens` and `keep`.

    Raises:
        ValueError: The kind has a parameter that is none of them.
    """
    function = kind_of(kind) if isinstance(kind, str) else kind
    forward = getattr(function, "forward", function)
    first = 3 if isinstance(function, type) else 2  # a class has self before tokens, keep
    names = list(signature(forward).parameters)[first:]
    accepted = f"only (tokens, keep) and names of {', '.join(INPUTS)}"
    expect(INPUTS.keys() >= set(names), f"inputs of kind {_name(kind)!r}", names, accepted)
    return frozenset(names)


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
    """Compress the visual tokens of images to about `keep` of them.

    Args:
        kind: A name, a function, or an instance of a class with weights.
        tokens: [B, N, D].
        keep: The keep ratio, in (0, 1]; 1 returns `tokens` itself.
        grid: (height, width) of the tokens, N = height * width.
        scores: See INPUTS; so are the others, each needed only where the kind wants it.

    Returns:
        The outputs [B, k, D], 1 <= k <= N, and where they come from.

    Raises:
        ValueError: The kind is unknown, an argument that it wants is missing or has another shape,
            or it doesn't return what Outputs says.
    """
    function, name = kind_of(kind) if isinstance(kind, str) else kind, _name(kind)
    accepted = "an instance of the class, which has weights: made with (dim)"
    expect(not isinstance(function, type), "kind", kind, accepted)
    expect(0 < keep <= 1, "keep", keep, "a number in (0, 1]")
    is_grid = tokens.ndim == 3 and grid[0] * grid[1] == tokens.shape[1]
    accepted = f"height * width = tokens of [batch, tokens, dim] = {list(tokens.shape)}"
    expect(is_grid, "grid", tuple(grid), accepted)
    if keep == 1 or function is none:
        return tokens, none(tokens, keep)
    inputs = {"grid": grid, "scores": scores, "text": text, "text_mask": text_mask}
    inputs |= {"generator": generator}
    inputs = {key: inputs[key] for key in sorted(wants(kind))}
    for key, value in inputs.items():
        expect(value is not None, key, value, f"{INPUTS[key]}, for kind {name!r}")
        inputs[key] = value.to(tokens.device) if hasattr(value, "to") else value
    _check_shapes(name, tokens, inputs)
    outputs = function(tokens, keep, **inputs)
    _check_outputs(name, tokens, outputs)
    compressed = outputs.apply(tokens) if outputs.tokens is None else outputs.tokens
    expected, shape = [*outputs.positions.shape, tokens.shape[2]], list(compressed.shape)
    expect(shape == expected, f"outputs of kind {name!r}", shape, f"{expected}")
    return compressed, outputs


def _name(kind: str | Callable) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)


def _check_shapes(name: str, tokens: Tensor, inputs: dict[str, Any]) -> None:
    """Raise a ValueError for inputs of other shapes: some kinds would take them for less tokens."""
    batch, length, dim = tokens.shape
    texts = [n for key in ("text", "text_mask") if key in inputs for n in inputs[key].shape[1:2]]
    shapes = {"scores": [batch, length], "text": [batch, *texts[:1], dim]}
    shapes |= {"text_mask": [batch, *texts[:1]]}
    for key in shapes.keys() & inputs.keys():
        shape, accepted = list(inputs[key].shape), f"{shapes[key]} for kind {name!r}"
        expect(shape == shapes[key], f"{key}.shape", shape, accepted)
    if "text_mask" in inputs:
        dtype = str(inputs["text_mask"].dtype)
        expect(dtype == "torch.bool", "text_mask.dtype", dtype, "torch.bool: where text is")


def _check_outputs(name: str, tokens: Tensor, outputs: Outputs) -> None:
    """Raise a ValueError for Outputs that aren't what their docstring says, as far as is cheap."""
    batch, length = tokens.shape[:2]
    returned = type(outputs).__name__
    expect(isinstance(outputs, Outputs), f"outputs of kind {name!r}", returned, "sts.vtc.Outputs")
    positions, real = outputs.positions, outputs.real
    layout = [str(positions.dtype), *positions.shape]
    is_right = layout[:2] == ["torch.int64", batch] and positions.ndim == 2
    is_right = is_right and 1 <= positions.shape[1] <= length
    expect(is_right, f"positions of kind {name!r}", layout, f"long, [{batch}, 1..{length}]")
    if positions.device.type == "cpu":  # anywhere else it would wait for the device
        low, high = int(positions.min()), int(positions.max())
        is_right, accepted = 0 <= low <= high < length, f"within 0..{length - 1}"
        expect(is_right, f"positions of kind {name!r}", (low, high), accepted)
    if real is not None:
        layout, accepted = [str(real.dtype), *real.shape], ["torch.bool", *positions.shape]
        expect(layout == accepted, f"real of kind {name!r}", layout, f"{accepted}")
