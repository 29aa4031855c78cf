"""`scenes`: the embedded data set. Seeded 72x72 pictures with captions, questions and ground truth.

Everything is integer numpy on a counter-based generator (Philox) keyed by (seed, split, index), so
the same arguments give the same pixels and words on every machine, and any row can be made alone.

Three kinds of picture, each on a tinted, shaded, noisy background:
objects   1-5 shapes of 6 kinds, 8 colours, 2 sizes
text      a three-letter word in a 5x7 bitmap font, scaled by two
chart     four coloured bars of height 1-5 over an axis

Seven skills ask about them (`SKILLS`), plus `composition`: the same questions about shape-colour
pairs that no training row shows or names (`HELD_OUT`). Answers are balanced within each question
form, so a guess from the question alone is near chance.
"""

import hashlib
from collections.abc import Callable, Iterator
from itertools import count as counter
from typing import Any

import numpy as np

VERSION = "4"
SIZE, PATCH = 72, 6
GRID = SIZE // PATCH

SHAPES = ["circle", "square", "triangle", "cross", "diamond", "ring"]
PLURALS = ["circles", "squares", "triangles", "crosses", "diamonds", "rings"]
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 225, 40),
    "purple": (165, 50, 205),
    "orange": (250, 140, 25),
    "cyan": (40, 215, 225),
    "white": (245, 245, 245),
}
COLOUR_NAMES = list(COLOURS)
SIZES = ["small", "large"]
NUMBERS = ["zero", "one", "two", "three", "four", "five"]
ORDINALS = ["first", "second", "third"]
RELATIONS = ["left", "right", "above", "below"]
WORDS = [
    "cat", "dog", "sun", "map", "key", "box", "jam", "fox", "pen", "hat", "ice", "bug",
    "cup", "van", "zip", "owl", "wig", "rye", "gym", "sky", "nut", "log", "bed", "fin",
]  # fmt: skip
# two colours a shape, two shapes a colour: the one never tells the other
HELD_OUT = {
    ("circle", "cyan"), ("circle", "orange"), ("square", "purple"), ("square", "white"),
    ("triangle", "orange"), ("triangle", "red"), ("cross", "white"), ("cross", "green"),
    ("diamond", "red"), ("diamond", "cyan"), ("ring", "green"), ("ring", "purple"),
}  # fmt: skip
CAPTION_REQUEST = "describe the image."

# Columns of the standard 5x7 font, least significant bit on top.
FONT = {
    letter: [int(column, 16) for column in columns.split()]
    for letter, columns in {
        "a": "7e 11 11 11 7e", "b": "7f 49 49 49 36", "c": "3e 41 41 41 22", "d": "7f 41 41 22 1c",
        "e": "7f 49 49 49 41", "f": "7f 09 09 09 01", "g": "3e 41 49 49 7a", "h": "7f 08 08 08 7f",
        "i": "00 41 7f 41 00", "j": "20 40 41 3f 01", "k": "7f 08 14 22 41", "l": "7f 40 40 40 40",
        "m": "7f 02 0c 02 7f", "n": "7f 04 08 10 7f", "o": "3e 41 41 41 3e", "p": "7f 09 09 09 06",
        "q": "3e 41 51 21 5e", "r": "7f 09 19 29 46", "s": "46 49 49 49 31", "t": "01 01 7f 01 01",
        "u": "3f 40 40 40 3f", "v": "1f 20 40 20 1f", "w": "3f 40 38 40 3f", "x": "63 14 08 14 63",
        "y": "07 08 70 08 07", "z": "61 51 49 45 43",
    }.items()
}  # fmt: skip
LETTERS = list(FONT)

# Ground truth of a patch: one integer an attribute, 0 = not applicable (see `_truth`).
KINDS = [*SHAPES, "letter", "bar"]
ATTRIBUTES = {
    "kind": KINDS,
    "colour": COLOUR_NAMES,
    "size": SIZES,
    "letter": LETTERS,
    "ordinal": ORDINALS,
    "height": NUMBERS[1:],
    "centre": ["center"],
}

# Of 20 questions "how many ...s", by the answer, those that are kept: few scenes have many of a
# kind, and a model learns to say the commonest number. Five of a kind would be all objects.
COUNTED = {1: 4, 2: 3, 3: 9, 4: 20, 5: 0}

Scene = dict[str, Any]
Question = tuple[str, str, str]  # question, answer, form


def generator(*key: object) -> np.random.Generator:
    """A counter-based generator for a key such as (seed, "train", 17)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _pick(rng: np.random.Generator, items: list) -> Any:
    return items[int(rng.integers(len(items)))]


# --- pictures ---


def _background(rng: np.random.Generator) -> np.ndarray:
    """[72, 72, 3] int16: a dark tint, a slope across it, and noise."""
    tint = rng.integers(20, 85, size=3)
    slope = rng.integers(-24, 25, size=2)
    ramp = np.arange(SIZE)
    shade = (slope[0] * ramp[:, None] + slope[1] * ramp[None, :]) // SIZE
    noise = rng.integers(-8, 9, size=(SIZE, SIZE, 3))
    return (tint + shade[..., None] + noise).astype(np.int16)


def _mask(shape: str, cx: int, cy: int, r: int) -> np.ndarray:
    """[72, 72] bool: the pixels of a shape of radius `r` pixels."""
    y, x = np.mgrid[:SIZE, :SIZE]
    dx, dy = x - cx, y - cy
    ax, ay, square = abs(dx), abs(dy), dx * dx + dy * dy
    box = (ax <= r) & (ay <= r)
    if shape == "circle":
        return square <= r * r
    if shape == "square":
        return (ax < r) & (ay < r)
    if shape == "triangle":
        return box & (2 * ax <= dy + r)
    if shape == "cross":
        return box & ((3 * ax <= r) | (3 * ay <= r))
    if shape == "diamond":
        return ax + ay <= r
    return (square <= r * r) & (4 * square >= r * r)  # ring


def _paint(rng: np.random.Generator, image: np.ndarray, where: np.ndarray, colour: str) -> None:
    image[where] = (
        np.array(COLOURS[colour])
        + rng.integers(-15, 16, size=3)
        + rng.integers(-5, 6, size=(int(where.sum()), 3))
    )


def _objects(rng: np.random.Generator, allowed: Callable[[str, str], bool]) -> list[dict]:
    """Placed, non-overlapping objects. A theme shared by some of them makes high counts common."""
    total = int(rng.integers(2, 6))
    theme = {}
    if rng.integers(4):
        theme = (
            {"shape": _pick(rng, SHAPES)}
            if rng.integers(2)
            else {"colour": _pick(rng, COLOUR_NAMES)}
        )
    themed = int(rng.integers(2, total + 1)) if theme else 0
    placed: list[dict] = []
    for index in range(total):
        fixed = theme if index < themed else {}
        while True:
            shape = fixed.get("shape") or _pick(rng, SHAPES)
            colour = fixed.get("colour") or _pick(rng, COLOUR_NAMES)
            if allowed(shape, colour):
                break
        size = int(rng.integers(2))
        r = int(rng.integers(7, 9)) if size else int(rng.integers(4, 6))
        # well inside a patch: which patch holds the centre is no matter of one pixel
        centres = [v for v in range(r + 1, SIZE - r - 1) if 2 <= v % PATCH < PATCH - 2]
        for _ in range(40):
            cx, cy = _pick(rng, centres), _pick(rng, centres)
            if all(max(abs(cx - o["cx"]), abs(cy - o["cy"])) > r + o["r"] + 1 for o in placed):
                placed.append(
                    {
                        "shape": shape,
                        "colour": colour,
                        "size": SIZES[size],
                        "cx": cx,
                        "cy": cy,
                        "r": r,
                    }
                )
                break
    return placed


def _draw_objects(rng: np.random.Generator, allowed: Callable[[str, str], bool]) -> Scene:
    image, owner = _background(rng), np.full((SIZE, SIZE), -1, np.int8)
    objects = _objects(rng, allowed)
    for index, o in enumerate(objects):
        mask = _mask(o["shape"], o["cx"], o["cy"], o["r"])
        _paint(rng, image, mask, o["colour"])
        owner[mask] = index
    return {"kind": "objects", "objects": objects, "image": image, "owner": owner}


def _draw_text(rng: np.random.Generator) -> Scene:
    image, owner = _background(rng), np.full((SIZE, SIZE), -1, np.int8)
    word, colour = _pick(rng, WORDS), _pick(rng, COLOUR_NAMES)
    left, top = int(rng.integers(2, SIZE - 36)), int(rng.integers(2, SIZE - 16))
    letters, ink = [], np.zeros((SIZE, SIZE), bool)
    for index, letter in enumerate(word):
        x = left + 12 * index
        bits = np.array([[column >> row & 1 for column in FONT[letter]] for row in range(7)], bool)
        ink[top : top + 14, x : x + 10] = bits.repeat(2, axis=0).repeat(2, axis=1)
        owner[top : top + 14, x : x + 10] = index
        letters.append({"letter": letter, "ordinal": ORDINALS[index], "cx": x + 5, "cy": top + 7})
    _paint(rng, image, ink, colour)
    parts = [{"shape": "letter", "colour": colour, **letter} for letter in letters]
    return {"kind": "text", "word": word, "objects": parts, "image": image, "owner": owner}


def _draw_chart(rng: np.random.Generator) -> Scene:
    image, owner = _background(rng), np.full((SIZE, SIZE), -1, np.int8)
    base, left, unit = int(rng.integers(SIZE - 10, SIZE - 3)), int(rng.integers(4, SIZE - 54)), 10
    image[base : base + 2, left - 2 : left + 52] = 160
    image[base - 5 * unit - 2 : base, left - 3 : left - 1] = 160
    while True:
        heights = [int(h) for h in rng.integers(1, 6, size=4)]
        if heights.count(max(heights)) == 1 and heights.count(min(heights)) == 1:
            break
    colours = [COLOUR_NAMES[i] for i in rng.permutation(len(COLOUR_NAMES))[:4]]
    bars = []
    for index, (height, colour) in enumerate(zip(heights, colours, strict=True)):
        x, top = left + 1 + 13 * index, base - unit * height
        where = np.zeros((SIZE, SIZE), bool)
        where[top:base, x : x + 9] = True
        _paint(rng, image, where, colour)
        owner[where] = index
        bars.append(
            {
                "shape": "bar",
                "colour": colour,
                "height": NUMBERS[height],
                "cx": x + 4,
                "cy": base - 4,
            }
        )
    return {"kind": "chart", "objects": bars, "image": image, "owner": owner}


def _truth(scene: Scene) -> np.ndarray:
    """[144, 7] uint8, a row a patch in reading order, a column an entry of `ATTRIBUTES`.

    A patch belongs to the thing that covers most of it (at least 1/8), or whose centre it holds;
    value v of attribute a means ATTRIBUTES[a][v - 1], 0 means none.
    """
    blocks = (
        scene["owner"].reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID**2, -1)
    )
    truth = np.zeros((GRID**2, len(ATTRIBUTES)), np.uint8)
    for index, thing in enumerate(scene["objects"]):
        covered = (blocks == index).sum(1)
        mine = covered >= PATCH * PATCH // 8
        for other in range(len(scene["objects"])):
            mine &= covered >= (blocks == other).sum(1)
        centre = (thing["cy"] // PATCH) * GRID + thing["cx"] // PATCH
        mine[centre] = True
        named = {**thing, "kind": thing["shape"]}
        row = [
            values.index(named[name]) + 1 if name in named else 0
            for name, values in ATTRIBUTES.items()
        ]
        truth[mine] = row
        truth[centre, -1] = 1
    return truth


def written(truth: np.ndarray) -> list[list[str]]:
    """The picture in words: for each of the 144 patches what is there, its row and its column.

    A language model that reads these words slot by slot knows all that a perfect vision tower sees.
    """
    slots = []
    for patch, row in enumerate(truth):
        words = [values[v - 1] for v, values in zip(row, ATTRIBUTES.values(), strict=True) if v]
        slots.append([*words, f"r{patch // GRID + 1}", f"c{patch % GRID + 1}"])
    return slots


# --- words ---


def _caption(scene: Scene) -> str:
    def place(o: dict) -> str:
        return f"at r{o['cy'] // PATCH + 1} c{o['cx'] // PATCH + 1}"

    things = scene["objects"]
    if scene["kind"] == "text":
        letters, word = " ".join(scene["word"]), scene["word"]
        return f"the {things[0]['colour']} word {letters} {place(things[0])} is {word}."
    if scene["kind"] == "chart":
        return "a chart with " + ", ".join(f"{o['colour']} {o['height']}" for o in things) + "."
    ordered = sorted(things, key=lambda o: (o["cy"] // PATCH, o["cx"] // PATCH))
    return ", ".join(f"a {o['size']} {o['colour']} {o['shape']} {place(o)}" for o in ordered) + "."


def _existence(scene: Scene, rng: np.random.Generator, named: Callable) -> Question | None:
    present = {(o["shape"], o["colour"]) for o in scene["objects"]}
    shapes, colours = {s for s, _ in present}, {c for _, c in present}
    if rng.integers(3) == 0:
        yes = bool(rng.integers(2))
        pool = sorted(shapes) if yes else sorted(set(SHAPES) - shapes)
        return (
            (f"is there a {_pick(rng, pool)}?", "yes" if yes else "no", "shape") if pool else None
        )
    if rng.integers(2):
        pool, answer = [pair for pair in sorted(present) if named(*pair)], "yes"
    else:  # three of four negatives are hard: the shape is there, or the colour, but not together
        pairs = [
            (s, c) for s in SHAPES for c in COLOUR_NAMES if (s, c) not in present and named(s, c)
        ]
        hard = [(s, c) for s, c in pairs if s in shapes or c in colours]
        pool, answer = (hard if hard and rng.integers(4) else pairs), "no"
    if not pool:
        return None
    shape, colour = _pick(rng, pool)
    return f"is there a {colour} {shape}?", answer, "pair"


def _attribute(ask: str, give: str, text: str) -> Callable:
    """A question for `give` of the things whose `ask` names them, where the answer is one."""

    def question(scene: Scene, rng: np.random.Generator, named: Callable) -> Question | None:
        answers: dict[str, set] = {}
        for o in scene["objects"]:
            answers.setdefault(o[ask], set()).add((o[give], named(o["shape"], o["colour"])))
        pool = [
            (key, next(iter(found))[0])
            for key, found in sorted(answers.items())
            if len(found) == 1 and next(iter(found))[1]
        ]
        if not pool:
            return None
        key, answer = _pick(rng, pool)
        return text.format(key), answer, give

    return question


def _counting(scene: Scene, rng: np.random.Generator, named: Callable) -> Question | None:
    things = scene["objects"]
    form = _pick(rng, ["shape", "shape", "colour", "colour", "all"])
    if form == "all":
        return "how many objects are there?", NUMBERS[len(things)], form
    values = [o[form] for o in things]
    pool = [v for v in sorted(set(values)) for _ in range(values.count(v) ** 4)]
    value = _pick(rng, pool)
    number = values.count(value)
    if rng.integers(20) >= COUNTED[number]:
        return None
    name = PLURALS[SHAPES.index(value)] if form == "shape" else f"{value} objects"
    return f"how many {name} are there?", NUMBERS[number], form


def _relation(scene: Scene, rng: np.random.Generator, named: Callable) -> Question | None:
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
    a, b, answer = _pick(rng, pool)
    text = f"where is the {a['colour']} {a['shape']} relative to the {b['colour']} {b['shape']}?"
    return text, answer, "side"


def _text(scene: Scene, rng: np.random.Generator, named: Callable) -> Question:
    if rng.integers(2):
        return "what word is written?", scene["word"], "word"
    index = int(rng.integers(3))
    return f"what is the {ORDINALS[index]} letter?", scene["word"][index], "letter"


def _chart(scene: Scene, rng: np.random.Generator, named: Callable) -> Question:
    bars = sorted(scene["objects"], key=lambda o: NUMBERS.index(o["height"]))
    form = _pick(rng, ["highest", "lowest", "height", "height"])
    if form == "height":
        bar = _pick(rng, bars)
        return f"how high is the {bar['colour']} bar?", bar["height"], form
    return f"which bar is the {form}?", bars[-1 if form == "highest" else 0]["colour"], form


_colour = _attribute("shape", "colour", "what color is the {}?")
_shape = _attribute("colour", "shape", "what shape is the {} object?")
_ASK: dict[str, tuple[str, list[Callable]]] = {
    "existence": ("objects", [_existence]),
    "colour": ("objects", [_colour]),
    "shape": ("objects", [_shape]),
    "counting": ("objects", [_counting]),
    "relation": ("objects", [_relation]),
    "text": ("text", [_text]),
    "chart": ("chart", [_chart]),
    "composition": ("objects", [_existence, _colour, _shape]),
}
SKILLS = list(_ASK)
# of the attempts at a question about objects; most of those at counting fail (see COUNTED)
_MIX = ["existence", "colour", "shape", *["relation"] * 2, *["counting"] * 5]


def _draw(kind: str, rng: np.random.Generator, composition: bool = False) -> Scene:
    """One scene of a kind. Held-out pairs appear only with `composition`, where they always do."""
    if kind == "text":
        return _draw_text(rng)
    if kind == "chart":
        return _draw_chart(rng)
    while True:
        if not composition:
            return _draw_objects(rng, lambda s, c: (s, c) not in HELD_OUT)
        scene = _draw_objects(rng, lambda s, c: (s, c) in HELD_OUT or not rng.integers(3))
        if any((o["shape"], o["colour"]) in HELD_OUT for o in scene["objects"]):
            return scene


def _seen(shape: str, colour: str) -> bool:
    return (shape, colour) not in HELD_OUT


def _unseen(shape: str, colour: str) -> bool:
    return (shape, colour) in HELD_OUT


def _pixels(scene: Scene) -> np.ndarray:
    return scene["image"].clip(0, 255).astype(np.uint8)


def rows(split: str, count: int, seed: int, turns: int = 5) -> Iterator[dict]:
    """Training rows.

    Yields `count` of {"id", "image": uint8 [72, 72, 3], "caption": str, "qa": [{"question",
    "answer", "skill", "form"}], "truth": uint8 [144, 7] (see `_truth`)}; about 2/3 objects, 1/6
    text, 1/6 charts, with at most `turns` different questions each.
    """
    for index in range(count):
        rng = generator(VERSION, seed, split, index)
        scene = _draw(_pick(rng, ["objects"] * 4 + ["text", "chart"]), rng)
        skills = [scene["kind"]] * turns
        if scene["kind"] == "objects":
            order = [_MIX[i] for i in rng.permutation(len(_MIX))]
            skills = [*order, *order]
        qa: dict[str, dict] = {}
        for skill in skills:
            if len(qa) == turns:
                break
            asked = _pick(rng, _ASK[skill][1])(scene, rng, _seen)
            if asked:
                question, answer, form = asked
                qa.setdefault(
                    question, {"question": question, "answer": answer, "skill": skill, "form": form}
                )
        yield {
            "id": f"{split}-{index:06d}",
            "image": _pixels(scene),
            "caption": _caption(scene),
            "qa": list(qa.values()),
            "truth": _truth(scene),
        }


def drill(split: str, count: int, seed: int, turns: int = 6) -> Iterator[dict]:
    """Rows for a language model that learns to find things and to compare places.

    As `rows`, but objects only and mostly relations and places ("where is the red ring?", answered
    as captions say it). No other split asks for a place in this way. In every scene things share
    a colour, and things a shape: else a model may find them by colour alone, and not go on.
    """
    for index in range(count):
        rng = generator(VERSION, seed, split, index)
        while True:
            scene = _draw("objects", rng)
            if all(
                len({o[k] for o in scene["objects"]}) < len(scene["objects"])
                for k in ("shape", "colour")
            ):
                break
        qa: dict[str, tuple[str, str]] = {}
        for maker in [_relation] * 8 + [_counting] * 6 + [_existence]:
            asked = maker(scene, rng, _seen)
            if asked:
                qa[asked[0]] = asked[:2]
        names = [f"{o['colour']} {o['shape']}" for o in scene["objects"]]
        for name, o in zip(names, scene["objects"], strict=True):
            if names.count(name) == 1:
                place = f"r{o['cy'] // PATCH + 1} c{o['cx'] // PATCH + 1}"
                qa[f"where is the {name}?"] = (f"where is the {name}?", place)
        asked = [list(qa.values())[i] for i in rng.permutation(len(qa))[:turns]]
        yield {
            "caption": _caption(scene),
            "qa": [{"question": question, "answer": answer} for question, answer in asked],
            "truth": _truth(scene),
        }


def benchmark(skill: str, count: int, seed: int) -> list[dict]:
    """Test rows of one skill: {"id", "image": uint8 [72, 72, 3], "question", "answer", "form"}.

    One question a scene; forms take turns and, within a form, each answer comes equally often (up
    to rounding). Raises ValueError for an unknown skill.
    """
    if skill not in _ASK:
        raise ValueError(f"scenes has no benchmark {skill!r}; it has: {', '.join(SKILLS)}")
    kind, makers = _ASK[skill]
    asked_of = _unseen if skill == "composition" else _seen
    answers = _answers(skill)
    quota = {
        (form, answer): 0 for form, given in answers.items() for answer in given
    }  # how many are still wanted
    for index in range(count):
        form = list(answers)[index % len(answers)]
        quota[form, answers[form][index // len(answers) % len(answers[form])]] += 1
    found = []
    for attempt in counter():
        if len(found) == count:
            break
        rng = generator(VERSION, seed, f"test-{skill}", attempt)
        scene = _draw(kind, rng, composition=skill == "composition")
        asked = _pick(rng, makers)(scene, rng, asked_of)
        if not asked or not quota.get((asked[2], asked[1])):
            continue
        question, answer, form = asked
        quota[form, answer] -= 1
        found.append({
            "id": f"{skill}-{attempt:06d}", "image": _pixels(scene),
            "question": question, "answer": answer, "form": form,
        })  # fmt: skip
    return found


def _answers(skill: str) -> dict[str, list[str]]:
    """The answers of each question form of a skill."""
    words = sorted(WORDS)
    letters = sorted(set("".join(WORDS)))
    held_shapes = sorted({s for s, _ in HELD_OUT})
    held_colours = sorted({c for _, c in HELD_OUT})
    return {
        "existence": {"pair": ["yes", "no"], "shape": ["yes", "no"]},
        "colour": {"colour": COLOUR_NAMES},
        "shape": {"shape": SHAPES},
        "counting": {"shape": NUMBERS[1:5], "colour": NUMBERS[1:5], "all": NUMBERS[2:6]},
        "relation": {"side": RELATIONS},
        "text": {"word": words, "letter": letters},
        "chart": {"highest": COLOUR_NAMES, "lowest": COLOUR_NAMES, "height": NUMBERS[1:]},
        "composition": {"pair": ["yes", "no"], "colour": held_colours, "shape": held_shapes},
    }[skill]


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
