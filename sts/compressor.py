"""Visual token compression (VTC): fewer visual tokens, on tensors of [batch, tokens, dim].

Pure functions and a registry. A new kind is one function with the signature of those below and one
entry in COMPRESSORS. Scores and similarities decide which tokens go together and carry no gradient;
the outputs are linear in the tokens, so gradients reach every token that an output holds.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sts.schedule import annealing, expect, ramp

Apply = Callable[[Tensor], Tensor]  # [B, N, C] -> [B, k, C]: what the kind does, to any features


class Kind(NamedTuple):
    """How to compress: `function(tokens, keep, *, grid, scores, generator) -> (positions, apply)`.

    positions [B, k], long and ascending: the tokens at which the outputs stand. apply: the
    outputs of `tokens`, or of anything else that is laid out like them (positions, deepstack).
    """

    function: Callable[..., tuple[Tensor, Apply]]
    needs_scores: bool = False  # a score per token, such as the attention the class token pays it
    averages: bool = False  # an output is a mean of tokens, not the one at its position


@lru_cache
def pooled_grid(height: int, width: int, keep: float) -> tuple[int, int]:
    """The (rows, columns) that [height, width] is pooled to so that about `keep` of it remains.

    Minimises the log error of the count plus a little (0.15) of the log distortion of the cells:
    12x12 of 24x24 at 1/4, and 2x3 rather than strips of 1x7 where 7 of 8x8 are asked for.
    """

    def cost(shape: tuple[int, int]) -> float:
        rows, columns = shape
        count = abs(math.log(rows * columns / (keep * height * width)))
        return count + 0.15 * abs(math.log(rows * width / (columns * height)))

    shapes = [(r, c) for r in range(1, height + 1) for c in range(1, width + 1)]
    return min(shapes, key=cost)


def _cell_centres(size: int, cells: int) -> Tensor:
    """The index nearest the middle of each adaptive pooling cell (the lower of two), [cells]."""
    cell = torch.arange(cells)
    start, end = cell * size // cells, -(-(cell + 1) * size // cells)
    return (start + end - 1) // 2


def kept_rows(height: int, width: int, keep: float) -> list[int]:
    """The rows of a grid at which pooling to about `keep` of it leaves a row."""
    return _cell_centres(height, pooled_grid(height, width, keep)[0]).tolist()


def _count(tokens: Tensor, keep: float) -> int:
    return max(1, round(keep * tokens.shape[1]))


def avgpool2d(tokens: Tensor, keep: float, *, grid: tuple[int, int], **_) -> tuple[Tensor, Apply]:
    """Adaptive 2-D average pooling (DeCo; M3, arXiv 2405.17430).

    Cells overlap by a row or column where the grid doesn't divide. A position is the original token
    nearest the centre of its cell.
    """
    (height, width), cells = grid, pooled_grid(*grid, keep)

    def apply(x: Tensor) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, (height, width))
        return F.adaptive_avg_pool2d(image, cells).flatten(2).transpose(1, 2)

    return _centres(tokens, grid, cells), apply


def _centres(tokens: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """The positions [B, rows * columns] nearest the centres of the cells of a grid."""
    rows = _cell_centres(grid[0], cells[0])[:, None]
    places = rows * grid[1] + _cell_centres(grid[1], cells[1])
    return places.flatten().to(tokens.device).expand(len(tokens), -1)


def avgpool1d(tokens: Tensor, keep: float, **_) -> tuple[Tensor, Apply]:
    """Adaptive average pooling along the sequence, row after row, as LLaVolta pools (arXiv
    2406.20092; there inside the language model and with a fixed stride)."""
    count = _count(tokens, keep)

    def apply(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(x.transpose(1, 2), count).transpose(1, 2)

    return _centres(tokens, (1, tokens.shape[1]), (1, count)), apply


def pixel_shuffle(
    tokens: Tensor, keep: float, *, grid: tuple[int, int], **_
) -> tuple[Tensor, Apply]:
    """Neighbours share the channels: channel c of an output is channel c of neighbour c mod n of
    the n tokens of its cell.

    After the pixel shuffle of InternVL and Idefics3, which puts all channels of the n neighbours
    side by side for a wider projector; here there are no new weights, so each keeps an n-th of its
    channels. Cells are those of `avgpool2d`.
    """
    (height, width), (rows, columns) = grid, pooled_grid(*grid, keep)
    cells = [
        [y * width + x for y in _members(height, rows, row) for x in _members(width, columns, col)]
        for row in range(rows)
        for col in range(columns)
    ]

    def apply(x: Tensor) -> Tensor:
        channels = range(x.shape[2])
        source = torch.tensor([[cell[c % len(cell)] for c in channels] for cell in cells])
        return x.gather(1, source.to(x.device).expand(len(x), -1, -1))

    return _centres(tokens, grid, (rows, columns)), apply


def _members(size: int, cells: int, cell: int) -> range:
    """The indices of an adaptive pooling cell."""
    return range(cell * size // cells, -(-(cell + 1) * size // cells))


def _select(positions: Tensor) -> tuple[Tensor, Apply]:
    """The tokens at `positions` [B, k], in their original order."""
    positions = positions.sort(dim=1).values

    def apply(x: Tensor) -> Tensor:
        return x.take_along_dim(positions[..., None], dim=1)

    return positions, apply


def random(
    tokens: Tensor, keep: float, *, generator: torch.Generator | None, **_
) -> tuple[Tensor, Apply]:
    """A uniform sample without replacement, another one for each row, from `generator`: a strong
    baseline in UniPruneBench."""
    expect(generator is not None, "generator", generator, "a torch.Generator for kind 'random'")
    device = generator.device  # drawn where the generator lives: a CPU one is the same everywhere
    draws = torch.rand(tokens.shape[:2], generator=generator, device=device).to(tokens.device)
    return _select(draws.topk(_count(tokens, keep), dim=1).indices)


def cls_topk(tokens: Tensor, keep: float, *, scores: Tensor, **_) -> tuple[Tensor, Apply]:
    """The tokens that the class token attends to most."""
    return _select(scores.topk(_count(tokens, keep), dim=1).indices.to(tokens.device))


def _merge(owner: Tensor) -> tuple[Tensor, Apply]:
    """Each token [B, N] goes to its owner (an owner owns itself); an output is the mean of an
    owner's tokens. Every row has the same number of owners."""
    owns_itself = owner == torch.arange(owner.shape[1], device=owner.device)
    positions = owns_itself.nonzero()[:, 1].view(len(owner), -1)
    slot = (owns_itself.cumsum(1) - 1).gather(1, owner)
    sizes = torch.zeros_like(positions).scatter_add_(1, slot, torch.ones_like(slot))

    def apply(x: Tensor) -> Tensor:
        total = x.new_zeros(*positions.shape, x.shape[2])
        total = total.scatter_add(1, slot[..., None].expand_as(x), x)
        return total / sizes[..., None].to(x.dtype)

    return positions, apply


def _directions(tokens: Tensor) -> Tensor:
    """The tokens as unit vectors, detached, in at least float32."""
    tokens = tokens.detach()
    return F.normalize(tokens if tokens.dtype == torch.float64 else tokens.float(), dim=-1)


CONTEXTUAL = 10 / 64  # of the outputs of cls_merge: VisionZip's 54 dominant + 10 contextual tokens


def cls_merge(tokens: Tensor, keep: float, *, scores: Tensor, **_) -> tuple[Tensor, Apply]:
    """The tokens that the class token attends to most, and the rest merged into a few.

    VisionZip (arXiv 2412.04467): of k outputs, CONTEXTUAL are targets evenly spaced among the rest;
    every other token is averaged into the target most similar to it. There similarity is the cosine
    of the vision encoder's keys, here of the projected tokens.
    """
    batch, length = tokens.shape[:2]
    count = _count(tokens, keep)
    contextual = min(count - 1, max(1, round(CONTEXTUAL * count)))
    owner = torch.arange(length, device=tokens.device).expand(batch, -1)
    dominant = scores.topk(count - contextual, dim=1).indices.to(tokens.device)
    if not contextual:
        return _select(dominant)
    left = torch.ones_like(owner, dtype=torch.bool).scatter(1, dominant, False)
    rest = left.nonzero()[:, 1].view(batch, -1)
    spaced = torch.arange(contextual, device=tokens.device) * rest.shape[1] // contextual
    targets = rest[:, spaced]
    unit = _directions(tokens)
    similar = unit.take_along_dim(rest[..., None], 1) @ (
        unit.take_along_dim(targets[..., None], 1).transpose(1, 2)
    )
    similar[:, spaced, torch.arange(contextual)] = math.inf  # a target goes to itself
    return _merge(owner.scatter(1, rest, targets.gather(1, similar.argmax(2))))


def diverse(tokens: Tensor, keep: float, **_) -> tuple[Tensor, Apply]:
    """The tokens least like one another: greedy max-min of 1 - cosine.

    DivPrune (arXiv 2503.02175): begin with the token farthest from its nearest neighbour, then
    always add the one farthest from those chosen.
    """
    unit = _directions(tokens)
    distance = 1 - unit @ unit.transpose(1, 2)
    length = tokens.shape[1]
    nearest = distance + torch.diag(torch.full((length,), math.inf)).to(distance)
    chosen = [nearest.amin(2).argmax(1)]
    best = distance.new_full(distance.shape[:2], math.inf)
    for _step in range(1, _count(tokens, keep)):
        newest = chosen[-1][:, None]
        best = torch.minimum(best, distance.take_along_dim(newest[..., None], 1)[:, 0])
        best = best.scatter(1, newest, -math.inf)  # never twice
        chosen.append(best.argmax(1))
    return _select(torch.stack(chosen, 1))


def bipartite(tokens: Tensor, keep: float, **_) -> tuple[Tensor, Apply]:
    """Token merging, ToMe (arXiv 2210.09461): the remaining tokens are split into every other one;
    the most similar pairs across the split are averaged, weighted by how many tokens each holds.

    At most half are merged at a time, so it is repeated until k are left. There similarity is the
    cosine of attention keys, here of the (merged) projected tokens.
    """
    count = _count(tokens, keep)
    batch, length = tokens.shape[:2]
    detached = tokens.detach()
    owner = torch.arange(length, device=tokens.device).repeat(batch, 1)
    while True:
        positions, mean = _merge(owner)
        excess = positions.shape[1] - count
        if not excess:
            return positions, mean
        unit = _directions(mean(detached))
        even, odd = positions[:, ::2], positions[:, 1::2]
        best, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(2)
        merged = best.topk(min(excess, odd.shape[1]), dim=1).indices
        to = owner.new_empty(batch, length).copy_(torch.arange(length))
        to.scatter_(1, even.gather(1, merged), odd.gather(1, partner.gather(1, merged)))
        owner = to.gather(1, owner)


def none(tokens: Tensor, keep: float, **_) -> tuple[Tensor, Apply]:
    """All tokens, whatever `keep` says."""
    everything = torch.arange(tokens.shape[1], device=tokens.device)
    return everything.expand(len(tokens), -1), lambda x: x


COMPRESSORS: dict[str, Kind] = {
    "none": Kind(none),
    "avgpool2d": Kind(avgpool2d, averages=True),
    "avgpool1d": Kind(avgpool1d, averages=True),
    "pixel_shuffle": Kind(pixel_shuffle),
    "random": Kind(random),
    "cls_topk": Kind(cls_topk, needs_scores=True),
    "cls_merge": Kind(cls_merge, needs_scores=True, averages=True),
    "diverse": Kind(diverse),
    "bipartite": Kind(bipartite, averages=True),
}


def compress(
    kind: str,
    tokens: Tensor,
    keep: float,
    grid: tuple[int, int],
    *,
    scores: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Apply]:
    """Compress `tokens` [B, N, D] of a grid (h, w), N = h * w, to about `keep` of them.

    `scores` [B, N] where the kind needs them. Returns (out [B, k, D], positions [B, k], apply):
    positions are the original indices (long, ascending) that the outputs stand at; `apply` does to
    other features of the same tokens, [B, N, C], what was done to these. 1 <= k <= N; keep = 1
    returns `tokens` itself. Raises ValueError for an unknown kind, a keep outside (0, 1], a grid
    that is not N tokens, or scores that are missing or of another shape.
    """
    expect(kind in COMPRESSORS, "kind", kind, f"one of {', '.join(COMPRESSORS)}")
    expect(0 < keep <= 1, "keep", keep, "a number in (0, 1]")
    expect(
        tokens.ndim == 3 and grid[0] * grid[1] == tokens.shape[1],
        "grid",
        tuple(grid),
        f"height * width = tokens of [batch, tokens, dim] = {list(tokens.shape)}",
    )
    function = none if keep == 1 else COMPRESSORS[kind].function
    if keep < 1 and COMPRESSORS[kind].needs_scores:
        given = None if scores is None else list(scores.shape)
        expected = f"[batch, tokens] = {list(tokens.shape[:2])} for kind {kind!r}"
        expect(given == list(tokens.shape[:2]), "scores.shape", given, expected)
    positions, apply = function(tokens, keep, grid=grid, scores=scores, generator=generator)
    return apply(tokens), positions, apply


def keep_at(fraction: float, keep: float, schedule: str, anneal: float = 0.0) -> float:
    """The keep ratio in (0, 1] at a fraction of the stage: from `keep` to 1 by the schedule, or
    `keep` throughout (constant); 1 in the last `anneal` share."""
    expect(0 < keep <= 1, "keep", keep, "a number in (0, 1]")
    strength = ramp(fraction, schedule, constant=0.0)
    return 1.0 if annealing(fraction, anneal) else min(1.0, keep + (1 - keep) * strength)
