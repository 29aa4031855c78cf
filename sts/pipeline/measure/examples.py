"""Questions of all benchmarks with their pictures and what two runs answered, as a small result
file; over each picture the tokens that every compressor keeps.

    python -m sts examples --config results/mini/configs/dense.yaml \
        --backbone results/mini/backbone/dense.json --data data/mini/scenes/manifest.json \
        --runs results/mini/runs/dense/seed0/eval.json results/mini/runs/sts/seed0/eval.json \
        --out results/mini/examples.json

Nothing is asked again: answers are those that the evaluations kept.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from sts.pipeline.config import Config
from sts.pipeline.data.pictures import rgb
from sts.pipeline.evaluate.loading import Benchmark, load_benchmarks, tasks_of
from sts.pipeline.files import SEAL, sha256_json, write_text_atomic
from sts.pipeline.measure.kept_tokens import KEEP, View, drawable_kinds, viewer, weights
from sts.pipeline.train.model import read_backbone

COUNT = 24  # questions
Row = dict[str, Any]  # what an evaluation keeps of a question (evaluate/scoring.py)
Pair = tuple[Row, Row]


def examples(
    config: Config,
    backbone: str | Path,
    data: Sequence[str | Path],
    runs: tuple[str | Path, str | Path],
    out: str | Path,
) -> dict[str, Any]:
    """Choose COUNT questions, as many of each benchmark, and write and return the result.

    Args:
        config: Of the first run.
        backbone: Manifest of a vision tower.
        data: Manifests of the data sets that the benchmarks ask.
        runs: The evaluations (eval.json) of two runs.
        out: File to write.

    Returns:
        `runs`; the `keep` ratio; `agreement`, of each benchmark how many questions both answered
        (`questions`) and which run alone is right, or nearer (`first`, `second`); `questions`, the
        ones with different answers first: `benchmark`, `question`, `target`, `answers`, `correct`,
        `picture` (what the tower sees, as WebP in base64), `grid` of patches [rows, columns],
        `kept`: kind -> of each patch the output that it weighs most in, -1 for none. No `questions`
        where the evaluations kept no answers.
    """
    names = config.evaluate.benchmarks
    pairs = {name: answered(name, runs) for name in names}
    result: dict[str, Any] = {
        "runs": [str(Path(run).parent) for run in runs],
        "keep": KEEP,
        "agreement": {name: _agreement(of_name) for name, of_name in pairs.items() if of_name},
    }
    quotas = _shares(COUNT, [name for name in names if pairs[name]])
    chosen = [(name, pair) for name, n in quotas.items() for pair in choose(pairs[name], n)]
    chosen.sort(key=lambda item: not _is_different(item[1]))
    result["questions"] = []
    if chosen:
        view = viewer(read_backbone(backbone))
        benchmarks = load_benchmarks(config.evaluate, data, config.data.mirror)
        entries = (
            _entry(name, pair, benchmarks[name], view, seed)
            for seed, (name, pair) in enumerate(chosen)
        )
        result["questions"] = [entry for entry in entries if entry]
    result[SEAL] = sha256_json(result)
    write_text_atomic(out, json.dumps(result, separators=(",", ":")) + "\n")
    return result


def answered(benchmark: str, runs: Sequence[str | Path]) -> list[Pair]:
    """The questions that two runs both answered, with what each said."""
    files = [Path(run).parent / "samples" / f"{benchmark}.jsonl" for run in runs]
    if not all(map(Path.exists, files)):  # of before answers were kept, or not copied
        return []
    first, second = (
        {row["id"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
        for file in files
    )
    return [(row, second[id]) for id, row in first.items() if id in second]


def choose(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The first `count` in the order of the questions, in turn of those of which the second run
    alone is right, the first alone, and neither is more right but the answers differ; then the
    others."""
    better = [pair for pair in pairs if pair[1]["correct"] > pair[0]["correct"]]
    worse = [pair for pair in pairs if pair[1]["correct"] < pair[0]["correct"]]
    rest = [pair for pair in pairs if pair[1]["correct"] == pair[0]["correct"]]
    different = [pair for pair in rest if _is_different(pair)]
    turns = zip_longest(better, worse, different)
    ordered = [pair for turn in turns for pair in turn if pair]
    return [*ordered, *(pair for pair in rest if not _is_different(pair))][:count]


def _is_different(pair: Pair) -> bool:
    return _text(pair[0]) != _text(pair[1])


def _text(row: Row) -> str:
    return str(row["output"]).strip()


def _agreement(pairs: Sequence[Pair]) -> dict[str, int]:
    differences = [second["correct"] - first["correct"] for first, second in pairs]
    return {
        "questions": len(pairs),
        "first": sum(difference < 0 for difference in differences),
        "second": sum(difference > 0 for difference in differences),
    }


def _shares(count: int, names: Sequence[str]) -> dict[str, int]:
    """`count` over names, as evenly as whole numbers allow."""
    ends = [count * i // max(1, len(names)) for i in range(len(names) + 1)]
    return {name: ends[i + 1] - ends[i] for i, name in enumerate(names)}


def _entry(
    name: str,
    pair: Pair,
    benchmark: Benchmark,
    view: Callable[[Image.Image], View],
    seed: int,
) -> dict[str, Any] | None:
    """A question with its picture; None if it does not have one picture. seed: of random kinds."""
    pictures = _pictures(benchmark, pair[0]["id"])
    if len(pictures) != 1:
        return None
    seen, grid, features, scores = view(rgb(pictures[0]))
    webp = io.BytesIO()
    seen.save(webp, format="WEBP", quality=90)
    outputs = {
        kind: weights(kind, features, grid, scores, seed)
        for kind in drawable_kinds(scores is not None)
    }
    return {
        "benchmark": name,
        "question": pair[0]["question"],
        "target": str(pair[0]["target"]),
        "answers": [_text(row) for row in pair],
        "correct": [float(row["correct"]) for row in pair],
        "picture": base64.b64encode(webp.getvalue()).decode(),
        "grid": grid,
        "kept": {kind: _owners(of_kind, grid) for kind, of_kind in outputs.items()},
    }


def _pictures(benchmark: Benchmark, id: str) -> list[Image.Image]:
    """The pictures of a question by its id in an evaluation."""
    for task in tasks_of(benchmark):
        docs = task.eval_docs
        if "id" in docs.features:
            # else a Dataset decodes the pictures, too; of the hub's sets a column is read alone
            alone = docs.select_columns("id") if hasattr(docs, "select_columns") else docs
            ids = alone["id"]
            place = next((i for i, other in enumerate(ids) if other == id), None)
        else:
            of_task, _, number = id.rpartition("/")
            place = int(number) if of_task == task.task_name else None
        if place is not None:
            return list(task.doc_to_image(docs[place]))
    return []


def _owners(outputs: Sequence[Sequence[tuple[int, float]]], grid: tuple[int, int]) -> list[int]:
    """Of each patch the output that it weighs most in, -1 for a patch that is in none."""
    owners, most = [-1] * (grid[0] * grid[1]), [0.0] * (grid[0] * grid[1])
    for output, tokens in enumerate(outputs):
        for token, weight in tokens:
            if weight > most[token]:
                owners[token], most[token] = output, weight
    return owners
