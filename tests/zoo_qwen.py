"""Tiny random models of the Qwen 3, GLM-V, EXAONE 4.5 and Cosmos 3 families; see tiny.py."""

from collections.abc import Callable

import transformers as hf
from tiny import (
    DEEPSTACK_VISION,
    EAGER,
    EXPERTS,
    LATENT,
    LINEAR,
    MROPE,
    PATCH,
    QWEN,
    QWEN3_VISION,
    QWEN_GRIDS,
    ROPE,
    VISION,
    Case,
    alternating,
    patches,
    text,
    typed,
)

# 4 x 4 position embeddings, interpolated
GLM_VISION = {**VISION, "out_hidden_size": 24, "image_size": 16}
# rotary embedding on half of a head; the published models have it on a quarter or a half
HALF = {"head_dim": 16, "rope_parameters": {**MROPE, "partial_rotary_factor": 0.5}}


def build(name: str, vision: dict, text_config: str, more: dict, **outer) -> Callable:
    language = text(getattr(hf, text_config), **{"rope_parameters": dict(MROPE), **more})
    return typed(name, vision, language.to_dict(), **EAGER, **outer)


def qwen(name: str, vision: dict, text_config: str, **more) -> Case:
    """A type whose pixel inputs and placeholders are Qwen2-VL's."""
    return Case(build(name, vision, text_config, more), **QWEN)


CASES = {
    "qwen3_vl_moe": qwen(
        "Qwen3VLMoe",
        DEEPSTACK_VISION,
        "Qwen3VLMoeTextConfig",
        **EXPERTS,
        num_experts=4,
        mlp_only_layers=[0],
    ),
    "qwen3_5": qwen(
        "Qwen3_5",
        QWEN3_VISION,
        "Qwen3_5TextConfig",
        **HALF,
        **LINEAR,
        layer_types=alternating("linear_attention", "full_attention"),
    ),
    "glm4v": qwen("Glm4v", GLM_VISION, "Glm4vTextConfig"),
    "glm46v": qwen("Glm46V", GLM_VISION, "Glm4vTextConfig"),
    "glm4v_moe": qwen(
        "Glm4vMoe",
        GLM_VISION,
        "Glm4vMoeTextConfig",
        **HALF,
        **EXPERTS,
        n_routed_experts=4,
        first_k_dense_replace=1,
    ),
    "glm_ocr": qwen("GlmOcr", GLM_VISION, "GlmOcrTextConfig"),
    "qwen3_5_moe": qwen(
        "Qwen3_5Moe",
        QWEN3_VISION,
        "Qwen3_5MoeTextConfig",
        **HALF,
        **LINEAR,
        **EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=16,
        layer_types=alternating("linear_attention", "full_attention"),
    ),
    "cosmos3_omni": qwen("Cosmos3Omni", DEEPSTACK_VISION, "Qwen3VLTextConfig"),
    "cosmos3_edge": Case(
        build(
            "Cosmos3Edge",
            {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": PATCH,
                "num_patches": 16,
                "spatial_merge_size": 2,
            },
            "Cosmos3EdgeTextConfig",
            # its own check wants three sections that sum to half of a head
            {"rope_parameters": dict(MROPE)},
            projector_hidden_size=32,
        ),
        **{**QWEN, "inputs": patches(QWEN_GRIDS, PATCH * PATCH * 3)},
    ),
    "exaone4_5": Case(  # plain positions: neither the model nor its processor has token types
        build(
            "Exaone4_5_",
            {
                **VISION,
                "out_hidden_size": 24,
                "num_key_value_heads": 1,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "Exaone4Config",
            {
                "rope_parameters": dict(ROPE),
                "sliding_window": 8,
                "layer_types": alternating("sliding_attention", "full_attention"),
            },
        ),
        QWEN["images"],
        QWEN["inputs"],
    ),
    "qwen4_exp": qwen(
        "Qwen4Exp",
        QWEN3_VISION,
        "Qwen4ExpTextConfig",
        **HALF,
        **LINEAR,
        **EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=16,
        layer_types=alternating("linear_attention", "indexed_attention"),
        hc_count=2,
        hc_lowrank=8,
        # embeddings of n-grams of token ids, added before the third layer
        ple_layer_ids=[3],
        ple_embed_dim=16,
        heads_per_ngram=2,
        ngram_vocab_size_base=50,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=1,
        # a query attends to 4 blocks of 2 tokens and the odd last one; a block's score is a sum of
        # ReLUs over the heads, so that blocks would tie at 0 were the heads few; the choice passes
        # no gradient on, so that the indexers' parameters get none
        indexer_n_heads=16,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
    ),
    "glm5_next": Case(
        build(
            "Glm5Next",
            {**GLM_VISION, "projection_intermediate_size": 32},
            "Glm5NextTextConfig",
            {
                **EXPERTS,
                "rope_parameters": None,  # it has no positions at all
                "num_key_value_heads": 3,
                "n_routed_experts": 4,
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                "layer_types": alternating("linear_attention", "indexed_attention"),
                **LATENT,
                "linear_head_dim": 8,
                "linear_num_heads": 2,
                "hc_mult": 2,
                # as for qwen4_exp above
                "index_topk": 8,
                "index_kpool": 2,
                "index_head_dim": 8,
                "index_n_heads": 16,
            },
        ),
        **QWEN,
    ),
}
