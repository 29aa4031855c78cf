"""The test questions of a prepared data set, as lm-eval asks for them (`custom_dataset` in
_base.yaml)."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from sts.pipeline.files import listed_file, read_json


def split_file(dataset: str, split: str, manifests: Sequence[str]) -> Path:
    """Arrow file of a split of a prepared data set, whose manifest is one of `manifests`. Raises
    FileNotFoundError that says what is missing, where, and what to do."""
    for manifest in map(Path, manifests):
        content = read_json(manifest)
        if content["dataset"] != dataset:
            continue
        if split not in content["splits"]:
            raise FileNotFoundError(
                f"{manifest}: no split '{split}', but {', '.join(content['splits'])}; correct "
                "the task file, or prepare the data set again"
            )
        return listed_file(manifest, content["splits"][split]["file"])
    searched = ", ".join(map(str, manifests)) or "no data manifest at all"
    raise FileNotFoundError(
        f"no data set '{dataset}', whose split '{split}' is asked, in {searched}; pass its "
        "manifest, or take its benchmarks out of evaluate.benchmarks"
    )


def load(
    dataset: str = "",
    split: str = "",
    manifests: str | Sequence[str] = (),
    config_source: str = "",
    **_: object,
) -> dict[str, Dataset]:
    """{"test": rows with id, image (PIL), question, answer, form} of the `dataset_kwargs` of a task
    file, config_source; the paths of data manifests come from the metadata. Raises ValueError if
    the task file does not say what it asks."""
    if not (dataset and split):
        raise ValueError(
            f"{config_source}: dataset_kwargs must name a prepared data set and a split of it, as "
            "{dataset: scenes, split: test_chart}"
        )
    manifests = [manifests] if isinstance(manifests, str) else manifests
    return {"test": Dataset.from_file(str(split_file(dataset, split, manifests)))}


def prompt(row: dict) -> str:
    """The user's turn: the image first, as in LLaVA's conversations. A function because lm-eval
    compiles a template anew for every question."""
    return f"<image>\n{row['question']}"
