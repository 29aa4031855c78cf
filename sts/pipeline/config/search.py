"""What a search may say: workflow/config/search.yaml, its budget and the space of each study."""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic import Discriminator, Field, Tag, model_validator

from sts.checks import expect
from sts.pipeline.config.base import Block, Distinct, Line, Name, Seed, deep_merge, up_to
from sts.pipeline.config.blocks import Config
from sts.pipeline.config.errors import ConfigError, parsed
from sts.pipeline.config.loading import Ablation, load_yaml, resolve


class Range(Block):
    """Numbers to choose from."""

    low: float
    """The least."""
    high: float
    """The highest."""
    log: bool = False
    """Whether their logarithm is drawn evenly."""

    @model_validator(mode="after")
    def _check(self) -> "Range":
        expect(self.low < self.high, "range.high", self.high, f"more than low, {self.low:g}")
        expect(self.low > 0 or not self.log, "range.low", self.low, "above 0 where log is true")
        return self


Choices = Annotated[list[Any], Field(min_length=2)]
Knob = Annotated[
    Annotated[Range, Tag("[range]")] | Annotated[Choices, Tag("[choices]")],
    Discriminator(lambda knob: "[choices]" if isinstance(knob, list) else "[range]"),
]


class Study(Block):
    """A search of the knobs of one ablation."""

    ablation: Name
    """What a trial is apart from its knobs, and whose own values are the first trial."""
    space: Annotated[dict[Line, Knob], Field(min_length=1)]
    """Dotted key of a stage's value -> the values to choose from, or {low, high, log}."""


class SearchConfig(Block):
    """A search: as many trials of each study, all of the same cost."""

    trials: dict[Name, up_to(10_000)]
    """Scale -> trials of each study; a scale that is not there has no search."""
    flops: Annotated[float, Gt(0), Le(10)] | None = None
    """FLOPs of a trial's training / those of the baseline's, by the number of its steps; null: it
    has the steps of its ablation."""
    seeds: Annotated[list[Seed], Field(min_length=1), Distinct] = [0]
    """Runs of a trial, whose losses are averaged; the first may end it early."""
    draws: Annotated[int, Ge(0)] = 0
    """Seed of what is tried."""
    studies: dict[Name, Study]
    """Name -> study."""


def load_search(path: str | Path) -> SearchConfig:
    """Read a search. Raises ConfigError."""
    return parsed(SearchConfig, load_yaml(path), path)


def check_study(
    search: SearchConfig, name: str, file: str, ablations: Mapping[str, Ablation], scale: Config
) -> None:
    """Raise ConfigError for a study, or a scale, that a search doesn't go with."""
    if scale.scale not in search.trials:
        accepted = f"a mapping with {scale.scale} -> trials of each study"
        raise ConfigError(file, "trials", search.trials, accepted)
    if name not in search.studies:
        raise ConfigError(file, "studies", name, f"one of {', '.join(search.studies)}")
    study = search.studies[name]
    if study.ablation not in ablations:
        accepted = f"one of {', '.join(ablations)}"
        raise ConfigError(file, f"studies.{name}.ablation", study.ablation, accepted)
    stages = resolve(scale, ablations[study.ablation]).model_dump()["stages"]
    for key in study.space:
        try:
            value_at(stages, key)
        except (KeyError, TypeError):
            accepted = f"the key of a value, after one of the stages {', '.join(stages)}"
            raise ConfigError(file, f"studies.{name}.space", key, accepted) from None


def value_at(block: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key. Raises KeyError or TypeError if there is none."""
    return reduce(lambda inner, part: inner[part], key.split("."), block)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of dotted keys as mappings in mappings; of two for one place the later counts."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        result = deep_merge(result, value)
    return result
