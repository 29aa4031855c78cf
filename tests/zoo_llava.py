"""Tiny random models of LLaVA-like families; see tiny.py."""

from collections.abc import Callable

import torch
import transformers as hf
from tiny import (
    EAGER,
    FEW,
    NEXT,
    NEXT_TILES,
    PATCH,
    PINPOINTS,
    SQUARE,
    case,
    flat,
    llava,
    noise,
    of_images,
    sam,
    sized,
    sliding,
    text,
    tiled,
    vit,
)


def siglip(size: int):
    """Without the pooling head, which no multimodal model uses."""
    return vit(hf.SiglipVisionConfig, size, vision_use_head=False)


def masked(seen: dict[str, int]) -> Callable:
    """Aria's: images of 16 x 16 pixels of which only the first rows may be seen."""

    def inputs(every: list[int]) -> dict:
        mask = torch.arange(16) < torch.tensor(every)[:, None]
        mask = mask.long()[..., None].repeat(1, 1, 16)
        return {"pixel_values": noise(len(every), 3, 16, 16), "pixel_mask": mask}

    return of_images(seen, inputs)


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
    "inputs": of_images(
        {"big": 2, "small": 1}, lambda counts: {"pixel_values": noise(sum(counts), 3, 24, 24)}
    ),
}

CASES = {
    "aya_vision": case("AyaVision", siglip(24), sliding(hf.Cohere2Config), **COHERE),
    "cohere2_vision": case(
        "Cohere2Vision",
        siglip(24),
        sliding(hf.Cohere2Config),
        **COHERE,
        alignment_intermediate_size=48,
    ),
    "got_ocr2": case(  # 16 x 16 patches, then two convolutions of stride 2
        "GotOcr2",
        sam(type(hf.GotOcr2Config().vision_config)),
        text(hf.Qwen2Config),
        SQUARE,
        flat(3, 64, 64),
        image_seq_length=16,
    ),
    "fast_vlm": case(  # its own tower is timm's FastViT; this one is convolutional as well
        "FastVlm",
        hf.ConvNextConfig(
            patch_size=PATCH,
            num_stages=2,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_scale_init_value=1.0,
            hidden_size=16,  # what the projector takes
        ),
        text(hf.Qwen2Config),
        {"big": [(3, 4, False)], "small": [(3, 4, False)]},
        flat(3, 24, 32),
        image_seq_length=12,
    ),
    "deepseek_vl": case("DeepseekVL", siglip(16), text(hf.LlamaConfig), SQUARE, flat(3, 16, 16)),
    "janus": case(  # its VQ model and generation head only make images, and get no gradient
        "Janus",
        {
            "image_size": 16,
            "patch_size": PATCH,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "projection_dim": 24,
            "num_image_tokens": 16,
        },
        text(hf.LlamaConfig),
        SQUARE,
        flat(3, 16, 16),
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
    "llava_next_video": llava(
        "LlavaNextVideo", **NEXT, image_grid_pinpoints=PINPOINTS, video_token_id=61
    ),
    "lighton_ocr": case(
        "LightOnOcr",
        vit(hf.PixtralVisionConfig, 64, head_dim=8),
        text(hf.Qwen3Config),
        FEW,
        sized({"big": (24, 32), "small": (16, 16)}),
    ),
    "perception_lm": case(  # its own tower is timm's; a thumbnail and two tiles of every image
        "PerceptionLM",
        vit(hf.CLIPVisionConfig, model_args={"embed_dim": 16}),
        text(hf.LlamaConfig),
        {"big": [(2, 2, False)] * 3, "small": [(2, 2, False)] * 3},
        flat(3, 3, 16, 16),
        projector_pooling_ratio=2,
        video_token_id=61,
    ),
    "aria": case(  # 6 queries of a resampler for an image of 16 patches
        "Aria",
        vit(hf.Idefics3VisionConfig),
        text(hf.AriaTextConfig, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        {"big": [(1, 6, False)], "small": [(1, 6, False)]},
        masked({"big": 16, "small": 8}),
        projector_patch_to_query_dict={16: 6},
        **EAGER,
    ),
    "video_llava": llava(  # the tower of videos is another than that of images
        "VideoLlava", SQUARE, flat(3, 16, 16), image_seq_length=16, video_token_id=61
    ),
    # No visual token in the input, but added before layers 0, 1 and 2. A head of its Q-former
    # is 64 wide. 16 x 16 pixels are 4 x 4 patches, one query for 2 x 2 of them.
    "granite4_vision": case(
        "Granite4Vision",
        hf.CLIPVisionConfig(
            image_size=16,
            patch_size=PATCH,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
        ),
        text(
            type(hf.Granite4VisionConfig().text_config),
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.35,
            logits_scaling=2.0,
        ),
        {"big": [(2, 2, False), (4, 4, True)], "small": [(2, 2, False), (4, 2, True)]},
        tiled({"big": (32, 32), "small": (32, 16)}, NEXT_TILES),
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
    "qianfan_ocr": case(
        "QianfanOCR",
        vit(hf.QianfanOCRVisionConfig, [32, 32], [PATCH, PATCH], drop_path_rate=0.0).to_dict(),
        text(hf.Qwen3Config),
        SQUARE,
        flat(3, 32, 32),
        image_seq_length=16,
    ),
    # Experts but in its first layer, two layers without positions. A query sees the 8 tokens
    # that score highest; with few heads scores tie at 0, and padding decides which come first.
    "mistral_large4": case(
        "MistralLarge4",
        vit(hf.PixtralVisionConfig, 64, head_dim=8),
        text(
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
        FEW,
        sized({"big": (24, 32), "small": (16, 16)}),
        **EAGER,
    ),
    "deepseek_vl_hybrid": case(  # SAM's 16 x 16 patches become 4 x 4 and join SigLIP's
        "DeepseekVLHybrid",
        siglip(16),
        text(hf.LlamaConfig),
        SQUARE,
        two_sizes,
        high_res_vision_config=sam(hf.SamVisionConfig).to_dict(),
    ),
}
