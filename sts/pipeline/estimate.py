"""What a run of the pipeline will cost, before anything is trained.

    python -m sts estimate --configfile workflow/config/mini.yaml

Jobs are counted, FLOPs and memory are computed from shapes (sts/pipeline/cost.py), and time is FLOPs over a
speed that is measured here and now: a few training steps where the model is small, one large matrix
product where it is not. All but the number of jobs is an estimate; nothing is downloaded.
"""

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)

from sts.lds.decision import expected_work
from sts.pipeline import cost
from sts.pipeline.bench import REPEATS
from sts.pipeline.config import (
    STAGES,
    Ablation,
    Config,
    StageConfig,
    load_ablations,
    load_scale,
    resolve,
)
from sts.pipeline.model import SHIPPED, freeze
from sts.pipeline.train import (
    fused_attention,
    global_batch,
    make_optimizer,
    optimizer_step,
    precision_here,
    prepare_process,
    put_scheme,
)
from sts.schedule import keep_at
from sts.settings import IGNORE_INDEX, LDS, VTC

GROUPS = ("main",)  # tables of the bare command
FIGURES = 4

# (text, answer) tokens of a sample, text with the padding of its batch. `scenes`: measured in the
# mini scale's batches of 32. All other data: a guess at what LLaVA's two data sets hold.
TOKENS = {"scenes": {"align": (50, 24), "instruct": (78, 8)}}
OTHER_TOKENS = {"align": (40, 25), "instruct": (250, 130)}
IMAGE_BYTES = {"scenes": 7_700}  # of a PNG; a user's own data hold paths of images only
START_SECONDS = 10  # imports and loading, each job
PROCESS_BYTES = 0.7e9  # torch, transformers and tracking in memory before any model
MATMUL_SHARE = 0.4  # of a matrix product's speed that a training of a large model reaches

# Sizes of published parts, so that an estimate needs no download.
VISION = {
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    ),
}  # fmt: skip
LANGUAGE = {
    "lmsys/vicuna-7b-v1.5": LlamaConfig(vocab_size=32000),
    "lmsys/vicuna-13b-v1.5": LlamaConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40,
    ),
}  # fmt: skip


def estimate(
    configfile: str | Path, ablations: str | Path, as_json: bool = False
) -> dict[str, Any]:
    """Print, as a table or as JSON, and return what the bare command will cost with this scale.

    Raises ConfigError for a file that is not accepted, ValueError for a pretrained model whose
    sizes are not known here.
    """
    base, table = load_scale(configfile), load_ablations(ablations)
    configs = {id: resolve(base, entry) for id, entry in shown(table).items()}
    groups = {name: [id for id, e in table.items() if name in e.groups] for name in GROUPS}
    found = forecast(base, configs, groups)
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True))
    else:
        show(found, Console())
    return found


def shown(table: Mapping[str, Ablation]) -> dict[str, Ablation]:
    """The ablations that the bare command trains."""
    return {id: entry for id, entry in table.items() if set(GROUPS) & set(entry.groups)}


def forecast(
    base: Config, configs: Mapping[str, Config], groups: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Everything that `show` prints, as plain numbers: seconds, bytes, FLOPs."""
    model = model_config(base)
    shape = cost.shape_of(model)
    trainings = unique_trainings(configs)
    speed, source = calibrate(base, model)
    slots = concurrent(base)

    def seconds(stage: str, block: StageConfig) -> float:
        return stage_flops(shape, stage, block) / speed[stage] / block.processes

    training = [seconds(stage, block) + START_SECONDS for stage, block in trainings]
    stage_times = {
        id: sum(seconds(stage, config.stage(stage)) for stage in STAGES)
        for id, config in configs.items()
    }
    evaluation = [evaluation_seconds(shape, config, speed) for config in configs.values()]
    runs = [len(config.seeds) for config in configs.values()]
    evaluating = sum(n * s for n, s in zip(runs, evaluation, strict=True))
    timing = sum(
        (stage_times[id] / sum(configs[id].stage(s).steps for s in STAGES))
        * 2 * base.bench.points * (base.bench.warmup + REPEATS)
        for members in groups.values()
        for id in members
    )  # fmt: skip
    parts = {
        "training": sum(training) / slots,
        "evaluation": evaluating / slots,
        "timing": timing + START_SECONDS * len(groups),
        "backbone": backbone_seconds(base, shape, speed["instruct"]),
    }
    count = cost.parameters(shape)
    weights = 4.0 * (
        count["vision"] + count["projector"] + count["head"] + shape.layers * count["layer"]
    )
    peak = max(step_memory(shape, stage, block) for stage, block in trainings)
    return {
        "scale": base.scale,
        "jobs": jobs(base, configs, groups),
        "flops": {
            "runs": {
                id: {stage: stage_flops(shape, stage, config.stage(stage)) for stage in STAGES}
                for id, config in configs.items()
            },
            "total": sum(stage_flops(shape, stage, block) for stage, block in trainings),
        },
        "seconds": {**parts, "total": sum(parts.values())},
        "speed": {"flops_per_s": speed, "source": source, "trainings_at_once": slots},
        "disk_bytes": {
            "data": data_bytes(configs.values()),
            "weights": weights * len(trainings),
            "checkpoints": slots * max(state_bytes(shape, stage) for stage, _ in trainings),
            "free": float(shutil.disk_usage(".").free),
        },
        "memory_bytes": {"of_a_training": peak, "at_once": slots * peak},
    }


def jobs(
    base: Config, configs: Mapping[str, Config], groups: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """Jobs of the bare command from an empty folder, by the name of their rule."""
    stages = Counter(stage for stage, _ in unique_trainings(configs))
    wanted = sum(len(config.seeds) * len(STAGES) for config in configs.values())
    return {
        "prepare": len(data_names(configs.values())),
        "backbone": 1,
        **{stage: stages[stage] for stage in STAGES},
        **({"share": shared} if (shared := wanted - stages.total()) else {}),
        "evaluate": sum(len(config.seeds) for config in configs.values()),
        "timing": len(groups),
        "table": len(groups),
        "figure": FIGURES,
    }


def unique_trainings(configs: Mapping[str, Config]) -> list[tuple[str, StageConfig]]:
    """(stage, settings) of every training job; runs with equal settings and seed share one."""
    found = {}
    for config in configs.values():
        for seed in config.seeds:
            past: tuple = (seed,)
            for stage in STAGES:
                block = config.stage(stage)
                past = (*past, json.dumps(block.identity(), sort_keys=True))
                found[past] = (stage, block)
    return list(found.values())


def data_names(configs: Iterable[Config]) -> list[str]:
    """Names of the data sets that are trained or evaluated on, each once."""
    return list(
        dict.fromkeys(
            name
            for config in configs
            for name in [*config.align.data, *config.instruct.data, *config.evaluation_data()]
        )
    )


# ---- sizes ------------------------------------------------------------------------------------


def model_config(config: Config) -> LlavaConfig:
    """The model's sizes: the mini scale's own, or those of published or local parts."""
    model = config.model
    if model.backbone == "pretrained":
        vision = known(model.vision, VISION)
        vision = getattr(vision, "vision_config", vision)
        language = known(model.language, LANGUAGE)
    else:
        vision, language = (AutoConfig.from_pretrained(SHIPPED / p) for p in ("vision", "language"))
        language.num_hidden_layers = model.layers
    return LlavaConfig(
        vision_config=vision,
        text_config=language,
        vision_feature_layer=model.vision_feature_layer,
        image_token_index=3,
        tie_word_embeddings=language.tie_word_embeddings,
    )


def known(name: str, table: Mapping[str, PretrainedConfig]) -> PretrainedConfig:
    """Sizes of a published part: from the table, a local folder or the local hub cache."""
    if name in table:
        return table[name]
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"model {name}: its sizes are not known here. Download it first (hf download {name}) "
            f"or give a local folder; known without: {', '.join([*VISION, *LANGUAGE])}"
        ) from error


def tokens(stage: str, block: StageConfig) -> tuple[float, float]:
    """(text, answer) tokens of a sample, means over the data sets of the stage."""
    pairs = [TOKENS.get(name, OTHER_TOKENS)[stage] for name in block.data]
    text, answer = (fmean(values) for values in zip(*pairs, strict=True))
    return text, answer


def stage_flops(shape: cost.Shape, stage: str, block: StageConfig, points: int = 50) -> float:
    """FLOPs of a whole stage on all processes, with its schedules for keep ratio and skip rate."""
    return block.steps * fmean(
        step_flops(shape, stage, block, (i + 0.5) / points) for i in range(points)
    )


def step_flops(shape: cost.Shape, stage: str, block: StageConfig, fraction: float) -> float:
    """FLOPs of one optimizer step at a fraction of the stage, on all processes."""
    vtc = block.vtc
    keep = keep_at(fraction, vtc.keep, vtc.schedule, vtc.dense_tail)
    text, answer = tokens(stage, block)
    return cost.step_flops(
        shape,
        batch=global_batch(block),
        visual_tokens=keep * shape.visual_tokens,
        text_tokens=text,
        answer_tokens=answer,
        work=expected_work(block.lds, shape.layers, fraction),
        stage=stage,
        checkpointing=block.gradient_checkpointing,
        fused_attention=fused_attention(block),
    )


def step_memory(shape: cost.Shape, stage: str, block: StageConfig) -> float:
    """Peak bytes of one process of a training, at all tokens and layers."""
    text, answer = tokens(stage, block)
    parts = cost.peak_memory(
        shape,
        batch=block.batch_size,
        visual_tokens=shape.visual_tokens,
        text_tokens=text,
        answer_tokens=answer,
        layers_run=shape.layers,
        stage=stage,
        checkpointing=block.gradient_checkpointing,
        value_bytes=2 if precision_here(block) == "bf16" else 4,
    )
    return PROCESS_BYTES + sum(parts.values())


def state_bytes(shape: cost.Shape, stage: str) -> float:
    """Bytes of a checkpoint while the next is written: trained weights and two moments, twice."""
    count = cost.parameters(shape)
    language = shape.layers * count["layer"] + count["head"]
    return 2 * 12.0 * (count["projector"] + (language if stage == "instruct" else 0))


def data_bytes(configs: Iterable[Config]) -> float:
    """Bytes of prepared images and text, for the data sets whose size the configuration says."""
    configs = list(configs)
    size = configs[0].data.scenes
    rows = {"scenes": size.align + size.instruct + 8 * size.test}
    return float(sum(rows.get(n, 0) * IMAGE_BYTES.get(n, 0) for n in data_names(configs)))


# ---- time -------------------------------------------------------------------------------------


def concurrent(config: Config) -> int:
    """Trainings that run at once: by GPUs if there are any, else by cores."""
    if torch.cuda.is_available():
        return max(1, torch.cuda.device_count() // config.instruct.processes)
    return max(1, len(os.sched_getaffinity(0)) // config.instruct.threads)


def calibrate(config: Config, model: LlavaConfig) -> tuple[dict[str, float], str]:
    """({stage: FLOPs a second of one training}, how it was measured), within seconds."""
    if config.model.backbone == "pretrained":
        rate = MATMUL_SHARE * matmul_rate(config.instruct)
        share = f"{MATMUL_SHARE:.0%} of a matrix product's speed"
        return dict.fromkeys(STAGES, rate), f"{share}, measured on this machine: a rough guess"
    speed = {stage: training_rate(model, stage, config.stage(stage)) for stage in STAGES}
    return speed, "dense training steps, measured on this machine just now"


def training_rate(model: LlavaConfig, stage: str, block: StageConfig, budget: float = 6) -> float:
    """FLOPs a second of dense training steps on random weights and tokens; at most about `budget`
    seconds and five steps."""
    block = block.model_copy(update={"processes": 1})
    accelerator = prepare_process(block)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = LlavaForConditionalGeneration(model)
        batch = synthetic_batch(model, stage, block)
    freeze(built, block.trains)
    scheme = put_scheme(built, block, 0, stage, global_batch(block))
    wrapped, optimizer = accelerator.prepare(built, make_optimizer(built, block))
    batches = [batch] * block.gradient_accumulation_steps
    seconds: list[float] = []
    began = time.perf_counter()
    while not seconds or (len(seconds) < 5 and time.perf_counter() - began < budget):
        scheme.begin_step(0)
        start = time.perf_counter()
        optimizer_step(accelerator, wrapped, optimizer, batches, block, 0.0, scheme)
        seconds.append(time.perf_counter() - start)
    # the median: neither the first step, which warms up, nor the luckiest
    return step_flops(cost.shape_of(model), stage, block, 0.0) / median(seconds)


def synthetic_batch(model: LlavaConfig, stage: str, block: StageConfig) -> dict[str, torch.Tensor]:
    """Random tokens and pixels of the shapes that a micro-batch of the stage has."""
    text, answer = map(round, tokens(stage, block))
    size, patch = model.vision_config.image_size, model.vision_config.patch_size
    visual, batch = (size // patch) ** 2, block.batch_size
    ids = torch.randint(4, model.text_config.vocab_size, (batch, visual + text))
    ids[ids == model.image_token_id] += 1
    ids[:, :visual] = model.image_token_id
    labels = ids.clone()
    labels[:, :-answer] = IGNORE_INDEX
    pixels = torch.randn(batch, 3, size, size)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def matmul_rate(block: StageConfig, largest: int = 2048, enough: float = 0.1) -> float:
    """FLOPs a second of square matrix products with the stage's precision and threads: of the
    first size, from 256 on, that takes `enough` seconds (bf16 is slow on a CPU without it)."""
    gpu = torch.cuda.is_available()
    torch.set_num_threads(block.threads)
    kind = torch.bfloat16 if precision_here(block) == "bf16" else torch.float32
    size, fastest = 128, 0.0
    while fastest < enough and size < largest:
        size *= 2
        a = torch.ones(size, size, dtype=kind, device="cuda" if gpu else "cpu")
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            (a @ a).sum().item()
            seconds.append(time.perf_counter() - began)
        fastest = min(seconds)
    return 2 * size**3 / fastest


def evaluation_seconds(shape: cost.Shape, config: Config, speed: Mapping[str, float]) -> float:
    """One evaluation job: a forward pass of every question (a third of a training step's FLOPs),
    twice over for the answer's tokens and the harness, and again with a grey image if `blind`."""
    questions = len(config.evaluate.benchmarks) * config.data.scenes.test
    dense = config.instruct.model_copy(update={"vtc": VTC(), "lds": LDS()})
    forward = step_flops(shape, "instruct", dense, 0.0) / global_batch(dense) / 3
    passes = 2 * (2 if config.evaluate.blind else 1)
    return START_SECONDS + questions * passes * forward / speed["instruct"]


def backbone_seconds(config: Config, shape: cost.Shape, speed: float) -> float:
    """Both backbones, if they are trained anew: 64 samples a step, forward and backward."""
    if config.model.backbone != "rebuild":
        return float(START_SECONDS)
    settings = {"batch": 64, "visual_tokens": shape.visual_tokens, "stage": "instruct"}
    text, answer = tokens("instruct", config.instruct)
    parts = cost.flop_parts(shape, text_tokens=text, answer_tokens=answer, **settings)
    vision = 3 * parts["vision"] * config.model.vision_steps
    language = (parts["decoder"] + parts["head"]) * config.model.language_steps
    return START_SECONDS + (vision + language) / speed


# ---- printing ---------------------------------------------------------------------------------


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print a forecast as a small table."""
    table = Table("what", "estimate", title=f"Scale {found['scale']}: what a run will cost")
    total = sum(found["jobs"].values())
    kinds = ", ".join(f"{n} {name}" for name, n in found["jobs"].items())
    table.add_row("jobs", f"{total}: {kinds}")
    runs = found["flops"]["runs"]
    dense = sum(next(iter(runs.values())).values())
    for id, stages in runs.items():
        parts = " + ".join(f"{flops:.2g} {stage}" for stage, flops in stages.items())
        table.add_row(f"FLOPs of {id}", f"{parts}, {sum(stages.values()) / dense:.0%}")
    table.add_row("FLOPs of all trainings", f"{found['flops']['total']:.2g}")
    for name, seconds in found["seconds"].items():
        table.add_row(f"time: {name}", duration(seconds))
    disk, memory = found["disk_bytes"], found["memory_bytes"]
    for name in ("data", "weights", "checkpoints", "free"):
        table.add_row(f"disk: {name}", size(disk[name]))
    table.add_row("memory of a training", size(memory["of_a_training"]))
    table.add_row("memory at once", size(memory["at_once"]))
    console.print(table)
    speed = found["speed"]
    rates = ", ".join(f"{rate / 1e9:.3g} GFLOP/s {s}" for s, rate in speed["flops_per_s"].items())
    console.print(
        f"Estimates. Speed: {rates} ({speed['source']}); {speed['trainings_at_once']} trainings "
        "at once. VTC and LDS save less time than FLOPs: `bench` says how much. FLOPs in % of the "
        "first run; jobs as from an empty folder.",
        highlight=False,
    )


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 12 min, 3.5 h, 21 days."""
    for limit, unit, name in ((90, 1, "s"), (90 * 60, 60, "min"), (72 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"


def size(value: float) -> str:
    """Bytes for people, in powers of ten."""
    power = min(4, int(math.log10(max(value, 1)) // 3))
    return f"{value / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
