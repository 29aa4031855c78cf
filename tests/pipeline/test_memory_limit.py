"""What a training needs is foreseen, and what can't fit is refused before its first step."""

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from sts.pipeline.config import EvaluateConfig, load_scale
from sts.pipeline.cost import memory
from sts.pipeline.measure.stage_cost import StageCost, model_config

PAPER, SMALL = (Path(__file__).parents[2] / f"workflow/config/{x}.yaml" for x in ("paper", "small"))
GB = 1e9


@pytest.fixture(scope="module")
def paper():
    return load_scale(PAPER)


@pytest.fixture
def here(monkeypatch):
    """here(bytes): as much as a process may have."""
    return lambda there: monkeypatch.setattr(memory, "memory_here", lambda processes: there)


def sizes(paper, stage, **values):
    """What `step_memory` is told of a stage with other values."""
    block = paper.stage(stage).model_copy(update=values)
    cost = StageCost(paper.model_copy(update={"stages": {stage: block}}), stage)
    return cost.counts, block, *cost.longest


def needed(paper, stage, on_gpu=True, **values):
    return memory.step_memory(*sizes(paper, stage, **values), on_gpu)


def check(paper, stage="instruct", **values):
    counts, *others = sizes(paper, stage, **values)
    memory.check_memory(counts, stage, *others)


def test_bf16_weights_halve_what_is_frozen_and_have_masters_and_gradients(paper):
    plain, half = (
        needed(paper, "align", weights=name, parallel="ddp") for name in ("fp32", "bf16")
    )
    counts = StageCost(paper, "align").counts
    assert paper.stage("align").trains == ["projector"]
    assert half["weights"] == plain["weights"] / 2
    assert half["optimizer"] == 16 * counts.parameters["projector"]
    assert half["copies"] == 2 * counts.parameters["projector"]


def test_adapters_need_an_optimizer_of_their_own_weights_alone(paper):
    stage = paper.stage("instruct")
    rates = {"lora": 2e-4, "projector": 2e-5}
    adapters = needed(paper, "instruct", trains=["projector", "lora"], lr=rates)
    of_text = StageCost(paper, "instruct").counts
    width, layers, hidden = 4096, 32, 11008
    rank = stage.lora.rank
    added = layers * rank * (4 * 2 * width + 3 * (width + hidden))
    assert adapters["optimizer"] == 12 * (added + of_text.parameters["projector"]) / 8
    assert adapters["weights"] == 4 * (sum(of_text.parameters.values()) + added) / 8


def test_shards_divide_weights_gradients_and_moments_of_adamw(paper):
    whole, shared = (needed(paper, "instruct", parallel=name) for name in ("ddp", "fsdp2"))
    parameters = StageCost(paper, "instruct").counts.parameters
    outside = parameters["head"] + parameters["projector"]
    trained = parameters["decoder"] + outside
    assert whole["optimizer"] == 12 * trained and whole["copies"] == 2 * trained
    for part in ("weights", "optimizer"):
        assert shared[part] == whole[part] / 8
    assert shared["activations"] < whole["activations"], "bf16 from layer to layer"
    layer = parameters["decoder"] / 32
    assert shared["copies"] == 2 * 2 * (outside + 2 * layer), "weights and gradients"


def test_a_step_at_full_size_takes_what_fake_tensors_count(paper):
    """Peak GB of activations, logits and autocast's copies of a step of rows at the cut, which
    torch allocated on fake tensors of the full models, all answers or a few of them."""
    small = load_scale(SMALL)
    wide = {"batch_size": 16, "max_length": 2048}
    for scale, stage, counted, values in (
        (small, "instruct", 55.2, wide),
        (small, "instruct", 22.1, wide | {"gradient_checkpointing": True}),
        (paper, "instruct", 22.3, {}),
        (paper, "align", 37.0, {}),
    ):
        parts = needed(scale, stage, **values)
        copies = 0 if scale is paper else parts["copies"]
        foreseen = (parts["activations"] + parts["logits"]) / memory.ALLOCATOR + copies
        assert foreseen / GB == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("scale", "gigabytes", "values"),
    [(PAPER, 80, {}), (PAPER, 40, {"batch_size": 8, "gradient_accumulation_steps": 2}),
     (SMALL, 24, {})],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_the_longest_batches_fit_the_gpus_that_a_scale_names(scale, gigabytes, values, stage):
    """With a fifth to spare."""
    assert sum(needed(load_scale(scale), stage, **values).values()) < 0.8 * gigabytes * GB


def test_on_smaller_gpus_the_batch_is_what_lacks(paper):
    block, parts = paper.stage("instruct"), needed(paper, "instruct")
    assert "a smaller batch_size" in memory.lacking("instruct", block, parts, 40 * GB)


def test_what_can_not_fit_is_refused_with_the_numbers_and_the_keys(paper, here):
    here(80 * GB)
    with pytest.raises(MemoryError) as refused:
        check(paper, parallel="ddp")
    text = str(refused.value)
    for part in (
        "stages.instruct: a process needs about", "and has 80 GB", "weights 28", "optimizer 81",
        "parallel: fsdp2", "trains: lora", "batch_size",
    ):  # fmt: skip
        assert part in text
    assert "gradient_checkpointing" not in text, "it is on"


def test_activations_are_a_rough_figure_and_so_only_warned_of(paper, here, caplog):
    parts = needed(paper, "instruct", on_gpu=False)
    here(sum(parts.values()) - parts["activations"] / 2)
    check(paper)
    assert "stages.instruct: a process needs about" in caplog.text
    caplog.clear()
    here(sum(parts.values()))
    check(paper)
    assert not caplog.text


def asked(scale, precision, batch_tokens):
    """What `evaluation_memory` is told of a scale's model."""
    parameters = sum(StageCost(scale, "instruct").counts.parameters.values())
    options = EvaluateConfig(batch_tokens=batch_tokens, max_new_tokens=16)
    return model_config(scale.model), parameters, options, precision


@pytest.mark.parametrize(
    ("precision", "weights", "peak"), [("bf16", 14.1, 10.2), ("fp32", 28.3, 20.4)]
)
def test_an_evaluation_takes_what_fake_tensors_count(paper, precision, weights, peak):
    """GB of Vicuna-7B's weights, and of the prefill of 24 questions of 680 tokens with pictures."""
    parts = memory.evaluation_memory(*asked(paper, precision, 24 * 680))
    assert parts["weights"] / GB == pytest.approx(weights, rel=0.01)
    assert sum(parts.values()) - parts["weights"] - parts["process"] < 1.1 * peak * GB
    assert sum(parts.values()) - parts["weights"] - parts["process"] > peak * GB


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4", "gemma4_unified", "perception_lm"])
def test_a_model_whose_layers_or_tower_are_of_an_own_kind_can_be_asked(kind):
    parts = memory.evaluation_memory(CONFIG_MAPPING[kind](), 10**9, EvaluateConfig(), "bf16")
    assert parts["cache"] > 1e6 and parts["activations"] > 1e6


def test_questions_that_can_not_fit_are_refused_before_the_first(paper, here, caplog):
    arguments = asked(paper, "bf16", 16_384)
    here(26 * GB)
    memory.check_evaluation(*arguments)
    assert not caplog.text
    here(25 * GB)
    memory.check_evaluation(*arguments)
    assert "evaluate: a process needs about 25.4 GB" in caplog.text
    here(16 * GB)
    with pytest.raises(MemoryError, match=r"cache 8\.\d+, .* has 16 GB.*batch_tokens below 16384"):
        memory.check_evaluation(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is not shared")
def test_a_host_is_shared_by_its_processes():
    assert memory.memory_here(1) == 2 * memory.memory_here(2) > 0.5 * GB
