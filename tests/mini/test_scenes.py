"""The generator: same bytes everywhere, disjoint splits, balanced answers, nothing leaks."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from recipes.mini import lessons
from sts.mini import pictures, scenes


def digest(rows: list[dict]) -> str:
    sha = hashlib.sha256()
    for row in rows:
        sha.update(row["image"].tobytes())
        sha.update(repr((row["id"], row["caption"], row["qa"], row["truth"].tolist())).encode())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def instruct() -> list[dict]:
    return list(scenes.rows("instruct", 400, 5))


def test_same_bytes_on_every_machine():
    """A change of this hash is a new data set: raise scenes.VERSION with it."""
    assert digest(list(scenes.rows("align", 40, 0)))[:16] == "17f662cb51fb75b6"


def test_a_row_depends_on_seed_split_and_index_only():
    assert digest(list(scenes.rows("align", 3, 0))) == digest(list(scenes.rows("align", 9, 0))[:3])
    assert digest(list(scenes.rows("align", 3, 0))) != digest(list(scenes.rows("align", 3, 1)))


def test_training_splits_share_no_image_with_each_other_or_a_benchmark():
    earlier: set[bytes] = set()
    for split in ("align", "instruct"):
        pixels = {row["image"].tobytes() for row in scenes.rows(split, 150, 0)}
        assert not earlier & pixels
        earlier |= pixels
    for skill in scenes.SKILLS:
        assert not earlier & {row["image"].tobytes() for row in scenes.benchmark(skill, 40, 0)}


@pytest.mark.parametrize("skill", scenes.SKILLS)
def test_within_a_form_every_answer_comes_equally_often(skill):
    rows = list(scenes.benchmark(skill, 120, 0))
    assert len(rows) == 120 and len({row["id"] for row in rows}) == 120
    forms = Counter(row["form"] for row in rows)
    assert max(forms.values()) - min(forms.values()) <= 1
    for form in forms:
        answers = Counter(row["answer"] for row in rows if row["form"] == form)
        assert max(answers.values()) - min(answers.values()) <= 1


def test_no_training_row_shows_or_names_a_held_out_pair(instruct):
    shown = {
        (pictures.SHAPES[kind - 1], pictures.COLOUR_NAMES[colour - 1])
        for row in instruct
        for kind, colour in row["truth"][:, :2]
        if 0 < kind <= len(pictures.SHAPES)
    }
    assert len(shown) == 48 - len(pictures.HELD_OUT) and not shown & pictures.HELD_OUT
    text = " ".join(
        row["caption"] + " ".join(qa["question"] for qa in row["qa"]) for row in instruct
    )
    assert not [pair for pair in pictures.HELD_OUT if f"{pair[1]} {pair[0]}" in text]


def test_composition_asks_about_held_out_pairs_only():
    pairs = [f"{colour} {shape}" for shape, colour in pictures.HELD_OUT]
    questions = [
        r["question"] for r in scenes.benchmark("composition", 60, 0) if r["form"] == "pair"
    ]
    assert questions and all(any(pair in question for pair in pairs) for question in questions)


def test_of_a_held_out_pair_neither_part_tells_the_other():
    for part in (0, 1):
        partners = Counter(pair[part] for pair in pictures.HELD_OUT)
        assert set(partners.values()) == {2}


def test_truth_describes_the_pixels():
    """Where a patch is said to be red, red is the strongest channel of its reddest pixel."""
    red = 1 + pictures.COLOUR_NAMES.index("red")
    for row in scenes.rows("align", 60, 3):
        patches = row["image"].reshape(12, 6, 12, 6, 3).transpose(0, 2, 1, 3, 4).reshape(144, 36, 3)
        for patch in np.flatnonzero((row["truth"][:, 1] == red) & (row["truth"][:, 3] == 0)):
            pixel = patches[patch].astype(int)
            assert (pixel[:, 0] - pixel[:, 1:].max(1)).max() > 100


def test_counts_agree_with_the_truth(instruct):
    """The number of centre patches is the number of objects that the question counts."""
    for row in instruct:
        for qa in row["qa"]:
            if qa["question"] == "how many objects are there?":
                assert row["truth"][:, -1].sum() == pictures.NUMBERS.index(qa["answer"])


def test_no_number_is_the_answer_to_most_training_questions(instruct):
    answers = [
        qa["answer"]
        for row in instruct
        for qa in row["qa"]
        if qa["skill"] == "counting" and qa["form"] != "all"
    ]
    shares = {number: answers.count(number) / len(answers) for number in set(answers)}
    assert set(shares) == {"one", "two", "three", "four"}
    assert min(shares.values()) > 0.1 and max(shares.values()) < 0.4, shares


def test_in_a_drill_neither_colour_nor_shape_alone_names_every_thing():
    """Else a decoder learns to look things up by their colour alone, and gets no further."""
    for row in lessons.drill("drill", 60, 0):
        things = row["truth"][row["truth"][:, -1] > 0]
        for attribute in (0, 1):
            assert len(set(things[:, attribute])) < len(things)


def test_written_pictures_say_kind_and_place():
    row = next(row for row in scenes.rows("align", 50, 0) if "circle" in row["caption"])
    slots = lessons.written(row["truth"])
    assert len(slots) == 144 and all(slot[-2:] == [f"r{i // 12 + 1}", f"c{i % 12 + 1}"]
                                    for i, slot in enumerate(slots))  # fmt: skip
    assert any("circle" in slot and "center" in slot for slot in slots)
