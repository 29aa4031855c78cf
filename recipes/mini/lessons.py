"""What the toy decoder learns from: scenes in words, drills, and the vocabulary of both."""

from collections.abc import Iterator

import numpy as np

from sts.mini.pictures import (
    ATTRIBUTES,
    COLOURS,
    GRID,
    KINDS,
    LETTERS,
    NUMBERS,
    ORDINALS,
    SHAPES,
    SIZES,
    WORDS,
    draw,
    generator,
    is_trained,
    truth_of,
)
from sts.mini.scenes import (
    CAPTION_REQUEST,
    PLURALS,
    QUESTIONS,
    RELATIONS,
    VERSION,
    caption_of,
    place_of,
    rows,
)


def written(truth: np.ndarray) -> list[list[str]]:
    """The picture in words: for each of the 144 patches what is there, its row and its column.

    A language model that reads these words slot by slot knows all that a perfect vision tower sees.
    """
    slots = []
    for patch, row in enumerate(truth):
        words = [values[v - 1] for v, values in zip(row, ATTRIBUTES.values(), strict=True) if v]
        slots.append([*words, f"r{patch // GRID + 1}", f"c{patch % GRID + 1}"])
    return slots


def drill(split: str, count: int, seed: int, turns: int = 6) -> Iterator[dict]:
    """Rows for a language model that learns to find things and to compare places.

    As `rows`, but objects only and mostly relations and places ("where is the red ring?", answered
    as captions say it). No other split asks for a place in this way. In every scene things share
    a colour, and things a shape: else a model may find them by colour alone, and not go on.
    """
    skills = ["relation"] * 8 + ["counting"] * 6 + ["existence"]
    for index in range(count):
        rng = generator(VERSION, seed, split, index)
        while True:
            scene = draw("objects", rng)
            if all(
                len({o[k] for o in scene["objects"]}) < len(scene["objects"])
                for k in ("shape", "colour")
            ):
                break
        qa: dict[str, tuple[str, str]] = {}
        for skill in skills:
            [make] = QUESTIONS[skill][1]
            if pair := make(scene, rng, is_trained):
                qa[pair[0]] = pair[:2]
        names = [f"{o['colour']} {o['shape']}" for o in scene["objects"]]
        for name, o in zip(names, scene["objects"], strict=True):
            if names.count(name) == 1:
                qa[f"where is the {name}?"] = (f"where is the {name}?", place_of(o))
        pairs = [list(qa.values())[i] for i in rng.permutation(len(qa))[:turns]]
        yield {
            "caption": caption_of(scene),
            "qa": [{"question": question, "answer": answer} for question, answer in pairs],
            "truth": truth_of(scene),
        }


def vocabulary() -> list[str]:
    """Every word a caption, a question, an answer or a written scene can hold."""
    texts = [CAPTION_REQUEST, "how many objects are there?", "what word is written?"]
    for row in rows("vocabulary", 400, 0):
        texts += [
            row["caption"],
            *(part for qa in row["qa"] for part in (qa["question"], qa["answer"])),
        ]
    fixed = [*SHAPES, *PLURALS, *COLOURS, *SIZES, *NUMBERS, *ORDINALS, *RELATIONS, *WORDS, *LETTERS]
    places = [f"{axis}{i}" for axis in "rc" for i in range(1, GRID + 1)]
    spoken = [word.strip(".,?") for text in texts for word in text.split()]
    return sorted({*fixed, *places, *KINDS, "center", "yes", "no", *spoken})
