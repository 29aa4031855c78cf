"""Tiny random models of Idefics 2, LFM2-VL, Ovis 2, Fuyu, Llama 4, Gemma 3n, 4 and 4 unified,
Granite Docling and MiniCPM-V and -OCR; see tiny.py.
"""

from collections.abc import Callable

import torch
import transformers as hf
from tiny import (
    EAGER,
    FEW,
    LINEAR,
    MROPE,
    PAD,
    PATCH,
    SQUARE,
    VOCAB,
    Case,
    alternating,
    builder,
    case,
    flat,
    noise,
    of_images,
    sliding,
    text,
    typed,
    vit,
)


def padded(sizes: dict[str, tuple[int, int]]) -> Callable:
    """Idefics2's: [rows, images, 3, height, width] and its mask, both zeros where there is none."""

    def inputs(names: list[list[str]]) -> dict:
        every = [sizes[name] for row in names for name in row]
        size = len(names), max(map(len, names)), max(h for h, _ in every), max(w for _, w in every)
        mask = torch.zeros(size, dtype=torch.bool)
        for row, images in zip(mask, names, strict=True):
            for image, name in zip(row, images, strict=False):
                image[: sizes[name][0], : sizes[name][1]] = True
        pixels = noise(*size[:2], 3, *size[2:]) * mask[:, :, None]
        return {"pixel_values": pixels, "pixel_attention_mask": mask}

    return inputs


def naflex(grids: dict[str, tuple[int, int]]) -> Callable:
    """SigLIP 2's: [images, patches of the largest, channels], its mask, and (rows, columns)."""

    def inputs(every: list) -> dict:
        lengths = torch.tensor([h * w for h, w in every])
        mask = torch.arange(lengths.max()) < lengths[:, None]
        return {
            "pixel_values": noise(*mask.shape, 3 * PATCH * PATCH) * mask[..., None],
            "spatial_shapes": torch.tensor(every),
            "pixel_attention_mask": mask.long(),
        }

    return of_images(grids, inputs)


FUYU_GRIDS = {"big": (3, 4), "small": (2, 2)}


def fuyu_inputs(every: list) -> dict:
    """The patches of all images of the batch one after the other, as one row's."""
    return {"pixel_values": noise(1, sum(h * w for h, w in every), 3 * PATCH * PATCH)}


def llama4(dtype: torch.dtype = torch.float64) -> hf.PreTrainedModel:
    build = typed(
        "Llama4",
        hf.Llama4VisionConfig(
            image_size=32,
            patch_size=PATCH,
            hidden_size=16,
            intermediate_size=64,  # of 2 x 2 patches
            num_hidden_layers=3,
            num_attention_heads=2,
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
        ),
        text(
            hf.Llama4TextConfig,
            intermediate_size_mlp=48,
            num_local_experts=4,
            num_experts_per_tok=2,
            moe_layers=[1, 3],
            no_rope_layer_interval=2,
            attention_chunk_size=8,
        ),
        boi_token_index=58,
        eoi_token_index=59,
    )
    made = build(dtype)
    # casting makes the tower's rotations real numbers
    rotary = made.vision_model.rotary_embedding
    rotary.freqs_ci = rotary._compute_freqs_ci(rotary.config)
    return made


def gemma3n(dtype: torch.dtype = torch.float64) -> hf.PreTrainedModel:
    # The real tower, MobileNet v5, needs timm. This one's output has the same shape, and unlike
    # many others of convolutions it has no batch norm.
    tower = hf.ConvNextConfig(
        image_size=32,
        patch_size=PATCH,
        num_stages=2,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_scale_init_value=1.0,
        # what Gemma3nVisionConfig has besides
        hidden_size=16,
        rms_norm_eps=1e-6,
        vocab_offset=56,
        vocab_size=6,
    )
    audio = hf.Gemma3nAudioConfig(
        vocab_size=2,
        vocab_offset=62,
        input_feat_size=16,
        hidden_size=16,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=1,
        sscp_conv_channel_size=(4, 4),
    )

    def config(vision_config: hf.PreTrainedConfig, **more) -> hf.PreTrainedConfig:
        made = hf.Gemma3nConfig(**more)
        made.__dict__["vision_config"] = vision_config  # past the check of its class
        return made

    build = builder(
        hf.Gemma3nForConditionalGeneration,
        config,
        tower,
        sliding(
            hf.Gemma3nTextConfig,
            vocab_size_per_layer_input=56,
            hidden_size_per_layer_input=8,
            altup_num_inputs=2,
            num_kv_shared_layers=2,
            laurel_rank=4,
            activation_sparsity_pattern=[0.5, 0.0, 0.5, 0.0],
        ),
        audio_config=audio,
        vision_soft_tokens_per_image=16,
        boi_token_id=54,
        boa_token_id=55,
        eoi_token_id=61,
        eoa_token_id=62,
        audio_token_id=63,
    )
    made = build(dtype)
    language = made.model.language_model
    with torch.no_grad():
        for layer in language.layers:  # per-layer inputs begin at nothing
            layer.altup.correct_output_scale.fill_(1)
        # padding of zeros that attends to nothing stays zero, and 0 ** 0.5 has no gradient
        language.embed_tokens.weight[PAD].fill_(0.1)
    return made


def placed(grids: dict[str, tuple[int, int]]) -> Callable:
    """Gemma 4's: [images, patches of the largest, channels], and (x, y) of each or (-1, -1)."""

    def inputs(every: list) -> dict:
        most = max(h * w for h, w in every)
        places = torch.full((len(every), most, 2), -1)
        for image, (h, w) in zip(places, every, strict=True):
            image[: h * w] = torch.tensor([(x, y) for y in range(h) for x in range(w)])
        return {
            "pixel_values": noise(len(every), most, 3 * PATCH * PATCH),
            "image_position_ids": places,
        }

    return of_images(grids, inputs)


def tiles(counts: dict[str, int]) -> Callable:
    """Granite Docling's: [rows, tiles of a row's images, 3, 24, 24] and which of them are real."""

    def inputs(names: list[list[str]]) -> dict:
        lengths = torch.tensor([sum(counts[name] for name in row) for row in names])
        mask = torch.arange(lengths.max()) < lengths[:, None]
        pixels = noise(*mask.shape, 3, 24, 24) * mask[..., None, None, None]
        return {"pixel_values": pixels, "pixel_attention_mask": mask}

    return inputs


GEMMA4_TOKENS = {
    "boi_token_id": 55,
    "eoi_token_id": 56,
    "boa_token_id": 57,
    "eoa_token_index": 58,
    "video_token_id": 61,
    "audio_token_id": 62,
}


def minicpm(
    name: str,
    grids: dict[str, tuple[int, int]],
    of_ids: Callable = lambda ids, attended, visual: {},
    **more,
) -> Case:
    """MiniCPM-V's, on Qwen 3.5; grids in patches."""

    def inputs(every: list) -> dict:
        total = sum(h * w for h, w in every)  # the patches of all images, side by side
        pixels = noise(1, 3, PATCH, PATCH * total)
        return {"pixel_values": pixels, "target_sizes": torch.tensor(every)}

    build = typed(
        name,
        vit(getattr(hf, f"{name}VisionConfig"), 32),
        text(
            hf.Qwen3_5TextConfig,
            head_dim=16,
            rope_parameters={**MROPE, "partial_rotary_factor": 0.5},
            **LINEAR,
            layer_types=alternating("linear_attention", "full_attention"),
        ),
        insert_layer_id=0,
        video_token_id=61,
        **more,
    )
    grid = {"big": [(3, 4, False)], "small": [(2, 2, False)]}
    return Case(build, grid, of_images(grids, inputs), of_ids)


def types(ids: torch.Tensor, attended: torch.Tensor, visual: torch.Tensor) -> dict:
    return {"mm_token_type_ids": visual.long()}


CASES = {
    "idefics2": case(  # a resampler: 6 queries an image, whatever its size
        "Idefics2",
        vit(hf.Idefics2VisionConfig).to_dict(),
        text(hf.MistralConfig),
        {"big": [(1, 6, False)], "small": [(1, 6, False)]},
        padded({"big": (12, 16), "small": (8, 8)}),
        perceiver_config={
            "hidden_size": 24,
            "resampler_n_latents": 6,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
    ),
    "lfm2_vl": case(  # 2 x 2 patches are a token
        "Lfm2Vl",
        hf.Siglip2VisionConfig(
            patch_size=PATCH,
            num_patches=16,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            vision_use_head=False,
        ),
        text(
            hf.Lfm2Config,
            block_auto_adjust_ff_dim=False,
            layer_types=alternating("conv", "full_attention"),
        ),
        FEW,
        naflex({"big": (6, 8), "small": (4, 4)}),
        projector_hidden_size=32,
        downsample_factor=2,
    ),
    "ovis2": case(  # 2 x 2 patches are a token, a mixture of 27 visual words
        "Ovis2",
        vit(
            hf.Ovis2VisionConfig,
            32,
            vocab_size=32,
            hidden_stride=2,
            num_visual_indicator_tokens=5,
        ),
        text(hf.Qwen2Config),
        SQUARE,
        flat(3, 32, 32),
        hidden_size=24,
        vocab_size=VOCAB,
        visual_indicator_token_ids=[55, 56, 57, 58, 59],
    ),
    "fuyu": Case(  # no tower: a linear layer on the pixels of a patch
        builder(
            hf.FuyuForCausalLM,
            lambda vision_config, **more: hf.FuyuConfig(**more),
            None,
            text(hf.PersimmonConfig),
            patch_size=PATCH,
        ),
        {name: [(*grid, False)] for name, grid in FUYU_GRIDS.items()},
        of_images(FUYU_GRIDS, fuyu_inputs),
    ),
    "llama4": Case(  # in turn, a dense layer on chunks of 8 tokens and one of experts on all tokens
        llama4, SQUARE, flat(3, 32, 32)
    ),
    # the last two layers take the keys and values of the first two, which must therefore run
    "gemma3n": Case(gemma3n, SQUARE, flat(3, 32, 32)),
    # every kind of Gemma 4 in one: per-layer inputs, keys and values shared as above, experts,
    # and the tokens of an image see each other in the sliding layers
    "gemma4": case(
        "Gemma4",
        hf.Gemma4VisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            patch_size=PATCH,
            pooling_kernel_size=2,
            position_embedding_size=16,
        ),
        sliding(
            hf.Gemma4TextConfig,
            global_head_dim=16,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            use_bidirectional_attention="vision",
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=2,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=16,
        ),
        FEW,
        placed({"big": (6, 8), "small": (4, 4)}),
        types,
        **GEMMA4_TOKENS,
        **EAGER,
    ),
    "granite_docling": case(  # an image is one or two square tiles, 2 x 2 patches a token
        "GraniteDocling",
        vit(
            hf.GraniteDoclingVisionConfig,
            24,
            out_hidden_size=24,
            scale_factor=2,
            deepstack_visual_indexes=[0, 1],
            use_fine_route=False,
        ),
        text(
            hf.GraniteDoclingTextConfig,
            embedding_multiplier=2.0,
            logits_scaling=0.5,
            residual_multiplier=0.7,
            attention_multiplier=0.35,
        ),
        {"big": [(3, 3, False)] * 2, "small": [(3, 3, False)]},
        tiles({"big": 2, "small": 1}),
    ),
    # 4 x 4 patches are a token in the first and the last of these, 2 x 2 in the second. The linear
    # layers leave out padding, on whichever side.
    "minicpmv4_6": minicpm("MiniCPMV4_6", {"big": (12, 16), "small": (8, 8)}),
    "minicpm_ocr": minicpm("MiniCPMOcr", {"big": (6, 8), "small": (4, 4)}),
    "gemma4_unified": case(  # no tower: a few layers on the pixels of a patch
        "Gemma4Unified",
        hf.Gemma4UnifiedVisionConfig(
            patch_size=PATCH // 2,
            pooling_kernel_size=2,
            mm_embed_dim=16,
            mm_posemb_size=16,
            output_proj_dims=16,
        ),
        sliding(hf.Gemma4UnifiedTextConfig, global_head_dim=16),
        FEW,
        placed({"big": (3, 4), "small": (2, 2)}),
        types,
        **GEMMA4_TOKENS,
    ),
    # The tokens around an image have their place on its canvas; here there are none of the ids of
    # its markers, so that the text before an image stands for one.
    "minicpmv4_7": minicpm(
        "MiniCPMV4_7",
        {"big": (12, 16), "small": (8, 8)},
        types,
        image_start_id=55,
        image_end_id=56,
        slice_start_id=57,
        slice_end_id=58,
        newline_id=59,
    ),
}
