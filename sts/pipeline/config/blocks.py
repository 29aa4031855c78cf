"""The blocks of a configuration: data, model, evaluation, timing, and all of them together."""

import math
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field, model_validator

from sts.checks import NotAccepted, expect
from sts.pipeline.config.base import (
    CODE,
    Block,
    Count,
    Distinct,
    Line,
    Name,
    Seed,
    Share,
    datasets,
    up_to,
)
from sts.pipeline.config.identity import ALWAYS, Neutral
from sts.pipeline.config.stages import BACKBONE, StageConfig, Stages
from sts.pipeline.tasks import registry as benchmarks


class ScenesConfig(Block):
    """Size of the generated data set."""

    seed: Seed = 0
    """Seed of the scenes; every split draws from its own part of the seed space."""
    align: Count = 2400
    """Images of the align split."""
    instruct: Count = 2720
    """Images of the instruct split."""
    validation: Count = 32
    """Questions of each skill on which the held-out loss is measured."""
    test: Count = 480
    """Questions of each benchmark."""


class CustomConfig(Block):
    """A user's own data, a file of rows and the folder its image paths start from, or a set of the
    hub with images, and texts, conversations, or a question and an answer."""

    json_file: Line | None = Field(alias="json", default=None)
    """JSON list of {id, image, conversations} or of {id, image, question, answer}; .jsonl: one a
    line."""
    csv: Annotated[Line | None, Neutral(None)] = None
    """CSV or TSV file with a line of names: image, question, answer, or also id."""
    images: Line | None = None
    """Folder that the image paths are relative to."""
    outside: Annotated[bool, Neutral(False)] = False
    """Whether image paths may lead out of `images`: absolute, by .., or by a link."""
    hub: Line | None = None
    """Name of a set of the hub, or a folder with its files."""
    files: Line = "**/*.parquet"
    """Which of its Parquet files, such as vqav2/*.parquet."""
    revision: Line = "main"
    """Its branch, tag or commit."""
    split: Literal["align", "instruct"] = "instruct"
    """Stage that trains on it."""

    @model_validator(mode="after")
    def _check(self) -> "CustomConfig":
        is_single = sum(map(bool, (self.json_file, self.csv, self.hub))) == 1
        expect(is_single, "custom.json", self.json_file, "json or csv with images, or else hub")
        has_images = bool(self.hub or self.images)
        expect(has_images, "custom.images", self.images, f"a folder, beside {self.table[0]}")
        return self

    @property
    def table(self) -> tuple[str, str | None]:
        """The key of the file of rows, and the file."""
        return ("csv", self.csv) if self.csv else ("json", self.json_file)


class DataConfig(Block):
    """Where data come from and when preparation gives up."""

    mirror: Line | None = None
    """Folder with copies of the source files; the variable STS_DATA_MIRROR wins over it."""
    max_bad_share: Share = 0.01
    """Share of rejected rows above which preparation stops."""
    max_text_chars: up_to(10**6) = 4000
    """Characters of one turn above which a row is rejected."""
    threads: Annotated[up_to(1000), Neutral(ALWAYS)] = 1
    """Threads that decode and check the images of a set."""
    rows: dict[str, Count] = {}
    """Data set -> rows that are taken of each training split, always the same; all of others."""
    folders: dict[str, Line] = {}
    """Data set of those that are fetched -> folder where its files lie already."""
    scenes: ScenesConfig = ScenesConfig()
    """The embedded data set."""
    custom: dict[Name, CustomConfig] = {}
    """Name -> the user's own data."""


class ModelConfig(Block):
    """The model that training starts from."""

    family: Annotated[Literal["joined", "whole"], Neutral("joined")] = "joined"
    """A vision tower and a language model joined by a fresh projector (LLaVA), or `checkpoint`."""
    checkpoint: Annotated[Line | None, Neutral(None)] = None
    """Folder or hub id, such as owner/name@revision, of any image-text-to-text model with its
    processor, where family: whole."""
    trust_remote_code: Annotated[bool, Neutral(False)] = False
    """Whether Python files beside the model's weights may run."""
    fresh: Annotated[
        list[Literal["projector", "language_model", "vision_tower"]], Distinct, Neutral([])
    ] = []
    """Parts of `checkpoint` that are drawn anew from the run's seed."""
    template: Annotated[Literal["own", "v1"], Neutral("own")] = "own"
    """Chat template of joined parts: the language model's, if it has none ours; or LLaVA-1.5's."""
    image_aspect_ratio: Annotated[Literal["own", "pad"], Neutral("own")] = "own"
    """How pictures of joined parts become squares: as the tower's processor has it (CLIP's cuts the
    centre out), or padded in its mean colour, as in LLaVA-1.5."""
    backbone: Literal["shipped", "pretrained"] = "shipped"
    """Parts that are joined: of this repository, or a folder or hub id (owner/name@revision) for
    each."""
    vision: Line | None = None
    """Vision tower of `pretrained`."""
    language: Line | None = None
    """Language model of `pretrained`."""
    vision_feature_layer: Annotated[int, Ge(-1000), Le(1000)] = -2
    """Layer of the vision tower whose features are projected."""
    layers: up_to(1000) = 12
    """Decoder layers of the language model; what skip rates are checked against."""
    layers_share: Annotated[float, Gt(0), Le(1), Neutral(1.0)] = 1.0
    """Share of them that joined parts keep, evenly spaced with the first and the last; the others
    are taken out for good."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        """Refuse values that are fine alone and not together."""
        if self.family == "whole":
            accepted = "1.0 where model.family is whole"
            expect(self.layers_share == 1, "model.layers_share", self.layers_share, accepted)
            accepted = "a hub id or folder where model.family is whole"
            expect(self.checkpoint is not None, "model.checkpoint", None, accepted)
            return self
        accepted = "null where model.family is joined"
        expect(self.checkpoint is None, "model.checkpoint", self.checkpoint, accepted)
        accepted = "[] where model.family is joined: the projector is fresh"
        expect(not self.fresh, "model.fresh", self.fresh, accepted)
        for key in ("vision", "language"):
            is_there = self.backbone == "shipped" or getattr(self, key) is not None
            accepted = "a hub id or folder where model.backbone is pretrained"
            expect(is_there, f"model.{key}", None, accepted)
            value = getattr(self, key) if self.backbone == "shipped" else None
            accepted = "null where model.backbone is shipped (pretrained takes it)"
            expect(value is None, f"model.{key}", value, accepted)
        return self

    @property
    def kept_layers(self) -> list[int]:
        """The decoder layers that the run has, by their number in the language model."""
        count = max(1, round(self.layers_share * self.layers))
        return [round(i * (self.layers - 1) / max(1, count - 1)) for i in range(count)]

    @property
    def sources(self) -> list[str]:
        """Folders or hub ids that are not ours: a whole checkpoint, or both pretrained parts."""
        of_parts = (self.vision, self.language) if self.backbone == "pretrained" else ()
        sources = (self.checkpoint,) if self.family == "whole" else of_parts
        return [source for source in sources if source]


class EvaluateConfig(Block):
    """How every finished run is measured."""

    benchmarks: Annotated[list[Line], Field(min_length=1), Distinct] = [
        "existence", "colour", "shape", "counting", "relation", "text", "chart", "composition",
    ]  # fmt: skip
    """Names of benchmarks: files of sts/pipeline/tasks, image tasks or groups of lm-eval."""
    metrics: Annotated[dict[str, str], Neutral({})] = {}
    """Benchmark -> metric that is its score, where it is not the first one of its task."""
    batch_tokens: up_to(10**7) = 8192
    """Tokens of questions answered at once, padding and visual tokens counted, or one question; in
    bf16 scores depend on it."""
    processes: Annotated[up_to(10_000), Neutral(ALWAYS)] = 1
    """Processes (GPUs of one machine) that share the questions."""
    blind: Share = 0.25
    """Share of the questions that are also asked with a grey image; 0: none."""
    max_new_tokens: up_to(10_000) = 4
    """Longest answer to our own questions; lm-eval's tasks have their own limits."""
    limit: up_to(10**7) | None = None
    """At most this many questions of each benchmark, always the same ones; null: all."""


REPEATS = 3  # timed steps of a variant at a point; their median counts


class BenchConfig(Block):
    """How the time of a training is measured."""

    points: up_to(1000) = 8
    """Places in each stage where a step is timed."""
    warmup: Annotated[int, Ge(0), Le(1000)] = 1
    """Steps before each that don't count."""

    @property
    def steps(self) -> int:
        """Steps that the timing takes of each stage of a run, in one process; one at each point
        is split into its parts."""
        return self.points * (self.warmup + REPEATS + 1)


class Config(Block):
    """All values of one run."""

    scale: Name = "mini"
    """Names the folders results/<scale> and data/<scale>."""
    seeds: Annotated[list[Seed], Field(min_length=1), Distinct] = [0, 1, 2]
    """One run for each."""
    data: DataConfig = DataConfig()
    """Sources and preparation."""
    model: ModelConfig = ModelConfig()
    """Vision tower and language model."""
    stages: Stages
    """Name -> training stage, one after the other; null takes a stage out."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Benchmarks."""
    bench: BenchConfig = BenchConfig()
    """Timing."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        """Refuse values of different blocks that do not go together."""
        sets = (*datasets(), *self.data.custom)
        for name in self.data.custom:
            taken = (*datasets(), *self.hub_benchmarks())
            accepted = f"another name than those of the package: {', '.join(taken)}"
            expect(name not in taken, f"config.data.custom.{name}", name, accepted)
        published = [n for n, file in datasets().items() if file.is_relative_to(CODE / "pipeline")]
        for key, names in {"rows": sets, "folders": published}.items():
            for name, value in getattr(self.data, key).items():
                accepted = f"a key that is one of {', '.join(names)}"
                expect(name in names, f"config.data.{key}.{name}", value, accepted)
        for name, stage in self.stages.items():
            for source in stage.data:
                accepted = f"one of {', '.join(sets)}"
                expect(source in sets, f"config.stages.{name}.data", source, accepted)
                custom = self.data.custom.get(source)
                if custom and custom.split != stage.split:
                    key, accepted = f"config.data.custom.{source}.split", f"{stage.split}: stages."
                    raise NotAccepted(key, custom.split, f"{accepted}{name}.data names it")
            try:
                stage.lds.check_layers(len(self.model.kept_layers))
            except NotAccepted as error:
                key = f"config.stages.{name}.lds.{error.name.partition('.')[2]}"
                raise NotAccepted(key, error.value, error.accepted) from None
            rows = self._rows(stage)
            accepted = (
                f"less: a step takes {stage.global_batch} samples (batch_size x processes x "
                f"gradient_accumulation_steps), and {', '.join(stage.data)} has {rows:.0f}"
            )
            key = f"config.stages.{name}.batch_size"
            expect(stage.global_batch <= rows, key, stage.batch_size, accepted)
        for name in self.evaluate.benchmarks:
            key, accepted = "config.evaluate.benchmarks", f"one of {benchmarks.accepted_names()}"
            expect(benchmarks.exists(name), key, name, accepted)
            dataset = benchmarks.dataset_of(name)
            accepted = f"a task file whose dataset is one of {', '.join(sets)}, not {dataset}"
            expect(dataset in (None, *sets), key, name, accepted)
        for name, metric in self.evaluate.metrics.items():
            key, asked = f"config.evaluate.metrics.{name}", self.evaluate.benchmarks
            expect(name in asked, key, metric, f"a key that is one of {', '.join(asked)}")
            metrics = benchmarks.metrics_of(name)
            is_there = not metrics or metric in metrics
            expect(is_there, key, metric, f"one of {', '.join(metrics)}")
        return self

    def _rows(self, stage: StageConfig) -> float:
        """The most rows that the data sets of a stage can have; infinite if nothing says so."""
        generated = {"scenes": getattr(self.data.scenes, stage.split)}
        known = (self.data.rows, generated)
        rows = sum(min(most.get(source, math.inf) for most in known) for source in stage.data)
        return stage.samples * rows

    def stage(self, name: str) -> StageConfig:
        """The block of a stage. Raises KeyError for one that there is not."""
        return self.stages[name]

    @property
    def last(self) -> str:
        """Name of the last stage, whose weights are evaluated."""
        return list(self.stages)[-1]

    def before(self, name: str) -> str:
        """The stage that a stage starts from; BACKBONE for the first."""
        names = [BACKBONE, *self.stages]
        return names[names.index(name) - 1]

    def training_data(self) -> list[str]:
        """Names of the data sets that are trained on, each once."""
        return list(dict.fromkeys(name for block in self.stages.values() for name in block.data))

    def evaluation_data(self) -> list[str]:
        """Names of the prepared data sets that hold the benchmarks, each once."""
        sets = map(benchmarks.dataset_of, self.evaluate.benchmarks)
        return list(dict.fromkeys(filter(None, sets)))

    def hub_benchmarks(self) -> list[str]:
        """Names of the benchmarks whose data come from the hub."""
        return list(filter(benchmarks.is_of_hub, self.evaluate.benchmarks))
