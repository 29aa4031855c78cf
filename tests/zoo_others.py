"""Tiny random models of discrete-token, Q-Former and other families; see tiny.py."""

from collections.abc import Callable

import torch
import transformers as hf
from tiny import (
    EAGER,
    EXPERTS,
    FEW,
    FIRST_DENSE,
    IMAGE,
    PATCH,
    VOCAB,
    Case,
    alternating,
    builder,
    case,
    flat,
    noise,
    sam,
    sized,
    text,
    vit,
)

QUERIES = {"big": [(1, 6, False)], "small": [(1, 6, False)]}  # of a Q-Former: no grid


def discrete(vision_config, text_config, image_token_id: int) -> hf.PreTrainedConfig:
    """Images are words of the vocabulary: the map takes the place of image_token_id."""
    words = {f"<|visual token {i:06}|>": 40 + i for i in range(8)}
    words |= {"<image>": image_token_id, "<|extra_200|>": 50}
    return hf.Emu3Config(text_config=text_config, vq_config=vision_config, vocabulary_map=words)


OPT = text(
    hf.OPTConfig,
    word_embed_proj_dim=24,
    ffn_dim=48,
    max_position_embeddings=128,
    dropout=0.0,
)


def qformer(name: str, language: hf.PreTrainedConfig, *inputs, **more) -> Case:
    """The vision tower's own initial range is 1e-10."""
    query = getattr(hf, f"{name}QFormerConfig")(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return case(
        name,
        vit(getattr(hf, f"{name}VisionConfig"), initializer_range=0.02).to_dict(),
        language.to_dict(),
        *inputs,
        qformer_config=query.to_dict(),
        num_query_tokens=6,
        **more,
    )


def instructed(names: list[list[str]]) -> dict:
    """InstructBLIP's Q-Former reads the question of every image too."""
    count = sum(map(len, names))
    return {
        "pixel_values": noise(count, 3, 16, 16),
        "qformer_input_ids": torch.tensor([[5, 6, 7]] * count),
        "qformer_attention_mask": torch.tensor([[1, 1, 1]] * count),
    }


def filmed(names: list[list[str]]) -> dict:
    """Two frames of each video."""
    pixels = noise(sum(map(len, names)), 2, 3, 16, 16)
    return instructed(names) | {"pixel_values": pixels}


def always(inputs: Callable) -> Callable:
    """BLIP's forwards ask for pixels in every batch: without placeholder they go nowhere."""
    return lambda ids, attended, visual: {} if visual.any() else inputs([["big"]])


SEPARATOR = (1, 0, True)  # a placeholder that is no patch, after an image's views
CROPS = {"big": (1, 2), "small": (0, 0)}  # rows and columns of the local views


def moe(config: type, **more) -> hf.PreTrainedConfig:
    return text(config, **FIRST_DENSE, n_routed_experts=4, **EXPERTS, **more)


def deepseek_sam(config: type, size: int) -> dict:
    """A convolution of stride 4 follows the patches."""
    more = {"num_hidden_layers": 2, "output_channels": 16, "downsample_channels": [16, 16]}
    return sam(config, image_size=size, **more).to_dict()


def views(size: int, local: int, number: Callable = list) -> Callable:
    """A global view of every image, local ones of some, and how many each has."""

    def inputs(names: list[list[str]]) -> dict:
        crops = [CROPS[name] for row in names for name in row]
        counts = [h * w for h, w in crops]
        pixels = {"pixel_values": noise(len(crops), 3, size, size)}
        if any(counts):
            pixels["pixel_values_local"] = noise(sum(counts), 3, local, local).flip(-1)
        return pixels | {"num_local_patches": number(counts)}

    return inputs


def unlimited(names: list[list[str]]) -> dict:
    """Lists also in the real processor's batch: torch.split takes no tensor."""
    crops = [CROPS[name] for row in names for name in row]
    return views(48, 32)(names) | {"patches_grid": [[w, h] for h, w in crops]}


def few_queries(config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    """DeepSeek-OCR 2 has 144 or 256 queries a view, in code; 6 here."""
    model = hf.DeepseekOcr2ForConditionalGeneration(config)
    tower = model.model.vision_tower
    tower.query_768_resolution = torch.nn.Embedding(6, 16)
    tower.query_768_resolution.weight.data.mul_(0.02)
    return model


MOLMO = {"big": (4, 8), "small": (4, 4)}  # patches of the whole image, in crops of 4 x 4


def molmo(names: list[list[str]]) -> dict:
    """[crops, 16, channels] of a small view and of the crops of each image; the patches that are
    pooled into each token, 2 x 2 of them; rows and columns of tokens of both."""
    crops, pooling, grids = 0, [], []
    for height, width in [MOLMO[name] for row in names for name in row]:
        small = torch.arange(16).reshape(4, 4)
        whole = torch.arange(16, 16 + height * width).reshape(-1, 4, 4)
        for index in (small, torch.cat(list(whole), 1)):
            squares = index.unfold(0, 2, 2).unfold(1, 2, 2)
            pooling.append(squares.reshape(-1, 4) + 16 * crops)
        grids.append((2, 2, height // 2, width // 2))
        crops += 1 + len(whole)
    return {
        "pixel_values": noise(crops, 16, 3 * PATCH * PATCH),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor(grids),
    }


NEMOTRON = {"big": (6, 8), "small": (4, 4)}  # in patches; 2 x 2 of them are a token


def nemotron(names: list[list[str]]) -> dict:
    grids = [NEMOTRON[name] for row in names for name in row]
    return {
        "pixel_values": noise(sum(h * w for h, w in grids), 3 * PATCH * PATCH),
        "image_grid_hw": torch.tensor(grids),
    }


def nemotron_build(dtype: torch.dtype = torch.float64) -> hf.PreTrainedModel:
    made = builder(
        hf.NemotronH_Omni_Reasoning_V3,
        hf.NemotronH_Omni_Reasoning_V3_Config,
        hf.RadioConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2.0,
            patch_size=PATCH,
            image_size=32,
            max_img_size=32,
            num_cls_tokens=2,
            num_registers=1,
            video_temporal_patch_size=2,
        ),
        text(
            hf.NemotronHConfig,
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=8,
            n_groups=2,
            chunk_size=8,
            n_routed_experts=4,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16,
        ),
        vision_hidden_size=16,
        projector_hidden_size=32,
        video_token_id=61,
        **EAGER,
    )(dtype)
    made.vision_model.config.dtype = dtype  # the forward casts pixels to it
    return made


BLIP_PIXELS = flat(3, 16, 16)

CASES = {
    # No gradient reaches the tokenizer of images (argmax). Images of a batch are padded to the
    # largest and its convolutions and GroupNorm read the padding: a row alone gives the batch's
    # loss if its pixels keep the padding of the batch.
    "emu3": Case(
        builder(
            hf.Emu3ForConditionalGeneration,
            discrete,
            {
                "codebook_size": 8,
                "embed_dim": 4,
                "latent_channels": 4,
                "temporal_downsample_factor": 2,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1],
                "num_res_blocks": 0,  # they hold the BatchNorm that mixes a batch's images
                "hidden_size": 32,
            },
            text(hf.Emu3TextConfig, attention_dropout=0.0).to_dict(),
        ),
        {"big": [(3, 4, True)], "small": [(2, 2, True)]},
        sized({"big": (12, 16), "small": (8, 8)}),
    ),
    "blip-2": qformer("Blip2", OPT, QUERIES, BLIP_PIXELS, always(BLIP_PIXELS)),
    "instructblip": qformer(
        "InstructBlip", text(hf.LlamaConfig), QUERIES, instructed, always(instructed)
    ),
    "deepseek_ocr2": Case(
        builder(
            few_queries,
            hf.DeepseekOcr2Config,
            {
                "sam_config": deepseek_sam(hf.DeepseekOcr2SamVisionConfig, 32),
                "encoder_config": {
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                },
            },
            moe(hf.DeepseekOcr2TextConfig, n_shared_experts=1).to_dict(),
            **EAGER,
        ),
        {"big": [(1, 6, False)] * 3 + [SEPARATOR], "small": [(1, 6, False), SEPARATOR]},
        views(32, 32, torch.tensor),
    ),
    "unlimited_ocr": case(
        "UnlimitedOcr",
        {
            "sam_config": deepseek_sam(hf.UnlimitedOcrSamVisionConfig, 48),
            "encoder_config": vit(hf.UnlimitedOcrVisionEncoderConfig, 12).to_dict(),
        },
        moe(
            hf.UnlimitedOcrTextConfig,
            n_shared_experts=1,
            sliding_window=8,
            layer_types=alternating("reference_sliding_attention", "full_attention"),
        ).to_dict(),
        {  # the local views as one grid, then the global one
            "big": [(2, 4, True), (3, 3, True), SEPARATOR],
            "small": [(3, 3, True), SEPARATOR],
        },
        unlimited,
        **EAGER,
    ),
    "step3p7": case(
        "Step3p7",
        vit(hf.Step3p7VisionConfig, 48, mlp_ratio=2.0).to_dict(),
        moe(
            hf.Step3p7TextConfig,
            sliding_window=8,
            layer_types=alternating("sliding_attention", "full_attention"),
            share_expert_dim=16,
            num_sliding_attention_heads=2,
        ).to_dict(),
        {"big": [(2, 2, False)] * 2 + [(3, 3, False)], "small": [(3, 3, False)]},
        views(48, 32, torch.tensor),
    ),
    "molmo2": case(  # image_token_id is image_patch_id
        "Molmo2",
        vit(
            hf.Molmo2VisionConfig,
            [16, 16],
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.035,  # or what is added to embeddings is next to nothing
        ).to_dict(),
        text(
            hf.Molmo2TextConfig,
            additional_vocab_size=4,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
            rope_scaling_layers=[1, 3],
        ).to_dict(),
        {  # the whole image small, then large
            "big": [(2, 2, False), (2, 4, False)],
            "small": [(2, 2, False), (2, 2, False)],
        },
        molmo,
        lambda ids, attended, visual: {"mm_token_type_ids": visual.long()},
        adapter_config={
            "vision_feature_layer": [-1, 0],
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 32,
            "text_hidden_size": 24,
            "initializer_range": 0.035,
        },
    ),
    "nemotron_h_omni": Case(nemotron_build, FEW, nemotron),
    # A video of two frames as image: there is no other input. image_token_id is video_token_id.
    "instructblipvideo": qformer(
        "InstructBlipVideo",
        text(hf.LlamaConfig),
        {"big": [(1, 6, False)] * 2, "small": [(1, 6, False)] * 2},
        filmed,
        always(filmed),
        video_token_index=IMAGE,
    ),
}
