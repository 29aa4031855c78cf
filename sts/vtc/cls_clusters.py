"""The merging of DUET-VLM (arXiv 2602.18846) before the language model, its first stage.

Its second stage drops visual tokens between decoder layers, which no kind can do.
"""

import torch
from torch import Tensor

from sts.vtc import Outputs
from sts.vtc._shared import count_of, directions, products, rows_at

CONTEXTUAL = 32 / 202  # share of merged tokens: its 170 dominant + 32 contextual ones
WIDTH = 4  # tokens of a cluster, its centre among them


def cls_clusters(tokens: Tensor, keep: float, *, scores: Tensor) -> Outputs:
    """Keep the tokens that the class token attends to most; the next ones are centres, each
    averaged with those of the rest most like it. What is near no centre is left out.

    DUET-VLM compares the vision encoder's features, this the projected tokens by cosine.
    """
    count = count_of(tokens, keep)
    contextual = min(count - 1, max(1, round(CONTEXTUAL * count)))
    order = scores.argsort(dim=1, descending=True, stable=True)
    dominant, centres, rest = order.tensor_split((count - contextual, count), dim=1)
    unit = directions(tokens)
    near = products(rows_at(unit, centres), rows_at(unit, rest))
    width = min(WIDTH - 1, rest.shape[1])
    near = near.topk(width, dim=2).indices.flatten(1)
    members = torch.cat([centres[..., None], rest.gather(1, near).view(*centres.shape, width)], 2)
    positions, places = torch.cat([dominant, centres], 1).sort(dim=1)

    def apply(x: Tensor) -> Tensor:
        means = rows_at(x, members.flatten(1)).view(*members.shape, x.shape[-1]).mean(2)
        return rows_at(torch.cat([rows_at(x, dominant), means], 1), places)

    return Outputs(positions, apply)
