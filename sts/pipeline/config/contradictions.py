"""Values that are fine alone and not together."""

from collections.abc import Iterator
from typing import Any

from sts.checks import NotAccepted
from sts.pipeline.config.base import datasets
from sts.pipeline.config.blocks import Config, ModelConfig
from sts.pipeline.config.stages import StageConfig
from sts.pipeline.tasks import registry as benchmarks

Contradiction = tuple[str, Any, str]  # key, value, accepted


def contradictions(config: Config) -> Iterator[Contradiction]:
    """Each key whose value does not go with the others."""
    sets = (*datasets(), *config.data.custom)
    for name, stage in config.stages.items():
        yield from _of_data(config, name, stage, sets)
        for key, value, accepted in _of_stage(stage, config.model.layers):
            yield f"stages.{name}.{key}", value, accepted
    yield from _of_benchmarks(config, sets)
    for key, value, accepted in _of_model(config.model):
        yield f"model.{key}", value, accepted


def _of_data(
    config: Config, name: str, stage: StageConfig, sets: tuple[str, ...]
) -> Iterator[Contradiction]:
    for source in stage.data:
        if source not in sets:
            yield f"stages.{name}.data", source, f"one of {', '.join(sets)}"
        custom = config.data.custom.get(source)
        if custom and custom.split != stage.split:
            accepted = f"{stage.split}: stages.{name}.data names it"
            yield f"data.custom.{source}.split", custom.split, accepted


def _of_stage(stage: StageConfig, layers: int) -> Iterator[Contradiction]:
    trains = stage.trains
    if len(set(trains)) < len(trains):
        yield "trains", trains, "every part once"
    if {"lora", "language_model"} <= set(trains):
        yield "trains", trains, "lora or language_model: adapters train in its place"
    if stage.processes % stage.nodes:
        yield "nodes", stage.nodes, f"a divisor of its processes, {stage.processes}"
    if isinstance(stage.lr, dict) and set(stage.lr) != set(trains):
        yield "lr", stage.lr, f"a number, or one for each of {', '.join(trains)}"
    try:
        stage.lds.check_layers(layers)
    except NotAccepted as error:
        yield f"lds.{error.name.partition('.')[2]}", error.value, error.accepted


def _of_benchmarks(config: Config, sets: tuple[str, ...]) -> Iterator[Contradiction]:
    for name in config.evaluate.benchmarks:
        dataset = benchmarks.dataset_of(name)
        if not benchmarks.exists(name):
            yield "evaluate.benchmarks", name, f"one of {benchmarks.accepted_names()}"
        elif dataset and dataset not in sets:
            accepted = f"a task file whose dataset is one of {', '.join(sets)}, not {dataset}"
            yield "evaluate.benchmarks", name, accepted
    for name, metric in config.evaluate.metrics.items():
        if not benchmarks.exists(name):
            yield f"evaluate.metrics.{name}", metric, f"a key that is {benchmarks.accepted_names()}"


def _of_model(model: ModelConfig) -> Iterator[Contradiction]:
    if model.family == "whole":
        if model.checkpoint is None:
            yield "checkpoint", None, "a hub id or folder where model.family is whole"
        return
    if model.checkpoint is not None:
        yield "checkpoint", model.checkpoint, "null where model.family is joined"
    if model.fresh:
        yield "fresh", model.fresh, "[] where model.family is joined: the projector is fresh"
    if model.backbone == "pretrained":
        for key in ("vision", "language"):
            if getattr(model, key) is None:
                yield key, None, "a hub id or folder where model.backbone is pretrained"
