"""Kinds whose outputs are means of tokens that are alike. None is the paper's: alternatives."""

import math

import torch
from torch import Tensor

from sts.vtc import Outputs
from sts.vtc._shared import count_of, directions, merge, products, select

CONTEXTUAL = 10 / 64  # of the outputs of cls_merge: VisionZip's 54 dominant + 10 contextual tokens


def cls_merge(tokens: Tensor, keep: float, *, scores: Tensor) -> Outputs:
    """The tokens that the class token attends to most, and the rest merged into a few.

    VisionZip (arXiv 2412.04467): of k outputs, CONTEXTUAL are targets evenly spaced among the rest;
    every other token is averaged into the target most similar to it. There similarity is the cosine
    of the vision encoder's keys, here of the projected tokens.
    """
    batch, length = tokens.shape[:2]
    count = count_of(tokens, keep)
    contextual = min(count - 1, max(1, round(CONTEXTUAL * count)))
    owner = torch.arange(length, device=tokens.device).expand(batch, -1)
    dominant = scores.topk(count - contextual, dim=1).indices
    if not contextual:
        return select(dominant)
    left = torch.ones_like(owner, dtype=torch.bool).scatter(1, dominant, False)
    rest = left.nonzero()[:, 1].view(batch, -1)
    spaced = torch.arange(contextual, device=tokens.device) * rest.shape[1] // contextual
    targets = rest[:, spaced]
    unit = directions(tokens)
    similar = products(
        unit.take_along_dim(rest[..., None], 1), unit.take_along_dim(targets[..., None], 1)
    )
    similar[:, spaced, torch.arange(contextual)] = math.inf  # a target goes to itself
    return merge(owner.scatter(1, rest, targets.gather(1, similar.argmax(2))))


def bipartite(tokens: Tensor, keep: float) -> Outputs:
    """Token merging, ToMe (arXiv 2210.09461): the remaining tokens are split into every other one;
    the most similar pairs across the split are averaged, weighted by how many tokens each holds.

    At most half are merged at a time, so it is repeated until k are left. There similarity is the
    cosine of attention keys, here of the (merged) projected tokens.
    """
    count = count_of(tokens, keep)
    batch, length = tokens.shape[:2]
    detached = tokens.detach()
    owner = torch.arange(length, device=tokens.device).repeat(batch, 1)
    while True:
        outputs = merge(owner)
        positions = outputs.positions
        excess = positions.shape[1] - count
        if not excess:
            return outputs
        unit = directions(outputs.apply(detached))
        even, odd = positions[:, ::2], positions[:, 1::2]
        best, partner = products(unit[:, ::2], unit[:, 1::2]).max(2)
        merged = best.topk(min(excess, odd.shape[1]), dim=1).indices
        to = owner.new_empty(batch, length).copy_(torch.arange(length))
        to.scatter_(1, even.gather(1, merged), odd.gather(1, partner.gather(1, merged)))
        owner = to.gather(1, owner)
