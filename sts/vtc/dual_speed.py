"""The fast and slow mini-batches of DualSpeed (arXiv 2602.03815), without its self-distillation and
its learnt mode tokens, which need another objective and other inputs than a kind has.
"""

import torch
from torch import Tensor

from sts.vtc import Outputs, none
from sts.vtc.sampling import diverse

SLOW = 0.1  # share of the batches with all tokens


def dual_speed(tokens: Tensor, keep: float, *, generator: torch.Generator) -> Outputs:
    """All tokens in a tenth of the micro-batches; in the others those least like each other, as
    DivPrune. Drawn for the images of one grid together."""
    point = torch.rand((), generator=generator, device=generator.device)
    return none(tokens, keep) if point < SLOW else diverse(tokens, keep)
