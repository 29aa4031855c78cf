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
from dataclasses import dataclass, fields
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
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from sts.checks import expect
from sts.lds import POLICIES
from sts.pipeline import provenance
from sts.pipeline.bench import rotated, typical_steps
from sts.pipeline.model import freeze
from sts.scheme import sparsify, unsparsify
from sts.settings import IGNORE_INDEX, LDS, VTC
from sts.vtc import KINDS

IMAGE_TOKEN, ANSWERED = 3, 0.5  # id of the placeholder; share of the text that is an answer
ALWAYS = ("plain", "bare", "dense")
WARMUP = 2
# what each stage of the paper's recipe trains
STAGES = {"align": ("projector",), "instruct": ("projector", "language_model")}
STAGE = 1000  # optimizer steps that a schedule is spread over
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


@dataclass(frozen=True)
class Decoder:
    """A language model and its picture: widths in channels, tokens a sample."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    side: int  # visual tokens along each side of the picture
    vision_layers: int
    vision_width: int
    vision_mlp: int
    build: Callable[["Decoder"], PreTrainedModel]
    pictures: Callable[["Decoder", int], dict[str, Tensor]]

    def cut(self, layers: int, share: float) -> "Decoder":
        """Fewer layers, and narrower by `share`; heads stay as wide as they are."""

        def narrow(size: int, multiple: int) -> int:
            return max(multiple, round(size * share / multiple) * multiple)

        kv_heads = max(1, round(self.kv_heads * share))
        heads = narrow(self.heads, kv_heads)
        head = self.width // self.heads
        changed = {
            "layers": min(layers, self.layers),
            "width": heads * head,
            "mlp": narrow(self.mlp, 32),
            "heads": heads,
            "kv_heads": kv_heads,
            "vision_layers": max(2, round(self.vision_layers * layers / self.layers)),
            "vision_width": narrow(self.vision_width, 64),
            "vision_mlp": narrow(self.vision_mlp, 32),
        }
        return Decoder(**vars(self) | changed)


def _llava(shape: Decoder) -> PreTrainedModel:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                image_size=14 * shape.side,
                patch_size=14,
                hidden_size=shape.vision_width,
                intermediate_size=shape.vision_mlp,
                num_hidden_layers=shape.vision_layers,
                num_attention_heads=shape.vision_width // 64,
            ),
            text_config=LlamaConfig(
                hidden_size=shape.width,
                intermediate_size=shape.mlp,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                vocab_size=shape.vocab,
            ),
            image_token_id=IMAGE_TOKEN,
            image_seq_length=shape.side**2,
        )
    )


def _llava_pictures(shape: Decoder, batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 14 * shape.side, 14 * shape.side)}


def _qwen(shape: Decoder) -> PreTrainedModel:
    head = shape.width // shape.heads
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={
                "depth": shape.vision_layers,
                "hidden_size": shape.vision_width,
                "intermediate_size": shape.vision_mlp,
                "num_heads": shape.vision_width // 64,
                "out_hidden_size": shape.width,
                "fullatt_block_indexes": list(range(7, shape.vision_layers, 8)),
            },
            text_config={
                "hidden_size": shape.width,
                "intermediate_size": shape.mlp,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "vocab_size": shape.vocab,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
                },
            },
            image_token_id=IMAGE_TOKEN,
        )
    )


def _qwen_pictures(shape: Decoder, batch: int) -> dict[str, Tensor]:
    patches = (2 * shape.side) ** 2  # four of them are a token
    return {
        "pixel_values": torch.randn(batch * patches, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2 * shape.side, 2 * shape.side]] * batch),
    }


_CLIP_L = {"side": 24, "vision_layers": 24, "vision_width": 1024, "vision_mlp": 4096}
_LLAVA = {"build": _llava, "pictures": _llava_pictures}
SHAPES = {
    # the mini scale's
    "mini": Decoder(8, 128, 384, 4, 4, 700, 8, 5, 128, 512, **_LLAVA),
    # small, but the language model dominates it as it does a large one
    "wide": Decoder(12, 1024, 2816, 8, 8, 8192, 24, 2, 256, 512, **_LLAVA),
    "llava-1.5-7b": Decoder(32, 4096, 11008, 32, 32, 32064, **_CLIP_L, **_LLAVA),
    "llava-1.5-13b": Decoder(40, 5120, 13824, 40, 40, 32064, **_CLIP_L, **_LLAVA),
    "qwen2.5-vl-7b": Decoder(
        28, 3584, 18944, 28, 4, 152064, 24, 32, 1280, 3420, _qwen, _qwen_pictures
    ),
}


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


def made_up_batch(shape: Decoder, batch: int, text: int) -> dict[str, Tensor]:
    """Samples of one picture and `text` tokens, the last half of which are the answer."""
    generator = torch.Generator().manual_seed(0)
    visual = shape.side**2
    ids = torch.randint(4, shape.vocab, (batch, visual + text), generator=generator)
    ids[:, 1 : visual + 1] = IMAGE_TOKEN
    labels = ids.clone()
    labels[:, : visual + round(text * (1 - ANSWERED))] = IGNORE_INDEX
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if shape.build is _qwen:
        found["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return found | shape.pictures(shape, batch)


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
) -> dict[str, Any]:
    """Time `settings` at the shape `name`; print a table, write and return the result.

    layers, width: how many layers and what share of the width; by default all of them on a GPU, and
    elsewhere 4 layers of an eighth, but for `mini` and `wide`. Weights and activations are bf16 on
    a GPU, else float32. Raises ValueError for an unknown shape or setting.
    """
    expect(name in SHAPES, "shape", name, f"one of {', '.join(SHAPES)}")
    parsed = {setting: parse_setting(setting) for setting in settings if setting not in ALWAYS}
    variants = {"plain": None, "bare": None, "dense": (VTC(), LDS()), **parsed}
    gpu = torch.cuda.is_available()
    full, small = SHAPES[name], gpu or name in ("mini", "wide")
    layers = layers or (full.layers if small else 4)
    width = width or (1.0 if small else 1 / 8)
    shape = full if (layers, width) == (full.layers, 1.0) else full.cut(layers, width)
    cut = f"{shape.layers} of {full.layers} layers, width {shape.width} of {full.width}"
    dtype = torch.bfloat16 if gpu else torch.float32
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = shape.build(shape).train()
    finally:
        torch.set_default_dtype(torch.float32)
    inputs = {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in made_up_batch(shape, batch, text).items()
    }
    rows = []
    total = len(stages) * len(checkpointing) * len(variants) * (WARMUP + repeats + 1)
    with tqdm(total=total, desc=f"bench {name}", mininterval=5) as bar:
        for stage in stages:
            freeze(model, STAGES[stage])
            for saves_memory in checkpointing:
                _checkpoint(model, saves_memory)
                timed = _time(model, inputs, variants, repeats, bar)
                rows += _rows(timed, stage, saves_memory, batch * inputs["input_ids"].shape[1])
    result = {
        "shape": name,
        "cut": cut,
        "batch": batch,
        "visual_tokens": shape.side**2,
        "text_tokens": text,
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
    provenance.write_json_atomic(out, result)
    show(result)
    return result


def _checkpoint(model: PreTrainedModel, on: bool) -> None:
    if on:
        model.activation_checkpointing_enable()
    else:
        model.activation_checkpointing_disable()


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
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in variants}

    steps = {name: [0] * repeats for name in variants}
    for name, setting in variants.items():
        if setting:
            with sparsify(model, *setting, total_steps=STAGE) as scheme:
                steps[name] = typical_steps(scheme, STAGE, repeats)

    def run(name: str, step: int) -> float:
        setting = variants[name]
        scheme = sparsify(model, *setting, total_steps=STAGE) if setting else None
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
        counted = [
            _count(lambda step, name=name: run(name, step), model, step)
            for step in (steps[name] if varies else steps[name][:1])
        ]
        row |= {key: fmean(one[key] for one in counted) for key in ("flops", "held_mb")}
        row["peak_mb"] = max(one["peak_mb"] for one in counted) if gpu else None
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
    title = f"{result['shape']} ({result['cut']}), {result['device']}, {result['dtype']}"
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
