"""Kinds whose outputs are means of similar tokens. None of them is the paper's."""

import math

import torch
from torch import Tensor

from sts.vtc import Outputs
from sts.vtc._shared import count_of, directions, first_true, merge, products, rows_at, select

# Share of merged tokens in the outputs of cls_merge: VisionZip's 54 dominant + 10 contextual tokens
CONTEXTUAL = 10 / 64


def cls_merge(tokens: Tensor, keep: float, *, scores: Tensor) -> Outputs:
    """Keep the tokens that the class token attends to most and merge the others into a few.

    VisionZip (arXiv 2412.04467): the share CONTEXTUAL of the outputs are targets, evenly spaced
    among the tokens that are not dominant; each other token is averaged into the target most
    similar to it. VisionZip compares the vision encoder's keys by cosine, this the projected
    tokens.
    """
    batch, length = tokens.shape[:2]
    count = count_of(tokens, keep)
    contextual = min(count - 1, max(1, round(CONTEXTUAL * count)))
    owner = torch.arange(length, device=tokens.device).expand(batch, -1)
    dominant = scores.topk(count - contextual, dim=1).indices
    if not contextual:
        return select(dominant)
    is_rest = torch.ones_like(owner, dtype=torch.bool).scatter(1, dominant, False)
    rest = first_true(is_rest, length - count + contextual)
    every = torch.arange(contextual, device=tokens.device)
    spaced = every * rest.shape[1] // contextual
    targets, of_rest = rest[:, spaced], directions(rows_at(tokens.detach(), rest))
    similarity = products(of_rest, of_rest[:, spaced])
    similarity[:, spaced, every] = math.inf  # a target goes to itself
    return merge(owner.scatter(1, rest, targets.gather(1, similarity.argmax(2))), count)


def bipartite(tokens: Tensor, keep: float) -> Outputs:
    """Average the most similar pairs of tokens, round by round: token merging, ToMe (2210.09461).

    In each round the tokens are split into those at even and at odd places; the most similar pairs
    across the split are averaged, weighted by how many tokens each already holds. A round merges at
    most half, so rounds follow until `keep` is reached. ToMe compares attention keys by cosine,
    this the projected tokens as merged so far.
    """
    count = count_of(tokens, keep)
    batch, length = tokens.shape[:2]
    everything = torch.arange(length, device=tokens.device).expand(batch, -1)
    owner, left, detached = everything, length, tokens.detach()
    while True:
        outputs = merge(owner, left)
        if left == count:
            return outputs
        means = outputs.apply(detached) if left < length else detached
        unit, positions = directions(means), outputs.positions
        even, odd = positions[:, ::2], positions[:, 1::2]
        best, partner = products(unit[:, ::2], unit[:, 1::2]).max(2)
        merged = best.topk(min(left - count, odd.shape[1]), dim=1).indices
        target = odd.gather(1, partner.gather(1, merged))
        owner = everything.scatter(1, even.gather(1, merged), target).gather(1, owner)
        left -= merged.shape[1]
