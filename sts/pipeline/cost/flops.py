"""FLOPs of a training's steps, from what torch counts on one sample and what each step did.

A FLOP is a multiplication or an addition inside a matrix product, as torch.utils.flop_counter
counts them; element-wise work, norms and softmax are left out (below 1 % at any usual width).

`count` runs a dense sample through the model at two lengths, which tell a cost at any length, as it
is linear and quadratic in tokens. A step's FLOPs then follow from the tokens that VTC left and from
the share of each layer's work that LDS left.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from sts.architectures import architecture_of, decoder_layers_of, head_of, part_finder
from sts.pipeline.cost.counting import (
    AROUND,
    ATTENTION,
    HEAD,
    MLP,
    PICTURES,
    TOWER,
    TowerWatch,
    record,
)

LONGER = 64  # tokens between the two lengths; a multiple of the chunks of linear attentions
SMALL = 5_000_000  # weights below which real ones are faster than none
# The backward of fused attention computes the scores once more: 5 products where others have 4
FUSED_BACKWARD = 1.25

# Part of a model -> name in Counts.parameters; the language model is two
WEIGHTS_OF = {"vision_tower": "vision", "projector": "projector"}
WEIGHTS = ("vision", "projector", "decoder", "head")

log = logging.getLogger(__name__)


class Growth(NamedTuple):
    """linear * n + square * n**2, for n tokens."""

    linear: float = 0.0
    square: float = 0.0

    def at(self, tokens: float, pairs: float | None = None) -> float:
        """The value at so many tokens; pairs: of them that see each other, where not all do."""
        return self.linear * tokens + self.square * (tokens**2 if pairs is None else pairs)

    def fused(self, is_fused: bool) -> "Growth":
        """Of a backward, with or without fused attention."""
        return self._replace(square=self.square * FUSED_BACKWARD) if is_fused else self


class Both(NamedTuple):
    """Of a forward and of its backward."""

    forward: Growth
    backward: Growth

    def at(self, tokens: float, pairs: float | None, fused_attention: bool) -> float:
        """The sum at so many tokens."""
        return self.forward.at(tokens, pairs) + self.backward.fused(fused_attention).at(
            tokens, pairs
        )


@dataclass(frozen=True)
class Layer:
    """What a decoder layer costs, by tokens.

    Attributes:
        forward, attention, mlp, recomputed: FLOPs of the forward, of the backward of its two
            sublayers, and of what checkpointing computes once more.
        stored: Bytes that the backward needs, in float32.
    """

    forward: Growth
    attention: Growth
    mlp: Growth
    recomputed: Growth
    stored: Growth


@dataclass(frozen=True)
class Counts:
    """What a sample costs a model as a stage trains it.

    Attributes:
        layers: Of the decoder.
        around: FLOPs of the language model outside its layers and head, by tokens.
        head: FLOPs of logits, by tokens that have some.
        pictures: FLOPs of vision tower and projector, by patches and pairs (`TowerWatch`).
        pictures_recomputed: FLOPs of them that checkpointing computes once more, by the same.
        tower_stored: Bytes that the backward of each layer of the tower needs, by the same.
        patches, pairs, visual_tokens: Of the sample that was counted; visual tokens of the decoder.
        parameters: Numbers of weights: vision, projector, decoder (its layers, with adapters), head
            (embeddings, last norm, output head).
        trained: Numbers of those that are trained.
        widths: Channels of decoder and tower.
        vocab: Rows of the output head.
    """

    layers: tuple[Layer, ...]
    around: Both
    head: Both
    pictures: Both
    pictures_recomputed: Growth
    tower_stored: tuple[Growth, ...]
    patches: float
    pairs: float
    visual_tokens: float
    parameters: Mapping[str, int]
    trained: Mapping[str, int]
    widths: tuple[int, int]
    vocab: int

    def step(
        self,
        *,
        samples: int,
        tokens: float,
        answer_tokens: float,
        patches: float,
        pairs: float,
        work: Sequence[Mapping[str, float]] | None = None,
        checkpointing: bool = False,
        fused_attention: bool = True,
    ) -> dict[str, float]:
        """FLOPs of forward and backward: `pictures`, `decoder`, `head`.

        Args:
            samples: In the batch.
            tokens: Of a sample that reach the decoder, padding included.
            answer_tokens: Of a sample, whose logits are computed.
            patches: Of the batch, see `TowerWatch`.
            pairs: Of the batch, see `TowerWatch`.
            work: Of each decoder layer the shares of its work that are less than 1
                (sts/lds/decision.py, SHARES), [layers]; default: all layers do all of it.
            checkpointing: Whether layers are computed once more in the backward.
            fused_attention: Whether attention is SDPA or flash, not eager.

        Raises:
            ValueError: `work` is of another number of layers.
        """
        work = [{}] * len(self.layers) if work is None else work
        if len(work) != len(self.layers):
            raise ValueError(f"work of {len(work)} layers: the model has {len(self.layers)}")
        decoder = self.around.at(tokens, None, fused_attention)
        for layer, shares in zip(self.layers, work, strict=True):
            decoder += _layer_flops(layer, shares, tokens, checkpointing, fused_attention)
        pictures = self.pictures.at(patches, pairs, fused_attention)
        return {
            "pictures": pictures + checkpointing * self.pictures_recomputed.at(patches, pairs),
            "decoder": samples * decoder,
            "head": samples * self.head.at(answer_tokens, None, fused_attention),
        }

    def forward(self, tokens: float, answer_tokens: float) -> float:
        """FLOPs of a sample's forward alone, with the pictures of the sample that was counted."""
        parts = (self.around.forward, *(layer.forward for layer in self.layers))
        decoder = sum(part.at(tokens) for part in parts)
        pictures = self.pictures.forward.at(self.patches, self.pairs)
        return pictures + decoder + self.head.forward.at(answer_tokens)


def _layer_flops(
    layer: Layer,
    shares: Mapping[str, float],
    tokens: float,
    checkpointing: bool,
    fused_attention: bool,
) -> float:
    """FLOPs of a decoder layer and a sample."""
    tokens *= shares.get("tokens", 1.0)
    attention = shares.get("attention_backward", 1.0)
    mlp = shares.get("mlp_backward", 1.0)
    flops = layer.forward.at(tokens)
    flops += attention * layer.attention.fused(fused_attention).at(tokens)
    flops += mlp * layer.mlp.at(tokens)
    if checkpointing:  # a layer of which nothing needs a gradient is not computed again
        flops += (1 - (1 - attention) * (1 - mlp)) * layer.recomputed.at(tokens)
    return shares.get("rows", 1.0) * flops


def count(
    config: PreTrainedConfig,
    batch: Mapping[str, Any],
    prepare: Callable[[PreTrainedModel], Any],
) -> Counts:
    """Count what a model costs, whose weights need no memory here and get no value.

    No random number of torch's is drawn on the way.

    Args:
        config: Of an image-text-to-text model.
        batch: A batch that it is called with, labels included; of each row the same.
        prepare: Freezes what is not trained, and puts adapters on the model.

    Raises:
        ValueError: For a model that the library doesn't know its way in.
    """

    def build(device: str) -> PreTrainedModel:
        with torch.device(device):
            return AutoModelForImageTextToText.from_config(deepcopy(config), dtype=torch.float32)

    with torch.random.fork_rng(devices=[]):
        model = build("meta")
        if model.num_parameters() < SMALL:
            model = build("cpu")
        model.set_experts_implementation("batched_mm")  # others look at what routers say
        with torch.device(model.device):
            prepare(model)
    try:
        return _counted(model, batch)
    except Exception as error:  # whatever a model's code does where weights have no values
        name = config.model_type
        log.warning("FLOPs of pictures are a rough figure for model_type %r (%s)", name, error)
        return _roughly_counted(model, batch)


def _counted(model: PreTrainedModel, batch: Mapping[str, Any]) -> Counts:
    watch = TowerWatch(model)
    rows, length = batch["input_ids"].shape
    lengths = [-(-length // LONGER) * LONGER + more for more in (0, LONGER)]
    runs = [record(model, _stretched(batch, tokens)) for tokens in lengths]
    patches, pairs = (total / rows / len(runs) for total in watch.read())

    def growth(name: str, *places: tuple[str, int]) -> Growth:
        """Of a row, by tokens of the decoder: what the runs say at `places`."""
        totals = [sum(getattr(run, name)[place].sum() for place in places) for run in runs]
        rates = [total / rows / tokens for total, tokens in zip(totals, lengths, strict=True)]
        square = float(rates[1] - rates[0]) / LONGER
        return Growth(float(rates[0]) - square * lengths[0], square)

    def seen(name: str, *places: tuple[str, int]) -> Growth:
        """Of a row, by what the vision tower sees: what the first run says at `places`."""
        linear, square = (
            float(sum(getattr(runs[0], name)[place][i] for place in places)) / rows for i in (0, 1)
        )
        return Growth(linear / patches if patches else 0.0, square / pairs if pairs else 0.0)

    tower = [(TOWER, i) for i in range(len(watch.layers))]
    pictures = [(PICTURES, 0), *tower]
    return Counts(
        layers=tuple(
            Layer(
                forward=growth("forward", (ATTENTION, i), (MLP, i)),
                attention=growth("backward", (ATTENTION, i)),
                mlp=growth("backward", (MLP, i)),
                recomputed=growth("recomputed", (MLP, i)),
                stored=growth("stored", (ATTENTION, i), (MLP, i)),
            )
            for i in range(len(decoder_layers_of(model)))
        ),
        around=Both(growth("forward", (AROUND, 0)), growth("backward", (AROUND, 0))),
        head=Both(growth("forward", (HEAD, 0)), growth("backward", (HEAD, 0))),
        pictures=Both(seen("forward", *pictures), seen("backward", *pictures)),
        # a layer whose output nothing needs is not computed again
        pictures_recomputed=seen("recomputed", *(p for p in pictures if runs[0].backward[p].any())),
        tower_stored=tuple(seen("stored", place) for place in tower),
        patches=patches,
        pairs=pairs,
        visual_tokens=_placeholders(model, batch).sum().item() / rows,
        widths=(model.get_input_embeddings().weight.shape[1], watch.width),
        vocab=head_of(model).weight.shape[0],
        **_parameters(model),
    )


def _stretched(batch: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """A batch whose rows have so many tokens: the last one again and again."""

    def stretch(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != batch["input_ids"].shape:
            return value
        return torch.cat([value, value[:, -1:].expand(-1, tokens - value.shape[1])], 1)

    return {name: stretch(value) for name, value in batch.items()}


def _placeholders(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    """Where the tokens of images stand, [rows, tokens]."""
    return batch["input_ids"] == getattr(model.config, "image_token_id", None)


def _roughly_counted(model: PreTrainedModel, batch: Mapping[str, Any]) -> Counts:
    """Text is counted; a picture costs what its weights do, a patch for each of its tokens."""
    is_visual = _placeholders(model, batch)
    text = {"input_ids": batch["input_ids"].masked_fill(is_visual, 0)}
    text |= {name: batch[name] for name in ("attention_mask", "labels")}
    model.get_input_embeddings().register_forward_hook(
        lambda _, __, embeddings: (
            embeddings if embeddings.requires_grad else embeddings.requires_grad_()
        )
    )
    counts = _counted(model, text)
    weights, trained = (
        sum(numbers[part] for part in ("vision", "projector"))
        for numbers in (counts.parameters, counts.trained)
    )
    tokens = is_visual.sum().item() / len(is_visual)
    pictures = Both(Growth(2.0 * weights), Growth(4.0 * trained))
    return replace(counts, pictures=pictures, patches=tokens, visual_tokens=tokens)


def _parameters(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Counts.parameters and Counts.trained."""
    part_of, layers = part_finder(model), architecture_of(model).decoder_layers
    numbers = {name: dict.fromkeys(WEIGHTS, 0) for name in ("parameters", "trained")}
    for name, parameter in model.named_parameters():
        part = WEIGHTS_OF.get(part_of(name)) or (
            "decoder" if name.startswith(f"{layers}.") else "head"
        )
        numbers["parameters"][part] += parameter.numel()
        numbers["trained"][part] += parameter.numel() * parameter.requires_grad
    return numbers
