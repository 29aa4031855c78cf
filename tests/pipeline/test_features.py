"""A frozen tower's features from a file train a model as the tower itself does, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from cases import EVERYDAY, MIXED, ROWS
from configs import short
from zoo import ZOO

from sts.architectures import REFUSED, tower_layers_of
from sts.pipeline.config import Config
from sts.pipeline.cost.history import read_history
from sts.pipeline.measure.bench import bench
from sts.pipeline.train import features
from sts.pipeline.train.feed import load_data
from sts.pipeline.train.model import build, freeze
from sts.pipeline.train.train import train

BOTH = ["projector", "language_model"]
NO_PROJECTOR = ("emu3", "inkling_mm_model")
# Each for its reason: several calls, several tensors, no function that embeds images, ...
LIVE = (
    "blip-2", "deepseek_ocr2", "deepseek_vl", "deepseek_vl_hybrid", "dots3_note",
    "fast_vlm", "fuyu", "gemma3n", "gemma4_unified", "granite4_vision",
    "granite_docling", "hunyuan_vl", "hyperclovax_vision_v2", "instructblip", "instructblipvideo",
    "janus", "lfm2_vl", "llama4", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "muse_glimmer",
    "muse_spark", "ovis2", "perception_lm", "step3p7", "unlimited_ocr",
)  # fmt: skip
TYPES = sorted(set(ZOO) - set(REFUSED) - set(NO_PROJECTOR))
EVERY = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in (*EVERYDAY, *LIVE[:2]) else pytest.mark.slow)
        for name in TYPES
    ],
)


def learnt(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@EVERY
def test_loss_and_gradients_are_those_of_the_tower_or_the_model_is_refused(name):
    case = ZOO[name]
    model, batch = case.build(), case.batch(ROWS[MIXED])
    freeze(model, ["projector"])
    if name in LIVE:
        with pytest.raises(features.NotCached, match=f"^live: {type(model).__name__} "):
            features.check(model, batch)
        return
    features.check(model, batch)  # and leaves the model as it was
    found, _ = features.seen_by_projector(model, batch)
    freeze(model, BOTH)
    loss, grads = learnt(model, batch)

    ran = []
    for layer in tower_layers_of(model):
        layer.register_forward_hook(lambda *call: ran.append(call[1][0] is call[2]))
    given = {features.KEY + reader: tensor.detach() for reader, tensor in found.items()}
    features.skip_tower(model)
    again, same = learnt(model, batch | given)
    assert ran and all(ran)  # every layer gave back what it got
    assert torch.equal(loss, again)
    assert grads.keys() == same.keys()
    assert all(torch.equal(grads[one], same[one]) for one in grads)
    assert any("vision" not in one for one in grads)
    assert learnt(model, case.batch(ROWS["no image"]))[0].isfinite()  # a batch of text alone


@pytest.fixture(scope="module")
def kept(backbone, prepared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("features") / "scenes-align.json"
    features.write_features(short(), "align", prepared, backbone, out)
    return out


def test_a_file_holds_what_the_projector_is_called_with_row_by_row(backbone, prepared, kept):
    samples, _ = load_data([prepared], short().stage("align"), build(backbone, 0)[1], 0, [kept])
    model, processor = build(backbone, 5)  # another projector reads the same features
    for index in (0, 3, len(samples) - 1):
        sample = samples[index]
        pixels = processor.image_processor(images=sample["images"], return_tensors="pt")
        with torch.no_grad():
            hidden = model.model.vision_tower(**pixels, output_hidden_states=True).hidden_states
        [(name, found)] = sample["features"].items()
        assert name == features.KEY + "model.multi_modal_projector"
        assert torch.equal(found, hidden[-2][:, 1:])


def test_the_manifest_is_the_same_every_time_and_the_file_is_not_made_twice(
    backbone, prepared, kept, monkeypatch
):
    before, file = kept.read_bytes(), Path(json.loads(kept.read_text())["file"])
    made = file.stat().st_mtime_ns
    monkeypatch.setattr(features, "_write", None)
    features.write_features(short(), "align", prepared, backbone, kept)
    assert (kept.read_bytes(), file.stat().st_mtime_ns) == (before, made)


@pytest.mark.parametrize("vtc", [{}, {"kind": "uniform", "keep": 0.5}])
def test_a_training_on_features_gives_the_weights_that_the_tower_gives(
    backbone, prepared, kept, tmp_path, monkeypatch, vtc
):
    monkeypatch.setenv("STS_TRACKING", "off")
    config = short(vtc=vtc) if vtc else short()

    def run(folder: str, *files: Path) -> dict:
        out = tmp_path / folder / "runs" / "dense" / "seed0" / "align.json"
        return train(config, "dense", 0, "align", [prepared], backbone, out, features=files)

    live, cached = run("live"), run("cached", kept)
    assert live["weights_sha256"] == cached["weights_sha256"]
    assert live["key"] == cached["key"]
    assert 0 < cached["flops"] < live["flops"]
    rows = [read_history(run["weights"])[0] for run in (live, cached)]
    assert [row["cached"] for row in rows] == [False, True]
    assert rows[0]["loss"] == rows[1]["loss"]
    assert rows[0]["patches"] == rows[1]["patches"] == 16 * 4  # 4 x 4 of each of 4 images


def test_what_can_not_be_read_is_computed_or_refused(backbone, prepared, kept, tmp_path):
    align, instruct = short().stages.values()
    assert features.usable(align, [prepared], [kept]) == [kept]
    assert features.usable(align, [prepared], []) == []
    asks = short(vtc={"kind": "cls_topk", "keep": 0.5}).stage("align")
    assert features.usable(asks, [prepared], [kept]) == []
    with pytest.raises(ValueError, match=r"features: none of .*manifest.json, instruct, among"):
        features.usable(instruct, [prepared], [kept])
    other = tmp_path / "other.json"
    other.write_text(kept.read_text().replace('"fp32"', '"bf16"'))
    assert features.usable(align, [prepared], [other]) == []


def test_the_benchmark_times_steps_on_features_beside_those_that_compute_them(
    backbone, prepared, kept, tmp_path
):
    """Side by side: of one variant the tower is asked for its attention."""
    more = {"model": {"features": "cached"}, "bench": {"points": 1, "warmup": 0}}
    configs = {
        id: Config(stages={"align": short(vtc=vtc).stage("align")}, **more)
        for id, vtc in (("dense", {}), ("cls", {"kind": "cls_topk", "keep": 0.5}))
    }
    inits = dict.fromkeys(configs, backbone)
    found = bench(configs, [prepared], inits, tmp_path / "bench.json", features=[kept])
    variants = found["variants"]
    assert variants["dense"]["align"]["visual_tokens"] == [16]
    assert variants["cls"]["align"]["visual_tokens"] == [8]
    assert variants["cls"]["flops"]["align"] > 0
