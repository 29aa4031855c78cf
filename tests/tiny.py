"""A tiny random model of every architecture, and batches for it.

    case = CASES["qwen2_vl"]
    model, batch = case.build(), case.batch([["big", 5, 6, 7], [8, "small", 9, 10]])

A row is a list of token ids and images; an image is one of the names in `case.images`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf

IMAGE, VIDEO, PAD, VOCAB, LAYERS, ANSWER = 60, 61, 0, 64, 4, 2
PATCH = 4


@dataclass(frozen=True)
class Case:
    """images: name -> grids (height, width, newline) of its tokens, worked out by hand.

    inputs: (names of the batch's images by row) -> the pixel inputs of the outer forward.
    of_ids: (ids, attended, visual) -> inputs that depend on the text.
    """

    build: Callable[..., hf.PreTrainedModel]
    images: dict[str, list[tuple[int, int, bool]]]
    inputs: Callable[[list[list[str]]], dict]
    of_ids: Callable[..., dict] = field(default=lambda ids, attended, visual: {})

    def tokens(self, name: str) -> int:
        return sum(h * (w + newline) for h, w, newline in self.images[name])

    def placeholders(self, name: str) -> list[int]:
        """A name that begins with `clip` is a video's."""
        return [VIDEO if name.startswith("clip") else IMAGE] * self.tokens(name)

    def batch(self, rows: list[list], side: str = "right") -> dict:
        """Padded on one side; the last ANSWER tokens of a row are its answer."""
        ids = [
            [t for x in row for t in (self.placeholders(x) if isinstance(x, str) else [x])]
            for row in rows
        ]
        length = max(map(len, ids))
        columns = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in ids:
            answer = [-100] * (len(row) - ANSWER) + row[-ANSWER:]
            for name, values, fill in (
                ("input_ids", row, PAD),
                ("attention_mask", [1] * len(row), 0),
                ("labels", answer, -100),
            ):
                padding = [fill] * (length - len(row))
                columns[name].append(values + padding if side == "right" else padding + values)
        batch = {name: torch.tensor(values) for name, values in columns.items()}
        names = [[x for x in row if isinstance(x, str)] for row in rows]
        pixels = self.inputs(names) if any(names) else {}
        visual = is_visual(batch["input_ids"])
        return batch | pixels | self.of_ids(batch["input_ids"], batch["attention_mask"], visual)


def is_visual(ids: torch.Tensor) -> torch.Tensor:
    return (ids == IMAGE) | (ids == VIDEO)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def text(config: type, **more) -> hf.PreTrainedConfig:
    """A decoder configuration; explicit head_dim, as Gemma and Mistral have one of their own."""
    settings = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config(**settings | more)


def alternating(first: str, second: str) -> list[str]:
    return [first, second] * (LAYERS // 2)


def sliding(config: type, **more) -> hf.PreTrainedConfig:
    """A decoder of which every second layer sees the last 8 tokens only."""
    layers = alternating("sliding_attention", "full_attention")
    return text(config, sliding_window=8, layer_types=layers, **more)


def tower(config: type, **more) -> hf.PreTrainedConfig:
    """A vision tower of two layers, for images of any size."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return config(**sizes, num_attention_heads=2, patch_size=PATCH, **more)


def vit(config: type, size: int | list[int] = 16, patch: int | list[int] = PATCH, **more):
    return config(
        image_size=size,
        patch_size=patch,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        **more,
    )


def builder(model: Callable, config: Callable, vision, language, **more) -> Callable:
    def build(dtype: torch.dtype = torch.float64) -> hf.PreTrainedModel:
        torch.manual_seed(0)
        parts = copy.deepcopy({"vision_config": vision, "text_config": language, **more})
        made = model(config(image_token_id=IMAGE, **parts))
        with torch.no_grad():  # initial weights are so small that layers do next to nothing
            for parameter in made.parameters():
                if parameter.ndim > 1 and parameter.any():
                    parameter.mul_(4)
                elif parameter.ndim > 1:  # Gemma 3's projector begins at nothing
                    parameter.normal_(std=0.1)
        return made.to(dtype).train()

    return build


def typed(name: str, vision, language, **more) -> Callable:
    """Of the classes that transformers calls `name`."""
    model, config = getattr(hf, f"{name}ForConditionalGeneration"), getattr(hf, f"{name}Config")
    return builder(model, config, vision, language, **more)


def case(
    name: str,
    vision,
    language,
    images: dict[str, list[tuple[int, int, bool]]],
    inputs: Callable,
    of_ids: Callable = lambda ids, attended, visual: {},
    **more,
) -> Case:
    """Of the classes that transformers calls `name`; see Case."""
    return Case(typed(name, vision, language, **more), images, inputs, of_ids)


def flat(*shape: int) -> Callable:
    """Pixel inputs of models that take all images of a batch in one tensor [images, *shape]."""
    return lambda names: {"pixel_values": noise(sum(map(len, names)), *shape)}


def of_images(values: dict[str, Any], make: Callable[[list], dict]) -> Callable:
    """Pixel inputs that `make` makes of a value of each of the batch's images."""
    return lambda names: make([values[name] for row in names for name in row])


def tiled(sizes: dict[str, tuple[int, int]], tiles: dict[str, int]) -> Callable:
    """LLaVA-NeXT's: [images, tiles, 3, 16, 16] and each image's pixels."""

    def inputs(every: list) -> dict:
        pixels = noise(len(every), max(tiles.values()), 3, 16, 16)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(every)}

    return of_images(sizes, inputs)


def sam(config: type, **more):
    """SAM's tower: windows of 4 x 4 patches but in one layer, which sees all."""
    sizes = {"image_size": 64, "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 3}
    sizes |= {"output_channels": 8, "window_size": 4, "global_attn_indexes": [1]}
    sizes |= {"initializer_range": 0.02}  # 1e-10 by default, which leaves nothing of the image
    return config(patch_size=PATCH, num_attention_heads=2, **sizes | more)


def by_row(names: list[list[str]]) -> dict:
    """Idefics3's: [rows, images, 3, 32, 32], rows with fewer images filled up with zeros."""
    most = max(map(len, names))
    pixels = noise(len(names), most, 3, 32, 32)
    for row, images in zip(pixels, names, strict=True):
        row[len(images) :] = 0
    return {"pixel_values": pixels}


def patches(grids: dict[str, tuple[int, int]], *shape: int) -> Callable:
    """Patches of all images, each of a shape, and (frames, rows, columns) of each image."""

    def inputs(every: list) -> dict:
        pixels = noise(sum(h * w for h, w in every), *shape)
        thw = torch.tensor([(1, h, w) for h, w in every])
        return {"pixel_values": pixels, "image_grid_thw": thw}

    return of_images(grids, inputs)


def sized(sizes: dict[str, tuple[int, int]]) -> Callable:
    """Pixtral's: [images, 3, height, width] of the largest, and each image's pixels."""

    def inputs(every: list) -> dict:
        height, width = map(max, zip(*every, strict=True))
        pixels = noise(len(every), 3, height, width)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(every)}

    return of_images(sizes, inputs)


PINPOINTS = [[16, 32], [32, 16], [32, 32]]
NEXT_SIZES = {"big": (24, 32), "small": (32, 16)}  # the first is padded to 32 x 32 and cut again
NEXT_TILES = {"big": 5, "small": 3}
NEXT = {
    "images": {"big": [(4, 4, False), (6, 8, True)], "small": [(4, 4, False), (8, 4, True)]},
    "inputs": tiled(NEXT_SIZES, NEXT_TILES),
}
QWEN_GRIDS = {"big": (8, 12), "small": (4, 8)}  # in patches; 2 x 2 of them are a token
QWEN = {
    "images": {"big": [(4, 6, False)], "small": [(2, 4, False)]},
    "inputs": patches(QWEN_GRIDS, 3 * 2 * PATCH * PATCH),
    "of_ids": lambda ids, attended, visual: {"mm_token_type_ids": visual.long()},
}
SQUARE = {"big": [(4, 4, False)], "small": [(4, 4, False)]}
FEW = {"big": [(3, 4, False)], "small": [(2, 2, False)]}
# What several decoders and towers have alike
EAGER = {"experts_implementation": "eager"}  # PyTorch's grouped product has no float64
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
FIRST_DENSE = {"mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1)}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
SWA = {"swa_num_attention_heads": 3, "swa_num_key_value_heads": 1, "swa_head_dim": 8}
WINDOWED = {"out_hidden_size": 24, "window_size": 16, "fullatt_block_indexes": [1]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2}
VISION = {**QWEN_VISION, "hidden_size": 16, "intermediate_size": 32}
QWEN3_VISION = {**VISION, "out_hidden_size": 24, "num_position_embeddings": 16}
DEEPSTACK_VISION = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}


def llava(name: str, images: dict, inputs: Callable, **more) -> Case:
    return case(name, vit(hf.CLIPVisionConfig), text(hf.LlamaConfig), images, inputs, **more)


def idefics(name: str) -> Case:
    vision = vit(getattr(hf, f"{name}VisionConfig"), 32).to_dict()
    return case(name, vision, text(hf.LlamaConfig), SQUARE, by_row, scale_factor=2)


CASES = {
    "llava": llava("Llava", SQUARE, flat(3, 16, 16), image_seq_length=16),
    "pixtral": case(  # a LLaVA with a tower that takes any size
        "Llava",
        vit(hf.PixtralVisionConfig, 64, head_dim=8),
        text(hf.MistralConfig),
        FEW,
        sized({"big": (12, 16), "small": (8, 8)}),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "vipllava": llava(
        "VipLlava", SQUARE, flat(3, 16, 16), image_seq_length=16, vision_feature_layers=[-2, 1]
    ),
    "llava_next": llava("LlavaNext", **NEXT, image_grid_pinpoints=PINPOINTS),
    "llava_onevision": case(
        "LlavaOnevision",
        vit(hf.SiglipVisionConfig),
        text(hf.Qwen2Config),
        **NEXT,
        image_grid_pinpoints=PINPOINTS,
        video_token_id=61,
    ),
    "qwen2_vl": case(
        "Qwen2VL",
        {**QWEN_VISION, "embed_dim": 16, "hidden_size": 24},
        text(hf.Qwen2VLTextConfig, rope_parameters=dict(MROPE)).to_dict(),
        **QWEN,
    ),
    "qwen2_5_vl": case(
        "Qwen2_5_VL",
        VISION | WINDOWED,
        text(hf.Qwen2_5_VLTextConfig, rope_parameters=dict(MROPE)).to_dict(),
        **QWEN,
    ),
    "qwen3_vl": case(
        "Qwen3VL",
        DEEPSTACK_VISION,
        text(hf.Qwen3VLTextConfig, rope_parameters=dict(MROPE)).to_dict(),
        **QWEN,
    ),
    "internvl": case(
        "InternVL",
        vit(hf.InternVLVisionConfig, [32, 32], [PATCH, PATCH]),
        text(hf.Qwen2Config),
        SQUARE,
        flat(3, 32, 32),
        image_seq_length=16,
    ),
    "idefics3": idefics("Idefics3"),
    "smolvlm": idefics("SmolVLM"),
    "paligemma": case(
        "PaliGemma",
        vit(hf.SiglipVisionConfig, projection_dim=24),
        text(hf.GemmaConfig),
        SQUARE,
        flat(3, 16, 16),
        lambda ids, attended, visual: {  # 1 from the first answer token on
            "token_type_ids": (attended.flip(1).cumsum(1).flip(1) <= ANSWER).long() * attended
        },
        projection_dim=24,
    ),
    "gemma3": case(
        "Gemma3",
        vit(hf.SiglipVisionConfig, 32),
        sliding(hf.Gemma3TextConfig),
        SQUARE,
        flat(3, 32, 32),
        lambda ids, attended, visual: {"token_type_ids": visual.long()},
        mm_tokens_per_image=16,
    ),
    "mistral3": case(
        "Mistral3",
        vit(hf.PixtralVisionConfig, 64, head_dim=8),
        text(hf.MistralConfig),
        FEW,
        sized({"big": (24, 32), "small": (16, 16)}),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
}
