"""Videos, which are compressed frame by frame, and other things that a batch may hold."""

from dataclasses import replace

import pytest
import torch
from by_hand import KEEP, assert_same, backward, by_hand, pooled
from tiny import CASES, IMAGE, PATCH, VIDEO, noise
from zoo import ZOO

from sts import LDS, VTC, SparseCallback, sparsify
from sts.vtc import KINDS, Outputs

POOLED = VTC("avgpool2d", keep=KEEP)


def thw(sizes: dict[str, tuple[int, int, int]], channels: int):
    """Images and videos by (frames, rows, columns) of patches."""

    def inputs(names: list[list[str]]) -> dict:
        made = {}
        for medium, prefix in (("", False), ("_videos", True)):
            every = [n for row in names for n in row if n.startswith("clip") == prefix]
            if every:
                grids = torch.tensor([sizes[name] for name in every])
                made[f"pixel_values{medium}"] = noise(int(grids.prod(1).sum()), channels)
                made["video_grid_thw" if prefix else "image_grid_thw"] = grids
        return made

    return inputs


def of_frames(sizes: dict[str, int], images):
    """Videos as [videos, frames, 3, 16, 16], all of as many frames, beside images."""

    def inputs(names: list[list[str]]) -> dict:
        pictures = [[n for n in row if not n.startswith("clip")] for row in names]
        made = images(pictures) if any(pictures) else {}
        clips = [n for row in names for n in row if n.startswith("clip")]
        if clips:
            made["pixel_values_videos"] = noise(len(clips), sizes[clips[0]], 3, 16, 16)
        return made

    return inputs


def qwen(name: str):
    """2 x 2 patches are a token; a clip has two frames of another size than the images."""
    sizes = {"big": (1, 8, 12), "small": (1, 4, 8), "clip": (2, 8, 4), "clip of one": (1, 4, 4)}
    grids = {
        key: [(height // 2, width // 2, False)] * frames
        for key, (frames, height, width) in sizes.items()
    }
    channels = 3 * 2 * PATCH * PATCH

    def build():
        model = ZOO[name].build()
        model.config.video_token_id = VIDEO
        return model

    return replace(
        ZOO[name],
        build=build,
        images=grids,
        inputs=thw(sizes, channels),
        of_ids=lambda ids, *_: {"mm_token_type_ids": (ids == IMAGE) + 2 * (ids == VIDEO)},
    )


def llava(name: str, frame: list[tuple[int, int, bool]], end: list[tuple[int, int, bool]]):
    case = CASES.get(name) or ZOO[name]
    clip = {"clip": frame * 2 + end}
    return replace(case, images=case.images | clip, inputs=of_frames({"clip": 2}, case.inputs))


VIDEOS = {
    **{name: qwen(name) for name in ("qwen2_vl", "qwen2_5_vl")},
    "llava_onevision": llava("llava_onevision", [(2, 2, False)], [(1, 0, True)]),
    "llava_next_video": llava("llava_next_video", [(2, 2, False)], []),
}
ROWS = {
    "only a video": [["clip", 5, 6, 7], ["clip", 8, 9, 10, 11]],
    "beside an image": [[3, "big", 5, "clip", 6, 7], ["clip", 8, 9, 10], [11, 12, 13]],
}


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_videos_are_compressed_frame_by_frame(name, rows):
    case = VIDEOS[name]
    model, batch = case.build(), case.batch(rows)
    expected = by_hand(model, case, rows, batch, pooled)
    scheme = sparsify(model, POOLED)
    scheme.begin_step(0)
    assert_same(backward(model, batch), expected)
    assert 0 < scheme.metrics()["keep_ratio"] < 0.5


def test_an_image_that_is_masked_out_is_not_kept():
    model, batch = CASES["llava"].build(), CASES["llava"].batch([["big", 3, "big", 5, 6]])
    seen = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    batch["attention_mask"][0, :17] = 0  # the first image, and the text after it
    scheme = sparsify(model, VTC("uniform", keep=KEEP))
    scheme.begin_step(0)
    model(**batch).loss.backward()
    assert seen == [4 + 2] and scheme.metrics()["visual_tokens"] == 4


def test_vision_aspect_ratio_none_is_the_one_of_the_config():
    case = CASES["llava_onevision"]
    model, batch = case.build(), case.batch([["big", 5, 6, 7]])
    sparsify(model, POOLED).begin_step(0)
    expected = model(**batch).loss
    assert model(**batch, vision_aspect_ratio=None).loss == expected


@pytest.mark.parametrize("lds", [LDS("layerdrop", rate=0.5), LDS("dropbp", rate=0.5)])
def test_gradients_of_zeros_do_not_move_what_is_skipped(lds):
    """zero_grad(set_to_none=False) leaves them, and momentum and weight decay would act on them."""
    model, batch = CASES["llava"].build(), CASES["llava"].batch([["big", 5, 6, 7]])
    scheme = sparsify(model, lds=lds, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(4):
        scheme.begin_step(step)
        optimizer.zero_grad(set_to_none=False)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for _ in range(2):
            model(**batch).loss.backward()
        optimizer.step()
        unmoved = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
        off = {"rows": "", "attention_backward": "self_attn.", "mlp_backward": "mlp."}
        for layer, share in scheme.decision.off:
            prefix = f"model.language_model.layers.{layer}.{off[share]}"
            mine = {name for name in before if name.startswith(prefix)}
            assert mine and mine <= unmoved


def test_ddp_in_a_trainer_is_told_of_gradients_that_are_not_there():
    class Arguments:
        world_size, fsdp, deepspeed, ddp_find_unused_parameters = 2, [], None, None

    callback = SparseCallback(CASES["llava"].build(), lds=LDS("layerdrop", rate=0.5))
    with pytest.raises(ValueError, match=r"ddp_find_unused_parameters=None: expected True.*layer"):
        callback._check_ddp(Arguments)
    Arguments.ddp_find_unused_parameters = True
    callback._check_ddp(Arguments)
    callback = SparseCallback(None, lds=LDS("layerdrop", rate=0.5, unit="samples"))
    Arguments.ddp_find_unused_parameters = False
    callback._check_ddp(Arguments)


def doubled(tokens, keep):
    """A kind that keeps every place and changes what is there."""
    everything = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return Outputs(everything, lambda x: 2 * x)


def test_a_kind_that_keeps_every_place_still_does_what_it_does(monkeypatch):
    monkeypatch.setitem(KINDS, "doubled", doubled)
    model, batch = CASES["llava"].build(), CASES["llava"].batch([["big", 5, 6, 7]])
    projector = model.model.multi_modal_projector
    double = projector.register_forward_hook(lambda module, args, output: 2 * output)
    expected = backward(model, batch)
    double.remove()
    sparsify(model, VTC("doubled", keep=0.5)).begin_step(0)
    assert_same(backward(model, batch), expected)
