"""Scores of a trained model: lm-eval on its checkpoint, with two controls beside every score.

    python -m sts evaluate --config results/mini/configs/sts.yaml --ablation sts --seed 0 \
        --run results/mini/runs/sts/seed0/instruct.json --data data/mini/scenes/manifest.json \
        --out results/mini/runs/sts/seed0/eval.json

score     the benchmark's metric over the answers of lm-eval's `hf-multimodal`: for our own the
          share that match
blind     the same of a share of the questions, images turned grey: what the words give away
majority  the most frequent answer of each question form: no question-only guess that knows forms
          does better
chance    a uniform guess among the answers of each form
"""

import contextlib
import copy
import gc
import json
import logging
import math
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
import torch
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import _compute_task_aggregations
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.tasks import TaskManager
from PIL import Image
from tqdm import tqdm
from transformers import set_seed

from sts.pipeline.config import Config, ConfigError, EvaluateConfig, config_hash
from sts.pipeline.data.conversation import content_of, end_token, render
from sts.pipeline.data.source import DataError, mirror_folder
from sts.pipeline.files import write_json_atomic
from sts.pipeline.run import provenance, tracking
from sts.pipeline.run.device import lease
from sts.pipeline.tasks import registry as benchmarks

GREY = (128, 128, 128)
BLIND = "_blind"
FEWSHOT_SEED = 1234  # lm-eval's own
AT_ONCE = 2048  # questions whose pictures are in memory together

Benchmark = Task | Group
Id = tuple[str, str]  # a benchmark's name and that of a task of it
log = logging.getLogger(__name__)


def evaluate(
    config: Config,
    ablation: str,
    seed: int,
    run: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
) -> dict[str, Any]:
    """Measure the weights of the run manifest `run`; write and return the result `out`.

    data: manifests of the prepared data sets that the benchmarks ask. Every answer goes to
    samples/<benchmark>.jsonl beside `out`, time and place to eval/provenance.json. Raises
    FileNotFoundError if a manifest, a split or the weights are missing, DataError if the data of
    lm-eval's tasks can't be had, ConfigError for a benchmark or a metric that there is not.
    """
    settings, out = config.evaluate, Path(out)
    trained = json.loads(Path(run).read_text(encoding="utf-8"))
    # before the model: what is missing is said at once
    asked = load_benchmarks(settings, data, config.data.mirror)
    metrics = {name: metric_of(name, item, settings) for name, item in asked.items()}
    if settings.blind:
        asked |= {name + BLIND: blind(item) for name, item in asked.items()}
        metrics |= {name + BLIND: metric for name, metric in metrics.items()}
    key = config_hash(settings, trained["weights_sha256"])
    tracked_rows: list[dict[str, Any]] = []
    with (
        lease(),
        tracking.run(
            f"{ablation}/seed{seed}/evaluate",
            params=settings.model_dump(),
            tags={"ablation": ablation, "seed": seed, "stage": "evaluate",
                  "config": config_hash(config), "weights": trained["weights_sha256"]},
            directory=out.with_suffix("") / key,  # another key is another run
            rows=lambda: tracked_rows,
        ) as tracked,
    ):  # fmt: skip
        threads = config.stage(config.last).threads
        lm = load_model(trained["weights"], settings.batch_size, threads)
        began, cpu_began = time.monotonic(), time.process_time()
        scores, samples = answer(lm, asked, metrics, settings.limit, settings.blind)
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
        for name, rows in samples.items():
            write_jsonl(out.parent / "samples" / f"{name}.jsonl", rows)
        result = {
            "ablation": ablation,
            "seed": seed,
            "weights_sha256": trained["weights_sha256"],
            "lm_eval": lm_eval.__version__,
            "batch_size": settings.batch_size,
            "benchmarks": {
                name: summary(name, scores, samples[name]) for name in settings.benchmarks
            },
        }
        count = sum(map(len, samples.values()))
        write_json_atomic(
            out.with_suffix("") / "provenance.json",
            provenance.collect(config_hash(config))
            | {"seconds": seconds, "cpu_seconds": cpu_seconds, "samples": count},
        )
        write_json_atomic(out, result)
        for name, row in result["benchmarks"].items():
            tracked_rows.append({"step": 0} | {f"{name}.{k}": row[k] for k in row})
        tracked.artifact(out)
    return result


# ---- what is asked ----------------------------------------------------------------------------


def load_benchmarks(
    settings: EvaluateConfig,
    data: Sequence[str | Path],
    mirror: str | None = None,
    split: str | None = None,
) -> dict[str, Benchmark]:
    """lm-eval's task, or group of tasks, of each benchmark, with its questions.

    mirror: folder with copies of hub data sets, `<owner>/<name>` each; STS_DATA_MIRROR wins over
    it. split: of the data set of a benchmark of LLaVA's, instead of the one that is scored. Raises
    FileNotFoundError if prepared data are missing, DataError if those that lm-eval fetches can't be
    had, ConfigError if there is no such benchmark or none that shows images.
    """
    # it warns of defaults of its own choice, once for each task
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = {"manifests": [str(Path(manifest).absolute()) for manifest in data]}
    metadata |= {"instead": split} if split else {}
    found = {}
    for name in settings.benchmarks:
        file = benchmarks.file_of(name)
        if file is None:
            raise _refused("benchmarks", name, f"one of {benchmarks.accepted()}")
        # of that folder alone: indexing all of lm-eval's tasks takes long
        manager = TaskManager(include_defaults=False, include_path=file.parent, metadata=metadata)
        found[name] = _load(name, manager, file, mirror)
        for task in tasks_of(found[name]):
            task.set_fewshot_seed(FEWSHOT_SEED)
            if benchmarks.dataset_of(name):  # our own questions
                limit = {"max_gen_toks": settings.max_new_tokens}
                task.set_config("generation_kwargs", limit, update=True)
    return found


def _load(name: str, manager: TaskManager, file: Path, mirror: str | None) -> Benchmark:
    content = benchmarks.read(file)
    inner = content.get("group") or content["task"]
    described = list(_described(manager, inner))
    for task in described:
        kind = task.get("output_type", "generate_until")
        if not task.get("doc_to_image") or kind != "generate_until":
            accepted = "tasks that show images and ask for words: doc_to_image and output_type: "
            raise _refused("benchmarks", name, f"{accepted}generate_until in {file}")
    sets = dict.fromkeys(task["dataset_path"] for task in described if "dataset_path" in task)
    root = mirror_folder(mirror) if sets else None
    copied = root and all((root / path).is_dir() for path in sets)
    try:
        # `datasets` takes a folder of the set's name where we stand, before it asks the hub
        with contextlib.chdir(root if copied else "."):
            loaded = manager.load(inner)
    except (OSError, ValueError, RuntimeError) as error:
        if not sets:  # the error is our own: prepared data
            raise
        [path, *_] = sets
        raise DataError(
            f"benchmark {name}: its data set {', '.join(sets)} can't be had: {error}. Go online; "
            "or set HF_HOME to the folder of a cache that it was loaded into; or copy it with `hf "
            f"download {path} --repo-type dataset --local-dir MIRROR/{path}` and set "
            "STS_DATA_MIRROR (or data.mirror) to that MIRROR; or take it out of "
            "evaluate.benchmarks"
        ) from error
    return next(iter((loaded["groups"] or loaded["tasks"]).values()))


def _described(manager: TaskManager, name: str) -> Iterator[Mapping[str, Any]]:
    """What the files of a task, or of all tasks of a group, say."""
    entry = manager.task_index.get(name)
    content = entry.cfg if entry else {}
    if "group" not in content:
        yield content
        return
    for part in content["task"]:
        yield from _described(
            manager, part if isinstance(part, str) else part.get("group") or part["task"]
        )


def tasks_of(benchmark: Benchmark) -> list[Task]:
    """The tasks that a benchmark consists of."""
    return benchmark.get_all_tasks() if isinstance(benchmark, Group) else [benchmark]


def metric_of(name: str, benchmark: Benchmark, settings: EvaluateConfig) -> str:
    """The metric that is a benchmark's score: what `evaluate.metrics` says, else the first one.

    Raises ConfigError if the task or group has no such metric, or a lower value of it is better:
    what is kept of the baseline's score would be the wrong way round.
    """
    if isinstance(benchmark, Group):
        known = [item.metric for item in benchmark.aggregate_metric_list or []]
    else:
        known = list(benchmark.aggregation())
    if not known:
        raise _refused("benchmarks", name, "a group with an aggregate, or the tasks in it by name")
    metric = settings.metrics.get(name, known[0])
    if metric not in known:
        raise _refused(f"metrics.{name}", metric, f"one of {', '.join(known)}")
    if not all(task.higher_is_better().get(metric, True) for task in tasks_of(benchmark)):
        raise _refused(f"metrics.{name}", metric, "a metric of which a higher value is better")
    return metric


def blind(benchmark: Benchmark) -> Benchmark:
    """The same questions with grey images of the same sizes."""
    if isinstance(benchmark, Group):
        grey = Group(benchmark.name, benchmark.alias, benchmark.aggregate_metric_list)
        for task in tasks_of(benchmark):
            grey.add(blind(task))
        return grey
    twin = copy.copy(benchmark)
    twin.doc_to_image = lambda doc: [
        Image.new("RGB", image.size, GREY) for image in benchmark.doc_to_image(doc)
    ]
    return twin


def _refused(key: str, value: str, accepted: str) -> ConfigError:
    return ConfigError("the configuration", f"evaluate.{key}", value, accepted)


# ---- asking -----------------------------------------------------------------------------------


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
    return _Model(pretrained=str(weights), device=device, batch_size=batch_size)


class _Model(HFMultimodalLM):
    """Asks as the model was trained, with images of any mode, until its own end of a turn; refuses
    a question that is too long: lm-eval cuts off its beginning, the image with it."""

    def __init__(self, **settings):
        super().__init__(convert_img_format=True, **settings)
        ends, end = self.model.generation_config.eos_token_id, end_token(self.processor)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if end is not None and end not in ends:
            self.model.generation_config.eos_token_id = [*ends, end]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        self.chat_applied = True
        chat = [(message["role"], content_of(message["content"])) for message in chat_history]
        if add_generation_prompt:
            return render(self.processor, chat, ask=True)
        return render(self.processor, chat[:-1], ask=True) + chat_history[-1]["content"]

    def tok_batch_multimodal_encode(
        self, strings: list[str], images: list, left_truncate_len: int | None = None, **settings
    ) -> Mapping[str, torch.Tensor]:
        encoded = super().tok_batch_multimodal_encode(strings, images, **settings)
        length, room = encoded["input_ids"].shape[1], left_truncate_len
        if room is not None and length > room:
            raise ValueError(
                f"a question of {length} tokens and an answer of up to {self.max_length - room} "
                f"don't fit into the {self.max_length} tokens that the model takes: "
                f"{max(strings, key=len)[:80]!r}...; take its benchmark out of evaluate.benchmarks"
            )
        return encoded


def answer(
    lm: LM,
    asked: Mapping[str, Benchmark],
    metrics: Mapping[str, str],
    limit: int | None = None,
    grey: float = 1.0,
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Let a model answer all questions at once, so that batches are full whatever the task.

    limit, grey: as in `drawn`. Returns ({name: {score, stderr, version, metric, share}}, {name:
    [{id, question, form, target, output, correct}]}).
    """
    # known by both names, as one task may be asked by two benchmarks
    tasks = {(name, task.task_name): task for name, b in asked.items() for task in tasks_of(b)}
    rows, raw = defaultdict(list), defaultdict(lambda: defaultdict(list))
    set_seed(0)  # MMMU's task guesses where it finds no letter in the answer
    for id, sample in ask(lm, tasks, drawn(tasks, limit, grey)):
        name, filtered = id[0], sample["filter"]
        if metrics[name] not in sample:
            given = ", ".join(f"{metric},{filtered}" for metric in sample["metrics"])
            raise ValueError(f"{name}: its task gave no {metrics[name]}, but {given}")
        rows[id].append((filtered, _row(tasks[id], sample, metrics[name])))
        for metric in sample["metrics"]:
            raw[id][metric, filtered].append(sample[metric])
    scores, samples = {}, {}
    for name, benchmark in asked.items():
        ids = [id for id in rows if id[0] == name]
        # 1: the error of a mean has a formula; 0 would leave it out
        reckoned = {id: _compute_task_aggregations(tasks[id], raw[id], 1) for id in ids}
        of_tasks = {
            task: {**values, "sample_len": count} for (_, task), (values, count) in reckoned.items()
        }
        if isinstance(benchmark, Group):
            values, version = benchmark.aggregate(of_tasks), benchmark.version
        else:
            [values], version = of_tasks.values(), benchmark.VERSION
        # lm-eval's key is "metric,filter"; of more filters the first counts
        key = next(key for key in values if key.startswith(f"{metrics[name]},"))
        metric, _, filtered = key.partition(",")
        samples[name] = [row for id in ids for kept, row in rows[id] if kept == filtered]
        scores[name] = {
            "score": float(values[key]),
            "stderr": values[f"{metric}_stderr,{filtered}"],
            "version": version,
            "metric": metric,
            "share": all(map(_is_share, [values[key], *(r["correct"] for r in samples[name])])),
        }
    return scores, samples


def ask(
    lm: LM, tasks: Mapping[Id, Task], places: Mapping[Id, Sequence[int]]
) -> Iterator[tuple[Id, dict[str, Any]]]:
    """(task, lm-eval's sample) of every question at these places, task by task. At most AT_ONCE are
    asked together: lm-eval holds the decoded picture of each that it is given."""
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # else a bar for each task's prompts
    lm_eval.evaluator.LMEVAL_HASHMM = False  # else every image is written as PNG four times
    direct = {id: _direct(tasks[id]) for id in places}
    for piece in pieces(places, AT_ONCE):
        gc.freeze()  # `hf-multimodal` collects garbage after every batch: half the time otherwise
        try:
            found = lm_eval.evaluate(
                lm=lm,
                task_dict={"tasks": {id: direct[id] for id in piece}},
                samples=piece,
                apply_chat_template=True,
                bootstrap_iters=0,
            )["samples"]
        finally:
            gc.unfreeze()
        for id in piece:
            direct[id]._instances = None  # the pictures
            yield from ((id, sample) for sample in found[id])


def _direct(task: Task) -> Task:
    """The same task, which gets the questions that are asked by their places; lm-eval decodes all
    that there are, twice, and looks each up in the list of places."""
    twin, docs = copy.copy(task), task.eval_docs
    twin.doc_iterator = lambda *, samples, **_: enumerate(docs[place] for place in samples)
    return twin


def pieces(places: Mapping[Id, Sequence[int]], size: int) -> Iterator[dict[Id, list[int]]]:
    """The same places in the same order, at most `size` of them at a time."""
    piece, room = {}, size
    for id, waiting in places.items():
        while waiting:
            piece[id], waiting = list(waiting[:room]), waiting[room:]
            room -= len(piece[id])
            if not room:
                yield piece
                piece, room = {}, size
    if piece:
        yield piece


def drawn(tasks: Mapping[Id, Task], limit: int | None, grey: float) -> dict[Id, list[int]]:
    """(benchmark, task) -> places of the questions that are asked: `limit` of each benchmark (None:
    all), and of those the share `grey` in its blind twin. They are the first of an order that a
    fixed seed gives, so fewer are a part of more. A task of which none is asked is left out."""
    every = defaultdict(list)
    for id, task in tasks.items():
        every[id[0]] += [(id, place) for place in range(len(task.eval_docs))]
    places = defaultdict(list)
    for name, questions in every.items():
        count = len(questions)
        most = min(limit or count, count)
        most = math.ceil(most * grey) if name.endswith(BLIND) else most
        order = random.Random(count).sample(range(count), count)
        for index in sorted(order[:most]):
            id, place = questions[index]
            places[id].append(place)
    return dict(places)


def _row(task: Task, sample: Mapping[str, Any], metric: str) -> dict[str, Any]:
    doc, value = sample["doc"], sample[metric]
    if isinstance(value, Mapping):  # what an aggregation needs to know
        value = value["correct"]
    return {
        "id": doc.get("id", f"{task.task_name}/{sample['doc_id']}"),
        "question": doc["question"] if "form" in doc else task.doc_to_text(doc),
        "form": doc.get("form"),
        "target": sample["target"],
        "output": sample["filtered_resps"][0],
        "correct": bool(value) if value in (0, 1) else value,
    }


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= value <= 1


# ---- what came out ----------------------------------------------------------------------------


def summary(name: str, scores: Mapping[str, Mapping], rows: Sequence[Mapping]) -> dict[str, Any]:
    """One benchmark's entry of the result. `blind` is None if it was not measured, `majority` and
    `chance` are if the questions have no forms."""
    if not scores[name]["share"]:
        log.warning(
            "%s: %s is not a share of 0 to 1 but kept as it is: compare it with nothing but itself",
            name, scores[name]["metric"],
        )  # fmt: skip
    formed = all(row["form"] is not None for row in rows)
    majority, chance = guesses((r["form"], r["target"]) for r in rows) if formed else (None, None)
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
