"""Kinds that select the tokens which the sample's text is about.

The paper (arXiv 2509.18150) names a "Text-guide" compressor and doesn't give its rule. The rule of
`text_guided` is our reading of the name; `text_guided_max` is an alternative to it. Both compare
the projected visual tokens with the text's input embeddings: the language model reads both as
vectors of one space. A sample without text keeps evenly spaced tokens.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sts.vtc import Outputs
from sts.vtc._shared import cell_centres, count_of, directions, products, select


def text_guided(tokens: Tensor, keep: float, *, text: Tensor, text_mask: Tensor) -> Outputs:
    """The tokens with the highest cosine to the mean direction of the sample's text.

    Our reading of the paper's "Text-guide". The mean is over the text embeddings as unit vectors,
    so that a token of large norm weighs no more than the others.
    """
    total = (directions(text) * text_mask[..., None]).sum(1)  # a scale doesn't change the order
    return _most_relevant(products(directions(tokens), total[:, None])[..., 0], keep, text_mask)


def text_guided_max(tokens: Tensor, keep: float, *, text: Tensor, text_mask: Tensor) -> Outputs:
    """The tokens with the highest cosine to any text token of the sample."""
    cosines = products(directions(tokens), directions(text))
    cosines = cosines.masked_fill(~text_mask[:, None], -math.inf)
    cosines = F.pad(cosines, (0, 1), value=-math.inf)  # a batch without text has a maximum too
    return _most_relevant(cosines.amax(2), keep, text_mask)


def _most_relevant(relevance: Tensor, keep: float, text_mask: Tensor) -> Outputs:
    """The tokens of the highest relevance [B, N]; evenly spaced tokens in rows without text."""
    count = count_of(relevance, keep)
    spaced = torch.zeros_like(relevance[0])
    spaced[cell_centres(len(spaced), count)] = 1
    relevance = torch.where(text_mask.any(1, keepdim=True), relevance, spaced)
    return select(relevance.topk(count, dim=1).indices)
