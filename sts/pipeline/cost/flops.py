"""FLOPs and memory of an optimizer step, from the sizes of a model and of what it was given.

A FLOP is a multiplication or an addition inside a matrix product, as torch.utils.flop_counter
counts them; element-wise work, norms and softmax are left out (below 1 % at any usual width).

What a training costs follows from `trains`, the parts that are trained (PARTS): a product with a
matrix is computed once, once more for the gradient of its input if something before it is trained,
and once more for the gradient of the matrix if it is trained itself.

The sizes are read from the modules of the model, whatever its family, so that there is no formula
of a family: a matrix costs what it holds for every token, and attention its two products. Three
things no module says: how many patches one row of the projector holds (from the channels that it
reads; POOLED where these don't tell), which patches see each other (`tower_work`), and that of
experts a token goes through `top_k`. The arithmetic needs no torch; reading a model does.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

PARTS = ("projector", "language_model", "vision_tower", "lora")
SIDE = 24  # visual tokens along each side of a picture, where a model takes any size


class Matrix(NamedTuple):
    """One that tokens are multiplied with. times: how often a token is, on average; of a projector,
    how often a patch is. adapted: whether LoRA puts an adapter on it. merges: how many rows a
    convolution makes one of; 0 where it is none."""

    inputs: int
    outputs: int
    times: float = 1.0
    adapted: bool = True
    merges: int = 0

    @property
    def weights(self) -> float:
        return self.inputs * self.outputs * self.times

    def adapter(self, rank: int) -> float:
        """Weights of its adapter: one matrix of [rank, inputs] and one of [outputs, rank]."""
        return rank * (self.inputs + self.outputs) * self.adapted


class Branch(NamedTuple):
    """A branch of a projector: the matrix that reads the tower's features, and those after it; all
    are after it where a norm comes first, whose gradient is one more for what it gives."""

    reads: tuple[Matrix, ...]
    others: tuple[Matrix, ...]


@dataclass(frozen=True)
class Layer:
    """A layer of a vision tower or decoder: the matrices of its attention and all others.

    width: channels of its input. scores: channels of queries and of values, over all heads; 0 for
    an attention without products of tokens with each other. closed: the output of its last product
    is needed in the backward pass, as a norm, a scale or the weights of experts come after it.
    """

    width: int
    attention: tuple[Matrix, ...]
    mlp: tuple[Matrix, ...]
    scores: int
    closed: bool = False

    @cached_property
    def sizes(self) -> tuple[float, float, float, float]:
        """Weights of attention, of all else, of those that read the layer's input, of the last."""
        attention, mlp, reads = (
            sum(one.weights for one in some) for some in (self.attention, self.mlp, self.reads)
        )
        return attention, mlp, reads, self.last.weights

    @property
    def reads(self) -> list[Matrix]:
        """Of attention, those that read the layer's input."""
        return [one for one in self.attention[:-1] if one.inputs == self.width]

    @property
    def last(self) -> Matrix:
        return (self.mlp or self.attention)[-1]

    def adapters(self, rank: int) -> tuple[float, float]:
        """Weights of the adapters of attention and of all else."""
        attention, mlp = (
            sum(one.adapter(rank) for one in some) for some in (self.attention, self.mlp)
        )
        return attention, mlp


@dataclass(frozen=True)
class Shape:
    """Sizes of a vision tower, a projector and a decoder.

    tower: its layers, of which the first `tower_used` make what the projector gets. embedding:
    weights of the patch embedding. beside: other matrices of the tower, after its layers.
    patches, pairs, class_tokens: of one tile of the tower's size, or of a picture of SIDE x SIDE
    visual tokens where the tower takes any size; pairs of patches that see each other, mean of the
    layers. rows: that the projector makes of a patch. projector: its branches.
    around: those of the language model outside its layers and its head. parameters: numbers of
    weights, biases and norms included: vision, projector, decoder (all layers), head (embeddings,
    last norm, output head).
    """

    tower: tuple[Layer, ...]
    tower_used: int
    embedding: int
    beside: tuple[Matrix, ...]
    patches: int
    pairs: float
    class_tokens: int
    rows: float
    projector: tuple[Branch, ...]
    decoder: tuple[Layer, ...]
    around: tuple[Matrix, ...]
    width: int
    vocab: int
    parameters: Mapping[str, int]

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.decoder)

    @property
    def visual_tokens(self) -> int:
        """That the decoder gets of one tile or picture, see `patches`."""
        return round(self.patches * self.rows)


def trained_parameters(shape: Shape, trains: Collection[str], lora_rank: int = 0) -> int:
    """Number of trained weights. Raises ValueError for parts that can't be trained."""
    _check(trains, lora_rank)
    count = shape.parameters
    sizes = {
        "projector": count["projector"],
        "language_model": count["decoder"] + count["head"],
        "vision_tower": count["vision"],
        "lora": round(sum(sum(layer.adapters(lora_rank)) for layer in shape.decoder)),
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
    patches: float | None = None,
    pairs: float | None = None,
    checkpointing: bool = False,
    fused_attention: bool = True,
) -> dict[str, float]:
    """FLOPs of forward and backward of `batch` samples: vision, projector, decoder, head.

    Per sample: visual_tokens that reach the decoder, text_tokens (padding included), answer_tokens
    whose logits are computed. trains: the trained parts, out of PARTS; the language model's include
    embeddings and head. lora_rank: of adapters on all matrices of the decoder's layers, where
    `lora` is trained. work: of each decoder layer the shares of its work that are less than
    1 (sts/lds/decision.py, SHARES), [layers]; default: all layers do all of it. images: in the
    batch, each a tile of the tower's size (default: one per sample where there are visual tokens).
    patches, pairs: of the batch, where images are not such tiles (`tower_work`). checkpointing:
    layers that pass gradients on are computed once more (non-reentrant, transformers' default).
    fused_attention: its backward recomputes the scores (SDPA and flash: 2.5 times the forward;
    eager: 2). Raises ValueError for parts that can't be trained, or work of another number of
    layers.
    """
    _check(trains, lora_rank)
    s = shape
    work = [{}] * s.layers if work is None else work
    if len(work) != s.layers:
        raise ValueError(f"work of {len(work)} layers: the shape has {s.layers}")
    sees, joins, speaks, adapts = (
        part in trains for part in ("vision_tower", "projector", "language_model", "lora")
    )
    rank = lora_rank if adapts else 0
    scores_backward = 2.5 if fused_attention else 2

    if patches is None:
        images = (batch if visual_tokens else 0) if images is None else images
        patches = images * s.patches
    tiles = patches / s.patches
    pairs = tiles * s.pairs if pairs is None else pairs
    seen = patches + tiles * s.class_tokens
    vision = 2 * patches * s.embedding * (1 + sees)  # pixels need no gradient
    vision += 2 * patches * sum(one.weights for one in s.beside) * (1 + 2 * sees)
    for index, layer in enumerate(s.tower):
        attention, mlp, _, last = layer.sizes
        scores = 2 * pairs * layer.scores
        forward = 2 * seen * (attention + mlp) + scores
        vision += forward
        if sees and index < s.tower_used:
            vision += 4 * seen * (attention + mlp) + scores * scores_backward
            if checkpointing:  # torch stops before the last product
                vision += forward - (0 if layer.closed else 2 * seen * last)

    projector = 0.0
    for branch in s.projector:
        reads, others = (2 * patches * sum(one.weights for one in some) for some in branch)
        projector += reads * (1 + joins + sees) + others * (1 + joins + (joins or sees))

    # where nothing before the decoder is trained, its first product needs no gradient of its input
    begins = next((i for i, one in enumerate(work) if _attention_learns(one)), None)
    begins = begins if not (sees or joins or speaks) else None
    of_weights = 2 if speaks else 1  # times the forward's

    def run(index: int, shares: Mapping[str, float]) -> float:
        """A decoder layer, of one sample."""
        layer = s.decoder[index]
        attention_weights, mlp_weights, reads, last = layer.sizes
        attention_adapters, mlp_adapters = layer.adapters(rank)
        tokens = shares.get("tokens", 1.0) * (visual_tokens + text_tokens)
        scores = 2 * tokens**2 * layer.scores
        adapters = attention_adapters + mlp_adapters
        forward = 2 * tokens * (attention_weights + mlp_weights + adapters) + scores
        attention = 2 * tokens * attention_weights * of_weights + scores * scores_backward
        attention += 4 * tokens * attention_adapters
        if index == begins:
            attention -= 2 * tokens * (reads + sum(rank * one.inputs for one in layer.reads))
        mlp = 2 * tokens * mlp_weights * of_weights + 4 * tokens * mlp_adapters
        attention_share = shares.get("attention_backward", 1.0)
        mlp_share = shares.get("mlp_backward", 1.0)
        backward = attention_share * attention + mlp_share * mlp
        # torch stops before the last product
        last = rank * layer.last.outputs if rank and layer.last.adapted else last
        recomputed = forward - (0 if layer.closed else 2 * tokens * last) if checkpointing else 0
        # a layer of which nothing needs a gradient is not computed again
        recomputed *= 1 - (1 - attention_share) * (1 - mlp_share)
        return shares.get("rows", 1.0) * (forward + backward + recomputed)

    decoder = sum(run(index, shares) for index, shares in enumerate(work))
    around = 2 * (visual_tokens + text_tokens) * sum(one.weights for one in s.around)
    decoder += around * (2 + speaks)

    logits = 2 * answer_tokens * s.width * s.vocab
    return {
        "vision": vision,
        "projector": projector,
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
    patches: float | None = None,
    checkpointing: bool = False,
    value_bytes: int = 4,
    shards: int = 1,
) -> dict[str, float]:
    """Rough peak bytes of training a micro-batch with AdamW: weights, optimizer, activations, and
    `gathered` where weights and optimizer are split over processes.

    `weights` in float32; `optimizer` is gradients and two moments, float32, of what is trained;
    `activations` at `value_bytes` per value are what backward needs of each decoder layer that
    runs: its two norms' inputs and outputs, queries, keys, values (before and after rotation),
    attention output and MLP intermediates, less the inputs of matrices without trained weights or
    adapters; of a vision tower that is trained the same, of each layer up to the one whose features
    are used; with `checkpointing` a layer's input each and one layer in full. Logits in float32
    three times over. patches: of the micro-batch (default: a tile a sample). Of `shards` a process
    has one, and at `value_bytes`, as weights and as gradients, all outside the layers and two of
    them: the one that runs and the next. Left out: a frozen
    vision tower's working set, allocator overhead, attention scores (fused attention stores none).
    Expect the true figure within half and twice of it. Raises ValueError for parts that can't be
    trained.
    """
    trained = trained_parameters(shape, trains, lora_rank)
    s = shape
    adapters = trained_parameters(shape, ("lora",), lora_rank) if "lora" in trains else 0
    learns = bool({"language_model", "lora"} & set(trains))
    rank = lora_rank if "lora" in trains else 0

    def of_token(layer: Layer) -> float:
        """Values that a decoder layer holds of a token."""
        attention = layer.attention[-1].inputs if layer.attention else 0
        keys = max(0, sum(one.outputs for one in layer.reads) - attention)
        mlp = layer.mlp[-1].inputs * layer.mlp[-1].times if layer.mlp else 0
        held = 4 * layer.width + 2 * attention + keys + 3 * mlp
        if learns:  # the inputs of the matrices
            held += 2 * layer.width + attention + mlp
        return held + rank * sum(one.adapted for one in (*layer.attention, *layer.mlp))

    def stored(held: Sequence[float], widths: Sequence[int]) -> float:
        return sum(widths) + max(held) if checkpointing else sum(held)

    share = layers_run / s.layers
    held = [share * of_token(layer) for layer in s.decoder]
    if checkpointing:
        held = [of_token(layer) for layer in s.decoder]
    values = batch * (visual_tokens + text_tokens)
    values *= stored(held, [share * layer.width for layer in s.decoder])
    if "vision_tower" in trains and visual_tokens:
        patches = batch * s.patches if patches is None else patches
        used = s.tower[: s.tower_used]
        held = [8 * one.width + 3 * one.mlp[-1].inputs for one in used]
        seen = patches + patches / s.patches * s.class_tokens
        values += seen * stored(held, [one.width for one in used])
    outside = s.parameters["projector"] + s.parameters["head"]
    together = outside + 2 * s.parameters["decoder"] / s.layers
    return {
        "weights": 4.0 * (sum(s.parameters.values()) + adapters) / shards,
        "optimizer": 12.0 * trained / shards,
        "gathered": 2.0 * value_bytes * together if shards > 1 else 0.0,
        "activations": value_bytes * values + 12.0 * batch * answer_tokens * s.vocab,
    }


def _check(trains: Collection[str], lora_rank: int) -> None:
    """Raises ValueError for parts that can't be trained."""
    if not trains or not set(trains) <= set(PARTS):
        raise ValueError(f"trains={list(trains)}: expected one or more of {', '.join(PARTS)}")
    if "lora" in trains and lora_rank < 1:
        raise ValueError(f"lora_rank={lora_rank}: expected at least 1 where lora is trained")


def _attention_learns(shares: Mapping[str, float]) -> bool:
    return shares.get("rows", 1.0) * shares.get("attention_backward", 1.0) > 0


# ---- reading a model ----------------------------------------------------------------------------

# Rows of the projector for a patch, where patches become one by a mean and not by a matrix
POOLED = {
    "gemma3": lambda config: config.mm_tokens_per_image / _tile(config.vision_config),
    "shieldgemma2": lambda config: config.mm_tokens_per_image / _tile(config.vision_config),
    "video_llama_3": lambda config: 1 / 4,  # 2 x 2, as its processor has it
}
UNSEEN = re.compile(r"audio|video|vqmodel|generation|\bhead\b")  # no picture goes through these
EMBEDDING = re.compile("embed|patch")
CLASS_TOKEN = re.compile("class_embedding|class_token|cls")
OUTPUT = re.compile(r"\b(o_proj|out_proj|proj|projection_layer|dense|wo)\b")  # of an attention
# What stands between an MLP's last product and the residual stream, by its name in a layer
CLOSING = re.compile(r"post_(feedforward|mlp|ffn|norm2)|lambda|layer_?scale|ls2|mlp_sconv")
# More than 1 % off what torch counts, by the reasons that shape_of gives
ROUGH = frozenset((
    "aria", "blip-2", "deepseek_ocr2", "deepseek_vl_hybrid", "dots3_note", "emu3",
    "ernie4_5_vl_moe", "fast_vlm", "fuyu", "gemma3n", "gemma4", "gemma4_unified", "glm5_next",
    "got_ocr2", "granite4_vision", "idefics2", "inkling2", "inkling_mm_model", "instructblip",
    "instructblipvideo", "kimi_k25", "lfm2_vl", "lfm3_vl", "minicpm_ocr", "minicpmv4_6",
    "minicpmv4_7", "mistral_large4", "molmo2", "muse_glimmer", "muse_spark", "nemotron_h_omni",
    "ovis2", "pp_chart2table", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "step3p7", "unlimited_ocr",
))  # fmt: skip
DENSE = ("llama4",)  # every token goes through all experts
EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_k")  # what configurations call top_k


def shape_of(config: "PreTrainedConfig") -> Shape:
    """The Shape of an image-text-to-text configuration, from the modules of its model, which are
    built without memory.

    Not counted: what a linear attention, a state-space layer or a short convolution does between
    its matrices, and a SigLIP tower's pooling head, which no model reads. Where towers are no stack
    of attention layers, or projectors attend to patches, a matrix is taken to see as many rows as
    the one before gave. A warning says so of the types in ROUGH. Raises ValueError for a model that
    the library doesn't know its way in, or whose experts don't say how many of them a token goes
    through.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from sts.architectures import architecture_of, head_of, part_finder, projector_of

    if config.model_type in ROUGH:
        log.warning("FLOPs of model_type %r are a rough figure", config.model_type)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(deepcopy(config))
    names, part_of, head = architecture_of(model), part_finder(model), head_of(model)
    layers = model.get_submodule(f"{names.language_model}.{names.layers}")
    stacks = _stacks(model, part_of)
    alone = [
        (name, matrix)
        for name, matrix in _matrices(model, config)
        if not name.startswith((*(f"{one}." for one in stacks), names.language_model))
        and part_of(name) == "vision_tower"
        and not UNSEEN.search(name)
    ]
    tower = tuple(_layer(one, (), config) for stack in stacks.values() for one in stack)
    taken = _taken(config)
    channels = tower[-1].width * len(taken) if tower else 0
    beside = _in_turn([one for name, one in alone if not EMBEDDING.search(name)], channels, 1.0)
    if beside:
        channels = beside[-1].outputs
    class_tokens = sum(
        one.shape[-2] if one.ndim > 1 else 1
        for name, one in model.named_parameters()
        if part_of(name) == "vision_tower" and CLASS_TOKEN.search(name) and not UNSEEN.search(name)
    )
    vision = _vision(config)
    given = beside[-1].times if beside else 1.0
    if config.model_type in POOLED:
        given = POOLED[config.model_type](config)
    elif getattr(config, "vision_feature_select_strategy", None) == "full" and class_tokens:
        given = (_tile(vision) + class_tokens) / _tile(vision)
    modules = [one for name, one in projector_of(model).items() if not UNSEEN.search(name)]
    branches, rows = _branches(modules, channels, given, config)
    patches = _tile(vision) or round(SIDE**2 / rows)
    side = round(patches**0.5)
    frame = (side, side) if _tile(vision) == 0 else (1, patches + class_tokens)
    return Shape(
        tower=tower,
        tower_used=max((index % (len(tower) + 1) for index in taken), default=0),
        embedding=round(sum(one.weights for name, one in alone if EMBEDDING.search(name))),
        beside=beside,
        patches=patches,
        pairs=_windowed(vision, [frame]),
        class_tokens=class_tokens,
        rows=rows,
        projector=branches,
        decoder=tuple(_layer(one, names.attention, config) for one in layers),
        around=tuple(
            matrix
            for name, matrix in _matrices(model, config)
            if part_of(name) == "language_model"
            and not name.startswith(f"{names.language_model}.{names.layers}.")
            and model.get_submodule(name.rpartition(".")[0]) is not head
        ),
        width=head.weight.shape[1],
        vocab=head.weight.shape[0],
        parameters=_count(model, part_of, layers),
    )


def tower_work(
    config: "PreTrainedConfig", shape: Shape, inputs: Mapping[str, Any]
) -> tuple[int, float]:
    """(patches, pairs) of the pictures among the inputs of a forward: how many patches go through
    the vision tower, and how many pairs of them see each other, mean of the tower's layers."""
    vision = _vision(config)
    grids = [
        size
        for name in ("image_grid_thw", "video_grid_thw")
        if inputs.get(name) is not None
        for size in inputs[name].tolist()
    ]
    if grids:  # a frame is a sequence of its own
        frames = [(height, width) for count, height, width in grids for _ in range(count)]
        return sum(map(prod, frames)), _windowed(vision, frames)
    patches, pairs, tile = 0, 0.0, _tile(vision)
    for pixels in _pixels(inputs):
        if pixels.ndim < 4:  # [(images,) patches, values of a patch]
            tiles, each = prod(pixels.shape[:-2]), pixels.shape[-2]
        elif not hasattr(vision, "patch_size"):
            tiles, each = _tiles(config, inputs, pixels), shape.patches
        elif vision.model_type == "pixtral":  # all pictures are one sequence, padding cut away
            sizes = inputs["image_sizes"].tolist()
            tiles, each = 1, sum(prod(side // vision.patch_size for side in one) for one in sizes)
        else:
            sides = zip(pixels.shape[-2:], _pair(vision.patch_size), strict=True)
            tiles, each = _tiles(config, inputs, pixels), prod(size // one for size, one in sides)
        patches += tiles * each
        fixed = each in (tile, shape.patches)
        pairs += tiles * (shape.pairs if fixed else (each + shape.class_tokens) ** 2)
    return patches, pairs


def _pixels(inputs: Mapping[str, Any]) -> Iterator[Any]:
    """Tensors of [tiles, 3, height, width], or [tiles, patches, values], and the like."""
    for name in ("pixel_values", "pixel_values_videos"):
        given = inputs.get(name)
        if isinstance(given, list | tuple):
            yield from (one[None] if one.ndim == 3 else one for one in given)
        elif given is not None:
            yield given


def _tiles(config: Any, inputs: Mapping[str, Any], pixels: Any) -> int:
    """How many of pixels [..., 3, H, W] are no padding."""
    if pixels.ndim == 4:
        return len(pixels)
    if getattr(config, "image_grid_pinpoints", None) and "image_sizes" in inputs:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        alone = inputs.get("batch_num_images")  # pictures of a sample with several aren't cut
        cut = [True] * len(pixels) if alone is None else [n == 1 for n in alone for _ in range(n)]
        side = config.vision_config.image_size  # of a tile, which is not what they call it
        return sum(
            image_size_to_num_patches(size, config.image_grid_pinpoints, side) if whole else 1
            for size, whole in zip(inputs["image_sizes"], cut, strict=True)
        )
    return int(pixels.flatten(-3).any(-1).sum())


def _windowed(vision: Any, frames: Sequence[tuple[int, int]]) -> float:
    """Pairs of patches that see each other in frames [height, width] each, mean of the layers. Of
    some towers (Qwen2.5-VL's) most layers see windows of a frame only."""
    whole = sum(prod(frame) ** 2 for frame in frames)
    if getattr(vision, "fullatt_block_indexes", None) is None:
        return whole
    merge = vision.spatial_merge_size
    side = vision.window_size // merge // vision.patch_size * merge

    def squares(length: int) -> int:
        return length // side * side**2 + (length % side) ** 2

    windows = sum(squares(height) * squares(width) for height, width in frames)
    full = sum(index < vision.depth for index in vision.fullatt_block_indexes) / vision.depth
    return full * whole + (1 - full) * windows


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", config)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)[-2:]


def _tile(vision: Any) -> int:
    """Patches of a picture of the tower's own size; 0 where it has none."""
    if not getattr(vision, "image_size", None) or not hasattr(vision, "patch_size"):
        return 0
    sides = zip(_pair(vision.image_size), _pair(vision.patch_size), strict=True)
    return prod(size // side for size, side in sides)


def _taken(config: Any) -> list[int]:
    """Hidden states of the tower that the projector gets, counted from the embeddings' output, 0,
    or from the end."""
    for name in ("vision_feature_layer", "vision_feature_layers"):
        taken = getattr(config, name, None)
        if taken is not None:
            return [taken] if isinstance(taken, int) else list(taken)
    return [-1]


def _in_turn(matrices: Sequence[Matrix], channels: int, rows: float) -> tuple[Matrix, ...]:
    """Matrices of which one takes what the one before gives, with `times`: the first takes so many
    channels of so many rows a patch, or of several rows at once."""
    found = []
    for matrix in matrices:
        together = channels and matrix.inputs % channels == 0
        rows /= matrix.merges or (matrix.inputs // channels if together else 1)
        channels = matrix.outputs
        found.append(matrix._replace(times=rows))
    return tuple(found)


def _count(model: "nn.Module", part_of: Any, layers: "nn.Module") -> dict[str, int]:
    """See Shape.parameters."""
    count = dict.fromkeys(("vision_tower", "projector", "language_model"), 0)
    for name, one in model.named_parameters():
        count[part_of(name)] += one.numel()
    decoder = sum(one.numel() for one in layers.parameters())
    return {
        "vision": count["vision_tower"],
        "projector": count["projector"],
        "decoder": decoder,
        "head": count["language_model"] - decoder,
    }


def _stacks(model: "nn.Module", part_of: Any) -> dict[str, "nn.ModuleList"]:
    """The lists of attention layers of a vision tower, by name."""
    from torch import nn

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and part_of(name) == "vision_tower"
        and not UNSEEN.search(name)
        and any(_attention(layer, ()) for layer in module)
    }


def _matrices(module: "nn.Module", config: Any) -> Iterator[tuple[str, Matrix]]:
    """(name, Matrix) of all that tokens are multiplied with in a module."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    for name, weight in module.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(owner, nn.Linear | _ConvNd) and leaf == "weight":
            outputs = weight.shape[0]
            merges = prod(owner.stride) if isinstance(owner, _ConvNd) else 0
            inputs = weight.numel() // outputs
            yield name, Matrix(inputs, outputs, adapted=not merges, merges=merges)
        elif isinstance(owner, nn.Embedding) or not re.search("weight|proj", leaf):
            continue
        elif weight.ndim == 2:
            yield name, Matrix(weight.shape[1], weight.shape[0], adapted=False)
        elif weight.ndim == 3 and "expert" in name:
            dense = config.model_type in DENSE
            times = len(weight) if dense else min(len(weight), _top_k(module, config))
            yield name, Matrix(weight.shape[2], weight.shape[1], times, adapted=False)


def _top_k(module: "nn.Module", config: Any) -> int:
    """Experts that a token goes through."""
    routers = (getattr(one, "top_k", None) for one in module.modules())
    text = config.get_text_config()
    asked = (*routers, *(getattr(text, name, None) for name in EXPERTS))
    found = next((one for one in asked if isinstance(one, int)), None)
    if found is None:
        raise ValueError(
            f"FLOPs of model_type {config.model_type!r}: neither its routers (top_k) nor its "
            f"text_config ({', '.join(EXPERTS)}) say how many experts a token goes through; add "
            "the name to EXPERTS in sts/pipeline/cost/flops.py"
        )
    return found


def _branches(
    modules: Sequence["nn.Module"], channels: int, given: float, config: Any
) -> tuple[tuple[Branch, ...], float]:
    """Of the modules of a projector, which are given so many channels of so many rows a patch; and
    the rows a patch that the last one gives."""
    branches, rows = [], given
    for module in modules:
        matrices = [matrix for _, matrix in _matrices(module, config)]
        if not matrices:
            continue
        own = not channels or matrices[0].inputs % channels == 0  # else it reads another branch
        matrices = _in_turn(matrices, channels, given if own else rows)
        rows = matrices[-1].times
        norms = {
            len(one)
            for name, one in module.named_parameters()
            if one.ndim == 1 and name.endswith("weight")
        }
        first = 0 if norms & {channels, matrices[0].inputs} else 1
        branches.append(Branch(matrices[:first], matrices[first:]))
    return tuple(branches), rows


def _attention(layer: "nn.Module", names: Collection[str]) -> list[str]:
    """Names of a layer's modules that are its attention."""
    return [
        name
        for name, child in layer.named_children()
        if name in names or "attention" in type(child).__name__.lower()
    ]


def _layer(layer: "nn.Module", names: Collection[str], config: Any) -> Layer:
    found = _attention(layer, names)
    attention, mlp = [], []
    for name, matrix in _matrices(layer, config):
        (attention if name.split(".")[0] in found else mlp).append((name, matrix))
    attention.sort(key=lambda pair: bool(OUTPUT.search(pair[0])))
    closing = [*dict(layer.named_children()), *dict(layer.named_parameters(recurse=False))]
    mlp = [matrix for _, matrix in mlp]
    values = attention[-1][1].inputs if attention else 0
    scores = 0
    for name in found:
        module = layer.get_submodule(name)
        if re.search("attention", type(module).__name__, re.IGNORECASE) and not re.search(
            "linear|delta", type(module).__name__, re.IGNORECASE
        ):
            latent = getattr(module, "qk_head_dim", None)
            scores = values + (latent * module.num_heads if latent else values)
    return Layer(
        width=(attention[0][1] if attention else mlp[0]).inputs,
        attention=tuple(matrix for _, matrix in attention),
        mlp=tuple(mlp),
        scores=scores,
        closed=any(map(CLOSING.search, closing)) or any(one.times > 1 for one in mlp),
    )
