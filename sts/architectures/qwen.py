"""Qwen-VL: images of any size, several patches of which are merged into a token."""

from transformers import PreTrainedModel

from sts.architectures._base import Architecture, Grid, Inputs


def _qwen_grids(model: PreTrainedModel, inputs: Inputs, count: int) -> list[Grid]:
    merge = model.config.vision_config.spatial_merge_size
    return [
        Grid(height // merge, width // merge)
        for frames, height, width in inputs["image_grid_thw"].tolist()
        for _ in range(frames)
    ]


_QWEN = Architecture(grids=_qwen_grids)

ARCHITECTURES = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": Architecture(
        grids=_qwen_grids,
        visual_mask="visual_pos_masks",
        visual_features="deepstack_visual_embeds",
    ),
}
