"""What a row of a data set is.

training split    {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}
                  or {"id", "images": [...], "conversations"} in all rows of the split
test_<benchmark>  {"id", "image", "question", "answer", "form"}

An image is a path, bytes of a file, a PIL image, a uint8 array [height, width, 3], or a BadRow
that says why there is none; `image` may be None and `images` empty. `IMAGE_TOKEN` stands in a
human's turn for each image, in their order; a question has none. `form` groups questions that have
the same possible answers.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}

Rows = tuple[int, Iterable[dict]]  # how many (for the progress bar), and they themselves


class BadRow(ValueError):
    """A row that is left out: (reason to count it under, what exactly)."""


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


def turns(row: dict, images: int) -> Any:
    """LLaVA's turns {from, value} of a row's `conversations`, of its `texts`, pairs of {user,
    assistant}, or of its `question` and `answer`. Where no text says where the images stand, they
    come first."""
    texts = row.get("conversations", row.get("texts"))
    if "question" in row and texts is None:
        texts = [{"user": row["question"], "assistant": row.get("answer")}]
    if not isinstance(texts, list) or not all(isinstance(text, dict) for text in texts):
        return texts  # `prepare` judges it
    if texts and "user" in texts[0]:
        texts = turns_of((pair.get("user"), pair.get("assistant")) for pair in texts)
    else:
        texts = [{"from": turn.get("from"), "value": turn.get("value")} for turn in texts]
    values = [turn["value"] for turn in texts]
    is_text = bool(texts) and all(isinstance(value, str) for value in values)
    if is_text and not any(IMAGE_TOKEN in value for value in values):
        texts[0]["value"] = f"{IMAGE_TOKEN}\n" * images + values[0]
    return texts


def as_llava(conversation: Any, images: int) -> Any:
    """A conversation as LLaVA trains on it: without an answer that comes before any question; where
    the row has one image, with one <image> in a turn that has more of them."""
    if not isinstance(conversation, list) or not all(map(_is_text, conversation)):
        return conversation  # `prepare` judges it
    begin = conversation[:1] and conversation[0].get("from") == "gpt"
    turns = [dict(turn) for turn in conversation[bool(begin) :]]
    for turn in turns if images == 1 else ():
        if turn["value"].count(IMAGE_TOKEN) > 1:
            turn["value"] = f"{IMAGE_TOKEN}\n{turn['value'].replace(IMAGE_TOKEN, '').strip()}"
    return turns


def _is_text(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("value"), str)


def picture_path(
    name: Any, folder: Path, outside: bool = False, links: bool = False
) -> Path | BadRow:
    """The path of an image below a folder; a bad row if it leads out of it, unless `outside`; by a
    link it may with `links`."""
    path, place = folder / str(name), os.path.normpath if links else os.path.realpath
    try:
        if outside or Path(place(path)).is_relative_to(place(folder)):
            return path
    except (OSError, ValueError):  # a name that none can have: `prepare` says so
        return path
    allowed = "" if links else "; `outside: true` beside its entry's `images` or `hub` allows it"
    return BadRow("image outside", f"{name} leads out of {folder}{allowed}")


def images_of(row: dict) -> list:
    """The images of a row in their order, whichever of the two keys holds them."""
    image = row.get("image")
    return [image] if image is not None else row.get("images") or []


def columns_of(images: list, several: bool) -> dict:
    """The reverse of `images_of`: the images of a row under the key that its split has."""
    return {"images": images} if several else {"image": next(iter(images), None)}
