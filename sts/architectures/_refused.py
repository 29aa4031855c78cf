"""Image-text-to-text types that can't be carried, and why."""

_CROSS = "its decoder sees the image by cross-attention, so its sequence holds no visual tokens"
_ENCODER = "an encoder-decoder: the visual tokens are in the encoder, the decoder attends to them"
_WITHIN = (
    "the module that runs the decoder layers puts the image features into the sequence itself, so "
    "there is no place between the two"
)

REFUSED: dict[str, str] = {
    "blip": _CROSS,
    "chameleon": _WITHIN,
    "diffusion_gemma": "it denoises blocks of text: its forward has no next-token loss",
    "evolla": "it reads proteins, by cross-attention, and has no visual tokens",
    "florence2": _ENCODER,
    "git": "every row begins with the image's tokens, without placeholders, and its loss cuts off "
    "a fixed number of logits",
    "idefics": _CROSS,
    "kosmos-2": _WITHIN,
    "kosmos-2.5": _WITHIN,
    "mistral4": "a language model: it takes no images",
    "mllama": _CROSS,
    "pi0": "it predicts actions: its forward has no next-token loss",
    "pix2struct": _ENCODER,
    "pp_formulanet": _ENCODER,
    "t5gemma2": _ENCODER,
    "udop": _ENCODER,
    "vision-encoder-decoder": _ENCODER,
}

# With the other half of the scheme these are trained
NO_VTC: dict[str, str] = {
    "granite4_vision": "its placeholders are zeros in the sequence, and decoder layers add the "
    "visual features to them",
    "minimax_m3_vl": "its sparse attention reads position ids as places of the sequence, so no "
    "token can be left out",
}
NO_LDS: dict[str, str] = {
    "inkling2": "its layers add up what earlier blocks of layers stored, so that a layer left out "
    "counts twice",
}
