"""Ours: skip most the layers that lately changed their input least, by block influence.

Block influence is 1 - cos(input, output), mean over tokens (ShortGPT, arXiv 2403.03853).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sts.lds import Depth, Policy

if TYPE_CHECKING:
    from torch import Tensor

    from sts.settings import LDS

MEASURED_TOKENS = 64  # of each row, evenly spaced: enough for a layer's mean influence


def by_rank(layers: int, lds: "LDS", measured: Sequence[float]) -> list[float]:
    """explore + (1 - explore) x 2 rank / (L + 1), mean 1; rank L = the least influence.

    Ties share their mean rank: with nothing measured it is uniform. The `explore` share of uniform
    skipping keeps every estimate fresh; what was never measured counts as most influential.
    """
    values = list(measured)
    ranks = [sum(v < o for o in values) + (values.count(v) + 1) / 2 for v in values]
    scale = 2 * (1 - lds.explore) / (layers + 1)
    return [lds.explore + scale * rank for rank in ranks]


def block_influence(before: "Tensor", after: "Tensor", mask: "Tensor | None") -> "Tensor":
    """(sum, count) of 1 - cos(before, after) [B, T, D] over real tokens (mask [B, T]), [2]."""
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
