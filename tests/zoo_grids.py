"""Tiny random models of families whose images come as patches and grids; see tiny.py."""

from collections.abc import Callable

import torch
import transformers as hf
from tiny import (
    DEEPSTACK_VISION,
    EAGER,
    EXPERTS,
    FEW,
    FIRST_DENSE,
    LATENT,
    MROPE,
    PATCH,
    QWEN,
    QWEN_GRIDS,
    ROPE,
    SWA,
    VISION,
    VOCAB,
    WINDOWED,
    Case,
    alternating,
    builder,
    case,
    patches,
    sliding,
    text,
    tower,
    typed,
    vit,
)

MERGED = QWEN["images"]  # of QWEN_GRIDS, 2 x 2 patches a token

AUDIO = {  # a tower that no batch uses
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "max_source_positions": 16,
    "output_dim": 24,
}
INKLING = {
    **SWA,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "n_routed_experts": 4,
    "layer_types": alternating("hybrid_sliding", "hybrid"),
}
OMNI = {
    "video_token_id": 61,
    "audio_token_id": 62,
    "audio_start_token_id": 58,
    "vision_start_token_id": 59,
}


def grids(*shape: int) -> Callable:
    return patches(QWEN_GRIDS, *shape)


def inkling2(dtype: torch.dtype = torch.float64) -> hf.PreTrainedModel:
    """Its routers compute in float32 and take no weights of another type."""
    build = typed(
        "Inkling2",
        tower(
            hf.Inkling2VisionConfig,
            posemb_grid_size=4,
            projection_hidden_dim=32,
            text_hidden_size=24,
        ),
        text(
            hf.Inkling2TextConfig,
            intermediate_size=16,
            **INKLING,
            n_layers_per_attn_res_block=2,
            num_experts_per_tok=2,
            unpadded_vocab_size=VOCAB,
        ),
        **EAGER,
    )
    made = build(dtype)
    for layer in made.model.language_model.layers:
        layer.mlp.gate.float()
    return made


# Inkling's: pixels of each token, the channels last
FEW_GRIDS = {"big": (3, 4), "small": (2, 2)}


CASES = {
    "paddleocr_vl": case(
        "PaddleOCRVL",
        vit(hf.PaddleOCRVisionConfig).to_dict(),
        text(hf.PaddleOCRTextConfig, rope_parameters=dict(MROPE)).to_dict(),
        MERGED,
        grids(3, PATCH, PATCH),
        QWEN["of_ids"],
    ),
    "video_llama_3": case(
        "VideoLlama3",
        tower(hf.VideoLlama3VisionConfig),
        text(hf.Qwen2Config),
        MERGED,
        lambda names: (
            grids(3 * PATCH * PATCH)(names)
            | {"image_merge_sizes": torch.full((sum(map(len, names)),), 2)}
        ),
        video_token_id=61,
    ),
    "ernie4_5_vl_moe": case(  # a dense layer, then experts for text and others for images
        "Ernie4_5_VLMoe",
        VISION,
        text(
            hf.Ernie4_5_VLMoeTextConfig,
            rope_parameters=dict(MROPE),
            moe_intermediate_size=[16, 8],
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            **FIRST_DENSE,
        ).to_dict(),
        MERGED,
        grids(3 * PATCH * PATCH),
        lambda ids, attended, visual: {
            "mm_token_type_ids": visual.long(),
            "moe_mm_token_type_ids": visual.long(),
        },
        video_token_id=61,
        **EAGER,
    ),
    # A token more at the beginning, at the end and after each row. One part of the positions is
    # the number of the image in the batch: a row's loss depends on how many images precede it.
    "hunyuan_vl": case(
        "HunYuanVL",
        tower(hf.HunYuanVLVisionConfig, max_image_size=16, out_hidden_size=24, text_hidden_size=24),
        text(hf.HunYuanVLTextConfig, rope_parameters={**MROPE, "mrope_section": [1, 1, 1, 1]}),
        {
            name: [(1, 1, False), *((h, w, True) for h, w, _ in grid), (1, 1, False)]
            for name, grid in MERGED.items()
        },
        grids(3 * PATCH * PATCH),
        QWEN["of_ids"],
    ),
    "kimi_k25": case(  # DeepSeek's latent attention and experts with shared ones
        "Kimi_K25",
        tower(hf.Kimi_K25VisionConfig, pos_emb_height=4, pos_emb_width=4),
        text(
            hf.DeepseekV3Config,
            num_key_value_heads=3,
            head_dim=4,
            **LATENT,
            qk_rope_head_dim=4,
            **EXPERTS,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        MERGED,
        grids(3, PATCH, PATCH),
        projection_hidden_size=16,
        video_token_id=61,
        **EAGER,
    ),
    "hyperclovax_vision_v2": case(
        "HyperCLOVAXVisionV2",
        {**VISION, **WINDOWED, "model_type": "qwen2_5_vl_vision"},
        text(hf.HyperCLOVAXConfig, residual_multiplier=0.7),
        MERGED,
        grids(3 * 2 * PATCH * PATCH),
        video_token_id=61,
    ),
    "lfm3_vl": case(  # convolutions between attention of two reaches, in tower and decoder
        "Lfm3Vl",
        hf.Lfm3VlVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            patch_size=PATCH,
            layer_types=["conv", "full_attention"],
        ),
        text(
            hf.Lfm3Config,
            sliding_window=8,
            conv_L_cache=3,
            layer_types=["conv", "full_attention", "conv", "sliding_attention"],
        ),
        MERGED,
        grids(3 * 2 * PATCH * PATCH),
        projector_hidden_size=32,
        video_token_id=61,
    ),
    "cohere_compass": case(  # no positions in full attention; features into the first two layers
        "CohereCompass",
        DEEPSTACK_VISION,
        sliding(
            hf.CohereCompassTextConfig,
            rope_parameters={"sliding_attention": dict(MROPE), "full_attention": None},
        ).to_dict(),
        **QWEN,
        video_token_id=61,
    ),
    "muse_glimmer": case(  # the last layer has no positions and attends to all
        "MuseGlimmer",
        tower(hf.MuseGlimmerVisionConfig, pos_emb_height=4, pos_emb_width=4),
        text(hf.MuseGlimmerTextConfig, sliding_window=8),
        MERGED,
        grids(3 * 2 * PATCH * PATCH),
        out_hidden_size=64,
        projector_hidden_size=32,
        video_token_id=61,
    ),
    # The model finds images by a token before them, which the rows lack: positions as in text.
    "qwen2_5_omni_thinker": case(
        "Qwen2_5OmniThinker",
        VISION | WINDOWED,
        sliding(
            hf.Qwen2_5OmniTextConfig, rope_parameters=dict(MROPE), use_sliding_window=True
        ).to_dict(),
        MERGED,
        grids(3 * 2 * PATCH * PATCH),
        audio_config={**AUDIO},
        **OMNI,
    ),
    "qwen3_omni_moe_thinker": case(  # positions as in text, too; a dense layer among experts
        "Qwen3OmniMoeThinker",
        DEEPSTACK_VISION,
        text(
            hf.Qwen3OmniMoeTextConfig,
            rope_parameters=dict(MROPE),
            **EXPERTS,
            num_experts=4,
            mlp_only_layers=[1],
        ).to_dict(),
        MERGED,
        grids(3 * 2 * PATCH * PATCH),
        audio_config={**AUDIO, "downsample_hidden_size": 8},
        **OMNI,
        **EAGER,
    ),
    # Half of the layers attend to the best blocks of 4 keys, which begin at the first column:
    # the loss of a left-padded batch is another one.
    "minimax_m3_vl": Case(
        builder(
            hf.MiniMaxM3SparseForConditionalGeneration,
            hf.MiniMaxM3VLConfig,
            tower(hf.MiniMaxM3VLVisionConfig),
            text(
                hf.MiniMaxM3VLTextConfig,
                intermediate_size=16,
                dense_intermediate_size=48,
                shared_intermediate_size=16,
                num_local_experts=4,
                num_experts_per_tok=2,
                rope_parameters={**ROPE, "partial_rotary_factor": 0.5},
                **FIRST_DENSE,
                layer_types=alternating("full_attention", "minimax_m3_sparse"),
                index_n_heads=1,
                index_head_dim=8,
                index_block_size=4,
                index_topk_blocks=2,
            ),
            projector_hidden_size=32,
            video_token_id=61,
            **EAGER,
        ),
        MERGED,
        grids(3 * 2 * PATCH * PATCH),
    ),
    # Convolutions in every layer; every second layer begins a block of residuals. Much is computed
    # in float32 whatever the weights are.
    "inkling2": Case(inkling2, FEW, patches(FEW_GRIDS, 2 * PATCH, 2 * PATCH, 3)),
    # Convolutions in every layer, half of which attend to 8 tokens. Tokens are patches row by row,
    # but nothing in a batch says how many make a row: one row.
    "inkling_mm_model": case(
        "Inkling",
        hf.InklingVisionConfig(num_hidden_layers=3, patch_size=2),
        text(
            hf.InklingTextConfig,
            **EXPERTS,
            **INKLING,
            n_shared_experts=1,
            logits_mup_width_multiplier=1.0,
            **FIRST_DENSE,
        ),
        {name: [(1, h * w, False)] for name, [(h, w, _)] in FEW.items()},
        lambda names: {"pixel_values": patches(FEW_GRIDS, 2, 2, 2, 3)(names)["pixel_values"]},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        audio_token_id=62,
        **EAGER,
    ),
    "dots3_note": case(  # half of the layers attend to the 8 best keys, half to the last 8
        "Dots3Note",
        tower(
            hf.Dots3NoteVisionConfig,
            mlp_layer_types=["dense", "sparse"],
            moe_intermediate_size=16,
            num_local_experts=4,
            adapter_in_dim=16,
            adapter_out_dim=24,
        ),
        text(
            hf.Dots3NoteTextConfig,
            num_key_value_heads=3,
            head_dim=12,
            **LATENT,
            qk_rope_head_dim=4,
            swa_num_attention_heads=3,
            swa_num_key_value_heads=3,
            swa_head_dim=12,
            swa_q_lora_rank=8,
            swa_kv_lora_rank=8,
            swa_qk_nope_head_dim=8,
            swa_v_head_dim=8,
            **EXPERTS,
            shared_experts_intermediate_size=16,
            n_routed_experts=4,
            index_topk=8,
            index_head_dim=8,
            index_n_heads=8,
            sliding_window=8,
            layer_types=alternating("indexed_attention", "sliding_attention"),
        ),
        MERGED,
        grids(3 * PATCH * PATCH),
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "feature_size": 8,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": 24,
        },
        video_token_id=61,
        audio_token_id=62,
        **EAGER,
    ),
    "muse_spark": case(  # the last layer has no positions and attends to all; experts
        "MuseSpark",
        tower(hf.MuseSparkVisionConfig, pos_emb_height=4, pos_emb_width=4),
        text(
            hf.MuseSparkTextConfig,
            sliding_window=8,
            **EXPERTS,
            moe_hidden_size=16,
            num_local_experts=4,
            **FIRST_DENSE,
        ),
        MERGED,
        grids(3 * 2 * PATCH * PATCH),
        audio_config={
            "patch_sizes": [2, 2],
            "hidden_sizes": [8, 8],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 24,
        },
        out_hidden_size=64,
        projector_hidden_size=32,
        video_token_id=61,
        audio_token_id=62,
        **EAGER,
    ),
}
