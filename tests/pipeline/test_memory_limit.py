"""What a training needs is foreseen, and what can't fit is refused before its first step."""

from pathlib import Path

import pytest
import torch

from sts.pipeline.config import load_scale
from sts.pipeline.cost import memory
from sts.pipeline.measure.stage_cost import StageCost

PAPER = Path(__file__).parents[2] / "workflow/config/paper.yaml"
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
    text, answer = cost.tokens
    return cost.counts, block, cost.counts.visual_tokens + text, answer


def needed(paper, stage, **values):
    return memory.step_memory(*sizes(paper, stage, **values))


def check(paper, stage="instruct", **values):
    counts, *others = sizes(paper, stage, **values)
    memory.check_memory(counts, stage, *others)


def test_shards_divide_weights_gradients_and_moments_of_adamw(paper):
    whole, shared = (needed(paper, "instruct", parallel=name) for name in ("ddp", "fsdp2"))
    parameters = StageCost(paper, "instruct").counts.parameters
    outside = parameters["head"] + parameters["projector"]
    assert whole["optimizer"] == 12 * (parameters["decoder"] + outside) and whole["gathered"] == 0
    for part in ("weights", "optimizer"):
        assert shared[part] == whole[part] / 8
    assert shared["activations"] == whole["activations"]
    layer = parameters["decoder"] / 32
    assert shared["gathered"] >= outside + 2 * layer, "at least a byte of each"


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_the_paper_scale_fits_the_gpus_that_it_names(paper, here, stage):
    here(80 * GB)
    check(paper, stage)
    assert sum(needed(paper, stage).values()) < 70 * GB


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
    parts = needed(paper, "instruct")
    here(sum(parts.values()) - parts["activations"] / 2)
    check(paper)
    assert "stages.instruct: a process needs about" in caplog.text
    caplog.clear()
    here(sum(parts.values()))
    check(paper)
    assert not caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is not shared")
def test_a_host_is_shared_by_its_processes():
    assert memory.memory_here(1) == 2 * memory.memory_here(2) > 0.5 * GB
