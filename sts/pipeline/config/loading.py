"""Read scales and ablations, put an ablation's values into a scale, write a configuration."""

import json
import re
from collections.abc import Collection, Hashable, Mapping
from functools import cache, reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Gt, Le
from pydantic import Discriminator, Field, Tag

from sts.checks import NotAccepted, expect
from sts.pipeline.config.base import (
    MINI,
    NAME,
    NAME_ACCEPTED,
    Block,
    Distinct,
    Line,
    Name,
    Seed,
    deep_merge,
)
from sts.pipeline.config.blocks import Config
from sts.pipeline.config.errors import ConfigError, parsed
from sts.pipeline.config.stages import merge_stage

StepsShare = Annotated[float, Gt(0), Le(10)]


class Entry(Block):
    """An entry of the table of ablations."""

    groups: Annotated[list[Name], Distinct] = []
    """Tables that show the ablation."""
    label: Line
    """Name in tables and figures, no other ablation's."""
    source: Literal["baseline", "paper", "ours", "peers"] = "ours"
    """Whose method it is: the head it stands under in tables."""
    seeds: Annotated[list[Seed], Field(min_length=1), Distinct] | None = None
    """Instead of the scale's."""
    steps_share: Annotated[
        Annotated[StepsShare, Tag("[share]")] | Annotated[dict[Name, StepsShare], Tag("[shares]")],
        Discriminator(lambda value: "[shares]" if isinstance(value, Mapping) else "[share]"),
    ] = 1.0
    """Share of the scale's steps that each stage trains, or scale -> share: a control with less
    training, or with more. A scale that is none of several has no table that shows the ablation."""
    time_of: str | None = None
    """Ablation whose time it shall have: `steps_share` is compared with the times measured."""
    relative_to: str | None = None
    """Ablation that retention and cost are relative to in tables; null: the first of the table."""
    overrides: dict[str, dict[str, Any] | None] = {}
    """The values that differ from the scale's, of `model`, `evaluate` or a stage; null takes out a
    stage, and a name that the scale has not adds one."""


class Ablation(Entry):
    """A named delta of a scale."""

    id: str
    """Its name in files and calls."""
    file: str
    """The file that says it."""

    def share_of(self, scale: str) -> float | None:
        """`steps_share` of a scale; None: it has none."""
        share = self.steps_share
        return share.get(scale) if isinstance(share, Mapping) else share


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. ConfigError if a key stands twice, or if it is no YAML mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(path, "the file", error.strerror, "a file that can be read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(path, f"byte {error.start}", error.reason, "text in UTF-8") from None
    content = parse_yaml(text, path)
    if not isinstance(content, dict):
        raise ConfigError(path, "the file", content, "a mapping of keys to values")
    return content


def parse_yaml(text: str, file: str | Path) -> Any:
    """A value in YAML; `file` is what an error names. Raises ConfigError as `load_yaml`."""
    try:
        content = yaml.load(text, Loader)
        json.dumps(content, default=str)  # ValueError for what holds itself
        return content
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        key, problem = f"line {mark.line + 1 if mark else 1}", getattr(error, "problem", str(error))
    except RecursionError:
        key, problem = "the file", "nested without end"
    except NotAccepted as error:
        raise ConfigError(file, error.name, error.value, error.accepted) from None
    except (TypeError, ValueError) as error:  # such as a date of month 13
        key, problem = "the file", str(error)
    raise ConfigError(file, key, problem, "valid YAML")


class Loader(yaml.SafeLoader):
    """PyYAML's, which alone takes the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            expect(isinstance(key, Hashable), f"line {line}", key, "a key that is text")
            twice = f"given twice, in lines {lines.get(key)} and {line}"
            expect(key not in lines, str(key), twice, "every key once")
            lines[key] = line
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """What `Loader` reads as it was: text that looks like a number is quoted."""


# 1e-3, a number without a dot, is text in YAML 1.1
_SCIENTIFIC = re.compile(r"[-+]?\d+[eE][-+]?\d+$")
for _class in (Loader, Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, [*"-+0123456789"])


def load_scale(*paths: str | Path) -> Config:
    """Read and check a scale file, or a resolved configuration. Raises ConfigError.

    What the file doesn't say comes from the mini scale, as with `snakemake --configfile`, and then
    from the blocks' defaults. Of several files a later one overrides, as there.
    """
    content = reduce(deep_merge, map(load_yaml, (MINI, *paths)))
    return validate(content, ", ".join(map(str, paths)))


def load_ablations(path: str | Path) -> dict[str, Ablation]:
    """Read the ablation table, by id; the first entry is the complete baseline.

    Raises ConfigError for what can be seen without a scale; `resolve` checks the overrides.
    """
    ablations: dict[str, Ablation] = {}
    content_by_id = load_yaml(path)
    if not content_by_id:
        raise ConfigError(path, "the file", {}, "at least one ablation, the baseline")
    for id, content in content_by_id.items():
        if not NAME.fullmatch(str(id)):
            raise ConfigError(path, "id", id, NAME_ACCEPTED)
        entry = parsed(Entry, content, path, id)
        ablations[id] = Ablation(id=id, file=str(path), **dict(entry))
    id_by_label: dict[str, str] = {}
    for id, entry in ablations.items():
        other = id_by_label.setdefault(entry.label, id)
        if other != id:
            raise ConfigError(path, f"{id}.label", entry.label, f"another: it is that of {other}")
        same = [base for base in ablations if {*entry.groups} <= {*ablations[base].groups}]
        if entry.time_of not in (None, *ablations):
            accepted = f"an id of this file: {', '.join(ablations)}"
            raise ConfigError(path, f"{id}.time_of", entry.time_of, accepted)
        if entry.relative_to not in (None, *same):
            accepted = f"an id of this file that all its groups show: {', '.join(same)}"
            raise ConfigError(path, f"{id}.relative_to", entry.relative_to, accepted)
    baseline = next(iter(ablations.values()))
    if baseline.steps_share != 1:
        accepted = "1.0: this is the baseline"
        raise ConfigError(path, f"{baseline.id}.steps_share", baseline.steps_share, accepted)
    if baseline.overrides:
        accepted = "{}: the first is the baseline"
        raise ConfigError(path, f"{baseline.id}.overrides", baseline.overrides, accepted)
    return ablations


def resolve(config: Config, ablation: Ablation) -> Config:
    """The scale's configuration with the ablation's values in place. Raises ConfigError."""
    base = config.model_dump(by_alias=True)
    overrides = dict(ablation.overrides)
    benchmarks = (overrides.get("evaluate") or {}).get("benchmarks")
    if isinstance(benchmarks, list):  # the scale's metrics are of its own
        metrics = base["evaluate"]["metrics"].items()
        base["evaluate"]["metrics"] = {name: it for name, it in metrics if name in benchmarks}
    delta = {block: overrides.pop(block) for block in ("model", "evaluate") if block in overrides}
    if ablation.seeds:
        delta["seeds"] = ablation.seeds
    stages = base["stages"]
    for name in _mini_stages() - stages.keys():
        if not {"trains", "like"} & (overrides.get(name) or {}).keys():
            overrides.pop(name, None)  # it says how to train a stage that the scale took out
    _refuse_like(ablation.file, f"{ablation.id}.", overrides, stages)
    for name, block in stages.items():
        share = ablation.share_of(config.scale) or 1.0
        all_steps, block["steps"] = block["steps"], round(block["steps"] * share)
        if not block["steps"]:
            key, accepted = f"{ablation.id}.steps_share", f"more: {name} has {all_steps} steps"
            raise ConfigError(ablation.file, key, ablation.steps_share, accepted)
    for name, block in overrides.items():
        base_stage = stages.get(name) or {}
        stages[name] = None if block is None else merge_stage(base_stage, _paced(base_stage, block))
    return parsed(Config, deep_merge(base, delta), ablation.file, ablation.id)


def _paced(stage: Mapping, override: Mapping) -> Mapping:
    """An override of a stage. One with a share of the samples and no steps gets those that pass
    over them as often as the stage's over its own."""
    share = override.get("samples")
    is_share = isinstance(share, int | float) and 0 < share <= 1
    if not is_share or "steps" in override or "steps" not in stage:
        return override
    return {**override, "steps": max(1, round(stage["steps"] * share / stage["samples"]))}


def validate(content: Mapping, file: str | Path) -> Config:
    """The checked configuration of a scale that was merged with the mini scale; `file` is what an
    error names. Raises ConfigError."""
    stages = content.get("stages")
    if isinstance(stages, dict):
        _refuse_like(file, "stages.", stages, _mini_stages())
    return parsed(Config, content, file)


def _refuse_like(file: str | Path, prefix: str, stages: Mapping, complete: Collection[str]) -> None:
    """Raise ConfigError for `like` in a stage that has all values already."""
    for name in [name for name in stages if name in complete]:
        like = stages[name].get("like") if isinstance(stages[name], dict) else None
        if like is not None:
            accepted = "null: it is of a new stage, this one has its values"
            raise ConfigError(file, f"{prefix}{name}.like", like, accepted)


@cache
def _mini_stages() -> frozenset[str]:
    return frozenset(load_yaml(MINI)["stages"])


def dump(config: Config) -> str:
    """The configuration as YAML that `load_scale` reads: it says all that the mini scale would fill
    in, also the order of the stages, and which of them there are not."""
    content = config.model_dump(by_alias=True)
    for name, block in content["stages"].items():
        block["init"] = config.before(name)
        del block["like"]
    content["stages"] |= dict.fromkeys(sorted(_mini_stages() - content["stages"].keys()))
    return yaml.dump(content, Dumper=Dumper, sort_keys=False)
