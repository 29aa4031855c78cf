"""Training stages: what one may say, in which order they come, and which is like another."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from sts.checks import expect
from sts.pipeline.config.base import (
    NAME,
    NAME_ACCEPTED,
    Block,
    Count,
    LDSSettings,
    Number,
    Rate,
    VTCSettings,
    deep_merge,
)
from sts.pipeline.config.identity import ALWAYS, Neutral, identity
from sts.settings import LDS, VTC

SPLITS = ("align", "instruct")  # captions, conversations
BACKBONE = "backbone"  # what the first stage starts from
# no names of stages: they have files and keys of their own
RESERVED = (BACKBONE, "model", "evaluate", "eval")
Part = Literal["projector", "language_model", "vision_tower", "lora"]
RateOfParts = Annotated[
    Annotated[Rate, Tag("[rate]")] | Annotated[dict[Part, Rate], Tag("[rates]")],
    Discriminator(lambda value: "[rates]" if isinstance(value, Mapping) else "[rate]"),
]


class LoraConfig(Block):
    """Low-rank adapters on the linear layers of the language model's decoder, merged at the end."""

    rank: Count = 16
    """Rank of an adapter."""
    alpha: Annotated[Number, Gt(0)] = 32.0
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: Annotated[Number, Ge(0), Lt(1)] = 0.0
    """Of an adapter's input."""


class StageConfig(Block):
    """One training stage.

    What has no default is a recipe's decision: a new stage says it, or takes it with `like`.
    """

    trains: Annotated[list[Part], Field(min_length=1)]
    """Parts that are trained; the others are frozen."""
    like: str | None = None
    """Of a new stage: another whose values it has, all but `init`, where it doesn't say its own."""
    init: str | None = None
    """Stage it comes right after, or `backbone`: it comes first; null: in the order of the list."""
    data: Annotated[list[str], Field(min_length=1)]
    """Names of the data sets, mixed."""
    split: Literal["align", "instruct"] | None = None
    """Split of the data sets: captions or conversations; null: that of the stage's name."""
    template: Annotated[Literal["plain"] | None, Neutral(None)] = None
    """Text of a row: the model's chat template, or plain, LLaVA's of alignment: image, caption."""
    steps: Count
    """Optimizer steps."""
    batch_size: Count
    """Samples of one forward pass on one process."""
    gradient_accumulation_steps: Annotated[Count, Neutral(1)] = 1
    """Forward passes of one optimizer step."""
    processes: Annotated[Count, Neutral(1)]
    """Data-parallel processes (GPUs) of one training."""
    nodes: Annotated[Count, Neutral(ALWAYS)] = 1
    """Machines that share the processes evenly; more than one needs Slurm."""
    parallel: Annotated[Literal["ddp", "fsdp2"], Neutral("ddp")]
    """What each process holds: a copy of the model, or a shard of every layer."""
    lr: RateOfParts
    """Peak learning rate, one for all or one for each part that is trained; cosine schedule."""
    warmup_ratio: Annotated[Number, Ge(0), Lt(1), Neutral(0.0)] = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[Number, Ge(0), Neutral(0.0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[Number, Gt(0)] = 1.0
    """Norm that gradients are clipped to."""
    precision: Literal["fp32", "bf16"]
    """Of the forward pass; bf16 by autocast, and fp32 on a CPU that does not compute in bf16."""
    gradient_checkpointing: Annotated[bool, Neutral(False)]
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
        left_out = {"like", "init", "checkpoint_every"}
        left_out |= {"batch_size", "gradient_accumulation_steps", "processes"}
        acts = {"vtc": self.compresses, "lds": self.skips, "lora": "lora" in self.trains}
        left_out |= {name for name in acts if not acts[name]}
        values = {key: value for key, value in identity(self).items() if key not in left_out}
        return values | {"global_batch": self.global_batch}


RECIPE = [name for name, info in StageConfig.model_fields.items() if info.is_required()]


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
        expect(
            isinstance(stages[like], Mapping | Block), f"stages.{like}", stages[like], "a mapping"
        )
        base = _with_like(stages, like, (*followers, name))
        base = base.model_dump(by_alias=True) if isinstance(base, Block) else base
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
        names = [BACKBONE, *(other for other in stages if other != name)]
        is_name = NAME.fullmatch(name) and name not in RESERVED
        accepted = f"{NAME_ACCEPTED}, none of {', '.join(RESERVED)}"
        expect(bool(is_name), "stages", name, accepted)
        if block.init is None:
            continue
        key = f"stages.{name}.init"
        expect(block.init in names, key, block.init, f"one of {', '.join(names)}")
        first = follower.setdefault(block.init, name)
        accepted = f"another: {first} comes right after it"
        expect(first == name, key, block.init, accepted)
    order: list[str] = []
    for start in (BACKBONE, *(name for name, block in stages.items() if block.init is None)):
        following: str | None = start
        while following:
            order.append(following)
            following = follower.get(following)
    for name, block in stages.items():
        accepted = "a stage that does not come after this one"
        expect(name in order, f"stages.{name}.init", block.init, accepted)
    return {name: _placed(name, stages[name]) for name in order[1:]}


def _placed(name: str, block: StageConfig) -> StageConfig:
    """A stage whose place is known: with its split, and without `init`."""
    split = block.split or (name if name in SPLITS else None)
    accepted = f"one of {', '.join(SPLITS)}: the name of the stage is neither"
    expect(split is not None, f"stages.{name}.split", split, accepted)
    return block.model_copy(update={"init": None, "split": split})


Stages = Annotated[
    dict[str, StageConfig],
    Field(min_length=1),
    BeforeValidator(_filled),
    AfterValidator(_in_order),
]
