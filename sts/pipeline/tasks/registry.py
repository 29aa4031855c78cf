"""Which benchmarks there are: a task file of ours each, and the tasks and groups of lm-eval.

Only yaml is needed and lm-eval is not imported, so that the workflow can ask in any environment.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

TASKS = Path(__file__).parent
OF_LM_EVALS = {"mmmu_val": 3_600_000_000}  # bytes of their data sets; our guess


def ours() -> tuple[str, ...]:
    """Names of our benchmarks: those of the task files that do not begin with _."""
    return tuple(sorted(file.stem for file in TASKS.glob("[!_]*.yaml")))


def file_of(name: str) -> Path | None:
    """The task file of a benchmark, ours or lm-eval's; None if there is none."""
    return TASKS / f"{name}.yaml" if name in ours() else _lm_evals(name)


def exists(name: str) -> bool:
    """Whether there is such a benchmark; without lm-eval, whether there can be."""
    return file_of(name) is not None or find_spec("lm_eval") is None


def accepted_names() -> str:
    """What a benchmark may be, for errors."""
    return (
        f"{', '.join(ours())} (the files of sts/pipeline/tasks), or the name of a task or group of "
        "lm-eval that shows images, such as mmmu_val"
    )


def dataset_of(name: str) -> str | None:
    """The data set that a benchmark's task file names (dataset_kwargs.dataset), which is prepared
    here; None where they come from the hub."""
    return _value(name, "dataset_kwargs", "dataset")


def questions_of(name: str) -> int | None:
    """How many questions a benchmark of ours on the hub says that it has; None for others."""
    return _value(name, "metadata", "questions")


def hub_set_of(name: str) -> dict[str, Any]:
    """Of a benchmark of ours on the hub: `path`, `revision`, `name`, `split` and `images` of its
    data set, as `official.load` takes them; nothing of others."""
    content = read(TASKS / f"{name}.yaml") if name in ours() else {}
    kwargs = content.get("dataset_kwargs") or {}
    return kwargs if "path" in kwargs else {}


def is_of_hub(name: str) -> bool:
    """Whether it is a benchmark whose data come from the hub, and not a set prepared here."""
    return exists(name) and dataset_of(name) is None


def bytes_of(*names: str) -> int:
    """Bytes of the files on the hub that hold the data of benchmarks, each file once; of one that
    says nothing, and of those prepared here, none."""
    sizes = {}
    for name in names:
        hub_set = hub_set_of(name)
        files = (hub_set["path"], hub_set.get("name"), hub_set["split"]) if hub_set else name
        sizes[files] = _value(name, "metadata", "bytes") or OF_LM_EVALS.get(name, 0)
    return sum(sizes.values())


def metrics_of(name: str) -> list[str]:
    """The metrics that a benchmark's task file lists; none where it leaves them to another."""
    file = file_of(name)
    try:
        content = read(file) if file else {}
    except OSError:  # lm-eval's own ways to include
        return []
    listed = content.get("metric_list") or content.get("aggregate_metric_list") or []
    return [metric["metric"].rpartition(".")[2] for metric in listed]  # a function's own name


def _value(name: str, block: str, key: str) -> Any:
    """A value in the task file of a benchmark of ours, if it is one and there is one."""
    content = read(TASKS / f"{name}.yaml") if name in ours() else {}
    return (content.get(block) or {}).get(key)


def sources(names: Iterable[str]) -> list[Path]:
    """The files of ours that the questions and scores of these benchmarks are made of."""
    files = [TASKS / f"{name}.yaml" for name in names if name in ours()]
    parts = {part for file in files for part, _ in _parts(file)}
    texts = "".join(part.read_text(encoding="utf-8") for part in parts)
    modules = {TASKS / f"{module}.py" for module in re.findall(r"!function (\w+)\.", texts)}
    code = "".join(module.read_text(encoding="utf-8") for module in modules)
    inner = re.findall(r"from sts\.pipeline\.tasks\.(\w+) import", code)
    return sorted({*parts, *modules, *(TASKS / f"{module}.py" for module in inner)})


@cache
def read(file: Path) -> dict[str, Any]:
    """A task file with what it includes; its functions stay names."""
    return {key: value for _, part in _parts(file) for key, value in part.items()}


def _parts(file: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files that a task file includes, and at last itself, with what each says."""
    content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    included = content.pop("include", [])
    for name in [included] if isinstance(included, str) else included:
        yield from _parts(file.parent / name)
    yield file, content


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Takes lm-eval's tag `!function` too; libyaml's, if it is there, is ten times as fast."""


_Loader.add_constructor("!function", lambda loader, node: node.value)


@cache
def _lm_evals(name: str) -> Path | None:
    """lm-eval's file that defines this task or group, by its text: its own index takes 15 s."""
    spec = find_spec("lm_eval")
    if spec is None:
        return None
    root = Path(*spec.submodule_search_locations, "tasks")
    defines = re.compile(rf"^(task|group): *(['\"]?){re.escape(name)}\2 *(#.*)?$", re.MULTILINE)
    # a folder is named as the tasks in it begin
    likely = [folder for folder in root.iterdir() if name.startswith(folder.name)]
    files = (file for folder in [*likely, root] for file in sorted(folder.rglob("*.yaml")))
    return next((f for f in files if defines.search(f.read_text(encoding="utf-8"))), None)
