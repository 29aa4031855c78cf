"""What VTC and LDS save at the shape of a known model, with random weights and made-up data.

    python -m sts bench --shape llava-1.5-7b --settings uniform@0.25 layerdrop@0.5 --out bench.json

A setting is `kind@keep` (VTC), `policy@rate` (LDS), each with more of its settings after colons
(`sts@0.6:epsilon=0.5:unit=samples`), or both joined by `+`. Three more are always
there: `plain`, the model untouched; `bare`, its base model and the loss on answer tokens written
out by hand; `dense`, the same with a scheme attached that does nothing: the baseline. A step is
forward and backward. All settings take turns on the same batch in one process, so that whatever
else the machine does falls on all alike; what counts is the ratio. Of a setting that leaves out
layers, steps are timed that stand for a whole stage (bench.typical_steps).
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from sts.checks import expect
from sts.lds import POLICIES
from sts.pipeline.files import write_json_atomic
from sts.pipeline.measure import shapes
from sts.pipeline.measure.bench import rotated, typical_steps
from sts.pipeline.run import provenance
from sts.pipeline.train.model import freeze, recompute
from sts.scheme import sparsify, unsparsify
from sts.settings import IGNORE_INDEX, LDS, VTC
from sts.vtc import KINDS

ALWAYS = ("plain", "bare", "dense")
WARMUP = 2
# What each stage of LLaVA's recipe trains
STAGES = {"align": ("projector",), "instruct": ("projector", "language_model")}
FLASH = "flash_attention_2"
ATTENTION = ("sdpa", "eager", FLASH)
STEPS = 1000  # optimizer steps that a schedule is spread over
# On a CPU the fused attention is an operator of its own that torch's counter doesn't know.
FUSED_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}
# Dense bf16 matrix throughput, FLOP/s, by the vendor's data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


def parse_setting(text: str) -> tuple[VTC, LDS]:
    """`uniform@0.25+sts@0.6:epsilon=0.5` -> what it says. ValueError says what is accepted."""
    vtc, lds = VTC(), LDS()
    for part in text.split("+"):
        main, *more = part.split(":")
        name, _, number = main.partition("@")
        known = name in KINDS or name in POLICIES
        accepted = f"kind@keep or policy@rate of {', '.join([*KINDS, *POLICIES])}"
        expect(known and bool(number), "setting", text, accepted)
        pairs = [pair.partition("=") for pair in more]
        expect(all(value for _, _, value in pairs), "setting", text, ":name=value after it")
        values = {key: yaml.safe_load(value) for key, _, value in pairs}
        fits = VTC if name in KINDS else LDS
        keys = [field.name for field in fields(fits)]
        expect(set(values) <= set(keys), "setting", text, f"names of {', '.join(keys)}")
        if fits is VTC:
            vtc = VTC(kind=name, keep=yaml.safe_load(number), **values)
        else:
            lds = LDS(policy=name, rate=yaml.safe_load(number), **values)
    return vtc, lds


def speed(
    name: str,
    settings: Sequence[str],
    out: str | Path,
    *,
    stages: Sequence[str] = tuple(STAGES),
    checkpointing: Sequence[bool] = (False,),
    batch: int = 2,
    text: int = 64,
    layers: int | None = None,
    width: float | None = None,
    repeats: int = 7,
    attention: str = "sdpa",
) -> dict[str, Any]:
    """Time `settings` at the shape `name`; print a table, write and return the result.

    layers, width: how many layers and what share of the width; by default all of them on a GPU, and
    elsewhere 4 layers of an eighth, but for `mini` and `wide`. Weights and activations are bf16 on
    a GPU, else float32. attention: one of ATTENTION. Raises ValueError for an unknown shape,
    setting or attention, and for one that can't run here.
    """
    expect(attention in ATTENTION, "attention", attention, f"one of {', '.join(ATTENTION)}")
    can = attention != FLASH or (torch.cuda.is_available() and is_flash_attn_2_available())
    expect(can, "attention", attention, "sdpa or eager, or a GPU and the package flash-attn")
    full = shapes.shape(name).text_config
    parsed = {setting: parse_setting(setting) for setting in settings if setting not in ALWAYS}
    variants = {"plain": None, "bare": None, "dense": (VTC(), LDS()), **parsed}
    gpu = torch.cuda.is_available()
    small = gpu or name in ("mini", "wide")
    layers = layers or (full.num_hidden_layers if small else 4)
    config = shapes.shape(name, layers, width or (1.0 if small else 1 / 8))
    own = config.text_config
    cut = (
        f"{own.num_hidden_layers} of {full.num_hidden_layers} layers, "
        f"width {own.hidden_size} of {full.hidden_size}"
    )
    dtype = torch.bfloat16 if gpu else torch.float32
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    with device:
        model = shapes.random_model(config, dtype)
    model.set_attn_implementation(attention)
    inputs = {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in shapes.made_up_batch(config, batch, text, text - text // 2).items()
    }
    rows = []
    total = len(stages) * len(checkpointing) * len(variants) * (WARMUP + repeats + 1)
    with tqdm(total=total, desc=f"bench {name}", mininterval=5) as bar:
        for stage in stages:
            freeze(model, STAGES[stage])
            for saves_memory in checkpointing:
                recompute(model, saves_memory)
                timed = _time(model, inputs, variants, repeats, bar)
                rows += _rows(timed, stage, saves_memory, batch * inputs["input_ids"].shape[1])
    result = {
        "shape": name,
        "cut": cut,
        "batch": batch,
        "visual_tokens": shapes.side(config) ** 2,
        "text_tokens": text,
        "attention": attention,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name()
        if gpu
        else f"{os.cpu_count()} x {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": repeats,
        "rows": rows,
        "command": provenance.command_line(),
        "commit": provenance.git()["commit"],
    }
    write_json_atomic(out, result)
    show(result)
    return result


def _step(model: PreTrainedModel, inputs: dict[str, Tensor], bare: bool) -> None:
    """Forward and backward."""
    if bare:
        others = {key: value for key, value in inputs.items() if key != "labels"}
        hidden = model.base_model(**others, use_cache=False)[0]
        targets = inputs["labels"][:, 1:]
        logits = model.get_output_embeddings()(hidden[:, :-1][targets != IGNORE_INDEX])
        loss = cross_entropy(logits.float(), targets[targets != IGNORE_INDEX])
    else:
        loss = model(**inputs).loss
    loss.backward()


def _time(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    variants: dict[str, tuple[VTC, LDS] | None],
    repeats: int,
    bar: tqdm,
) -> dict[str, dict[str, Any]]:
    """Variant -> seconds of its timed steps, FLOPs, MB held for backward, peak MB of a GPU."""
    gpu = inputs["input_ids"].device.type == "cuda"
    attention = model.config._attn_implementation
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in variants}

    steps = {name: [0] * repeats for name in variants}
    for name, setting in variants.items():
        if setting:
            with sparsify(model, *setting, total_steps=STEPS) as scheme:
                steps[name] = typical_steps(scheme, STEPS, repeats)

    def run(name: str, step: int) -> float:
        setting = variants[name]
        scheme = sparsify(model, *setting, total_steps=STEPS) if setting else None
        try:
            if scheme:
                scheme.begin_step(step)
            if gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
            _step(model, inputs, bare=name == "bare")
            if gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - began
        finally:
            model.zero_grad(set_to_none=True)
            if scheme:
                unsparsify(model)
            bar.update()

    asked = next(name for name, setting in variants.items() if setting)
    run(asked, steps[asked][0])  # a forward is asked once what it sees, which is no part of a step
    for name, row in found.items():
        varies = variants[name] is not None and variants[name][1].rate > 0
        some = steps[name] if varies else steps[name][:1]
        counted = [_count(partial(run, name), model, step) for step in some]
        row["held_mb"] = fmean(one["held_mb"] for one in counted)
        row["peak_mb"] = max(one["peak_mb"] for one in counted) if gpu else None
        if attention != "sdpa":  # torch's counter knows no other's kernels
            model.set_attn_implementation("sdpa")
            counted = [_count(partial(run, name), model, step) for step in some]
            model.set_attn_implementation(attention)
        row["flops"] = fmean(one["flops"] for one in counted)
    for repeat in range(-WARMUP, repeats):
        for name in rotated(list(variants), repeat):
            seconds = run(name, steps[name][max(repeat, 0)])
            if repeat >= 0:
                found[name]["seconds"].append(seconds)
    return found


def _count(run: Callable[[int], float], model: PreTrainedModel, step: int) -> dict[str, float]:
    """FLOPs of a step, MB it holds for backward, peak MB of a GPU."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    counter = FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU)
    with counter, saved_tensors_hooks(pack, lambda tensor: tensor):
        run(step)
    return {
        "flops": counter.get_total_flops(),
        "held_mb": sum(size for at, size in held.items() if at not in weights) / 1e6,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if gpu else 0.0,
    }


def _rows(
    timed: dict[str, dict[str, Any]], stage: str, checkpointing: bool, tokens: int
) -> list[dict[str, Any]]:
    """One row a variant: medians, spread, and ratios to `dense`."""
    dense, rows = timed["dense"], []
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for gpu, value in PEAK_FLOPS.items() if gpu in name), None)
    for setting, one in timed.items():
        seconds = median(one["seconds"])
        # paired by turn, so that a slow moment of the machine is in both; a mean, as the steps of
        # a setting need not do the same
        ratio = fmean(a / b for a, b in zip(one["seconds"], dense["seconds"], strict=True))
        flops = one["flops"] / dense["flops"]
        rows.append(
            {
                "stage": stage,
                "checkpointing": checkpointing,
                "setting": setting,
                "step_s": seconds,
                "step_s_range": [min(one["seconds"]), max(one["seconds"])],
                "tokens_per_s": tokens / seconds,
                "flops": one["flops"],
                "mfu": one["flops"] / seconds / peak if peak else None,
                "held_mb": one["held_mb"],
                "peak_mb": one["peak_mb"],
                "time_ratio": ratio,
                "flops_ratio": flops,
                "realisation": (1 - ratio) / (1 - flops) if flops < 0.99 else None,
            }
        )
    return rows


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    where = f"{result['device']}, {result['dtype']}, {result['attention']}"
    title = f"{result['shape']} ({result['cut']}), {where}"
    table = Table(title=title)
    columns = "stage checkpointing setting step_s tokens_per_s flops_ratio time_ratio realisation"
    for column in [*columns.split(), "held_mb", "peak_mb", "mfu"]:
        table.add_column(column, justify="left" if column in ("stage", "setting") else "right")
    for row in result["rows"]:
        cells = [
            "" if row[c.header] is None else f"{row[c.header]:.3g}"
            if isinstance(row[c.header], float) else str(row[c.header])
            for c in table.columns
        ]  # fmt: skip
        table.add_row(*cells)
    Console(width=150).print(table)
