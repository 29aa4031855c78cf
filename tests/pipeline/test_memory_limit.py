"""What a training needs is foreseen, and what can't fit is refused before its first step."""

from pathlib import Path

import pytest
import torch

from sts.pipeline.config import load_scale
from sts.pipeline.cost import flops as cost
from sts.pipeline.cost import memory
from sts.pipeline.measure.forecast import model_config, tokens

PAPER = Path(__file__).parents[2] / "workflow/config/paper.yaml"
GB = 1e9


@pytest.fixture(scope="module")
def paper():
    return load_scale(PAPER)


@pytest.fixture(scope="module")
def shape(paper):
    return cost.shape_of(model_config(paper))


@pytest.fixture
def here(monkeypatch):
    """here(bytes): as much as a process may have."""
    return lambda there: monkeypatch.setattr(memory, "memory_here", lambda processes: there)


def needed(paper, shape, stage, **values):
    block = paper.stage(stage).model_copy(update=values)
    return memory.step_memory(shape, block, *tokens(block, paper.data))


def check(paper, shape, stage="instruct", **values):
    block = paper.stage(stage).model_copy(update=values)
    memory.check_memory(shape, stage, block, *tokens(block, paper.data))


def test_shards_divide_weights_gradients_and_moments_of_adamw(paper, shape):
    whole, shared = (needed(paper, shape, "instruct", parallel=name) for name in ("ddp", "fsdp2"))
    trained = shape.parameters["decoder"] + shape.parameters["head"] + shape.parameters["projector"]
    assert whole["optimizer"] == 12 * trained and whole["gathered"] == 0
    for part in ("weights", "optimizer"):
        assert shared[part] == whole[part] / 8
    assert shared["activations"] == whole["activations"]
    outside = shape.parameters["head"] + shape.parameters["projector"]
    layer = shape.parameters["decoder"] / 32
    assert shared["gathered"] >= outside + 2 * layer, "at least a byte of each"


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_the_paper_scale_fits_the_gpus_that_it_names(paper, shape, here, stage):
    here(80 * GB)
    check(paper, shape, stage)
    assert sum(needed(paper, shape, stage).values()) < 70 * GB


def test_what_can_not_fit_is_refused_with_the_numbers_and_the_keys(paper, shape, here):
    here(80 * GB)
    with pytest.raises(MemoryError) as refused:
        check(paper, shape, parallel="ddp")
    said = str(refused.value)
    assert "stages.instruct: a process needs about" in said and "and has 80 GB" in said
    assert "weights 28" in said and "optimizer 81" in said
    assert "parallel: fsdp2" in said and "trains: lora" in said and "batch_size" in said
    assert "gradient_checkpointing" not in said, "it is on"


def test_activations_are_a_rough_figure_and_so_only_warned_of(paper, shape, here, caplog):
    parts = needed(paper, shape, "instruct")
    here(sum(parts.values()) - parts["activations"] / 2)
    check(paper, shape)
    assert "stages.instruct: a process needs about" in caplog.text
    caplog.clear()
    here(sum(parts.values()))
    check(paper, shape)
    assert not caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is not shared")
def test_a_host_is_shared_by_its_processes():
    assert memory.memory_here(1) == 2 * memory.memory_here(2) > 0.5 * GB
