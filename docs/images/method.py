"""Draws method.svg, the two stages at a glance: python docs/images/method.py

The skip pattern is not drawn by hand: it is what LDS decides with the values of row `sts`.
"""

from pathlib import Path

import numpy as np

from sts import STS_LDS, STS_VTC
from sts.lds.decision import decide

LAYERS, STEPS, SEED = 12, 40, 0
TOKENS = 12  # of the drawing
INK, QUIET, KEPT, LEFT_OUT = "#24292f", "#6e7781", "#0072b2", "#e8ebef"


def text(x: float, y: float, words: str, size: int = 13, **style: str) -> str:
    """A line of text whose left end, or `text_anchor`, is at (x, y)."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{INK}"{extra}>{words}</text>'


def box(x: float, y: float, width: float, height: float, words: str, fill: str = "#fff") -> str:
    """A box with words in its middle."""
    middle = text(x + width / 2, y + height / 2 + 5, words, text_anchor="middle")
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}"'
    return f'{shape} stroke="{QUIET}"/>{middle}'


def arrow(x: float, y: float, length: float) -> str:
    """An arrow to the right."""
    line = f'<path d="M{x} {y}h{length - 6}" stroke="{QUIET}" stroke-width="1.5"/>'
    return f'{line}<path d="M{x + length} {y}l-7 -4v8z" fill="{QUIET}"/>'


def squares(x: float, y: float, kept: list[bool], size: float, gap: float, columns: int) -> str:
    """Small squares in rows of so many columns; those that are not kept are pale."""
    cells = []
    for i, is_kept in enumerate(kept):
        left, top = x + i % columns * (size + gap), y + i // columns * (size + gap)
        fill = KEPT if is_kept else LEFT_OUT
        place = f'x="{left:g}" y="{top:g}" width="{size}" height="{size}"'
        cells.append(f'<rect {place} rx="1.5" fill="{fill}"/>')
    return "".join(cells)


def alignment() -> str:
    """Stage 1: half of the visual tokens reach the language model."""
    order = np.random.default_rng(SEED).permutation(TOKENS)
    kept = set(order[: round(STS_VTC.keep * TOKENS)].tolist())
    return "".join([
        text(24, 40, "1  Modality alignment", 16, font_weight="bold"),
        text(24, 62, "VTC: a random half of the visual tokens goes on"),
        box(24, 96, 96, 44, "vision tower"),
        arrow(124, 118, 24),
        box(152, 96, 80, 44, "projector", "#fff4d6"),
        arrow(236, 118, 24),
        squares(266, 97, [True] * TOKENS, 12, 4, 3),
        arrow(318, 118, 24),
        squares(350, 97, [i in kept for i in range(TOKENS)], 12, 4, 3),
        box(152, 190, 278, 44, "language model"),
        f'<path d="M370 166v13" stroke="{QUIET}" stroke-width="1.5"/>',
        f'<path d="M370 186l-4 -7h8z" fill="{QUIET}"/>',
        text(62, 217, "caption"), arrow(124, 212, 24),
        text(24, 272, "The projector is trained; the rest is frozen.", 12, fill_opacity="0.75"),
    ])  # fmt: skip


def instruction() -> str:
    """Stage 2: layers that a step skips, most at the beginning and in deep layers."""
    steps = [decide(STS_LDS, LAYERS, (s + 0.5) / STEPS, SEED, s).layers for s in range(STEPS)]
    runs = [layer not in steps[s] for layer in reversed(range(LAYERS)) for s in range(STEPS)]
    return "".join([
        text(482, 40, "2  Instruction tuning", 16, font_weight="bold"),
        text(482, 62, "LDS: every step skips some decoder layers, forward and backward"),
        squares(520, 84, runs, 8, 2, STEPS),
        text(512, 93, "12", 11, text_anchor="end"), text(512, 203, "1", 11, text_anchor="end"),
        text(498, 156, "decoder layer", 11, text_anchor="middle",
             transform="rotate(-90 498 148)"),
        text(520, 224, "first step", 11), text(918, 224, "last step", 11, text_anchor="end"),
        squares(520, 243, [True], 10, 0, 1), text(536, 252, "runs", 12),
        squares(580, 243, [False], 10, 0, 1),
        text(596, 252, "skipped: the identity, not trained", 12),
        text(482, 272, "Projector and language model are trained.", 12, fill_opacity="0.75"),
    ])  # fmt: skip


def method() -> str:
    """The whole drawing."""
    note = "Inference sees all tokens and layers; an ordinary Hugging Face checkpoint is saved."
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 944 320" '
        'font-family="system-ui, sans-serif" role="img" aria-label="The two stages of STS">'
        '<rect width="944" height="320" rx="10" fill="#fff"/>'
        + alignment()
        + f'<path d="M456 28v250" stroke="{LEFT_OUT}" stroke-width="2"/>'
        + instruction()
        + text(472, 306, note, text_anchor="middle")
        + "</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(method(), encoding="utf-8")
