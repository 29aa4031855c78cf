"""What VTC and LDS save at the shape of a known model, with random weights and made-up data.

    python -m sts bench --shape llava-1.5-7b --settings uniform@0.25 layerdrop@0.5 --out bench.json

A setting is `kind@keep` (VTC), `policy@rate` (LDS), each with more of its settings after colons
(`sts@0.6:epsilon=0.5:unit=samples`), or both joined by `+`. Three more are always there: `plain`,
the model untouched; `bare`, its base model and the loss on answer tokens written out by hand;
`dense`, the same with a scheme attached that does nothing: the baseline; `chunked`, which is
`dense` with its loss in chunks (`cross_entropy: chunked`).

A step is forward and backward, in bf16 on a GPU, else in float32, or by autocast to bf16. All
settings take turns on the same batch in one process. Of a setting that leaves out layers, steps are
timed that stand for a whole stage (`typical_steps`).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from sts.checks import expect
from sts.lds import POLICIES
from sts.pipeline.cost.machines import gpu_of
from sts.pipeline.files import write_json_atomic
from sts.pipeline.measure import shapes
from sts.pipeline.measure.timing import in_turn, measured_on, typical_steps
from sts.pipeline.train.chunked_loss import chunk_loss
from sts.pipeline.train.model import freeze, recompute
from sts.scheme import sparsify
from sts.settings import IGNORE_INDEX, LDS, VTC
from sts.vtc import KINDS

WARMUP = 2
# What each stage of LLaVA's recipe trains
STAGES = {"align": ("projector",), "instruct": ("projector", "language_model")}
FLASH = "flash_attention_2"
ATTENTION = ("sdpa", "eager", FLASH)
Variants = dict[str, tuple[VTC, LDS] | None]  # None: without a scheme
ALWAYS: Variants = {"plain": None, "bare": None} | dict.fromkeys(
    ("dense", "chunked"), (VTC(), LDS())
)
STEPS = 1000  # optimizer steps that a schedule is spread over
COLUMNS = (
    "stage checkpointing setting step_s tokens_per_s flops_ratio time_ratio realisation held_mb "
    "peak_mb mfu"
)
# On a CPU the fused attention is an operator of its own that torch's counter doesn't know.
FUSED_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}


def parse_setting(text: str) -> tuple[VTC, LDS]:
    """`uniform@0.25+sts@0.6:epsilon=0.5` -> what it says. ValueError says what is accepted."""
    settings: dict[type, VTC | LDS] = {VTC: VTC(), LDS: LDS()}
    for part in text.split("+"):
        main, *more = part.split(":")
        name, _, number = main.partition("@")
        accepted = f"kind@keep or policy@rate of {', '.join([*KINDS, *POLICIES])}"
        is_named = name in KINDS or name in POLICIES
        expect(is_named and bool(number), "setting", text, accepted)
        pairs = [pair.partition("=") for pair in more]
        expect(all(value for _, _, value in pairs), "setting", text, ":name=value after it")
        values = {key: yaml.safe_load(value) for key, _, value in pairs}
        kind = VTC if name in KINDS else LDS
        keys = [field.name for field in fields(kind)]  # the first two: name and number
        expect(values.keys() <= set(keys[2:]), "setting", text, f"names of {', '.join(keys[2:])}")
        settings[kind] = kind(**{keys[0]: name, keys[1]: yaml.safe_load(number)} | values)
    return settings[VTC], settings[LDS]


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
    autocast: bool = False,
) -> dict[str, Any]:
    """Time settings of VTC and LDS at the shape of a known model; print, write, return the result.

    Args:
        name: The shape, one of shapes.SHAPES.
        settings: As `parse_setting` reads them.
        out: File to write.
        stages: What is trained, names of STAGES.
        checkpointing: Whether activations are computed once more in the backward pass.
        batch: Samples a step.
        text: Text tokens a sample, half of them the answer.
        layers, width: Decoder layers, and share of the channels; default: all on a GPU and of
            `mini` and `wide`, else 4 and 1/8.
        repeats: Timed steps a setting.
        attention: One of ATTENTION.
        autocast: Whether weights are float32 and the forward computes in bf16.

    Raises:
        ValueError: An unknown shape, setting or attention, or one that can't run here.
    """
    expect(attention in ATTENTION, "attention", attention, f"one of {', '.join(ATTENTION)}")
    can_flash = attention != FLASH or (torch.cuda.is_available() and is_flash_attn_2_available())
    expect(can_flash, "attention", attention, "sdpa or eager, or a GPU and the package flash-attn")
    parsed = {setting: parse_setting(setting) for setting in settings if setting not in ALWAYS}
    config, cut = _cut(name, layers, width)
    steps = Steps(config, attention, batch, text, ALWAYS | parsed, autocast)
    about, tokens = measured_on(), steps.inputs["input_ids"].numel()
    rows = [
        {"stage": stage, "checkpointing": is_on, **row}
        for stage in stages
        for is_on in checkpointing
        for row in _rows(steps.time(stage, is_on, repeats), tokens, about["device"])
    ]
    result = {
        **{"shape": name, "cut": cut, "batch": batch, "text_tokens": text, "repeats": repeats},
        "visual_tokens": shapes.side(config) ** 2,
        **{"attention": attention, "autocast": autocast, "torch": torch.__version__},
        "dtype": str(steps.model.dtype).removeprefix("torch."),
        "rows": rows,
        **about,
    }
    write_json_atomic(out, result)
    print(f"{name} ({cut}), {about['device']}, {result['dtype']}, {attention}")
    table = pd.DataFrame(rows)[COLUMNS.split()].dropna(axis="columns", how="all")
    print(table.to_string(index=False, na_rep="", float_format="{:.3g}".format))
    return result


def _cut(name: str, layers: int | None, width: float | None) -> tuple[PreTrainedConfig, str]:
    """The configuration of a shape, cut to what this machine runs, and what was cut in words."""
    full = shapes.shape(name).text_config
    is_full = torch.cuda.is_available() or name in ("mini", "wide")
    layers = layers or (full.num_hidden_layers if is_full else 4)
    config = shapes.shape(name, layers, width or (1.0 if is_full else 1 / 8))
    text = config.text_config
    return config, (
        f"{text.num_hidden_layers} of {full.num_hidden_layers} layers, "
        f"width {text.hidden_size} of {full.hidden_size}"
    )


class Timed(NamedTuple):
    """`seconds` of a variant's steps, and of a step `flops`, `held_mb` for the backward pass and
    `peak_mb` of a GPU."""

    seconds: list[float]
    counts: dict[str, float | None]


class Steps:
    """Takes the steps of all variants, forward and backward, on one model with random weights and
    one batch."""

    def __init__(
        self,
        config: PreTrainedConfig,
        attention: str,
        batch: int,
        text: int,
        variants: Variants,
        autocast: bool = False,
    ) -> None:
        has_gpu, self.autocast = torch.cuda.is_available(), autocast
        device = "cuda" if has_gpu else "cpu"
        dtype = torch.bfloat16 if has_gpu and not autocast else torch.float32
        torch.manual_seed(0)
        with torch.device(device):
            self.model = shapes.random_model(config, dtype)
        self.model.set_attn_implementation(attention)
        self.chunk = chunk_loss(self.model)
        inputs = shapes.made_up_batch(config, batch, text, text - text // 2)
        self.inputs = {
            key: value.to(device, dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }
        self.variants = variants

    def time(self, stage: str, checkpointing: bool, repeats: int) -> dict[str, Timed]:
        """Variant -> what its steps took."""
        freeze(self.model, STAGES[stage])
        recompute(self.model, checkpointing)
        steps = {name: self.typical(name, repeats) for name in self.variants}
        # a forward is asked once what it sees, which is no part of a step
        self.take("dense", 0)
        counts = {name: self.count(name, steps[name]) for name in self.variants}
        # torch's counter doesn't know the products in the chunks' operator
        counts["chunked"]["flops"] = counts["dense"]["flops"]
        taken = in_turn(
            f"bench {stage}", list(self.variants), 1, WARMUP, repeats,
            lambda name, _, repeat: self.take(name, steps[name][max(repeat, 0)]),
        )  # fmt: skip
        return {
            name: Timed([seconds for _, seconds in rounds], counts[name])
            for name, (rounds,) in taken.items()
        }

    def scheme(self, name: str) -> Any:
        """The variant's scheme on the model, or None, for the body of a `with`."""
        setting = self.variants[name]
        self.chunk(name == "chunked")
        return sparsify(self.model, *setting, total_steps=STEPS) if setting else nullcontext()

    def typical(self, name: str, repeats: int) -> list[int]:
        """The steps of a variant that are timed."""
        with self.scheme(name) as scheme:
            return typical_steps(scheme, STEPS, repeats) if scheme else [0] * repeats

    def take(self, name: str, step: int) -> float:
        """Seconds of a step."""
        with self.scheme(name) as scheme:
            if scheme:
                scheme.begin_step(step)
            began = timer()
            with torch.autocast(self.model.device.type, torch.bfloat16, self.autocast):
                loss = self.bare_loss() if name == "bare" else self.model(**self.inputs).loss
            loss.backward()
            seconds = timer() - began
        self.model.zero_grad(set_to_none=True)
        return seconds

    def bare_loss(self) -> Tensor:
        """The loss by hand: logits of the answer tokens alone."""
        unlabelled = {key: value for key, value in self.inputs.items() if key != "labels"}
        hidden = self.model.base_model(**unlabelled, use_cache=False)[0]
        targets = self.inputs["labels"][:, 1:]
        logits = self.model.get_output_embeddings()(hidden[:, :-1][targets != IGNORE_INDEX])
        return cross_entropy(logits.float(), targets[targets != IGNORE_INDEX])

    def count(self, name: str, steps: Sequence[int]) -> dict[str, float | None]:
        """FLOPs and memory of a variant, means over its steps where these differ."""
        setting, attention = self.variants[name], self.model.config._attn_implementation
        steps = steps if setting and setting[1].rate > 0 else steps[:1]
        counts = [self._count(name, step) for step in steps]
        held_mb = fmean(step["held_mb"] for step in counts)
        peak_mb = max(step["peak_mb"] for step in counts) or None
        if attention != "sdpa":  # torch's counter knows no other's kernels
            self.model.set_attn_implementation("sdpa")
            counts = [self._count(name, step) for step in steps]
            self.model.set_attn_implementation(attention)
        flops = fmean(step["flops"] for step in counts)
        return {"flops": flops, "held_mb": held_mb, "peak_mb": peak_mb}

    def _count(self, name: str, step: int) -> dict[str, float]:
        """FLOPs of a step, MB it holds for backward, peak MB of a GPU."""
        stored: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            stored[storage.data_ptr()] = storage.nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.reset_peak_memory_stats()
        counter = FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU)
        with counter, saved_tensors_hooks(pack, lambda tensor: tensor):
            self.take(name, step)
        return {
            "flops": counter.get_total_flops(),
            "held_mb": sum(size for at, size in stored.items() if at not in weights) / 1e6,
            "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if has_gpu else 0.0,
        }


def _rows(timed: dict[str, Timed], tokens: int, device: str) -> list[dict[str, Any]]:
    """A row for each variant: medians, range, and ratios to `dense`; tokens: of a batch."""
    dense, rows = timed["dense"], []
    gpu = gpu_of(device)
    for setting, (seconds, counts) in timed.items():
        step_s = median(seconds)
        # paired by turn, so that a slow moment of the machine is in both; a mean, as the steps of
        # a setting need not do the same
        time_ratio = fmean(a / b for a, b in zip(seconds, dense.seconds, strict=True))
        flops_ratio = counts["flops"] / dense.counts["flops"]
        realisation = (1 - time_ratio) / (1 - flops_ratio) if flops_ratio < 0.99 else None
        rows.append(
            {
                "setting": setting,
                "step_s": step_s,
                "step_s_range": [min(seconds), max(seconds)],
                "tokens_per_s": tokens / step_s,
                "mfu": counts["flops"] / step_s / gpu.flops if gpu else None,
                "time_ratio": time_ratio,
                "flops_ratio": flops_ratio,
                "realisation": realisation,
                **counts,
            }
        )
    return rows
