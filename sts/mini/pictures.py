"""What the scenes show: seeded 72x72 pictures and, of every patch, what is there.

Everything is integer numpy on a counter-based generator (Philox), so the same key gives the same
pixels on every machine. Pictures are of objects (1-5), of a three-letter word, or a chart of four
bars, each on a tinted, shaded, noisy background.
"""

import hashlib
from collections.abc import Callable
from string import ascii_lowercase
from typing import Any

import numpy as np

SIZE, PATCH = 72, 6
GRID = SIZE // PATCH

SHAPES = ["circle", "square", "triangle", "cross", "diamond", "ring"]
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

LETTERS = list(ascii_lowercase)
# columns of the standard 5x7 font, five a letter, least significant bit on top
COLUMNS = bytes.fromhex("""
7e1111117e 7f49494936 3e41414122 7f4141221c 7f49494941 7f09090901 3e4149497a 7f0808087f 00417f4100
2040413f01 7f08142241 7f40404040 7f020c027f 7f0408107f 3e4141413e 7f09090906 3e4151215e 7f09192946
4649494931 01017f0101 3f4040403f 1f2040201f 3f4038403f 6314081463 0708700807 6151494543
""")
FONT = {letter: COLUMNS[5 * i : 5 * i + 5] for i, letter in enumerate(LETTERS)}

# Ground truth of a patch: one integer an attribute, 0 = not applicable (see `truth_of`).
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

Scene = dict[str, Any]


def generator(*key: object) -> np.random.Generator:
    """A counter-based generator for a key such as (seed, "train", 17)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def pick(rng: np.random.Generator, items: list) -> Any:
    return items[int(rng.integers(len(items)))]


def draw(kind: str, rng: np.random.Generator, composition: bool = False) -> Scene:
    """One scene of a kind. Held-out pairs appear only with `composition`, where they always do."""
    if kind != "objects":
        return {"text": _draw_text, "chart": _draw_chart}[kind](rng)
    if not composition:
        return _draw_objects(rng, is_trained)
    while True:
        scene = _draw_objects(rng, lambda s, c: is_held_out(s, c) or not rng.integers(3))
        if any(is_held_out(o["shape"], o["colour"]) for o in scene["objects"]):
            return scene


def is_held_out(shape: str, colour: str) -> bool:
    return (shape, colour) in HELD_OUT


def is_trained(shape: str, colour: str) -> bool:
    return not is_held_out(shape, colour)


def _background(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """[72, 72, 3] int16: a dark tint, a slope across it, and noise; and [72, 72] int8: the index of
    the thing that each pixel shows, -1 for none."""
    tint = rng.integers(20, 85, size=3)
    slope = rng.integers(-24, 25, size=2)
    ramp = np.arange(SIZE)
    shade = (slope[0] * ramp[:, None] + slope[1] * ramp[None, :]) // SIZE
    noise = rng.integers(-8, 9, size=(SIZE, SIZE, 3))
    image = (tint + shade[..., None] + noise).astype(np.int16)
    return image, np.full((SIZE, SIZE), -1, np.int8)


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
        name, values = ("shape", SHAPES) if rng.integers(2) else ("colour", COLOUR_NAMES)
        theme = {name: pick(rng, values)}
    themed = int(rng.integers(2, total + 1)) if theme else 0
    things: list[dict] = []
    for index in range(total):
        fixed = theme if index < themed else {}
        while True:
            shape = fixed.get("shape") or pick(rng, SHAPES)
            colour = fixed.get("colour") or pick(rng, COLOUR_NAMES)
            if allowed(shape, colour):
                break
        size = int(rng.integers(2))
        r = int(rng.integers(7, 9)) if size else int(rng.integers(4, 6))
        # well inside a patch: which patch holds the centre is no matter of one pixel
        centres = [v for v in range(r + 1, SIZE - r - 1) if 2 <= v % PATCH < PATCH - 2]
        for _ in range(40):
            cx, cy = pick(rng, centres), pick(rng, centres)
            if all(max(abs(cx - o["cx"]), abs(cy - o["cy"])) > r + o["r"] + 1 for o in things):
                thing = {"shape": shape, "colour": colour, "size": SIZES[size]}
                things.append(thing | {"cx": cx, "cy": cy, "r": r})
                break
    return things


def _draw_objects(rng: np.random.Generator, allowed: Callable[[str, str], bool]) -> Scene:
    image, owner = _background(rng)
    objects = _objects(rng, allowed)
    for index, o in enumerate(objects):
        mask = _mask(o["shape"], o["cx"], o["cy"], o["r"])
        _paint(rng, image, mask, o["colour"])
        owner[mask] = index
    return {"kind": "objects", "objects": objects, "image": image, "owner": owner}


def _draw_text(rng: np.random.Generator) -> Scene:
    image, owner = _background(rng)
    word, colour = pick(rng, WORDS), pick(rng, COLOUR_NAMES)
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
    image, owner = _background(rng)
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
        bar = {"shape": "bar", "colour": colour, "height": NUMBERS[height]}
        bars.append(bar | {"cx": x + 4, "cy": base - 4})
    return {"kind": "chart", "objects": bars, "image": image, "owner": owner}


def truth_of(scene: Scene) -> np.ndarray:
    """[144, 7] uint8, a row a patch in reading order, a column an entry of `ATTRIBUTES`.

    A patch belongs to the thing that covers most of it (at least 1/8), or whose centre it holds;
    value v of attribute a means ATTRIBUTES[a][v - 1], 0 means none.
    """
    blocks = scene["owner"].reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID**2, -1)
    truth = np.zeros((GRID**2, len(ATTRIBUTES)), np.uint8)
    for index, thing in enumerate(scene["objects"]):
        covered = (blocks == index).sum(1)
        patches = covered >= PATCH * PATCH // 8
        for other in range(len(scene["objects"])):
            patches &= covered >= (blocks == other).sum(1)
        centre = (thing["cy"] // PATCH) * GRID + thing["cx"] // PATCH
        patches[centre] = True
        thing = {**thing, "kind": thing["shape"]}
        truth[patches] = [
            values.index(thing[name]) + 1 if name in thing else 0
            for name, values in ATTRIBUTES.items()
        ]
        truth[centre, -1] = 1
    return truth


def pixels_of(scene: Scene) -> np.ndarray:
    return scene["image"].clip(0, 255).astype(np.uint8)
