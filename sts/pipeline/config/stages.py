"""Training stages: what one may say, in which order they come, and which is like another."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from sts.checks import expect
from sts.pipeline.config.base import (
    NAME,
    NAME_ACCEPTED,
    Block,
    Count,
    Distinct,
    LDSSettings,
    VTCSettings,
    deep_merge,
    up_to,
)
from sts.pipeline.config.identity import ALWAYS, Neutral, identity
from sts.settings import LDS, VTC

SPLITS = ("align", "instruct")  # captions, conversations
VALIDATION = "validation"  # split of conversations on which the held-out loss is measured
BACKBONE = "backbone"  # what the first stage starts from
# no names of stages: they have files and keys of their own
RESERVED = (BACKBONE, "model", "evaluate", "eval")
Part = Literal["projector", "language_model", "vision_tower", "lora"]
Rate = Annotated[float, Gt(0), Le(1)]  # Adam moves a weight by about this much in a step
RateOfParts = Annotated[
    Annotated[Rate, Tag("[rate]")] | Annotated[dict[Part, Rate], Tag("[rates]")],
    Discriminator(lambda value: "[rates]" if isinstance(value, Mapping) else "[rate]"),
]


class LoraConfig(Block):
    """Low-rank adapters on the linear layers of the language model's decoder, merged at the end."""

    rank: up_to(10_000) = 16
    """Rank of an adapter."""
    alpha: Annotated[float, Gt(0), Le(10_000)] = 32.0
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of an adapter's input."""


class StageConfig(Block):
    """One training stage.

    What has no default is a recipe's decision: a new stage says it, or takes it with `like`.
    """

    trains: Annotated[list[Part], Field(min_length=1), Distinct]
    """Parts that are trained; the others are frozen."""
    like: str | None = None
    """Of a new stage: another whose values it has, all but `init`, where it doesn't say its own."""
    init: str | None = None
    """Stage it comes right after, or `backbone`: it comes first; null: in the order of the list."""
    data: Annotated[list[str], Field(min_length=1), Distinct]
    """Names of the data sets, mixed."""
    split: Literal["align", "instruct"] | None = None
    """Split of the data sets: captions or conversations; null: that of the stage's name."""
    samples: Annotated[float, Gt(0), Le(1), Neutral(1.0)] = 1.0
    """Share of the samples that is trained on, drawn at random by the run's seed. An ablation that
    says it, and no `steps`, passes over them as often as the scale over all."""
    template: Annotated[Literal["plain"] | None, Neutral(None)] = None
    """Text of a row: the model's chat template, or plain, LLaVA's of alignment: image, caption."""
    steps: Count
    """Optimizer steps."""
    batch_size: up_to(10_000)
    """Samples of one forward pass on one process."""
    gradient_accumulation_steps: Annotated[up_to(10_000), Neutral(1)] = 1
    """Forward passes of one optimizer step."""
    processes: Annotated[up_to(10_000), Neutral(1)]
    """Data-parallel processes (GPUs) of one training."""
    nodes: Annotated[up_to(10_000), Neutral(ALWAYS)] = 1
    """Machines that share the processes evenly; more than one needs Slurm."""
    parallel: Annotated[Literal["ddp", "fsdp2"], Neutral("ddp")]
    """What each process holds: a copy of the model, or a shard of every layer."""
    lr: RateOfParts
    """Peak learning rate, one for all or one for each part that is trained; cosine schedule."""
    warmup_ratio: Annotated[float, Ge(0), Lt(1), Neutral(0.0)] = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[float, Ge(0), Le(1), Neutral(0.0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Gt(0), Le(1000)] = 1.0
    """Norm that gradients are clipped to."""
    precision: Literal["fp32", "bf16"]
    """Of the forward pass; bf16 by autocast, and fp32 on a CPU that does not compute in bf16."""
    weights: Annotated[Literal["fp32", "bf16"], Neutral("fp32")] = "fp32"
    """What the forward pass computes from; bf16: with a float32 master of each trained weight."""
    cross_entropy: Annotated[Literal["whole", "chunked"], Neutral("whole")] = "whole"
    """How the loss is computed; chunked: the logits of a micro-batch are never whole."""
    gradient_checkpointing: Annotated[bool, Neutral(False)]
    """Recompute activations in the backward pass to save memory."""
    group_by_length: Annotated[bool, Neutral(False)] = True
    """Batches of samples of similar length and the same modality."""
    sorted_batches: Annotated[up_to(10_000), Neutral(50)] = 50
    """So many batches' samples are sorted by length together; 1: a batch is of any length, as in
    LLaVA, and only its parts for processes and micro-batches are of similar length."""
    max_length: up_to(10**6) = 2048
    """Tokens of a sample; longer ones are cut."""
    checkpoint_every: up_to(10**6) = 100
    """Steps between checkpoints; the trained weights don't depend on it."""
    validations: Annotated[int, Ge(0), Le(1000), Neutral(ALWAYS)] = 8
    """Times in a stage of conversations that the held-out loss is measured, the last at its end."""
    threads: up_to(1000) = 1
    """CPU threads of one training; fixed, so that weights don't depend on the number of cores."""
    lora: LoraConfig = LoraConfig()
    """Adapters, where `lora` is among the parts that are trained."""
    vtc: VTCSettings = VTC()
    """Visual token compression."""
    lds: LDSSettings = LDS()
    """Layer skipping."""

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        """Refuse values that are fine alone and not together."""
        parts, accepted = self.trains, "lora or language_model: adapters train in its place"
        expect(not {"lora", "language_model"} <= set(parts), "stage.trains", parts, accepted)
        accepted = "fp32, or precision: bf16 with parallel: ddp and without lora"
        is_plain = self.precision == "bf16" and self.parallel == "ddp" and "lora" not in parts
        expect(self.weights == "fp32" or is_plain, "stage.weights", self.weights, accepted)
        accepted = f"a divisor of its processes, {self.processes}"
        expect(self.processes % self.nodes == 0, "stage.nodes", self.nodes, accepted)
        accepted = f"a number, or one for each of {', '.join(parts)}"
        is_complete = not isinstance(self.lr, dict) or set(self.lr) == set(parts)
        expect(is_complete, "stage.lr", self.lr, accepted)
        return self

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
        left_out = {"like", "init", "checkpoint_every"}
        left_out |= {"batch_size", "gradient_accumulation_steps", "processes"}
        acts = {"vtc": self.compresses, "lds": self.skips, "lora": "lora" in self.trains}
        left_out |= {name for name in acts if not acts[name]}
        values = {key: value for key, value in identity(self).items() if key not in left_out}
        return values | {"global_batch": self.global_batch}


RECIPE = [name for name, field in StageConfig.model_fields.items() if field.is_required()]


def merge_stage(base: Mapping, delta: Mapping) -> dict:
    """A stage's values with others in their place. An `lds` that names a policy starts from that
    policy's parts, not from those of `base`."""
    lds = delta.get("lds")
    if isinstance(lds, Mapping) and "policy" in lds:
        base = {**base, "lds": {}}
    return deep_merge(base, delta)


def _filled(stages: Any) -> Any:
    """The stages that were not taken out, each with the values of the one that it is like."""
    if not isinstance(stages, Mapping):
        return stages
    stages = {name: block for name, block in stages.items() if block is not None}
    return {name: _with_like(stages, name) for name in stages}


def _with_like(stages: Mapping[str, Any], name: str, followers: tuple[str, ...] = ()) -> Any:
    """A stage with the values of the one that it is like; `followers`: those that are like it."""
    block, others = stages[name], [other for other in stages if other != name]
    if not isinstance(block, Mapping):
        return block
    like = block.get("like")
    if like is not None:
        key, accepted = f"stages.{name}.like", f"one of {', '.join(others)}"
        expect(isinstance(like, str) and like in others, key, like, accepted)
        expect(like not in followers, key, like, "a stage that is not like this one")
        base = _with_like(stages, like, (*followers, name))
        base = base.model_dump(by_alias=True) if isinstance(base, Block) else base
        expect(isinstance(base, Mapping), f"stages.{like}", base, "a mapping")
        base = {key: value for key, value in base.items() if key != "init"}
        base["split"] = base.get("split") or (like if like in SPLITS else None)
        block = merge_stage(base, block) | {"like": None}
    missing = [key for key in RECIPE if key not in block]
    accepted = f"{', '.join(missing)} beside these, or `like`, a stage to take them from"
    accepted += f": {' or '.join(others)}" if others else ""
    expect(not missing, f"stages.{name}", [*block], accepted)
    return block


def _in_order(stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
    """Stages as they follow each other, with `init` null and `split` said.

    Raises NotAccepted for a name, a start or a split that can't be.
    """
    follower: dict[str, str] = {}
    for name, block in stages.items():
        accepted = f"{NAME_ACCEPTED}, none of {', '.join(RESERVED)}"
        expect(bool(NAME.fullmatch(name)) and name not in RESERVED, "stages", name, accepted)
        if block.init is not None:
            key = f"stages.{name}.init"
            starts = [BACKBONE, *(other for other in stages if other != name)]
            expect(block.init in starts, key, block.init, f"one of {', '.join(starts)}")
            first = follower.setdefault(block.init, name)
            expect(first == name, key, block.init, f"another: {first} comes right after it")
    order: list[str] = []
    for start in (BACKBONE, *(name for name, block in stages.items() if block.init is None)):
        following: str | None = start
        while following:
            order.append(following)
            following = follower.get(following)
    placed = {}
    for name in [*order[1:], *stages]:
        block, accepted = stages[name], "a stage that does not come after this one"
        expect(name in order, f"stages.{name}.init", block.init, accepted)
        split = block.split or (name if name in SPLITS else None)
        accepted = f"one of {', '.join(SPLITS)}: the name of the stage is neither"
        expect(split is not None, f"stages.{name}.split", split, accepted)
        placed[name] = block.model_copy(update={"init": None, "split": split})
    return placed


Stages = Annotated[
    dict[str, StageConfig],
    Field(min_length=1),
    BeforeValidator(_filled),
    AfterValidator(_in_order),
]
