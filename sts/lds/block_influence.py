"""Ours: skip those layers most that change their input least, by block influence.

Block influence is 1 - cos(input, output), mean over tokens (ShortGPT, arXiv 2403.03853).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sts.lds import Depth, Policy
from sts.lds.parts import LDS

if TYPE_CHECKING:
    from torch import Tensor

MEASURED_TOKENS = 64  # of each row, evenly spaced: enough for the mean of a layer


def by_rank(layers: int, lds: LDS, measured: Sequence[float]) -> list[float]:
    """explore + (1 - explore) x 2 rank / (L + 1), of mean 1; rank L is the least influence.

    Equal values share their mean rank, so before any measurement D(l) is uniform. The share
    `explore` of uniform skipping keeps every estimate fresh. A layer that was never measured counts
    as the most influential.
    """
    values = list(measured)
    ranks = [sum(x < y for y in values) + (values.count(x) + 1) / 2 for x in values]
    scale = 2 * (1 - lds.explore) / (layers + 1)
    return [lds.explore + scale * rank for rank in ranks]


def block_influence(before: "Tensor", after: "Tensor", mask: "Tensor | None") -> "Tensor":
    """(sum, count) of 1 - cos(before, after) over the tokens, [2].

    Args:
        before: Hidden states before the layer, [B, T, D].
        after: Those after it, [B, T, D].
        mask: Which tokens are no padding, [B, T]; None: all.
    """
    import torch  # here: the workflow reads this file without torch
    from torch.nn.functional import cosine_similarity

    with torch.no_grad():
        stride = -(-before.shape[1] // MEASURED_TOKENS)
        before, after = before[:, ::stride].float(), after[:, ::stride].float()
        influence = 1 - cosine_similarity(before, after, dim=-1)
        real = torch.ones_like(influence) if mask is None else mask[:, ::stride].to(influence)
        return torch.stack([(influence * real).sum(), real.sum()])


DEPTH = Depth(by_rank, "(rank of the layer's block influence)", of_forward=block_influence)
POLICY = Policy(depth="block_influence", draw="fixed_count", protect_first=1, protect_last=1)
