"""What a stage will cost, before it is trained: FLOPs, memory, disk.

Of a model whose weights are not here either: its sizes are known, or read from local files.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from statistics import fmean

from torch import Tensor
from transformers import PreTrainedConfig

from sts.lds.decision import expected_work
from sts.pipeline.config import Config, LoraConfig, ModelConfig, StageConfig
from sts.pipeline.cost.flops import Counts, count
from sts.pipeline.cost.memory import FLOAT32, evaluation_memory, held, step_memory
from sts.pipeline.data.registry import dataset
from sts.pipeline.measure import shapes
from sts.pipeline.measure.timing import what_is_held
from sts.pipeline.run.device import attention_here, precision_here
from sts.pipeline.tasks.registry import questions_of
from sts.pipeline.train.checkpoint import KEPT
from sts.pipeline.train.lora import train_parts
from sts.pipeline.train.model import SHIPPED
from sts.schedule import keep_at
from sts.settings import LDS, VTC

# Split -> (text, answer) tokens of a sample where the data set doesn't say: a guess at what LLaVA's
# two data sets hold.
TOKENS = {"align": (40, 25), "instruct": (250, 130)}
POINTS = 50  # of a stage, over which its schedules are averaged
START_SECONDS = 20  # imports and loading, each job
ANSWER_SECONDS = 0.004  # of a short answer's other tokens and the harness, a question on a core


@dataclass(frozen=True)
class StageCost:
    """What a stage of a run costs; `on_gpu`: on GPUs, also where there are none here."""

    config: Config
    stage: str
    on_gpu: bool = False

    @property
    def block(self) -> StageConfig:
        return self.config.stage(self.stage)

    @cached_property
    def counts(self) -> Counts:
        """Of the model as the stage trains it. Raises ValueError where its sizes are not known."""
        block = self.block
        rank = block.lora.rank if "lora" in block.trains else 1
        return _counts(self.config.model.model_dump_json(), tuple(sorted(block.trains)), rank)

    @property
    def tokens(self) -> tuple[float, float]:
        """(text, answer) tokens of a sample, text with the padding of its batch: means over the
        data sets of the stage."""
        split = self.block.split
        of_sets = [dataset(name, self.config.data).tokens for name in self.block.data]
        text, answer = zip(*(tokens.get(split, TOKENS[split]) for tokens in of_sets), strict=True)
        return fmean(text), fmean(answer)

    @cached_property
    def flops(self) -> float:
        """Of the whole stage on all processes, with its schedules for keep ratio and skip rate."""
        points = [(point + 0.5) / POINTS for point in range(POINTS)]
        return self.block.steps * fmean(map(self.step_flops, points))

    @cached_property
    def pictures_share(self) -> float:
        """Of a dense stage's FLOPs that of vision tower and projector, which VTC can't save."""
        dense = self.block.model_copy(update={"vtc": VTC(), "lds": LDS()})
        stages = self.config.stages | {self.stage: dense}
        config = self.config.model_copy(update={"stages": stages})
        parts = replace(self, config=config).step_parts(0.0)
        return parts["pictures"] / sum(parts.values())

    def step_flops(self, t: float) -> float:
        """Of an optimizer step at a share `t` of the stage, on all processes."""
        return sum(self.step_parts(t).values())

    def step_parts(self, t: float) -> dict[str, float]:
        """The same of `pictures`, `decoder` and `head`."""
        block, counts, vtc = self.block, self.counts, self.block.vtc
        keep = keep_at(t, vtc.keep, vtc.schedule, vtc.dense_tail)
        text, answer = self.tokens
        return counts.step(
            samples=block.global_batch,
            tokens=keep * counts.visual_tokens + text,
            answer_tokens=answer,
            patches=block.global_batch * counts.patches,
            pairs=block.global_batch * counts.pairs,
            work=expected_work(block.lds, len(counts.layers), t),
            checkpointing=block.gradient_checkpointing,
            fused_attention=self.on_gpu or attention_here(block.precision) != "eager",
        )

    @property
    def timing_flops(self) -> float:
        """Of the steps that the stage's timing takes, on all processes."""
        return self.flops * self.config.bench.steps / self.block.steps

    def evaluation_seconds(self, speed: float, bandwidth: float) -> float:
        """One evaluation job of a run with this last stage at so many FLOPs a second: a forward of
        every question and what its answer takes beside, and of a share again with a grey image. For
        each token of the longest answers a batch reads all weights, at so many bytes a second."""
        evaluation, (text, answer) = self.config.evaluate, self.tokens
        counts = [questions_of(n) or self.config.data.scenes.test for n in evaluation.benchmarks]
        limit = evaluation.limit or max(counts)
        questions = sum(min(count, limit) for count in counts) * (1 + evaluation.blind)
        tokens = self.counts.visual_tokens + text
        seconds = self.counts.forward(tokens, answer) / speed + ANSWER_SECONDS
        reads = evaluation.max_new_tokens * self.evaluation_memory["weights"] / bandwidth
        batches = math.ceil(questions * tokens / evaluation.batch_tokens)
        return START_SECONDS + (questions * seconds + batches * reads) / evaluation.processes

    @cached_property
    def evaluation_memory(self) -> dict[str, float]:
        """Peak bytes of one process that asks the model (sts/pipeline/cost/memory.py)."""
        precision, parameters = self.block.precision, sum(self.counts.parameters.values())
        precision = precision if self.on_gpu else precision_here(precision)
        sizes = model_config(self.config.model)
        return evaluation_memory(sizes, parameters, self.config.evaluate, precision)

    @property
    def longest(self) -> tuple[float, float]:
        """(tokens, answer tokens) of a sample of the longest batch that the order can give: where
        the data sets don't say more, all rows at the cut, in instruct of text alone."""
        block, visual = self.block, self.counts.visual_tokens
        of_sets = (dataset(name, self.config.data).longest for name in block.data)
        texts = [longest.get(block.split, block.max_length) for longest in of_sets]
        tokens = min(block.max_length, visual + max(texts))
        has_images = block.split == "align" or max(texts) < block.max_length
        return tokens, tokens - visual * has_images

    @cached_property
    def memory(self) -> dict[str, float]:
        """Peak bytes of one process in the longest batch, by what they hold (`step_memory`)."""
        return step_memory(self.counts, self.block, *self.longest, self.on_gpu)

    def total(self) -> float:
        """Sum of `memory`."""
        return sum(self.memory.values())

    @property
    def weight_bytes(self) -> float:
        """Of all weights of the model."""
        return FLOAT32 * sum(self.counts.parameters.values())

    @property
    def checkpoint_bytes(self) -> float:
        """Of the checkpoints kept while the next is written: trained weights, two moments."""
        return (KEPT + 1) * 3 * FLOAT32 * sum(self.counts.trained.values())


def stage_costs(config: Config, on_gpu: bool) -> dict[str, StageCost]:
    """The cost of each stage of a run."""
    return {stage: StageCost(config, stage, on_gpu) for stage in config.stages}


def timing_memory(costs: Iterable[StageCost]) -> list[tuple[StageCost, dict[str, float]]]:
    """Of the stages that a timing takes one after the other, the variant that needs most, and the
    peak bytes of a process then; `others`: of the models that are held beside its own."""
    groups: dict[tuple[str, str], dict[tuple, StageCost]] = defaultdict(dict)
    for cost in sorted(costs, key=StageCost.total):
        groups[cost.stage, cost.config.model.model_dump_json()][what_is_held(cost.block)] = cost
    needs = []
    for models in groups.values():
        *others, most = sorted(models.values(), key=StageCost.total)
        besides = sum(held(cost.memory) for cost in others)
        needs.append((most, most.memory | {"others": besides}))
    return needs


@lru_cache(maxsize=32)
def _counts(model: str, trains: tuple[str, ...], rank: int) -> Counts:
    model_block = ModelConfig.model_validate_json(model)
    config = model_config(model_block)
    batch: Mapping[str, Tensor]
    if model_block.family == "whole":
        batch = shapes.processed_batch(model_block.checkpoint)
    else:
        batch = shapes.made_up_batch(config, batch=1, text=64, answer=32)
    block = StageConfig.model_construct(trains=[*trains], lora=LoraConfig(rank=rank))
    return count(config, batch, partial(train_parts, stage=block, seed=0))


def model_config(model: ModelConfig) -> PreTrainedConfig:
    """The model's sizes: the mini scale's own, those of published or local parts, or those of a
    whole checkpoint. Raises ValueError where they are not known."""
    if model.family == "whole":
        return shapes.local(model.checkpoint)
    if model.backbone == "pretrained":
        vision, language = shapes.part(model.vision), shapes.part(model.language)
    else:
        vision, language = (shapes.part(str(SHIPPED / name)) for name in ("vision", "language"))
    language.num_hidden_layers = len(model.kept_layers)
    return shapes.joined(vision, language, model.vision_feature_layer)
