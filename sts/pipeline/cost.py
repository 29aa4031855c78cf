"""FLOPs and memory of an optimizer step, from shapes alone (no torch needed).

A FLOP is a multiplication or an addition inside a matrix product, as torch.utils.flop_counter
counts them; element-wise work, norms and softmax are left out (below 1 % at any usual width).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STAGES = ("align", "instruct")  # projector trained; projector and language model trained


@dataclass(frozen=True)
class Shape:
    """Sizes of a vision tower + two-layer MLP projector + gated decoder, as in LLaVA.

    Widths are in channels. visual_tokens: patches of one image that reach the projector.
    projector_in: channels of the vision features (several layers' features concatenated).
    """

    vision_layers: int
    vision_width: int
    vision_mlp: int
    vision_patch: int  # pixels of a patch's side
    visual_tokens: int
    projector_in: int
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False  # output head = input embedding


def shape_of(config) -> Shape:
    """The Shape of a Hugging Face LLaVA configuration (LlavaConfig or one of the same layout)."""
    vision, text = config.vision_config, config.text_config
    features = config.vision_feature_layer
    return Shape(
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        vision_mlp=vision.intermediate_size,
        vision_patch=vision.patch_size,
        visual_tokens=(vision.image_size // vision.patch_size) ** 2,
        projector_in=vision.hidden_size * (1 if isinstance(features, int) else len(features)),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        mlp=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
        tied=config.tie_word_embeddings,
    )


def parameters(shape: Shape) -> dict[str, int]:
    """Numbers of weights, biases and norms included: vision, projector, layer (one decoder layer),
    head (embedding, last norm and output head)."""
    s = shape
    v, d, attention = s.vision_width, s.width, s.heads * s.head_dim
    vision_layer = 4 * v * (v + 1) + 2 * v * s.vision_mlp + s.vision_mlp + v + 4 * v
    embeddings = 3 * v * s.vision_patch**2 + v + v * (s.visual_tokens + 1)
    return {
        "vision": s.vision_layers * vision_layer + embeddings + 4 * v,
        "projector": (s.projector_in + 1) * d + (d + 1) * d,
        "layer": 2 * d * (attention + s.kv_heads * s.head_dim) + 3 * d * s.mlp + 2 * d,
        "head": s.vocab * d * (1 if s.tied else 2) + d,
    }


def flop_parts(
    shape: Shape,
    *,
    batch: int,
    visual_tokens: float,
    text_tokens: float,
    answer_tokens: float,
    stage: str,
    work: Sequence[Mapping[str, float]] | None = None,
    images: float | None = None,
    checkpointing: bool = False,
    fused_attention: bool = True,
) -> dict[str, float]:
    """FLOPs of forward and backward of `batch` samples: vision, projector, decoder, head.

    Per sample: visual_tokens that reach the decoder, text_tokens (padding included), answer_tokens
    whose logits are computed. work: of each decoder layer the shares of its work that are less than
    1 (sts/lds/decision.py, SHARES), [layers]; default: all layers do all of it. images: in the
    batch (default: one per sample where there are visual tokens). checkpointing: decoder layers are
    computed once more (non-reentrant, the default of transformers). fused_attention: its backward
    recomputes the scores (SDPA and flash: 2.5 times the forward; eager: 2). The vision tower is
    frozen; in `align` the decoder passes gradients on but has none for its weights. Raises
    ValueError for an unknown stage, or work of another number of layers.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}: expected one of {', '.join(STAGES)}")
    s = shape
    work = [{}] * s.layers if work is None else work
    if len(work) != s.layers:
        raise ValueError(f"work of {len(work)} layers: the shape has {s.layers}")
    images = (batch if visual_tokens else 0) if images is None else images
    trained = stage == "instruct"

    patches = s.visual_tokens
    vision_tokens = patches + 1  # and the class token
    v = s.vision_width
    vision_linear = vision_tokens * (4 * v * v + 2 * v * s.vision_mlp)
    vision_attention = 2 * vision_tokens**2 * v
    patch_embedding = patches * 3 * s.vision_patch**2 * v
    vision = 2 * (s.vision_layers * (vision_linear + vision_attention) + patch_embedding)

    first, second = 2 * patches * s.projector_in * s.width, 2 * patches * s.width**2
    projector = 2 * first + 3 * second  # the first layer's input needs no gradient

    attention_width = s.heads * s.head_dim
    projections = 2 * s.width * (attention_width + s.kv_heads * s.head_dim)
    gated = 3 * s.width * s.mlp

    def layer(shares: Mapping[str, float]) -> float:
        """Of one sample."""
        tokens = shares.get("tokens", 1.0) * (visual_tokens + text_tokens)
        scores = 4 * tokens**2 * attention_width
        forward = 2 * tokens * (projections + gated) + scores
        of_weights = 2 if trained else 1  # times the forward's
        attention = 2 * tokens * projections * of_weights + scores * (2.5 if fused_attention else 2)
        mlp = 2 * tokens * gated * of_weights
        attention_share = shares.get("attention_backward", 1.0)
        mlp_share = shares.get("mlp_backward", 1.0)
        backward = attention_share * attention + mlp_share * mlp
        # torch stops before the last product
        recomputed = forward - 2 * tokens * s.mlp * s.width if checkpointing else 0
        # a layer of which nothing needs a gradient is not computed again
        recomputed *= 1 - (1 - attention_share) * (1 - mlp_share)
        return shares.get("rows", 1.0) * (forward + backward + recomputed)

    decoder = sum(map(layer, work))

    logits = 2 * answer_tokens * s.width * s.vocab
    return {
        "vision": images * vision,
        "projector": images * projector,
        "decoder": batch * decoder,
        "head": batch * logits * (3 if trained else 2),
    }


def step_flops(shape: Shape, **settings) -> float:
    """FLOPs of one forward and backward; settings as in `flop_parts`."""
    return sum(flop_parts(shape, **settings).values())


def peak_memory(
    shape: Shape,
    *,
    batch: int,
    visual_tokens: float,
    text_tokens: float,
    answer_tokens: float,
    layers_run: float,
    stage: str,
    checkpointing: bool = False,
    value_bytes: int = 4,
) -> dict[str, float]:
    """Rough peak bytes of training a micro-batch with AdamW: weights, optimizer, activations.

    `weights` in float32; `optimizer` is gradients and two moments, float32, of what is trained;
    `activations` at `value_bytes` per value are what backward needs of each decoder layer that
    runs: its two norms' inputs and outputs, queries, keys, values (before and after rotation),
    attention output and MLP intermediates, less the inputs of frozen weights; with `checkpointing`
    a layer's input each and one layer in full. Logits in float32 three times over. Left out: the
    frozen vision tower's working set, allocator overhead, attention scores (fused attention stores
    none). Expect the true figure within half and twice of it.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}: expected one of {', '.join(STAGES)}")
    s, count, trained = shape, parameters(shape), stage == "instruct"
    language = s.layers * count["layer"] + count["head"]
    attention, keys = s.heads * s.head_dim, 2 * s.kv_heads * s.head_dim
    per_token = 4 * s.width + 2 * attention + keys + 3 * s.mlp
    if trained:
        per_token += 2 * s.width + attention + s.mlp  # the inputs of the weight matrices
    tokens = batch * (visual_tokens + text_tokens)
    stored = (s.width * layers_run + per_token) if checkpointing else per_token * layers_run
    return {
        "weights": 4.0 * (count["vision"] + count["projector"] + language),
        "optimizer": 12.0 * (count["projector"] + (language if trained else 0)),
        "activations": value_bytes * tokens * stored + 12.0 * batch * answer_tokens * s.vocab,
    }
