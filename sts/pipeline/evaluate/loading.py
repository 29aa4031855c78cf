"""The benchmarks of an evaluation as lm-eval's tasks: with their questions, their metric, and twins
that show grey images."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from PIL import Image

from sts.pipeline.config import ConfigError, EvaluateConfig
from sts.pipeline.data.source import DataError, mirror_folder
from sts.pipeline.tasks import registry

GREY = (128, 128, 128)
FEWSHOT_SEED = 1234  # lm-eval's own

Benchmark = Task | Group


def load_benchmarks(
    options: EvaluateConfig,
    data: Sequence[str | Path],
    mirror: str | None = None,
    split: str | None = None,
) -> dict[str, Benchmark]:
    """lm-eval's task, or group of tasks, of each benchmark, with its questions.

    Args:
        options: the block `evaluate`.
        data: manifests of prepared data sets.
        mirror: folder with copies of hub data sets, `<owner>/<name>` each.
        split: of the data set of a benchmark of LLaVA's, instead of the one that is scored.

    Raises:
        FileNotFoundError: prepared data are missing.
        DataError: data that lm-eval fetches can't be had.
        ConfigError: there is no such benchmark, or it shows no images.
    """
    # it warns of defaults of its own choice, once for each task
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = {"manifests": [str(Path(manifest).absolute()) for manifest in data]}
    metadata |= {"instead": split} if split else {}
    benchmarks = {}
    for name in options.benchmarks:
        file = registry.file_of(name)
        if file is None:
            raise _refused("benchmarks", name, f"one of {registry.accepted_names()}")
        # of that folder alone: indexing all of lm-eval's tasks takes long
        manager = TaskManager(include_defaults=False, include_path=file.parent, metadata=metadata)
        benchmarks[name] = _load(name, manager, file, mirror)
        for task in tasks_of(benchmarks[name]):
            task.set_fewshot_seed(FEWSHOT_SEED)
            if registry.dataset_of(name):  # our own questions
                limit = {"max_gen_toks": options.max_new_tokens}
                task.set_config("generation_kwargs", limit, update=True)
    return benchmarks


def _load(name: str, manager: TaskManager, file: Path, mirror: str | None) -> Benchmark:
    content = registry.read(file)
    inner = content.get("group") or content["task"]
    entries = list(_task_entries(manager, inner))
    for task in entries:
        kind = task.get("output_type", "generate_until")
        if not task.get("doc_to_image") or kind != "generate_until":
            accepted = "tasks that show images and ask for words: doc_to_image and output_type: "
            raise _refused("benchmarks", name, f"{accepted}generate_until in {file}")
    sets = dict.fromkeys(task["dataset_path"] for task in entries if "dataset_path" in task)
    root = mirror_folder(mirror) if sets else None
    is_mirrored = root and all((root / path).is_dir() for path in sets)
    try:
        # `datasets` takes a folder of the set's name where we stand, before it asks the hub
        with contextlib.chdir(root if is_mirrored else "."):
            loaded = manager.load(inner)
    except (OSError, ValueError, RuntimeError) as error:
        if not sets:  # the error is our own: prepared data
            raise
        [path, *_] = sets
        raise DataError(
            f"benchmark {name}: its data set {', '.join(sets)} can't be had: {error}. Go online; "
            "or set HF_HOME to the folder of a cache that it was loaded into; or copy it with `hf "
            f"download {path} --repo-type dataset --local-dir MIRROR/{path}` and set "
            "STS_DATA_MIRROR (or data.mirror) to that MIRROR; or take it out of evaluate.benchmarks"
        ) from error
    return next(iter((loaded["groups"] or loaded["tasks"]).values()))


def _task_entries(manager: TaskManager, name: str) -> Iterator[Mapping[str, Any]]:
    """What the files of a task, or of all tasks of a group, say."""
    entry = manager.task_index.get(name)
    content = entry.cfg if entry else {}
    if "group" not in content:
        yield content
        return
    for part in content["task"]:
        inner = part if isinstance(part, str) else part.get("group") or part["task"]
        yield from _task_entries(manager, inner)


def tasks_of(benchmark: Benchmark) -> list[Task]:
    """The tasks that a benchmark consists of."""
    return benchmark.get_all_tasks() if isinstance(benchmark, Group) else [benchmark]


def metric_of(name: str, benchmark: Benchmark, options: EvaluateConfig) -> str:
    """The metric that is a benchmark's score: what `evaluate.metrics` says, else the first one.

    Raises ConfigError if the task or group has no such metric, or a lower value of it is better:
    what is kept of the baseline's score would be the wrong way round.
    """
    if isinstance(benchmark, Group):
        metrics = [item.metric for item in benchmark.aggregate_metric_list or []]
    else:
        metrics = list(benchmark.aggregation())
    if not metrics:
        raise _refused("benchmarks", name, "a group with an aggregate, or the tasks in it by name")
    metric = options.metrics.get(name, metrics[0])
    if metric not in metrics:
        raise _refused(f"metrics.{name}", metric, f"one of {', '.join(metrics)}")
    if not all(task.higher_is_better().get(metric, True) for task in tasks_of(benchmark)):
        raise _refused(f"metrics.{name}", metric, "a metric of which a higher value is better")
    return metric


def with_grey_images(benchmark: Benchmark) -> Benchmark:
    """The same questions with grey images of the same sizes."""
    if isinstance(benchmark, Group):
        group = Group(benchmark.name, benchmark.alias, benchmark.aggregate_metric_list)
        for task in tasks_of(benchmark):
            group.add(with_grey_images(task))
        return group
    twin = copy.copy(benchmark)
    twin.doc_to_image = lambda doc: [
        Image.new("RGB", image.size, GREY) for image in benchmark.doc_to_image(doc)
    ]
    return twin


def _refused(key: str, value: str, accepted: str) -> ConfigError:
    return ConfigError("the configuration", f"evaluate.{key}", value, accepted)
