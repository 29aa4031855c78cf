"""The benchmarks of an evaluation as lm-eval's tasks: with their questions, their metric, and twins
that show grey images."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from PIL import Image

from sts.pipeline.config import Config, ConfigError, EvaluateConfig
from sts.pipeline.data.benchmark_sets import (
    HOW,
    files_of,
    folder_of,
    mirrored_files,
    noted,
    version,
    write_note,
)
from sts.pipeline.data.origins import stamp
from sts.pipeline.data.source import DataError, mirror_folder
from sts.pipeline.files import sha256_json
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
    benchmarks = {}
    for name in options.benchmarks:
        file = registry.file_of(name)
        if file is None:
            raise _refused("benchmarks", name, f"one of {registry.accepted_names()}")
        of_task = dict(metadata)
        if registry.hub_set_of(name):
            note = noted(name, data)
            folder = note["folder"] if note else folder_of(name, mirror, split)
            of_task |= {"folder": str(folder), "instead": split}
        # of that folder alone: indexing all of lm-eval's tasks takes long
        manager = TaskManager(include_defaults=False, include_path=file.parent, metadata=of_task)
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
    sets = [*dict.fromkeys(task["dataset_path"] for task in entries if "dataset_path" in task)]
    root = _mirror_of(sets, mirror)
    try:
        # `datasets` takes a folder of the set's name where we stand, before it asks the hub
        with _cache_of(root, sets), contextlib.chdir(root or "."):
            loaded = manager.load(inner)
    except (OSError, ValueError, RuntimeError) as error:
        if not sets:  # the error is our own: prepared data
            raise
        [path, *_] = sets
        raise DataError(
            f"benchmark {name}: its data set {', '.join(sets)} can't be had: {error}. "
            f"{HOW.format(path=path)}; or set HF_HOME to the folder of a cache that it was loaded "
            "into"
        ) from error
    return next(iter((loaded["groups"] or loaded["tasks"]).values()))


def _mirror_of(sets: Sequence[str], mirror: str | None) -> Path | None:
    """The mirror, if it has all these sets."""
    root = mirror_folder(mirror) if sets else None
    return root if root and all((root / path).is_dir() for path in sets) else None


@contextlib.contextmanager
def _cache_of(root: Path | None, sets: Sequence[str]) -> Iterator[None]:
    """`datasets` keeps what it reads by the name of a set, also when the files of a folder have
    changed: for each state of a mirror it gets a cache of its own."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(before).absolute()
    if root:
        files = [file for path in sets for file in mirrored_files(root, path)]
        stamps = [(str(file), *stamp(file)) for file in files]
        datasets.config.HF_DATASETS_CACHE /= Path("mirrors", sha256_json(stamps)[:16])
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def fetch(config: Config, name: str, out: str | Path) -> None:
    """Have the data of a benchmark of the hub here, and note them in the manifest `out`. Raises
    DataError, ConfigError as an evaluation of it."""
    options = config.evaluate.model_copy(update={"benchmarks": [name]})
    [benchmark] = load_benchmarks(options, [], config.data.mirror).values()
    metric_of(name, benchmark, options)  # what the plan can't know where lm-eval isn't installed
    write_note(name, *_files_of(name, benchmark, config.data.mirror), out)


def version_of(
    name: str, benchmark: Benchmark, data: Sequence[str | Path], mirror: str | None
) -> str:
    """A hash of the data that a benchmark asks: of the split's file, or as its manifest says, or
    else of the files on the hub or in a mirror."""
    if registry.dataset_of(name):
        [file] = [Path(entry["filename"]) for entry in benchmark.eval_docs.cache_files]
        return version(file.parent, [file])
    note = noted(name, data)
    return note["sha256"] if note else version(*_files_of(name, benchmark, mirror))


def _files_of(name: str, benchmark: Benchmark, mirror: str | None) -> tuple[Path, list[Path]]:
    """The folder and the files that a benchmark of the hub is read from."""
    if registry.hub_set_of(name):
        folder = folder_of(name, mirror)
        return folder, files_of(name, folder)
    sets = [*dict.fromkeys(task.DATASET_PATH for task in tasks_of(benchmark))]
    if root := _mirror_of(sets, mirror):
        return root, [file for path in sets for file in mirrored_files(root, path)]
    caches = (task.eval_docs.cache_files for task in tasks_of(benchmark))
    files = [Path(entry["filename"]) for cache in caches for entry in cache]
    return Path(datasets.config.HF_DATASETS_CACHE).absolute(), files


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
