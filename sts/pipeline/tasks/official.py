"""Benchmarks of the hub as their authors score them: questions, and rules for answers.

A rule gives lm-eval {metric: value}. Where a score is no mean over questions, a value says all that
its aggregation needs, and `correct`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from datasets import Dataset, load_dataset

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNKNOWN = "When the provided information is insufficient, respond with 'Unanswerable'."
CIRCLE = 1_000_000  # MMBench numbers the copies of a question, options turned, by this much more

# ---- data ---------------------------------------------------------------------------------------


def load(
    path: str = "",
    name: str | None = None,
    split: str = "",
    column: str = "",
    values: Sequence[str] = (),
    images: str = "",
    instead: str = "",
    **_: object,
) -> dict[str, Dataset]:
    """{"test": rows of a split of a hub's data set}; of those with one of `values` in `column`.

    images: configuration that holds the pictures, by `id`, where the rows name them by `imageId`.
    instead: another split, from the metadata, which wins over the task file's.
    """
    split = instead or split
    rows = load_dataset(path, name, split=split)
    if column:
        rows = rows.select([i for i, value in enumerate(rows[column]) if value in values])
    if images:
        pictures = load_dataset(path, images, split=split)
        place = {id: i for i, id in enumerate(pictures["id"])}

        def with_image(batch: dict[str, list]) -> dict[str, list]:
            return batch | {"image": [pictures[place[id]]["image"] for id in batch["imageId"]]}

        rows = rows.with_transform(with_image)
    return {"test": rows}


def one(row: Mapping[str, Any]) -> list[Any]:
    """The image of a row."""
    return [row["image"]]


def several(row: Mapping[str, Any]) -> list[Any]:
    """Images of a row that has a list of them."""
    return list(row["image"])


# ---- prompts: LLaVA-1.5's -----------------------------------------------------------------------


def word(row: Mapping[str, Any]) -> str:
    return f"<image>\n{row['question']}\n{WORD}"


def as_it_is(row: Mapping[str, Any]) -> str:
    return f"<image>\n{row['question']}"


def text(row: Mapping[str, Any]) -> str:
    return f"<image>\n{row['question'].capitalize()}\n{WORD}"


def text_read(row: Mapping[str, Any]) -> str:
    tokens = ", ".join(row["ocr_tokens"])
    return f"<image>\n{row['question'].capitalize()}\nReference OCR token: {tokens}\n{WORD}"


def may_be_unknown(row: Mapping[str, Any]) -> str:
    return f"<image>\n{row['question'].capitalize()}\n{UNKNOWN}\n{WORD}"


def science(row: Mapping[str, Any]) -> str:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    options = _listed(dict(zip("ABCDEFGH", row["choices"], strict=False)))
    return f"<image>\n{context}{row['question']}\n{options}\n{LETTER}"


def seed(row: Mapping[str, Any]) -> str:
    options = {letter: row[f"choice_{letter.lower()}"] for letter in "ABCD"}
    return "<image>\n" * len(row["image"]) + f"{row['question']}\n{_listed(options)}\n{LETTER}"


def mmbench(row: Mapping[str, Any], ask: str = LETTER) -> str:
    hint = f"{row['hint']}\n" if given(row["hint"]) else ""
    return f"<image>\n{hint}{row['question']}\n{_listed(options_of(row))}\n{ask}"


def mmbench_cn(row: Mapping[str, Any]) -> str:
    return mmbench(row, "请直接回答选项字母。")


def options_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Letter -> option of a question of MMBench."""
    return {letter: row[letter] for letter in "ABCDE" if given(row.get(letter))}


def given(value: Any) -> bool:
    """Whether a field of MMBench holds something."""
    return value is not None and str(value) not in ("", "nan")


def _listed(options: Mapping[str, str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in options.items())


# ---- words --------------------------------------------------------------------------------------

ARTICLES = {"a", "an", "the"}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {name: str(value) for value, name in enumerate(NUMBERS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The official list, by what is written out: meant wherever one of its apostrophes is missing. The
# official one has an entry that turns one round, see below.
WRITTEN = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
""".split()  # noqa: SIM905


def _contractions() -> dict[str, str]:
    found = {}
    for whole in WRITTEN:
        places = [i for i, letter in enumerate(whole) if letter == "'"]
        for place in places:
            found[whole[:place] + whole[place + 1 :]] = whole
    return found | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def normal(said: str) -> str:
    """An answer as the servers of VQA, TextVQA and VizWiz compare it (EvalAI's processor)."""
    said = said.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return plain(" ".join(said.split()))


def plain(answer: str) -> str:
    """Without punctuation and articles, numbers as digits, apostrophes where they belong."""
    kept = answer
    for mark in PUNCTUATION:
        apart = f"{mark} " in answer or f" {mark}" in answer or re.search(r"\d,+\d", answer)
        kept = kept.replace(mark, "" if apart else " ")
    words = re.sub(r"\.(?!\d)", "", kept).lower().split()
    words = [word for word in (DIGITS.get(word, word) for word in words) if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def agreement(said: str, answers: Sequence[str]) -> float:
    """VQA accuracy (arXiv 1505.00468): mean over the people of min(1, others who said it / 3)."""
    shares = []
    for left_out in range(len(answers)):
        others = [*answers[:left_out], *answers[left_out + 1 :]]
        shares.append(min(1.0, others.count(said) / 3))
    return fmean(shares) if shares else 0.0


# ---- rules --------------------------------------------------------------------------------------


def vqa(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """VQAv2: answers are compared as they are where all people said the same."""
    said, answers = normal(results[0]), [one["answer"].strip() for one in row["answers"]]
    if len(set(answers)) > 1:
        said, answers = plain(said), [plain(answer) for answer in answers]
    return {"accuracy": agreement(said, answers)}


def people(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """TextVQA, VizWiz."""
    return {"accuracy": agreement(normal(results[0]), [normal(one) for one in row["answers"]])}


def pope(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """POPE (arXiv 2305.10355): of the first sentence, `no` if it says no or not, else `yes`."""
    words = results[0].split(".")[0].replace(",", "").lower().split()
    said = "no" if {"no", "not"} & set(words) else "yes"
    right = row["answer"].strip().lower()
    found = {"category": row["category"], "said": said, "answer": right, "correct": said == right}
    return {"f1": found, "accuracy": float(said == right), "yes": float(said == "yes")}


def mean_f1(found: Sequence[Mapping[str, Any]]) -> float:
    """Mean over the three ways of choosing what is asked for of the F1 of `yes`."""
    return fmean(_f1(rows) for rows in grouped(found, lambda one: one["category"]).values())


def _f1(found: Sequence[Mapping[str, Any]]) -> float:
    hits = sum(one["said"] == one["answer"] == "yes" for one in found)
    said, there = (sum(one[key] == "yes" for one in found) for key in ("said", "answer"))
    return 2 * hits / (said + there) if said + there else 0.0


def mme(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """MME (arXiv 2306.13394): yes or no by how the answer begins."""
    said = results[0].strip().lower().replace(".", "")
    begins = said if len(said) == 1 else said[:4]
    answer = next((one for one in ("yes", "no") if one in begins or said == one[0]), "other")
    correct = answer == row["answer"].strip().lower().replace(".", "")
    return {
        "score": {"category": row["category"], "image": row["question_id"], "correct": correct},
        "accuracy": float(correct),
    }


def mme_total(found: Sequence[Mapping[str, Any]]) -> float:
    """Sum over the categories of 100 (acc + acc+): the share of questions answered rightly, and of
    images of which both are. An image of which a limit asks one question is in acc alone."""
    total = 0.0
    for rows in grouped(found, lambda one: one["category"]).values():
        pairs = grouped(rows, lambda one: one["image"]).values()
        both = [all(one["correct"] for one in pair) for pair in pairs if len(pair) == 2]
        total += 100 * (fmean(one["correct"] for one in rows) + (fmean(both) if both else 0))
    return total


def scienceqa(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """ScienceQA, as LLaVA reads it: a letter alone, or with a period, or `The answer is A.`"""
    said = results[0].strip()
    found = re.fullmatch(r"([A-H])", said) or re.match(r"([A-H])\.( |$)", said)
    found = found or re.search(r"The answer is ([A-H])\.", said)
    return {"accuracy": float(found is not None and found[1] == "ABCDEFGH"[row["answer"]])}


def first_letter(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """SEED-Bench."""
    return {"accuracy": float(results[0].strip()[:1] == row["answer"])}


def circular(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """MMBench (arXiv 2307.06281), without a judge: the one letter that the answer names, or the
    one option whose text is in it."""
    correct = named(results[0], options_of(row)) == row["answer"]
    found = {"question": int(row["index"]) % CIRCLE, "correct": correct}
    return {"circular": found, "accuracy": float(correct)}


def named(said: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option that an answer names; None if there is none, or several."""
    words = [word.strip("().,:") for word in said.split()]
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and not ("A" in words and len(words) > 3):  # "A" may be an article
        return letters[0]
    held = [letter for letter, option in options.items() if str(option).lower() in said.lower()]
    return held[0] if len(held) == 1 else None


def all_copies(found: Sequence[Mapping[str, Any]]) -> float:
    """Share of the questions of which every copy, with its options turned, is answered rightly."""
    asked = grouped(found, lambda one: one["question"]).values()
    return fmean(all(one["correct"] for one in copies) for copies in asked)


def grouped(found: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups = defaultdict(list)
    for one in found:
        groups[key(one)].append(one)
    return dict(groups)
