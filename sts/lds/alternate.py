"""Spacing: every second layer may be skipped, the first never, so no two neighbours are.

Public recipes of 2026 on layer dropout skip alternating blocks only ("Don't Drop Dropout",
arXiv 2609.05275, is their kin; the excerpts at hand give no formula).
"""

from collections.abc import Sequence

from sts.lds import Depth
from sts.lds.parts import LDS


def every_second(layers: int, lds: LDS, measured: Sequence[float]) -> list[float]:
    """L / floor(L / 2) for odd l, of mean 1, else 0."""
    return [index % 2 * layers / (layers // 2) for index in range(layers)] if layers > 1 else [1.0]


DEPTH = Depth(every_second, "(l % 2) {layers} / floor({layers} / 2)")
