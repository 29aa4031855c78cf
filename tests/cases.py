"""What tests of many architectures are run over, and samples for them."""

import pytest
from tiny import CASES

# One of each mechanism; the others are like one of these, and daily in test_breadth.py
EVERYDAY = ("llava", "llava_next", "pixtral", "qwen3_vl", "smolvlm", "paligemma", "gemma3")
EVERY = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow)
        for name in sorted(CASES)
    ],
)
MIXED = "several images, none, and of two sizes"
ROWS = {
    MIXED: [[3, "big", 5, "small", 6, 7, 8], [9, 10, 11, 12], ["small", 14, 15, 16]],
    "one image": [["big", 5, 6, 7, 8], ["big", 9, 10, 11]],
    "no image": [[3, 4, 5], [6, 7, 8, 9]],
}
SIDE_BY_SIDE = [[3, "big", "small", 6, 7, 8], [9, 10, 11, 12], ["small", 14, 15, 16]]
FOUR = [*ROWS[MIXED], ["big", 17, 18, 19]]
ALIKE = [["big", 5, 6, 7, 8], ["big", 9, 10, 11], [12, "big", 13, 14], ["big", 15, 16, 17, 18]]
CLASS_TOKEN = ("internvl", "llava", "llava_next", "vipllava")


def turns(*values: str) -> list[dict]:
    """A LLaVA conversation: a human's turn and an answer by turns."""
    return [
        {"from": "gpt" if index % 2 else "human", "value": value}
        for index, value in enumerate(values)
    ]
