"""Scores of a trained model: lm-eval on its checkpoint, with two controls beside every score.

    python -m sts evaluate --config results/mini/configs/sts.yaml --ablation sts --seed 0 \
        --run results/mini/runs/sts/seed0/instruct.json --data data/mini/scenes/manifest.json \
        --out results/mini/runs/sts/seed0/eval.json

score     share of answers that match, from lm-eval's `hf-multimodal`
blind     the same model and questions with every image turned grey: what the words give away
majority  the most frequent answer of each question form: no question-only guess that knows forms
          does better
chance    a uniform guess among the answers of each form
"""

import gc
import json
import logging
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
import torch
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from sts.pipeline import provenance, tracking
from sts.pipeline.config import Config, EvaluateConfig, config_hash
from sts.pipeline.device import lease

TASKS = Path(__file__).parent / "tasks"
BLIND = "_blind"
SCORE, STDERR = "exact_match,none", "exact_match_stderr,none"  # lm-eval's "metric,filter"


def evaluate(
    config: Config,
    ablation: str,
    seed: int,
    run: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
) -> dict[str, Any]:
    """Measure the weights of the run manifest `run`; write and return the result `out`.

    data: manifests of prepared data sets; the first that has a benchmark's split gives it. Every
    answer goes to samples/<benchmark>.jsonl beside `out`, time and place to eval/provenance.json.
    Raises FileNotFoundError if a manifest, a benchmark's split or the weights are missing.
    """
    settings, out = config.evaluate, Path(out)
    trained = json.loads(Path(run).read_text(encoding="utf-8"))
    tasks = load_tasks(settings, data)  # before the model: what is missing is said at once
    key = config_hash(settings, trained["weights_sha256"])
    with (
        lease(),
        tracking.run(
            f"{ablation}/seed{seed}/evaluate",
            params=settings.model_dump(),
            tags={"ablation": ablation, "seed": seed, "stage": "evaluate",
                  "config": config_hash(config), "weights": trained["weights_sha256"]},
            directory=out.with_suffix("") / key,  # another key is another run
        ) as tracked,
    ):  # fmt: skip
        lm = load_model(trained["weights"], settings.batch_size, config.instruct.threads)
        began, cpu_began = time.monotonic(), time.process_time()
        scores, samples = answer(lm, tasks, settings.limit)
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
        for name, rows in samples.items():
            write_jsonl(out.parent / "samples" / f"{name}.jsonl", rows)
        result = {
            "ablation": ablation,
            "seed": seed,
            "weights_sha256": trained["weights_sha256"],
            "lm_eval": lm_eval.__version__,
            "benchmarks": {
                name: summary(name, scores, samples[name]) for name in settings.benchmarks
            },
        }
        count = sum(map(len, samples.values()))
        provenance.write_json_atomic(
            out.with_suffix("") / "provenance.json",
            provenance.collect(config_hash(config))
            | {"seconds": seconds, "cpu_seconds": cpu_seconds, "samples": count},
        )
        provenance.write_json_atomic(out, result)
        for name, row in result["benchmarks"].items():
            tracked.log({f"{name}.{key}": value for key, value in row.items()}, step=0)
        tracked.artifact(out)
    return result


def load_tasks(settings: EvaluateConfig, data: Sequence[str | Path]) -> dict[str, Task]:
    """lm-eval's tasks by name of the benchmark, those with grey images as <benchmark>_blind.

    Raises FileNotFoundError if the data of a benchmark are missing.
    """
    # it warns of defaults of its own choice, once for each task
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = {}
    for ending in ["", BLIND] if settings.blind else [""]:
        metadata = {"data": [str(manifest) for manifest in data], "blind": ending == BLIND}
        # without lm-eval's own tasks: indexing them takes long
        manager = TaskManager(include_defaults=False, metadata=metadata)
        for name in settings.benchmarks:
            [task] = manager.load(str(TASKS / f"{name}.yaml"))["tasks"].values()
            limit = {"max_gen_toks": settings.max_new_tokens}
            task.set_config("generation_kwargs", limit, update=True)
            tasks[name + ending] = task
    return tasks


def load_model(weights: str | Path, batch_size: int, threads: int) -> LM:
    """The checkpoint as lm-eval's `hf-multimodal`, on the GPU if there is one.

    Raises FileNotFoundError if the folder has no checkpoint: a name is never looked up on the hub.
    """
    if not (Path(weights) / "config.json").is_file():
        raise FileNotFoundError(
            f"{weights}: no checkpoint here although the run manifest names it; train the run again"
        )
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HFMultimodalLM(pretrained=str(weights), device=device, batch_size=batch_size)


def answer(
    lm: LM, tasks: Mapping[str, Task], limit: int | None = None
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Let a model answer all questions at once, so that batches are full whatever the task.

    limit: of a task with more questions, so many drawn by a fixed seed. Returns ({name: {score,
    stderr, version}}, {name: [{id, question, form, target, output, correct}]}).
    """
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # else a bar for each task's prompts
    lm_eval.evaluator.LMEVAL_HASHMM = False  # else every image is written as PNG four times
    gc.freeze()  # `hf-multimodal` collects garbage after every batch: half of the time otherwise
    try:
        found = lm_eval.evaluate(
            lm=lm,
            task_dict={"tasks": dict(tasks)},
            samples=limit and {n: _drawn(len(t.eval_docs), limit) for n, t in tasks.items()},
            apply_chat_template=True,
            bootstrap_iters=1,  # the error of a mean has a formula; 0 would leave it out
        )
    finally:
        gc.unfreeze()
    scores = {
        name: {
            "score": float(found["results"][name][SCORE]),
            "stderr": found["results"][name][STDERR],
            "version": found["versions"][name],
        }
        for name in tasks
    }
    return scores, {name: [_row(s) for s in found["samples"][name]] for name in tasks}


def _drawn(count: int, limit: int) -> list[int]:
    """The places of the questions that are asked, of `count`."""
    return sorted(random.Random(count).sample(range(count), min(limit, count)))


def _row(sample: Mapping[str, Any]) -> dict[str, Any]:
    doc = sample["doc"]
    return {
        "id": doc["id"],
        "question": doc["question"],
        "form": doc["form"],
        "target": sample["target"],
        "output": sample["filtered_resps"][0],
        "correct": bool(sample["exact_match"]),
    }


def summary(name: str, scores: Mapping[str, Mapping], rows: Sequence[Mapping]) -> dict[str, Any]:
    """One benchmark's entry of the result; `blind` is None if it was not measured."""
    majority, chance = guesses((row["form"], row["target"]) for row in rows)
    return {
        **scores[name],
        "blind": scores[name + BLIND]["score"] if name + BLIND in scores else None,
        "majority": majority,
        "chance": chance,
        "n": len(rows),
    }


def guesses(questions: Iterable[tuple[str, str]]) -> tuple[float, float]:
    """(majority, chance) of (form, answer) pairs, as shares of all questions.

    Majority knows how often the test set gives each answer of a form, so it bounds from above what
    can be got from the form alone; chance only knows which answers a form has.
    """
    forms: dict[str, Counter] = defaultdict(Counter)
    for form, given in questions:
        forms[form][given.strip().casefold()] += 1
    total = sum(answers.total() for answers in forms.values())
    majority = sum(max(answers.values()) for answers in forms.values()) / total
    chance = sum(answers.total() / len(answers) for answers in forms.values()) / total
    return majority, chance


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, under its name only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, path)
