"""FLOPs and memory of an optimizer step, from shapes alone (no torch needed).

A FLOP is a multiplication or an addition inside a matrix product, as torch.utils.flop_counter
counts them; element-wise work, norms and softmax are left out (below 1 % at any usual width).

What a training costs follows from `trains`, the parts that are trained (PARTS): a product with a
matrix is computed once, once more for the gradient of its input if something before it is trained,
and once more for the gradient of the matrix if it is trained itself.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

PARTS = ("projector", "language_model", "vision_tower", "lora")


@dataclass(frozen=True)
class Shape:
    """Sizes of a vision tower + two-layer MLP projector + gated decoder, as in LLaVA.

    Widths are in channels. visual_tokens: patches of one image that reach the projector.
    projector_in: channels of the vision features (several layers' features concatenated).
    """

    vision_layers: int
    vision_used: int  # layers up to the one whose features the projector gets
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
    features = [features] if isinstance(features, int) else features
    return Shape(
        vision_layers=vision.num_hidden_layers,
        # counted from the embeddings' output, 0, or from the end
        vision_used=max(index % (vision.num_hidden_layers + 1) for index in features),
        vision_width=vision.hidden_size,
        vision_mlp=vision.intermediate_size,
        vision_patch=vision.patch_size,
        visual_tokens=(vision.image_size // vision.patch_size) ** 2,
        projector_in=vision.hidden_size * len(features),
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


def trained_parameters(shape: Shape, trains: Collection[str], lora_rank: int = 0) -> int:
    """Number of trained weights. Raises ValueError for parts that can't be trained."""
    _check(trains, lora_rank)
    count = parameters(shape)
    sizes = {
        "projector": count["projector"],
        "language_model": shape.layers * count["layer"] + count["head"],
        "vision_tower": count["vision"],
        "lora": shape.layers * sum(_adapters(shape, lora_rank)),
    }
    return sum(sizes[part] for part in set(trains))


def flop_parts(
    shape: Shape,
    *,
    batch: int,
    visual_tokens: float,
    text_tokens: float,
    answer_tokens: float,
    trains: Collection[str],
    lora_rank: int = 0,
    work: Sequence[Mapping[str, float]] | None = None,
    images: float | None = None,
    checkpointing: bool = False,
    fused_attention: bool = True,
) -> dict[str, float]:
    """FLOPs of forward and backward of `batch` samples: vision, projector, decoder, head.

    Per sample: visual_tokens that reach the decoder, text_tokens (padding included), answer_tokens
    whose logits are computed. trains: the trained parts, out of PARTS; the language model's include
    embeddings and head. lora_rank: of adapters on all matrices of the decoder's layers, where
    `lora` is trained. work: of each decoder layer the shares of its work that are less than
    1 (sts/lds/decision.py, SHARES), [layers]; default: all layers do all of it. images: in the
    batch (default: one per sample where there are visual tokens). checkpointing: layers that pass
    gradients on are computed once more (non-reentrant, the default of transformers).
    fused_attention: its backward recomputes the scores (SDPA and flash: 2.5 times the forward;
    eager: 2). Raises ValueError for parts that can't be trained, or work of another number of
    layers.
    """
    _check(trains, lora_rank)
    s = shape
    work = [{}] * s.layers if work is None else work
    if len(work) != s.layers:
        raise ValueError(f"work of {len(work)} layers: the shape has {s.layers}")
    images = (batch if visual_tokens else 0) if images is None else images
    sees, joins, speaks, adapts = (
        part in trains for part in ("vision_tower", "projector", "language_model", "lora")
    )
    scores_backward = 2.5 if fused_attention else 2

    patches = s.visual_tokens
    vision_tokens = patches + 1  # and the class token
    v = s.vision_width
    vision_linear = vision_tokens * (4 * v * v + 2 * v * s.vision_mlp)
    vision_attention = 2 * vision_tokens**2 * v
    patch_embedding = patches * 3 * s.vision_patch**2 * v
    vision = 2 * (s.vision_layers * (vision_linear + vision_attention) + patch_embedding)
    if sees:
        backward = 2 * vision_linear + scores_backward * vision_attention
        # torch stops before the last product
        last = vision_tokens * s.vision_mlp * v
        again = vision_linear + vision_attention - last if checkpointing else 0
        vision += 2 * (s.vision_used * (backward + again) + patch_embedding)  # pixels need none

    first, second = 2 * patches * s.projector_in * s.width, 2 * patches * s.width**2
    projector = (1 + joins + sees) * first + (1 + joins + (joins or sees)) * second

    attention_width = s.heads * s.head_dim
    keys_width = s.kv_heads * s.head_dim
    projections = 2 * s.width * (attention_width + keys_width)
    gated = 3 * s.width * s.mlp
    attention_adapters, mlp_adapters = _adapters(s, lora_rank if adapts else 0)
    # where nothing before the decoder is trained, its first product needs no gradient of its input
    begins = next((i for i, one in enumerate(work) if _attention_learns(one)), None)
    begins = begins if not (sees or joins or speaks) else None

    def layer(index: int, shares: Mapping[str, float]) -> float:
        """Of one sample."""
        tokens = shares.get("tokens", 1.0) * (visual_tokens + text_tokens)
        scores = 4 * tokens**2 * attention_width
        adapters = attention_adapters + mlp_adapters
        forward = 2 * tokens * (projections + gated) + scores + 2 * tokens * adapters
        of_weights = 2 if speaks else 1  # times the forward's
        attention = 2 * tokens * projections * of_weights + scores * scores_backward
        attention += 4 * tokens * attention_adapters
        if index == begins:
            attention -= 2 * tokens * s.width * (attention_width + 2 * keys_width + 3 * lora_rank)
        mlp = 2 * tokens * gated * of_weights + 4 * tokens * mlp_adapters
        attention_share = shares.get("attention_backward", 1.0)
        mlp_share = shares.get("mlp_backward", 1.0)
        backward = attention_share * attention + mlp_share * mlp
        # torch stops before the last product
        last = 2 * tokens * (lora_rank if adapts else s.mlp) * s.width
        recomputed = forward - last if checkpointing else 0
        # a layer of which nothing needs a gradient is not computed again
        recomputed *= 1 - (1 - attention_share) * (1 - mlp_share)
        return shares.get("rows", 1.0) * (forward + backward + recomputed)

    decoder = sum(layer(index, shares) for index, shares in enumerate(work))

    logits = 2 * answer_tokens * s.width * s.vocab
    return {
        "vision": images * vision,
        "projector": images * projector,
        "decoder": batch * decoder,
        "head": batch * logits * (3 if speaks else 2),
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
    trains: Collection[str],
    lora_rank: int = 0,
    checkpointing: bool = False,
    value_bytes: int = 4,
) -> dict[str, float]:
    """Rough peak bytes of training a micro-batch with AdamW: weights, optimizer, activations.

    `weights` in float32; `optimizer` is gradients and two moments, float32, of what is trained;
    `activations` at `value_bytes` per value are what backward needs of each decoder layer that
    runs: its two norms' inputs and outputs, queries, keys, values (before and after rotation),
    attention output and MLP intermediates, less the inputs of matrices without trained weights or
    adapters; of a vision tower that is trained the same, of each layer up to the one whose features
    are used; with `checkpointing` a layer's input each and one layer in full. Logits in float32
    three times over. Left out: a frozen vision tower's working set, allocator overhead, attention
    scores (fused attention stores none). Expect the true figure within half and twice of it. Raises
    ValueError for parts that can't be trained.
    """
    trained = trained_parameters(shape, trains, lora_rank)
    s, count = shape, parameters(shape)
    language = s.layers * count["layer"] + count["head"]
    adapters = trained_parameters(shape, ("lora",), lora_rank) if "lora" in trains else 0

    def stored(layer: float, width: int, layers: float) -> float:
        """Values of one token, of `layers` layers that hold `layer` values each."""
        return width * layers + layer if checkpointing else layer * layers

    attention, keys = s.heads * s.head_dim, 2 * s.kv_heads * s.head_dim
    per_token = 4 * s.width + 2 * attention + keys + 3 * s.mlp
    if {"language_model", "lora"} & set(trains):
        per_token += 2 * s.width + attention + s.mlp  # the inputs of the matrices
    if "lora" in trains:
        per_token += 7 * lora_rank
    values = batch * (visual_tokens + text_tokens) * stored(per_token, s.width, layers_run)
    if "vision_tower" in trains and visual_tokens:
        held = 8 * s.vision_width + 3 * s.vision_mlp
        values += batch * (s.visual_tokens + 1) * stored(held, s.vision_width, s.vision_used)
    return {
        "weights": 4.0 * (count["vision"] + count["projector"] + language + adapters),
        "optimizer": 12.0 * trained,
        "activations": value_bytes * values + 12.0 * batch * answer_tokens * s.vocab,
    }


def _check(trains: Collection[str], lora_rank: int) -> None:
    """Raises ValueError for parts that can't be trained."""
    if not trains or not set(trains) <= set(PARTS):
        raise ValueError(f"trains={list(trains)}: expected one or more of {', '.join(PARTS)}")
    if "lora" in trains and lora_rank < 1:
        raise ValueError(f"lora_rank={lora_rank}: expected at least 1 where lora is trained")


def _adapters(shape: Shape, rank: int) -> tuple[int, int]:
    """Weights of the adapters of a decoder layer: of attention's four matrices, of the MLP's three.

    An adapter of a matrix [out, in] is one of [rank, in] and one of [out, rank].
    """
    s = shape
    attention = 4 * s.width + 2 * (s.heads + s.kv_heads) * s.head_dim
    return rank * attention, rank * 3 * (s.width + s.mlp)


def _attention_learns(shares: Mapping[str, float]) -> bool:
    return shares.get("rows", 1.0) * shares.get("attention_backward", 1.0) > 0
