"""Typed configuration: what a scale and an ablation may say, and what every value means.

A *scale* file (`workflow/config/*.yaml`) gives the values that differ from the mini scale, whose
file is complete. An entry of `workflow/ablations.yaml` is a named delta of a scale. Everything is
checked before anything runs; a `ConfigError` names the file, the key, the value and what is
accepted. Only pydantic and yaml are needed, so that the workflow can read it in any environment.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
)

from sts import lds as skipping
from sts import vtc as compressing
from sts.checks import NotAccepted, expect
from sts.pipeline.provenance import sha256_json
from sts.settings import LDS, VTC

CODE = Path(__file__).resolve().parents[1]
MINI = CODE.parent / "workflow" / "config" / "mini.yaml"
GROUPS = Literal["main", "components", "compressor", "skipper", "real"]
STAGES = ("align", "instruct")
NAME = re.compile(r"[a-z][a-z0-9_]*")


class ConfigError(ValueError):
    """A value that is not accepted: which file, key and value, and what would be accepted."""

    def __init__(self, file: str | Path, key: str, value: Any, accepted: str):
        super().__init__(f"{file}: {key}: {value!r} is not accepted. Accepted: {accepted}")
        self.file, self.key, self.value, self.accepted = str(file), key, value, accepted


def _scientific(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 (no dot) as text; take it for the number that was meant."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
        return float(value)
    return value


def registered(file: str, table: str) -> tuple[str, ...]:
    """Keys of the dict literal `table` in a source file of the package, read without importing it.

    So a new data set is accepted as soon as its registry names it, and the workflow needs no
    `datasets` to know that.
    """
    for node in ast.parse((CODE / file).read_text(encoding="utf-8")).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if table in names and isinstance(node.value, ast.Dict):
            return tuple(ast.literal_eval(key) for key in node.value.keys)
    raise LookupError(f"{CODE / file} has no dict literal {table}")


Number = Annotated[float, BeforeValidator(_scientific)]
Share = Annotated[Number, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Index = Annotated[int, Ge(0)]


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


BlockT = TypeVar("BlockT", bound=Block)


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
    """A user's own data: a LLaVA-style JSON file and the folder its image paths start from."""

    json_file: str = Field(alias="json")
    """JSON list of {id, image, conversations}."""
    images: str
    """Folder that the image paths are relative to."""
    split: Literal["align", "instruct"] = "instruct"
    """Stage that trains on it."""


class DataConfig(Block):
    """Where data come from and when preparation gives up."""

    mirror: str | None = None
    """Folder with copies of the source files; the variable STS_DATA_MIRROR wins over it."""
    max_bad_share: Share = 0.01
    """Share of rejected rows above which preparation stops."""
    max_text_chars: Count = 4000
    """Characters of one turn above which a row is rejected."""
    scenes: ScenesConfig = ScenesConfig()
    """The embedded data set."""
    custom: dict[str, CustomConfig] = {}
    """Name -> the user's own data."""


class ModelConfig(Block):
    """The vision tower and the language model that are joined."""

    backbone: Literal["shipped", "rebuild", "pretrained"] = "shipped"
    """Files of this repository, the same trained anew, or a hub id or folder for each part."""
    vision: str | None = None
    """Vision tower of `pretrained`."""
    language: str | None = None
    """Language model of `pretrained`."""
    vision_feature_layer: int = -2
    """Layer of the vision tower whose features are projected."""
    layers: Count = 8
    """Decoder layers of the language model; what skip rates are checked against."""
    vision_steps: Count = 2400
    """Training steps of the vision tower of `rebuild`."""
    language_steps: Count = 4800
    """Training steps of the language model of `rebuild`."""
    threads: Count = 2
    """CPU threads of a rebuild."""


class StageConfig(Block):
    """One training stage."""

    data: Annotated[list[str], Field(min_length=1)] = ["scenes"]
    """Names of the data sets, mixed."""
    steps: Count = 200
    """Optimizer steps."""
    batch_size: Count = 32
    """Samples of one forward pass on one process."""
    gradient_accumulation_steps: Count = 1
    """Forward passes of one optimizer step."""
    processes: Count = 1
    """Data-parallel processes (GPUs) of one training."""
    lr: Annotated[Number, Gt(0)] = 1.0e-3
    """Peak learning rate; cosine schedule."""
    warmup_ratio: Annotated[Number, Ge(0), Lt(1)] = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[Number, Ge(0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[Number, Gt(0)] = 1.0
    """Norm that gradients are clipped to."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward pass; bf16 by autocast, and fp32 on a CPU that does not compute in bf16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    group_by_length: bool = True
    """Batches of samples of similar length and the same modality."""
    max_length: Count = 2048
    """Tokens of a sample; longer ones are cut."""
    checkpoint_every: Count = 100
    """Steps between checkpoints; the trained weights don't depend on it."""
    threads: Count = 1
    """CPU threads of one training; fixed, so that weights don't depend on the number of cores."""
    vtc: VTCSettings = VTC()
    """Visual token compression."""
    lds: LDSSettings = LDS()
    """Layer skipping."""

    def identity(self) -> dict[str, Any]:
        """The values that the trained weights depend on."""
        return self.model_dump(exclude={"checkpoint_every"})

    def sources(self) -> list[Path]:
        """The source files whose formulas a training with these values uses."""
        files = ["pipeline/train.py", "scheme.py", "loss.py", "mini/backbone.py"]
        files += ["architectures/_base.py", "architectures/llava.py"]
        files += ["pipeline/data/collator.py", "pipeline/data/conversation.py"]
        own: set[Path | None] = set()
        if self.vtc.kind != "none":
            files += ["compression.py", "sequence.py", "schedule.py", "draws.py"]
            files += ["vtc/_shared.py"]
            own.add(compressing.source_of(self.vtc.kind))
        if self.lds.policy != "none":
            files += ["sequence.py", "schedule.py", "draws.py"]
            files += [f"lds/{part}.py" for part in ("decision", "parts", "skipper")]
            files += ["lds/units.py", "lds/measure.py"]
            own |= {skipping.source_of(name) for name in (self.lds.depth, self.lds.unit)}
        return sorted({CODE / file for file in files} | (own - {None}))


class EvaluateConfig(Block):
    """How every finished run is measured."""

    benchmarks: Annotated[list[str], Field(min_length=1)] = [
        "existence", "colour", "shape", "counting", "relation", "text", "chart", "composition",
    ]  # fmt: skip
    """Names of the benchmarks."""
    batch_size: Count = 64
    """Fixed: scores move with it."""
    blind: bool = True
    """Also answer every question with a grey image."""
    max_new_tokens: Count = 4
    """Longest answer."""
    limit: Count | None = None
    """At most this many questions of each benchmark, always the same ones; null: all."""


class BenchConfig(Block):
    """How the time of a training is measured."""

    points: Count = 8
    """Places in each stage where a step is timed."""
    warmup: Index = 1
    """Steps before each that don't count."""


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
    align: StageConfig = StageConfig()
    """First stage: projector only, captions."""
    instruct: StageConfig = StageConfig()
    """Second stage: projector and language model, questions and answers."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Benchmarks."""
    bench: BenchConfig = BenchConfig()
    """Timing."""

    def stage(self, name: str) -> StageConfig:
        """The block of the stage `align` or `instruct`."""
        return {"align": self.align, "instruct": self.instruct}[name]

    def evaluation_data(self) -> list[str]:
        """Names of the data sets that hold the benchmarks, each once."""
        return list(dict.fromkeys(dataset_of(name) for name in self.evaluate.benchmarks))


class _Entry(Block):
    groups: list[GROUPS] = []
    """Tables that show the ablation."""
    label: str
    """Name in tables and figures."""
    source: Literal["baseline", "paper", "ours", "peers"] = "ours"
    """Whose method it is: the head it stands under in tables."""
    seeds: Annotated[list[Index], Field(min_length=1)] | None = None
    """Instead of the scale's."""
    steps_share: Annotated[Number, Gt(0), Le(1)] = 1.0
    """Share of the scale's steps that each stage trains: a control with less training."""
    overrides: dict[Literal["align", "instruct", "evaluate"], dict[str, Any]] = {}
    """The values that differ from the scale's."""


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
    overrides: dict[str, dict[str, Any]]


def dataset_of(benchmark: str) -> str:
    """Name of the data set that holds a benchmark: its own if there is one, else `scenes`."""
    return (
        benchmark if benchmark in registered("pipeline/data/registry.py", "REGISTRY") else "scenes"
    )


def benchmarks() -> tuple[str, ...]:
    """Names of the benchmarks: every task file of the package that does not begin with _."""
    return tuple(
        sorted(f.stem for f in (CODE / "pipeline" / "tasks").glob("*.yaml") if f.stem[0] != "_")
    )


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
        checked = _parse(_Entry, entry, path, prefix=id)
        ablations[id] = Ablation(id=id, file=str(path), **dict(checked))
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
    for stage in STAGES:
        base[stage]["steps"] = max(1, round(base[stage]["steps"] * ablation.steps_share))
        lds = ablation.overrides.get(stage, {}).get("lds")
        if isinstance(lds, Mapping) and "policy" in lds:
            base[stage]["lds"] = {}  # its parts are that policy's, not those of the scale's
    delta = dict(ablation.overrides)
    if ablation.seeds:
        delta["seeds"] = ablation.seeds
    merged = deep_merge(base, delta)
    return validate(merged, ablation.file, prefix=ablation.id)


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
    config = _parse(Config, content, file, prefix)
    for key, value, accepted in _contradictions(config):
        raise ConfigError(file, ".".join(filter(None, (prefix, key))), value, accepted)
    return config


def dump(config: Config) -> str:
    """The configuration as YAML that `load_scale` reads."""
    return yaml.safe_dump(config.model_dump(by_alias=True), sort_keys=False)


def config_hash(*parts: BaseModel | Mapping | list | str) -> str:
    """16 hex digits of the given parts of a configuration."""
    plain = [part.model_dump() if isinstance(part, BaseModel) else part for part in parts]
    return sha256_json(plain)[:16]


def _contradictions(config: Config) -> Iterator[tuple[str, Any, str]]:
    """(key, value, accepted) of values that are fine alone but not together."""
    sets = (*registered("pipeline/data/registry.py", "REGISTRY"), *config.data.custom)
    for stage in STAGES:
        block = config.stage(stage)
        for name in block.data:
            if name not in sets:
                yield f"{stage}.data", name, f"one of {', '.join(sets)}"
            custom = config.data.custom.get(name)
            if custom and custom.split != stage:
                yield f"data.custom.{name}.split", custom.split, f"{stage}: {stage}.data names it"
        try:
            block.lds.check_layers(config.model.layers)
        except NotAccepted as error:
            yield f"{stage}.{_in_block(error.name)}", error.value, error.accepted
    for name in config.evaluate.benchmarks:
        if name not in benchmarks():
            yield "evaluate.benchmarks", name, f"one of {', '.join(benchmarks())}"
    if config.model.backbone == "pretrained":
        for key in ("vision", "language"):
            if getattr(config.model, key) is None:
                yield f"model.{key}", None, "a hub id or folder where model.backbone is pretrained"


def _in_block(name: str) -> str:
    """LDS.rate -> lds.rate: the name of a setting in the library -> its key in a stage's block."""
    kind, _, key = name.partition(".")
    return f"{kind.lower()}.{key}"


def _parse(model: type[BlockT], content: Any, file: str | Path, prefix: str) -> BlockT:
    """Pydantic's check, with the first problem as a ConfigError."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
    wrong = problem.get("ctx", {}).get("error")
    if isinstance(wrong, NotAccepted):  # of a block that is the library's: VTC.keep
        block = ".".join(str(part) for part in (prefix, *problem["loc"]) if part)
        _, _, key = wrong.name.partition(".")
        raise ConfigError(file, ".".join(filter(None, (block, key))), wrong.value, wrong.accepted)
    key = ".".join(str(part) for part in (prefix, *problem["loc"]) if part not in ("", "[key]"))
    raise ConfigError(file, key, problem["input"], _accepted(model, problem))


def _accepted(model: type[Block], problem: Mapping) -> str:
    """What a field takes, in words."""
    *parents, last = problem["loc"] or ("",)
    owner, field = model, None
    for part in (*parents, last):
        fields = {f.alias or name: f for name, f in getattr(owner, "model_fields", {}).items()}
        if problem["type"] == "extra_forbidden" and part == last:
            return f"the keys {', '.join(fields)}"
        field = fields.get(part, field)
        owner = field.annotation if field else owner
    if problem["type"] == "missing":
        return f"a value: {field.description}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] in _SHAPES:
        return _SHAPES[problem["type"]] + (f" ({field.description})" if field else "")
    if problem["type"] == "literal_error":
        return f"one of {problem['ctx']['expected']}"
    bounds = [_bound(item) for item in field.metadata] if field else []
    kind = _KINDS.get(owner if isinstance(owner, type) else None)
    kind = kind or _PARSED.get(problem["type"])
    text = " ".join([kind, " and ".join(filter(None, bounds))]).strip() if kind else problem["msg"]
    return f"{text} ({field.description})" if field and field.description else text


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PARSED = {"int_type": _KINDS[int], "float_type": _KINDS[float], "bool_type": _KINDS[bool]}
_SHAPES = {"list_type": "a list", "model_type": "a mapping", "dict_type": "a mapping"}


def _bound(item: Any) -> str:
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    found = (f"{word} {getattr(item, op)}" for op, word in words.items() if hasattr(item, op))
    return next(found, "")
