"""Benchmarks of the hub as their authors score them: questions, and rules for answers.

A rule gives lm-eval {metric: value}. Where a score is no mean over questions, a value says all that
its aggregation needs, and `correct`.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from statistics import fmean
from typing import Any

from sts.pipeline.tasks.parquet import ParquetRows, split_files

Row = Mapping[str, Any]

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNKNOWN = "When the provided information is insufficient, respond with 'Unanswerable'."
CIRCLE = 1_000_000  # MMBench numbers the copies of a question, options turned, by this much more


def load(
    folder: str = "",
    path: str = "",
    name: str | None = None,
    split: str = "",
    column: str = "",
    values: Sequence[str] = (),
    images: str = "",
    instead: str | None = None,
    **_: object,
) -> dict[str, ParquetRows]:
    """{"test": rows of a split of a hub's data set}; of those with one of `values` in `column`.

    folder, instead: where the files of the set lie, and another split; both from the metadata.
    images: configuration that holds the pictures, by `id`, where the rows name them by `imageId`.
    """
    split = instead or split
    if not folder:
        raise ValueError(f'metadata must name the folder of the files of {path}: {{"folder": ...}}')
    rows = ParquetRows(split_files(folder, name, split))
    if column:
        rows.places = [i for i, value in enumerate(rows[column]) if value in values]
    if not rows:
        raise ValueError(f"{folder}: no question in {', '.join(map(str, rows.files))}")
    if images:
        rows.pictures = ParquetRows(split_files(folder, images, split))
    return {"test": rows}


def images(row: Row) -> list[Any]:
    """The images of a row that has one or a list of them."""
    return row["image"] if isinstance(row["image"], list) else [row["image"]]


# ---- prompts: LLaVA-1.5's -----------------------------------------------------------------------


def word_prompt(row: Row) -> str:
    return f"<image>\n{row['question']}\n{WORD}"


def mme_prompt(row: Row) -> str:
    """LLaVA's wording in the place of MME's own."""
    question = row["question"].replace("Please answer yes or no.", "").strip()
    return f"<image>\n{question}\n{WORD}"


def textvqa_prompt(row: Row) -> str:
    return f"<image>\n{row['question'].capitalize()}\n{WORD}"


def textvqa_ocr_prompt(row: Row) -> str:
    tokens = ", ".join(row["ocr_tokens"])
    return f"<image>\n{row['question'].capitalize()}\nReference OCR token: {tokens}\n{WORD}"


def vizwiz_prompt(row: Row) -> str:
    return f"<image>\n{row['question'].capitalize()}\n{UNKNOWN}\n{WORD}"


def scienceqa_prompt(row: Row) -> str:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    options = _lines(dict(zip("ABCDE", row["choices"], strict=False)))
    return f"<image>\n{context}{row['question']}\n{options}\n{LETTER}"


def seed_prompt(row: Row) -> str:
    options = {letter: row[f"choice_{letter.lower()}"] for letter in "ABCD"}
    return "<image>\n" * len(row["image"]) + f"{row['question']}\n{_lines(options)}\n{LETTER}"


def mmbench_prompt(row: Row, request: str = LETTER) -> str:
    hint = f"{row['hint']}\n" if is_filled(row["hint"]) else ""
    return f"<image>\n{hint}{row['question']}\n{_lines(options_of(row))}\n{request}"


mmbench_cn_prompt = partial(mmbench_prompt, request="请直接回答选项字母。")


def options_of(row: Row) -> dict[str, str]:
    """Letter -> option of a question of MMBench, up to the first that is none."""
    options = takewhile(lambda item: is_filled(item[1]), ((key, row.get(key)) for key in "ABCD"))
    return dict(options)


def is_filled(value: Any) -> bool:
    """Whether a field of MMBench holds something."""
    return value is not None and str(value).lower() not in ("", "nan", "none")


def _lines(options: Mapping[str, str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in options.items())


# ---- words, as the servers of VQA compare them ---------------------------------------------------

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
CONTRACTIONS = {
    written[:place] + written[place + 1 :]: written
    for written in WRITTEN
    for place, letter in enumerate(written)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise(output: str) -> str:
    """An answer as the servers of VQA, TextVQA and VizWiz compare it (EvalAI's processor)."""
    output = output.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return simplify(" ".join(output.split()))


def simplify(answer: str) -> str:
    """Without punctuation and articles, numbers as digits, apostrophes where they belong."""
    kept = answer
    for mark in PUNCTUATION:
        apart = f"{mark} " in answer or f" {mark}" in answer or re.search(r"\d,+\d", answer)
        kept = kept.replace(mark, "" if apart else " ")
    words = re.sub(r"\.(?!\d)", "", kept).lower().split()
    words = [word for word in (DIGITS.get(word, word) for word in words) if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def agreement(answer: str, answers: Sequence[str]) -> float:
    """VQA accuracy (arXiv 1505.00468): mean over the people of min(1, others who said it / 3)."""
    same = [other == answer for other in answers]  # each of whom is left out once
    return fmean(min(1.0, (sum(same) - is_same) / 3) for is_same in same) if same else 0.0


# ---- rules: (row, [the model's output]) -> {metric: value} --------------------------------------


def score_vqav2(row: Row, results: Sequence[str]) -> dict[str, Any]:
    """VQAv2: answers are compared as they are where all people said the same."""
    output, answers = normalise(results[0]), [item["answer"].strip() for item in row["answers"]]
    if len(set(answers)) > 1:
        output, answers = simplify(output), [simplify(answer) for answer in answers]
    return {"accuracy": agreement(output, answers)}


def score_textvqa(row: Row, results: Sequence[str]) -> dict[str, Any]:
    """TextVQA, VizWiz."""
    return {"accuracy": agreement(normalise(results[0]), list(map(normalise, row["answers"])))}


def score_gqa(row: Row, results: Sequence[str]) -> dict[str, Any]:
    """GQA: the same words, without periods at the end."""
    return {"accuracy": float(results[0].strip().rstrip(".").lower() == row["answer"])}


def score_pope(row: Row, results: Sequence[str]) -> dict[str, Any]:
    """POPE (arXiv 2305.10355): of the first sentence, `no` if it says no or not, else `yes`."""
    words = results[0].strip().split(".")[0].replace(",", "").split(" ")
    output = "no" if {"No", "no", "not"} & set(words) else "yes"
    answer = row["answer"].strip().lower()
    correct = output == answer
    verdict = {"category": row["category"], "output": output, "answer": answer, "correct": correct}
    return {"f1": verdict, "accuracy": float(correct), "yes": float(output == "yes")}


def mean_f1(verdicts: Sequence[Row]) -> float:
    """Mean over the three ways of choosing what is asked for of the F1 of `yes`."""
    return fmean(map(_f1, group_by(verdicts, "category").values()))


def _f1(verdicts: Sequence[Row]) -> float:
    hits = sum(verdict["output"] == verdict["answer"] == "yes" for verdict in verdicts)
    total = sum((verdict["output"] == "yes") + (verdict["answer"] == "yes") for verdict in verdicts)
    return 2 * hits / total if total else 0.0


def score_mme(row: Row, results: Sequence[str]) -> dict[str, Any]:
    """MME (arXiv 2306.13394): yes or no by the first four characters of the answer."""
    begin = results[0].strip().lower()[:4]
    answer = next((word for word in ("yes", "no") if word in begin), "other")
    correct = answer == row["answer"].strip().lower()
    verdict = {"category": row["category"], "image": row["question_id"], "correct": correct}
    return {"score": verdict, "accuracy": float(correct)}


def mme_total(verdicts: Sequence[Row]) -> float:
    """Sum over the categories of 100 (acc + acc+): the share of questions answered rightly, and of
    pictures of which both are."""
    total = 0.0
    for rows in group_by(verdicts, "category").values():
        pairs = group_by(rows, "image").values()
        both = fmean(all(row["correct"] for row in pair) for pair in pairs)
        total += 100 * (fmean(row["correct"] for row in rows) + both)
    return total


def pictures_of(rows: ParquetRows) -> list[str]:
    """Of each question of MME the picture, whose two questions are scored together."""
    return rows["question_id"]


def score_scienceqa(row: Row, results: Sequence[str]) -> dict[str, Any]:
    """ScienceQA, as LLaVA reads it: a letter alone, or with its option, or `The answer is A.`"""
    output = results[0].strip()
    match = re.fullmatch("[A-E]", output) or re.match(r"[A-E](?=\. )", output)
    letters = [match[0]] if match else re.findall(r"The answer is ([A-Z]).", output)
    return {"accuracy": float(letters == ["ABCDE"[row["answer"]]])}


def score_letter(row: Row, results: Sequence[str]) -> dict[str, Any]:
    """SEED-Bench, as LLaVA reads it: the letter and nothing else."""
    return {"accuracy": float(results[0].strip() == row["answer"])}


def score_chartqa(row: Row, results: Sequence[str]) -> dict[str, Any]:
    """ChartQA (arXiv 2203.10244): a number within 5 % of the right one, or the same words."""
    output, answer = results[0].strip(), row["answer"]
    value, right = number_of(output), number_of(answer)
    if value is not None and right:  # of zero there are no percents
        return {"relaxed_accuracy": float(abs(value - right) / abs(right) <= 0.05)}
    return {"relaxed_accuracy": float(output.lower() == answer.lower())}


def number_of(text: str) -> float | None:
    """The number that a text is, in percent or not."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def score_mmbench(row: Row, results: Sequence[str]) -> dict[str, Any]:
    """MMBench (arXiv 2307.06281), without a judge: the one letter that the answer names, or the
    one option whose text is in it."""
    correct = letter_in(results[0], options_of(row)) == row["answer"]
    verdict = {"question": int(row["index"]) % CIRCLE, "correct": correct}
    return {"circular": verdict, "accuracy": float(correct)}


def letter_in(output: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option that an answer names; None if there is none, or several."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", output).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    by_text = [key for key, option in options.items() if str(option).lower() in output.lower()]
    return by_text[0] if len(by_text) == 1 else None


def copies_of(rows: ParquetRows) -> list[int]:
    """Of each row of MMBench the question, whose copies are scored together."""
    return [int(index) % CIRCLE for index in rows["index"]]


def all_copies(verdicts: Sequence[Row]) -> float:
    """Share of the questions of which every copy, with its options turned, is answered rightly."""
    questions = group_by(verdicts, "question").values()
    return fmean(all(copy["correct"] for copy in copies) for copies in questions)


def group_by(verdicts: Sequence[Row], key: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict[key], []).append(verdict)
    return groups
