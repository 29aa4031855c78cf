"""`scenes`, the embedded data set: seeded pictures with captions, questions and ground truth.

A row is drawn from (seed, split, index), so any row can be made alone and is the same everywhere.
`composition` asks about shape-colour pairs that no training row shows or names (`HELD_OUT`).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count as counter
from itertools import cycle

import numpy as np

from sts.mini.pictures import (
    COLOUR_NAMES,
    HELD_OUT,
    NUMBERS,
    ORDINALS,
    PATCH,
    SHAPES,
    WORDS,
    Scene,
    draw,
    generator,
    is_held_out,
    is_trained,
    pick,
    pixels_of,
    truth_of,
)

VERSION = "4"
PLURALS = ["circles", "squares", "triangles", "crosses", "diamonds", "rings"]
RELATIONS = ["left", "right", "above", "below"]
CAPTION_REQUEST = "describe the image."

# Of 20 questions "how many ...s", by the answer, those that are kept: few scenes have many of a
# kind, and a model learns to say the commonest number. Five of a kind would be all objects.
COUNTED = {1: 4, 2: 3, 3: 9, 4: 20, 5: 0}

Question = tuple[str, str, str]  # question, answer, form


def place_of(thing: dict) -> str:
    """The patch that a thing's centre lies in, in words."""
    return f"r{thing['cy'] // PATCH + 1} c{thing['cx'] // PATCH + 1}"


def caption_of(scene: Scene) -> str:
    """What a scene shows and where, in a sentence."""
    things = scene["objects"]
    if scene["kind"] == "text":
        colour, letters, word = things[0]["colour"], " ".join(scene["word"]), scene["word"]
        return f"the {colour} word {letters} at {place_of(things[0])} is {word}."
    if scene["kind"] == "chart":
        return "a chart with " + ", ".join(f"{o['colour']} {o['height']}" for o in things) + "."
    ordered = sorted(things, key=lambda o: (o["cy"] // PATCH, o["cx"] // PATCH))
    names = [f"a {o['size']} {o['colour']} {o['shape']} at {place_of(o)}" for o in ordered]
    return ", ".join(names) + "."


def _existence(scene: Scene, rng: np.random.Generator, may_name: Callable) -> Question | None:
    present = {(o["shape"], o["colour"]) for o in scene["objects"]}
    shapes, colours = {s for s, _ in present}, {c for _, c in present}
    if rng.integers(3) == 0:
        yes = bool(rng.integers(2))
        pool = sorted(shapes) if yes else sorted(set(SHAPES) - shapes)
        return (f"is there a {pick(rng, pool)}?", "yes" if yes else "no", "shape") if pool else None
    if rng.integers(2):
        pool, answer = [pair for pair in sorted(present) if may_name(*pair)], "yes"
    else:  # three of four negatives are hard: the shape is there, or the colour, but not together
        pairs = [
            (s, c) for s in SHAPES for c in COLOUR_NAMES if (s, c) not in present and may_name(s, c)
        ]
        hard = [(s, c) for s, c in pairs if s in shapes or c in colours]
        pool, answer = (hard if hard and rng.integers(4) else pairs), "no"
    if not pool:
        return None
    shape, colour = pick(rng, pool)
    return f"is there a {colour} {shape}?", answer, "pair"


def _attribute(ask: str, give: str, text: str) -> Callable:
    """A question for `give` of the things whose `ask` names them, where the answer is one."""

    def question(scene: Scene, rng: np.random.Generator, may_name: Callable) -> Question | None:
        answers: dict[str, set] = {}
        for o in scene["objects"]:
            answers.setdefault(o[ask], set()).add((o[give], may_name(o["shape"], o["colour"])))
        single = [
            (key, *values.pop()) for key, values in sorted(answers.items()) if len(values) == 1
        ]
        pool = [(key, answer) for key, answer, is_named in single if is_named]
        if not pool:
            return None
        key, answer = pick(rng, pool)
        return text.format(key), answer, give

    return question


def _counting(scene: Scene, rng: np.random.Generator, may_name: Callable) -> Question | None:
    things = scene["objects"]
    form = pick(rng, ["shape", "shape", "colour", "colour", "all"])
    if form == "all":
        return "how many objects are there?", NUMBERS[len(things)], form
    values = [o[form] for o in things]
    pool = [v for v in sorted(set(values)) for _ in range(values.count(v) ** 4)]
    value = pick(rng, pool)
    number = values.count(value)
    if rng.integers(20) >= COUNTED[number]:
        return None
    name = PLURALS[SHAPES.index(value)] if form == "shape" else f"{value} objects"
    return f"how many {name} are there?", NUMBERS[number], form


def _relation(scene: Scene, rng: np.random.Generator, may_name: Callable) -> Question | None:
    pairs = [(o["shape"], o["colour"]) for o in scene["objects"]]
    unique = [o for o in scene["objects"] if pairs.count((o["shape"], o["colour"])) == 1]
    pool = []
    for a in unique:
        for b in unique:
            dx, dy = a["cx"] - b["cx"], a["cy"] - b["cy"]
            if max(abs(dx), abs(dy)) >= 12 and 2 * min(abs(dx), abs(dy)) <= max(abs(dx), abs(dy)):
                side = (dx > 0) if abs(dx) > abs(dy) else 2 + (dy > 0)
                pool.append((a, b, RELATIONS[int(side)]))
    if not pool:
        return None
    a, b, answer = pick(rng, pool)
    text = f"where is the {a['colour']} {a['shape']} relative to the {b['colour']} {b['shape']}?"
    return text, answer, "side"


def _text(scene: Scene, rng: np.random.Generator, may_name: Callable) -> Question:
    if rng.integers(2):
        return "what word is written?", scene["word"], "word"
    index = int(rng.integers(3))
    return f"what is the {ORDINALS[index]} letter?", scene["word"][index], "letter"


def _chart(scene: Scene, rng: np.random.Generator, may_name: Callable) -> Question:
    bars = sorted(scene["objects"], key=lambda o: NUMBERS.index(o["height"]))
    form = pick(rng, ["highest", "lowest", "height", "height"])
    if form == "height":
        bar = pick(rng, bars)
        return f"how high is the {bar['colour']} bar?", bar["height"], form
    return f"which bar is the {form}?", bars[-1 if form == "highest" else 0]["colour"], form


_colour = _attribute("shape", "colour", "what color is the {}?")
_shape = _attribute("colour", "shape", "what shape is the {} object?")
YES_NO = ["yes", "no"]
HELD_SHAPES, HELD_COLOURS = (sorted(set(values)) for values in zip(*HELD_OUT, strict=True))
# skill -> kind of its scenes, what makes its questions, the answers of each question form
QUESTIONS: dict[str, tuple[str, list[Callable], dict[str, list[str]]]] = {
    "existence": ("objects", [_existence], {"pair": YES_NO, "shape": YES_NO}),
    "colour": ("objects", [_colour], {"colour": COLOUR_NAMES}),
    "shape": ("objects", [_shape], {"shape": SHAPES}),
    "counting": (
        "objects",
        [_counting],
        {"shape": NUMBERS[1:5], "colour": NUMBERS[1:5], "all": NUMBERS[2:6]},
    ),
    "relation": ("objects", [_relation], {"side": RELATIONS}),
    "text": ("text", [_text], {"word": sorted(WORDS), "letter": sorted(set("".join(WORDS)))}),
    "chart": (
        "chart",
        [_chart],
        {"highest": COLOUR_NAMES, "lowest": COLOUR_NAMES, "height": NUMBERS[1:]},
    ),
    "composition": (
        "objects",
        [_existence, _colour, _shape],
        {"pair": YES_NO, "colour": HELD_COLOURS, "shape": HELD_SHAPES},
    ),
}
SKILLS = list(QUESTIONS)
# of the attempts at a question about objects; most of those at counting fail (see COUNTED)
OBJECT_SKILLS = ["existence", "colour", "shape", *["relation"] * 2, *["counting"] * 5]


def rows(split: str, count: int, seed: int, turns: int = 5) -> Iterator[dict]:
    """Training rows.

    Yields `count` of {"id", "image": uint8 [72, 72, 3], "caption": str, "qa": [{"question",
    "answer", "skill", "form"}], "truth": uint8 [144, 7] (see `truth_of`)}; about 2/3 objects, 1/6
    text, 1/6 charts, with at most `turns` different questions each.
    """
    for index in range(count):
        rng = generator(VERSION, seed, split, index)
        scene = draw(pick(rng, ["objects"] * 4 + ["text", "chart"]), rng)
        skills = [scene["kind"]] * turns
        if scene["kind"] == "objects":
            order = [OBJECT_SKILLS[i] for i in rng.permutation(len(OBJECT_SKILLS))]
            skills = [*order, *order]
        qa: dict[str, dict] = {}
        for skill in skills:
            if len(qa) == turns:
                break
            if turn := pick(rng, QUESTIONS[skill][1])(scene, rng, is_trained):
                question, answer, form = turn
                entry = {"question": question, "answer": answer, "skill": skill, "form": form}
                qa.setdefault(question, entry)
        yield {
            "id": f"{split}-{index:06d}",
            "image": pixels_of(scene),
            "caption": caption_of(scene),
            "qa": list(qa.values()),
            "truth": truth_of(scene),
        }


def benchmark(skill: str, count: int, seed: int, split: str = "test") -> Iterator[dict]:
    """Rows of one skill: {"id", "image": uint8 [72, 72, 3], "question", "answer", "form"}.

    One question a scene; forms take turns and, within a form, each answer comes equally often (up
    to rounding).
    """
    kind, makers, answers = QUESTIONS[skill]
    is_composition = skill == "composition"
    may_name = is_held_out if is_composition else is_trained
    forms = zip(range(count), cycle(answers.items()), strict=False)
    quota = Counter(  # how many are still to come
        (form, words[index // len(answers) % len(words)]) for index, (form, words) in forms
    )
    for attempt in counter():
        if not quota.total():
            return
        rng = generator(VERSION, seed, f"{split}-{skill}", attempt)
        scene = draw(kind, rng, is_composition)
        turn = pick(rng, makers)(scene, rng, may_name)
        if not turn or not quota[turn[2], turn[1]]:
            continue
        question, answer, form = turn
        quota[form, answer] -= 1
        row = {"id": f"{skill}-{attempt:06d}", "image": pixels_of(scene)}
        yield row | {"question": question, "answer": answer, "form": form}
