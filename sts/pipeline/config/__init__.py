"""Typed configuration: what a scale and an ablation may say, and what every value means.

A *scale* file (`workflow/config/*.yaml`) gives the values that differ from the mini scale, whose
file is complete. An entry of `workflow/ablations.yaml` is a named delta of a scale. Everything is
checked before anything runs; a `ConfigError` names the file, the key, the value and what is
accepted. Only pydantic and yaml are needed, so that the workflow can read it in any environment.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
)

from sts.checks import NotAccepted, expect
from sts.pipeline.config.refusals import ConfigError, key_in_file, parsed
from sts.pipeline.files import sha256_json
from sts.pipeline.tasks import registry as benchmarks
from sts.settings import LDS, VTC

CODE = Path(__file__).resolve().parents[2]
MINI = CODE.parent / "workflow" / "config" / "mini.yaml"
SETS = (CODE / "mini" / "sets", CODE / "pipeline" / "data" / "sets")  # folders of data sets
SPLITS = ("align", "instruct")  # captions, conversations
BACKBONE = "backbone"  # what the first stage starts from
# no names of stages: they have files and keys of their own
RESERVED = (BACKBONE, "model", "evaluate", "eval")
NAME = re.compile(r"[a-z][a-z0-9_]*")


def _scientific(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 (no dot) as text; take it for the number that was meant."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
        return float(value)
    return value


def datasets() -> dict[str, Path]:
    """Name -> file of every data set of the package: what is in `SETS` and doesn't begin with _."""
    files = [file for folder in SETS for file in sorted(folder.glob("*.py"))]
    return {file.stem: file for file in files if file.stem[0] != "_"}


Number = Annotated[float, BeforeValidator(_scientific)]
Share = Annotated[Number, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Index = Annotated[int, Ge(0)]
Rate = Annotated[Number, Gt(0)]
Part = Literal["projector", "language_model", "vision_tower", "lora"]
RateOfParts = Annotated[
    Annotated[Rate, Tag("[one]")] | Annotated[dict[Part, Rate], Tag("[parts]")],
    Discriminator(lambda value: "[parts]" if isinstance(value, Mapping) else "[one]"),
]


def _settings(kind: type) -> Any:
    """The library's own settings as a block of a configuration: a mapping with its fields."""
    names = [field.name for field in fields(kind)]

    def parse(value: Any) -> Any:
        if isinstance(value, kind):
            return value
        known = f"the keys {', '.join(names)}"
        expect(isinstance(value, Mapping), kind.__name__, value, f"a mapping with {known}")
        for key in value:
            expect(key in names, f"{kind.__name__}.{key}", value[key], known)
        return kind(**{key: _scientific(one) for key, one in value.items()})

    return Annotated[kind, PlainValidator(parse), PlainSerializer(asdict)]


VTCSettings, LDSSettings = _settings(VTC), _settings(LDS)


class Block(BaseModel):
    """A mapping with known keys and strict types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )


EVER = object()


@dataclass(frozen=True)
class Neutral:
    """Marks a key by the value at which it does nothing: there it is left out of the identity, so
    that a new key retrains nothing. A default that changes from it does. EVER: no result depends on
    the key."""

    value: Any


def identity(part: Any) -> Any:
    """What a result depends on of a block of a configuration: plain values, without those that are
    neutral."""
    if isinstance(part, Mapping):
        return {key: identity(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [identity(one) for one in part]
    if isinstance(part, BaseModel):
        marks = {name: field.metadata for name, field in type(part).model_fields.items()}
        neutral = {
            name: item.value
            for name, items in marks.items()
            for item in items
            if isinstance(item, Neutral)
        }
    elif is_dataclass(part):
        marks = {field.name: field.metadata for field in fields(part)}
        neutral = {name: mark["neutral"] for name, mark in marks.items() if "neutral" in mark}
    else:
        return part
    values = {name: getattr(part, name) for name in marks}
    return {
        name: identity(value)
        for name, value in values.items()
        if name not in neutral or (neutral[name] is not EVER and value != neutral[name])
    }


class ScenesConfig(Block):
    """Size of the generated data set."""

    seed: Index = 0
    """Seed of the scenes; every split draws from its own part of the seed space."""
    align: Count = 8000
    """Images of the align split."""
    instruct: Count = 8000
    """Images of the instruct split."""
    test: Count = 200
    """Questions of each benchmark."""


class CustomConfig(Block):
    """A user's own data, a LLaVA-style JSON file and the folder its image paths start from, or a
    set of the hub with images, and texts or conversations."""

    json_file: str | None = Field(alias="json", default=None)
    """JSON list of {id, image, conversations}."""
    images: str | None = None
    """Folder that the image paths are relative to."""
    hub: str | None = None
    """Name of a set of the hub, or a folder with its files."""
    files: str = "**/*.parquet"
    """Which of its Parquet files, such as vqav2/*.parquet."""
    revision: str = "main"
    """Its branch, tag or commit."""
    split: Literal["align", "instruct"] = "instruct"
    """Stage that trains on it."""


def _one_kind(custom: CustomConfig) -> CustomConfig:
    given = [key for key, value in (("json", custom.json_file), ("hub", custom.hub)) if value]
    expect(len(given) == 1, "custom.json", custom.json_file, "json and images, or else hub")
    expect(custom.hub or custom.images, "custom.images", custom.images, "a folder, beside json")
    return custom


class DataConfig(Block):
    """Where data come from and when preparation gives up."""

    mirror: str | None = None
    """Folder with copies of the source files; the variable STS_DATA_MIRROR wins over it."""
    max_bad_share: Share = 0.01
    """Share of rejected rows above which preparation stops."""
    max_text_chars: Count = 4000
    """Characters of one turn above which a row is rejected."""
    threads: Annotated[Count, Neutral(EVER)] = 1
    """Threads that decode and check the images of a set."""
    rows: dict[str, Count] = {}
    """Data set -> rows that are taken of each training split, always the same; all of others."""
    folders: dict[str, str] = {}
    """Data set -> folder where its files lie already, for those that are fetched."""
    scenes: ScenesConfig = ScenesConfig()
    """The embedded data set."""
    custom: dict[str, Annotated[CustomConfig, AfterValidator(_one_kind)]] = {}
    """Name -> the user's own data."""


class ModelConfig(Block):
    """The model that training starts from."""

    family: Annotated[Literal["joined", "whole"], Neutral("joined")] = "joined"
    """A vision tower and a language model joined by a fresh projector (LLaVA), or `checkpoint`."""
    checkpoint: Annotated[str | None, Neutral(None)] = None
    """Hub id or folder of any image-text-to-text model, with its processor, where family: whole."""
    fresh: Annotated[list[Literal["projector", "language_model", "vision_tower"]], Neutral([])] = []
    """Parts of `checkpoint` that are drawn anew from the run's seed."""
    template: Annotated[Literal["own", "v1"], Neutral("own")] = "own"
    """Chat template of joined parts: the language model's, if it has none ours; or LLaVA-1.5's."""
    image_aspect_ratio: Annotated[Literal["own", "pad"], Neutral("own")] = "own"
    """How pictures of joined parts become squares: as the tower's processor has it (CLIP's cuts the
    centre out), or padded in its mean colour, as in LLaVA-1.5."""
    backbone: Literal["shipped", "pretrained"] = "shipped"
    """Parts that are joined: of this repository, or a hub id or folder for each."""
    vision: str | None = None
    """Vision tower of `pretrained`."""
    language: str | None = None
    """Language model of `pretrained`."""
    vision_feature_layer: int = -2
    """Layer of the vision tower whose features are projected."""
    layers: Count = 12
    """Decoder layers of the language model; what skip rates are checked against."""

    @property
    def sources(self) -> list[str]:
        """Folders or hub ids that are not ours: a whole checkpoint, or both pretrained parts."""
        of_parts = (self.vision, self.language) if self.backbone == "pretrained" else ()
        wanted = (self.checkpoint,) if self.family == "whole" else of_parts
        return [source for source in wanted if source]


class LoraConfig(Block):
    """Low-rank adapters on the linear layers of the language model's decoder, merged at the end."""

    rank: Count = 16
    """Rank of an adapter."""
    alpha: Annotated[Number, Gt(0)] = 32.0
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: Annotated[Number, Ge(0), Lt(1)] = 0.0
    """Of an adapter's input."""


class StageConfig(Block):
    """One training stage."""

    trains: Annotated[list[Part], Field(min_length=1)]
    """Parts that are trained, the others are frozen; every stage says it."""
    init: str | None = None
    """Stage it comes right after, or `backbone`: it comes first; null: in the order of the list."""
    data: Annotated[list[str], Field(min_length=1)] = ["scenes"]
    """Names of the data sets, mixed."""
    split: Literal["align", "instruct"] | None = None
    """Split of the data sets: captions or conversations; null: that of the stage's name."""
    template: Annotated[Literal["plain"] | None, Neutral(None)] = None
    """Text of a row: the model's chat template, or plain, LLaVA's of alignment: image, caption."""
    steps: Count = 200
    """Optimizer steps."""
    batch_size: Count = 32
    """Samples of one forward pass on one process."""
    gradient_accumulation_steps: Annotated[Count, Neutral(1)] = 1
    """Forward passes of one optimizer step."""
    processes: Annotated[Count, Neutral(1)] = 1
    """Data-parallel processes (GPUs) of one training."""
    nodes: Annotated[Count, Neutral(EVER)] = 1
    """Machines that share the processes evenly; more than one needs Slurm."""
    parallel: Annotated[Literal["ddp", "fsdp2"], Neutral("ddp")] = "ddp"
    """What each process holds: a copy of the model, or a shard of every layer."""
    lr: RateOfParts = 1.0e-3
    """Peak learning rate, one for all or one for each part that is trained; cosine schedule."""
    warmup_ratio: Annotated[Number, Ge(0), Lt(1), Neutral(0.0)] = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[Number, Ge(0), Neutral(0.0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[Number, Gt(0)] = 1.0
    """Norm that gradients are clipped to."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward pass; bf16 by autocast, and fp32 on a CPU that does not compute in bf16."""
    gradient_checkpointing: Annotated[bool, Neutral(False)] = False
    """Recompute activations in the backward pass to save memory."""
    group_by_length: Annotated[bool, Neutral(False)] = True
    """Batches of samples of similar length and the same modality."""
    sorted_batches: Annotated[Count, Neutral(50)] = 50
    """So many batches' samples are sorted by length together; 1: a batch is of any length, as in
    LLaVA, and only its parts for processes and micro-batches are of similar length."""
    max_length: Count = 2048
    """Tokens of a sample; longer ones are cut."""
    checkpoint_every: Count = 100
    """Steps between checkpoints; the trained weights don't depend on it."""
    threads: Count = 1
    """CPU threads of one training; fixed, so that weights don't depend on the number of cores."""
    lora: LoraConfig = LoraConfig()
    """Adapters, where `lora` is among the parts that are trained."""
    vtc: VTCSettings = VTC()
    """Visual token compression."""
    lds: LDSSettings = LDS()
    """Layer skipping."""

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step, over all processes and micro-batches."""
        return self.batch_size * self.gradient_accumulation_steps * self.processes

    @property
    def compresses(self) -> bool:
        """Whether VTC acts."""
        return self.vtc.kind != "none" and self.vtc.keep < 1

    @property
    def skips(self) -> bool:
        """Whether LDS acts."""
        return self.lds.rate > 0

    def identity(self) -> dict[str, Any]:
        """The values that the trained weights depend on. What a stage starts from is not among
        them: its bytes are hashed beside them. Nor is how a step's samples are split: a training
        may change hands."""
        idle = {
            "vtc": not self.compresses,
            "lds": not self.skips,
            "lora": "lora" not in self.trains,
        }
        split = {"batch_size", "gradient_accumulation_steps", "processes"}
        left_out = {"init", "checkpoint_every", *(name for name, off in idle.items() if off)}
        left_out |= split
        values = {key: value for key, value in identity(self).items() if key not in left_out}
        return values | {"global_batch": self.global_batch}


def _kept(stages: Any) -> Any:
    """The stages that were not taken out."""
    if not isinstance(stages, Mapping):
        return stages
    return {name: block for name, block in stages.items() if block is not None}


def _in_order(stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
    """The stages as they are trained; their order then says what `init` said, and `split` is filled
    in by the name."""
    follower: dict[str, str] = {}
    for name, block in stages.items():
        names = (BACKBONE, *(other for other in stages if other != name))
        whole = NAME.fullmatch(name) and name not in RESERVED
        accepted = "lower case letters, digits and _, a letter first"
        expect(whole, "stages", name, f"{accepted}, none of {', '.join(RESERVED)}")
        if block.init is not None:
            expect(
                block.init in names, f"stages.{name}.init", block.init, f"one of {', '.join(names)}"
            )
            other = follower.setdefault(block.init, name)
            accepted = f"another: {other} comes right after it"
            expect(other == name, f"stages.{name}.init", block.init, accepted)
    order: list[str] = []
    for listed in (BACKBONE, *(name for name, block in stages.items() if block.init is None)):
        following: str | None = listed
        while following:
            order.append(following)
            following = follower.get(following)
    for name, block in stages.items():
        accepted = "a stage that does not come after this one"
        expect(name in order, f"stages.{name}.init", block.init, accepted)
    split = {name: stages[name].split or (name if name in SPLITS else None) for name in stages}
    for name, one in split.items():
        accepted = f"one of {', '.join(SPLITS)}: the name of the stage is neither"
        expect(one is not None, f"stages.{name}.split", one, accepted)
    return {
        name: stages[name].model_copy(update={"init": None, "split": split[name]})
        for name in order[1:]
    }


class EvaluateConfig(Block):
    """How every finished run is measured."""

    benchmarks: Annotated[list[str], Field(min_length=1)] = [
        "existence", "colour", "shape", "counting", "relation", "text", "chart", "composition",
    ]  # fmt: skip
    """Names of benchmarks: files of sts/pipeline/tasks, image tasks or groups of lm-eval."""
    metrics: Annotated[dict[str, str], Neutral({})] = {}
    """Benchmark -> metric that is its score, where it is not the first one of its task."""
    batch_size: Count = 64
    """Questions answered at once; a part of the result's identity."""
    blind: Share = 0.25
    """Share of the questions that are also asked with a grey image; 0: none."""
    max_new_tokens: Count = 4
    """Longest answer to our own questions; lm-eval's tasks have their own limits."""
    limit: Count | None = None
    """At most this many questions of each benchmark, always the same ones; null: all."""


REPEATS = 3  # timed steps of a variant at a point; their median counts


class BenchConfig(Block):
    """How the time of a training is measured."""

    points: Count = 8
    """Places in each stage where a step is timed."""
    warmup: Index = 1
    """Steps before each that don't count."""

    @property
    def steps(self) -> int:
        """That the timing takes of each stage of a run, in one process."""
        return self.points * (self.warmup + REPEATS)


class Config(Block):
    """All settings of one run."""

    scale: Annotated[str, Field(pattern=f"^{NAME.pattern}$")] = "mini"
    """Names the folders results/<scale> and data/<scale>."""
    seeds: Annotated[list[Index], Field(min_length=1)] = [0, 1, 2]
    """One run for each."""
    data: DataConfig = DataConfig()
    """Sources and preparation."""
    model: ModelConfig = ModelConfig()
    """Vision tower and language model."""
    stages: Annotated[
        dict[str, StageConfig],
        Field(min_length=1),
        BeforeValidator(_kept),
        AfterValidator(_in_order),
    ]
    """Name -> training stage, one after the other; null takes a stage out."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Benchmarks."""
    bench: BenchConfig = BenchConfig()
    """Timing."""

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
        found = map(benchmarks.dataset_of, self.evaluate.benchmarks)
        return list(dict.fromkeys(filter(None, found)))


class _Entry(Block):
    groups: list[Annotated[str, Field(pattern=f"^{NAME.pattern}$")]] = []
    """Tables that show the ablation."""
    label: str
    """Name in tables and figures."""
    source: Literal["baseline", "paper", "ours", "peers"] = "ours"
    """Whose method it is: the head it stands under in tables."""
    seeds: Annotated[list[Index], Field(min_length=1)] | None = None
    """Instead of the scale's."""
    steps_share: Annotated[Number, Gt(0), Le(1)] = 1.0
    """Share of the scale's steps that each stage trains: a control with less training."""
    relative_to: str | None = None
    """Ablation that retention and cost are relative to in tables; null: the first of the table."""
    overrides: dict[str, dict[str, Any] | None] = {}
    """The values that differ from the scale's, of `model`, `evaluate` or a stage; null takes out a
    stage, and a name that the scale has not adds one."""


@dataclass(frozen=True)
class Ablation:
    """A named delta of a scale, and the file that says so."""

    id: str
    file: str
    groups: list[str]
    label: str
    source: str
    seeds: list[int] | None
    steps_share: float
    relative_to: str | None
    overrides: dict[str, dict[str, Any] | None]


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. ConfigError if a key stands twice, or if it is no YAML mapping."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except _DuplicateKey as error:
        raise ConfigError(path, *error.args, "every key once") from None
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if getattr(error, "problem_mark", None) else 1
        problem = getattr(error, "problem", str(error))
        raise ConfigError(path, f"line {line}", problem, "valid YAML") from None
    if not isinstance(content, dict):
        raise ConfigError(path, "the file", content, "a mapping of keys to values")
    return content


class _DuplicateKey(Exception):
    pass


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in lines:
                raise _DuplicateKey(key, f"given twice, in lines {lines[key]} and {line}")
            lines[key] = line
        return super().construct_mapping(node, deep)


def load_scale(path: str | Path) -> Config:
    """Read and check a scale file, or a resolved configuration. Raises ConfigError.

    What the file doesn't say comes from the mini scale, as with `snakemake --configfile`.
    """
    return validate(deep_merge(load_yaml(MINI), load_yaml(path)), path)


def load_ablations(path: str | Path) -> dict[str, Ablation]:
    """Read the ablation table, by id; the first entry is the complete baseline.

    Raises ConfigError for what can be seen without a scale; `resolve` checks the overrides.
    """
    ablations = {}
    for id, entry in load_yaml(path).items():
        if not NAME.fullmatch(str(id)):
            raise ConfigError(path, "id", id, "lower case letters, digits and _, a letter first")
        checked = parsed(_Entry, entry, path, prefix=id)
        ablations[id] = Ablation(id=id, file=str(path), **dict(checked))
    for id, entry in ablations.items():
        if entry.relative_to not in (None, *ablations):
            accepted = f"an id of this file: {', '.join(ablations)}"
            raise ConfigError(path, f"{id}.relative_to", entry.relative_to, accepted)
    baseline = next(iter(ablations.values()))
    if baseline.steps_share < 1:
        raise ConfigError(
            path, f"{baseline.id}.steps_share", baseline.steps_share, "1.0: this is the baseline"
        )
    if baseline.overrides:
        raise ConfigError(
            path, f"{baseline.id}.overrides", baseline.overrides, "{}: the first is the baseline"
        )
    return ablations


def resolve(config: Config, ablation: Ablation) -> Config:
    """The scale's configuration with the ablation's values in place. Raises ConfigError."""
    base = config.model_dump(by_alias=True)
    delta: dict[str, Any] = {"stages": dict(ablation.overrides)}
    for block in {"model", "evaluate"} & delta["stages"].keys():
        delta[block] = delta["stages"].pop(block)
    for name in _mini_stages() - base["stages"].keys():
        if "trains" not in (delta["stages"].get(name) or {}):
            delta["stages"].pop(name, None)  # it says how to train a stage that the scale took out
    for name, block in base["stages"].items():
        block["steps"] = max(1, round(block["steps"] * ablation.steps_share))
        lds = (delta["stages"].get(name) or {}).get("lds")
        if isinstance(lds, Mapping) and "policy" in lds:
            block["lds"] = {}  # its parts are that policy's, not those of the scale's
    if ablation.seeds:
        delta["seeds"] = ablation.seeds
    merged = deep_merge(base, delta)
    return validate(merged, ablation.file, prefix=ablation.id)


@cache
def _mini_stages() -> frozenset[str]:
    return frozenset(load_yaml(MINI)["stages"])


def deep_merge(base: Mapping, delta: Mapping) -> dict:
    """`base` with the values of `delta`: mappings merge key by key, all else is replaced."""
    merged = dict(base)
    for key, value in delta.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = deep_merge(old, value) if both else value
    return merged


def validate(content: Mapping, file: str | Path, prefix: str = "") -> Config:
    """A checked configuration; `file` and `prefix` (the ablation) are what an error names."""
    config = parsed(Config, content, file, prefix)
    for key, value, accepted in _contradictions(config):
        raise ConfigError(file, key_in_file(prefix, key), value, accepted)
    return config


def dump(config: Config) -> str:
    """The configuration as YAML that `load_scale` reads: it says all that the mini scale would fill
    in, also the order of the stages, and which of them there are not."""
    content = config.model_dump(by_alias=True)
    for name, block in content["stages"].items():
        block["init"] = config.before(name)
    content["stages"] |= dict.fromkeys(sorted(_mini_stages() - content["stages"].keys()))
    return yaml.safe_dump(content, sort_keys=False)


def config_hash(*parts: BaseModel | Mapping | list | str) -> str:
    """16 hex digits of what the given parts of a configuration say, neutral values left out."""
    return sha256_json([identity(part) for part in parts])[:16]


def _contradictions(config: Config) -> Iterator[tuple[str, Any, str]]:
    """(key, value, accepted) of values that are fine alone but not together."""
    sets = (*datasets(), *config.data.custom)
    for stage, block in config.stages.items():
        key = f"stages.{stage}"
        for name in block.data:
            if name not in sets:
                yield f"{key}.data", name, f"one of {', '.join(sets)}"
            custom = config.data.custom.get(name)
            if custom and custom.split != block.split:
                yield (
                    f"data.custom.{name}.split",
                    custom.split,
                    f"{block.split}: {key}.data names it",
                )
        if len(set(block.trains)) < len(block.trains):
            yield f"{key}.trains", block.trains, "every part once"
        if {"lora", "language_model"} <= set(block.trains):
            yield (
                f"{key}.trains",
                block.trains,
                "lora or language_model: adapters train in its place",
            )
        if block.processes % block.nodes:
            yield f"{key}.nodes", block.nodes, f"a divisor of its processes, {block.processes}"
        if isinstance(block.lr, dict) and set(block.lr) != set(block.trains):
            yield f"{key}.lr", block.lr, f"a number, or one for each of {', '.join(block.trains)}"
        try:
            block.lds.check_layers(config.model.layers)
        except NotAccepted as error:
            yield f"{key}.{_in_block(error.name)}", error.value, error.accepted
    for name in config.evaluate.benchmarks:
        asked = benchmarks.dataset_of(name)
        if not benchmarks.known(name):
            yield "evaluate.benchmarks", name, f"one of {benchmarks.accepted()}"
        elif asked and asked not in sets:
            yield (
                "evaluate.benchmarks",
                name,
                f"a task file whose dataset is one of {', '.join(sets)}, not {asked}",
            )
    for name, metric in config.evaluate.metrics.items():
        if not benchmarks.known(name):
            yield f"evaluate.metrics.{name}", metric, f"a key that is {benchmarks.accepted()}"
    model = config.model
    if model.family == "whole" and model.checkpoint is None:
        yield "model.checkpoint", None, "a hub id or folder where model.family is whole"
    if model.family == "joined" and model.checkpoint is not None:
        yield "model.checkpoint", model.checkpoint, "null where model.family is joined"
    if model.family == "joined" and model.fresh:
        yield "model.fresh", model.fresh, "[] where model.family is joined: the projector is fresh"
    if model.family == "joined" and model.backbone == "pretrained":
        for key in ("vision", "language"):
            if getattr(model, key) is None:
                yield f"model.{key}", None, "a hub id or folder where model.backbone is pretrained"


def _in_block(name: str) -> str:
    """LDS.rate -> lds.rate: the name of a setting in the library -> its key in a stage's block."""
    kind, _, key = name.partition(".")
    return f"{kind.lower()}.{key}"
