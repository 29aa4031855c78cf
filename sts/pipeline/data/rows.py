"""What a row of a data set is.

training split    {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}
                  or {"id", "images": [...], "conversations"} in all rows of the split
test_<benchmark>  {"id", "image", "question", "answer", "form"}

An image is a path, a PIL image or a uint8 array [height, width, 3]; `image` may be None and
`images` empty. `IMAGE_TOKEN` stands in a human's turn for each image, in their order; a question
has none. `form` groups questions that have the same possible answers.
"""

from collections.abc import Iterable
from typing import Any

IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}

Rows = tuple[int, Iterable[dict]]  # how many (for the progress bar), and they themselves


def conversation(id: str, image: Any, pairs: Iterable[tuple[str, str]]) -> dict:
    """A training row of questions about one image and their answers."""
    turns = turns_of(pairs)
    turns[0]["value"] = f"{IMAGE_TOKEN}\n{turns[0]['value']}"
    return {"id": id, "image": image, "conversations": turns}


def turns_of(pairs: Iterable[tuple[str, str]]) -> list[dict]:
    """The turns of questions and their answers."""
    return [
        {"from": role, "value": value}
        for pair in pairs
        for role, value in zip(ROLES, pair, strict=True)
    ]


def images_of(row: dict) -> list:
    """The images of a row in their order, whichever of the two keys holds them."""
    image = row.get("image")
    return [image] if image is not None else row.get("images") or []


def columns_of(images: list, several: bool) -> dict:
    """The reverse of `images_of`: the images of a row under the key that its split has."""
    return {"images": images} if several else {"image": next(iter(images), None)}
