"""What a row of a data set is.

training split    {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}
test_<benchmark>  {"id", "image", "question", "answer", "form"}

An image is a path, a PIL image, a uint8 array [height, width, 3], or None. The first turn of a
conversation with an image has `IMAGE_TOKEN`, a question has none. `form` groups questions that have
the same possible answers.
"""

from collections.abc import Iterable
from typing import Any

IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}

Rows = tuple[int, Iterable[dict]]  # how many (for the progress bar), and they themselves


def conversation(id: str, image: Any, pairs: Iterable[tuple[str, str]]) -> dict:
    """A training row of questions about one image and their answers."""
    turns = []
    for question, answer in pairs:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = f"{IMAGE_TOKEN}\n{turns[0]['value']}"
    return {"id": id, "image": image, "conversations": turns}
