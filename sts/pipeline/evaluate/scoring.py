"""From answers to scores: what lm-eval's tasks make of them, and the guesses beside each score."""

import logging
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from hashlib import sha256
from math import isclose, sqrt
from numbers import Real
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate.utils import gather_object
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import _compute_task_aggregations

from sts.pipeline.config import EvaluateConfig
from sts.pipeline.evaluate.asking import BLIND, ask, draw_places
from sts.pipeline.evaluate.loading import Benchmark, tasks_of

log = logging.getLogger(__name__)


def answer(
    lm: LM,
    benchmarks: Mapping[str, Benchmark],
    metrics: Mapping[str, str],
    options: EvaluateConfig,
    folder: Path,
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Let a model answer all questions at once, so that batches are full whatever the task.

    Args:
        lm: the model.
        benchmarks: by name, blind twins among them.
        metrics: the one that is each benchmark's score.
        options: the block `evaluate`.
        folder: as in `ask`.

    Returns:
        {name: {score, stderr, version, metric, share}} and
        {name: [{id, picture, question, form, target, output, correct}]}, where a row has a `note`
        too if its question was not asked; on every process.
    """
    # by both names, as one task may be asked by two benchmarks
    tasks = {(name, task.task_name): task for name, b in benchmarks.items() for task in tasks_of(b)}
    places = draw_places(tasks, options.limit, options.blind)
    answers = []
    for piece, id, sample in ask(lm, tasks, places, options.batch_tokens, folder):
        metric, filtered = metrics[id[0]], sample["filter"]
        if metric not in sample:
            names = ", ".join(f"{name},{filtered}" for name in sample["metrics"])
            raise ValueError(f"{id[0]}: its task gave no {metric}, but {names}")
        if not sample["fits"]:
            sample |= {name: _wrong(sample[name]) for name in sample["metrics"]}
        of_metrics = {name: sample[name] for name in sample["metrics"]}
        answers.append((piece, id, filtered, of_metrics, _row(tasks[id], sample, metric)))
    rows, values = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for _, id, filtered, of_metrics, row in sorted(gather_object(answers), key=itemgetter(0)):
        rows[id].append((filtered, row))
        for name, value in of_metrics.items():
            values[id][name, filtered].append(value)
    scores, samples = {}, {}
    for name, benchmark in benchmarks.items():
        ids = [id for id in rows if id[0] == name]
        # 1: the error of a mean has a formula; 0 would leave it out
        means = {id[1]: _compute_task_aggregations(tasks[id], values[id], 1) for id in ids}
        scores[name], filtered = _score(benchmark, metrics[name], means)
        samples[name] = [row for id in ids for kept, row in rows[id] if kept == filtered]
        shares = [scores[name]["score"], *(row["correct"] for row in samples[name])]
        scores[name]["share"] = all(isinstance(x, Real) and 0 <= x <= 1 for x in shares)
        scores[name]["stderr"] = _error(scores[name], samples[name])
    return scores, samples


def _score(
    benchmark: Benchmark, metric: str, means: Mapping[str, tuple[dict, int]]
) -> tuple[dict[str, Any], str]:
    """A benchmark's score from lm-eval's aggregates of its tasks, by name, with how many samples
    each has; and the filter of answers that it is of."""
    if isinstance(benchmark, Group):
        of_tasks = {task: {**mean, "sample_len": count} for task, (mean, count) in means.items()}
        values, version = benchmark.aggregate(of_tasks), benchmark.version
    else:
        [(values, _)], version = means.values(), benchmark.VERSION
    # lm-eval's key is "metric,filter"; of more filters the first counts
    key = next(key for key in values if key.startswith(f"{metric},"))
    filtered = key.partition(",")[2]
    score = {"score": float(values[key]), "stderr": values[f"{metric}_stderr,{filtered}"]}
    return score | {"version": version, "metric": metric}, filtered


def _error(score: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Standard error of a score over its questions: clustered by picture if it is their mean, else
    lm-eval's, which has none for some metrics."""
    values = [row["correct"] for row in rows]
    if score["share"] and len(rows) > 1 and isclose(fmean(values), score["score"]):
        return clustered_error(values, [row["picture"] for row in rows])
    return score["stderr"] if isinstance(score["stderr"], Real) else None


def clustered_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """Standard error of the mean of values that depend on each other within a cluster
    (Miller, arXiv 2411.00640), with the factor G / (G - 1) for G clusters: of clusters of one
    value it is their standard deviation / sqrt(n). None for a single cluster."""
    mean, sums = fmean(values), Counter()
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    number = len(sums)
    if number < 2:
        return None
    return sqrt(number / (number - 1) * sum(x**2 for x in sums.values())) / len(values)


def _picture(task: Task, doc: Mapping[str, Any]) -> str:
    """A hash of the pixels of a question's images."""
    pixels = sha256()
    for image in task.doc_to_image(doc) or ():
        pixels.update(image.tobytes())
    return pixels.hexdigest()[:16]


def _wrong(value: Any) -> Any:
    """A value of a metric, as of an answer that is wrong: some rules take none for an answer."""
    if isinstance(value, Mapping):  # what an aggregation needs to know
        return {**value, **({"output": None} if "output" in value else {}), "correct": False}
    return type(value)(0) if isinstance(value, Real) else value


def _row(task: Task, sample: Mapping[str, Any], metric: str) -> dict[str, Any]:
    doc, value = sample["doc"], sample[metric]
    if isinstance(value, Mapping):  # what an aggregation needs to know
        value = value["correct"]
    return {
        "id": doc.get("id", f"{task.task_name}/{sample['doc_id']}"),
        "picture": _picture(task, doc),
        "question": doc["question"] if "form" in doc else task.doc_to_text(doc),
        "form": doc.get("form"),
        "target": sample["target"],
        "output": sample["filtered_resps"][0],
        "correct": bool(value) if value in (0, 1) else value,
        **({} if sample["fits"] else {"note": "too long for the model's context: not asked"}),
    }


def summary(name: str, scores: Mapping[str, Mapping], rows: Sequence[Mapping]) -> dict[str, Any]:
    """One benchmark's entry of the result. `blind` is None if it was not measured, `majority` and
    `chance` are if the questions have no forms; `too_long`: questions that were not asked."""
    if not scores[name]["share"]:
        text = "%s: %s is not a share of 0 to 1 but kept as it is: compare it with itself alone"
        log.warning(text, name, scores[name]["metric"])
    too_long = sum("note" in row for row in rows)
    if too_long:
        text = "%s: %d of %d questions don't fit into the model's context: counted as wrong"
        log.warning(text, name, too_long, len(rows))
    majority = chance = None
    if all(row["form"] is not None for row in rows):
        majority, chance = guesses((row["form"], row["target"]) for row in rows)
    blind = scores[name + BLIND]["score"] if name + BLIND in scores else None
    controls = {"blind": blind, "majority": majority, "chance": chance}
    return {**scores[name], **controls, "n": len(rows), "too_long": too_long}


def guesses(questions: Iterable[tuple[str, str]]) -> tuple[float, float]:
    """(majority, chance) of (form, answer) pairs, as shares of all questions. Majority knows how
    often the test set gives each answer of a form, so it bounds from above what can be got from the
    form alone; chance only knows which answers a form has."""
    forms: dict[str, Counter] = defaultdict(Counter)
    for form, answer in questions:
        forms[form][answer.strip().casefold()] += 1
    total = sum(answers.total() for answers in forms.values())
    majority = sum(max(answers.values()) for answers in forms.values()) / total
    chance = sum(answers.total() / len(answers) for answers in forms.values()) / total
    return majority, chance
