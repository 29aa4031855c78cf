"""Tiny random models of LLaVA-like families; see tiny.py."""

from collections.abc import Callable

import torch
import transformers as hf
from tiny import (
    FEW,
    NEXT_GRIDS,
    NEXT_SIZES,
    NEXT_TILES,
    PATCH,
    PINPOINTS,
    SQUARE,
    Case,
    flat,
    llava,
    noise,
    sized,
    sliding,
    text,
    tiled,
    typed,
    vit,
)

EAGER = {"experts_implementation": "eager"}  # PyTorch's grouped product has no float64


def counted(tiles: dict[str, int], size: int) -> Callable:
    """All tiles of all images in one tensor, [tiles, 3, size, size]."""
    return lambda names: {
        "pixel_values": noise(sum(tiles[name] for row in names for name in row), 3, size, size)
    }


def siglip(size: int):
    """Without the pooling head, which no multimodal model uses."""
    return vit(hf.SiglipVisionConfig, size, vision_use_head=False)


def cohere2():
    return sliding(hf.Cohere2Config)


def sam(config: type, **more):
    """SAM's tower: windows of 4 x 4 of its 16 x 16 patches but in one layer, which sees all."""
    return config(
        image_size=64,
        patch_size=PATCH,
        hidden_size=16,
        mlp_dim=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        output_channels=8,
        window_size=4,
        global_attn_indexes=[1],
        initializer_range=0.02,  # 1e-10 by default, which leaves nothing of the image
        **more,
    )


def masked(seen: dict[str, int]) -> Callable:
    """Aria's: images of 16 x 16 pixels of which only the first rows may be seen."""

    def inputs(names: list[list[str]]) -> dict:
        every = [name for row in names for name in row]
        mask = torch.zeros(len(every), 16, 16, dtype=torch.long)
        for image, name in zip(mask, every, strict=True):
            image[: seen[name]] = 1
        return {"pixel_values": noise(len(every), 3, 16, 16), "pixel_mask": mask}

    return inputs


def two_sizes(names: list[list[str]]) -> dict:
    """DeepSeek-VL's: every image for SigLIP and, larger, for SAM."""
    count = sum(map(len, names))
    return {
        "pixel_values": noise(count, 3, 16, 16),
        "high_res_pixel_values": noise(count, 3, 64, 64),
    }


# 24 x 24 pixels are 6 x 6 patches, and 2 x 2 of them a token; one image is cut into two tiles
COHERE = {
    "images": {"big": [(3, 3, False)] * 2, "small": [(3, 3, False)]},
    "inputs": counted({"big": 2, "small": 1}, 24),
}

CASES = {
    "aya_vision": Case(typed("AyaVision", lambda: siglip(24), cohere2), **COHERE),
    "cohere2_vision": Case(
        typed("Cohere2Vision", lambda: siglip(24), cohere2, alignment_intermediate_size=48),
        **COHERE,
    ),
    "got_ocr2": Case(  # 16 x 16 patches, then two convolutions of stride 2
        typed(
            "GotOcr2",
            lambda: sam(type(hf.GotOcr2Config().vision_config)),
            lambda: text(hf.Qwen2Config),
            image_seq_length=16,
        ),
        SQUARE,
        flat(lambda n: noise(n, 3, 64, 64)),
    ),
    "fast_vlm": Case(  # its own tower is timm's FastViT; this one is convolutional as well
        typed(
            "FastVlm",
            lambda: hf.ConvNextConfig(
                patch_size=PATCH,
                num_stages=2,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                layer_scale_init_value=1.0,
                hidden_size=16,  # what the projector takes
            ),
            lambda: text(hf.Qwen2Config),
            image_seq_length=12,
        ),
        {"big": [(3, 4, False)], "small": [(3, 4, False)]},  # 6 x 8 patches, halved
        flat(lambda n: noise(n, 3, 24, 32)),
    ),
    "deepseek_vl": Case(
        typed("DeepseekVL", lambda: siglip(16), lambda: text(hf.LlamaConfig)),
        SQUARE,
        flat(lambda n: noise(n, 3, 16, 16)),
    ),
    "janus": Case(  # its VQ model and generation head only make images, and get no gradient
        typed(
            "Janus",
            lambda: {
                "image_size": 16,
                "patch_size": PATCH,
                "hidden_size": 16,
                "mlp_ratio": 2.0,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "projection_dim": 24,
                "num_image_tokens": 16,
            },
            lambda: text(hf.LlamaConfig),
            vq_config={
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 24,
                "image_token_embed_dim": 24,
            },
        ),
        SQUARE,
        flat(lambda n: noise(n, 3, 16, 16)),
    ),
    "llava_next_video": Case(
        llava("LlavaNextVideo", image_grid_pinpoints=PINPOINTS, video_token_id=61),
        NEXT_GRIDS,
        tiled(NEXT_SIZES, NEXT_TILES),
    ),
    "lighton_ocr": Case(
        typed(
            "LightOnOcr",
            lambda: vit(hf.PixtralVisionConfig, 64, head_dim=8),
            lambda: text(hf.Qwen3Config),
        ),
        FEW,
        sized({"big": (24, 32), "small": (16, 16)}),
    ),
    "perception_lm": Case(  # its own tower is timm's; a thumbnail and two tiles of every image
        typed(
            "PerceptionLM",
            lambda: vit(hf.CLIPVisionConfig, model_args={"embed_dim": 16}),
            lambda: text(hf.LlamaConfig),
            projector_pooling_ratio=2,
            video_token_id=61,
        ),
        {"big": [(2, 2, False)] * 3, "small": [(2, 2, False)] * 3},
        flat(lambda n: noise(n, 3, 3, 16, 16)),
    ),
    "aria": Case(  # 6 queries of a resampler for an image of 16 patches
        typed(
            "Aria",
            lambda: vit(hf.Idefics3VisionConfig),
            lambda: text(
                hf.AriaTextConfig, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
            ),
            projector_patch_to_query_dict={16: 6},
            **EAGER,
        ),
        {"big": [(1, 6, False)], "small": [(1, 6, False)]},
        masked({"big": 16, "small": 8}),
    ),
    "video_llava": Case(  # the tower of videos is another than that of images
        llava("VideoLlava", image_seq_length=16, video_token_id=61),
        SQUARE,
        flat(lambda n: noise(n, 3, 16, 16)),
    ),
    # No visual token in the input, but added before layers 0, 1 and 2. A head of its Q-former
    # is 64 wide. 16 x 16 pixels are 4 x 4 patches, one query for 2 x 2 of them.
    "granite4_vision": Case(
        typed(
            "Granite4Vision",
            lambda: hf.CLIPVisionConfig(
                image_size=16,
                patch_size=PATCH,
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
            ),
            lambda: text(
                type(hf.Granite4VisionConfig().text_config),
                embedding_multiplier=2.0,
                residual_multiplier=0.5,
                attention_multiplier=0.35,
                logits_scaling=2.0,
            ),
            qformer_config={
                "num_hidden_layers": 1,
                "intermediate_size": 64,
                "cross_attention_frequency": 1,
                "use_qformer_text_input": False,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            projector_dropout=0.0,
            downsample_rate="1/2",
            deepstack_layer_map=[[-2, 0]],
            spatial_target_layers=[1, 2],
            image_grid_pinpoints=PINPOINTS,
        ),
        {"big": [(2, 2, False), (4, 4, True)], "small": [(2, 2, False), (4, 2, True)]},
        tiled({"big": (32, 32), "small": (32, 16)}, NEXT_TILES),
    ),
    "qianfan_ocr": Case(
        typed(
            "QianfanOCR",
            lambda: vit(
                hf.QianfanOCRVisionConfig, [32, 32], [PATCH, PATCH], drop_path_rate=0.0
            ).to_dict(),
            lambda: text(hf.Qwen3Config),
            image_seq_length=16,
        ),
        SQUARE,
        flat(lambda n: noise(n, 3, 32, 32)),
    ),
    # Experts but in its first layer, two layers without positions. A query sees the 8 tokens
    # that score highest; with few heads scores tie at 0, and padding decides which come first.
    "mistral_large4": Case(
        typed(
            "MistralLarge4",
            lambda: vit(hf.PixtralVisionConfig, 64, head_dim=8),
            lambda: text(
                hf.MistralLarge4TextConfig,
                num_key_value_heads=3,
                moe_intermediate_size=24,
                n_routed_experts=4,
                num_experts_per_tok=2,
                kv_lora_rank=8,
                qk_rope_head_dim=4,
                qk_nope_head_dim=4,
                v_head_dim=8,
                index_topk=8,
                index_head_dim=8,
                index_n_heads=16,
                no_rope_layers=[1, 0, 1, 0],
            ),
            **EAGER,
        ),
        FEW,
        sized({"big": (24, 32), "small": (16, 16)}),
    ),
    "deepseek_vl_hybrid": Case(  # SAM's 16 x 16 patches become 4 x 4 and join SigLIP's
        typed(
            "DeepseekVLHybrid",
            lambda: siglip(16),
            lambda: text(hf.LlamaConfig),
            high_res_vision_config=sam(hf.SamVisionConfig).to_dict(),
        ),
        SQUARE,
        two_sizes,
    ),
}
