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
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from sts.architectures import architecture_of, decoder_layers_of, head_of, part_finder
from sts.pipeline.cost import counting
from sts.pipeline.cost.counting import ATTENTION, FORWARD, MLP, RECOMPUTED, TowerWatch, record

LONGER = 64  # tokens between the two lengths; a multiple of the chunks of linear attentions
SMALL = 5_000_000  # weights below which real ones are faster than none
# The backward of fused attention computes the scores once more: 5 products where others have 4
FUSED_BACKWARD = 1.25

# Part of a model -> name in Counts.parameters; the language model is two
WEIGHTS_OF = {"vision_tower": "vision", "projector": "projector"}
WEIGHTS = ("vision", "projector", "decoder", "head")

Cost = np.ndarray  # FLOPs [forward, backward, recomputed by checkpointing] x [a token, a pair]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """What a sample costs a model as a stage trains it.

    Attributes:
        layers: Of the decoder, (attention, MLP) each, by tokens.
        around: The language model outside its layers and head, by tokens.
        head: Logits, by tokens that have some.
        pictures: Vision tower and projector, by patches and pairs (`TowerWatch`).
        patches, pairs, visual_tokens: Of the sample that was counted; visual tokens of the decoder.
        parameters: Numbers of weights: vision, projector, decoder (its layers, with adapters), head
            (embeddings, last norm, output head).
        trained: Numbers of those that are trained.
        width, tower_width: Channels of a token and of a patch.
        vocab: Rows of the output head.
    """

    layers: Sequence[tuple[Cost, Cost]]
    around: Cost
    head: Cost
    pictures: Cost
    patches: float
    pairs: float
    visual_tokens: float
    parameters: Mapping[str, int]
    trained: Mapping[str, int]
    width: int
    tower_width: int
    tower_layers: int
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
            patches, pairs: Of the batch, see `TowerWatch`.
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

        of_pairs = FUSED_BACKWARD if fused_attention else 1.0

        def flops(
            cost: Cost, n: float, pairs: float, *, backward: float = 1.0, again: float = 0.0
        ) -> float:
            shares = np.array([[1, 1], [backward, of_pairs * backward], [again, again]])
            return float((shares * cost * (n, pairs)).sum())

        decoder = flops(self.around, tokens, tokens**2)
        for (attention, mlp), shares in zip(self.layers, work, strict=True):
            n = tokens * shares.get("tokens", 1.0)
            of_attention, of_mlp = (shares.get(f"{x}_backward", 1.0) for x in (ATTENTION, MLP))
            # a layer of which nothing needs a gradient is not computed again
            again = checkpointing * (1 - (1 - of_attention) * (1 - of_mlp))
            layer = flops(attention, n, n**2, backward=of_attention, again=again)
            layer += flops(mlp, n, n**2, backward=of_mlp, again=again)
            decoder += shares.get("rows", 1.0) * layer
        return {
            "pictures": flops(self.pictures, patches, pairs, again=checkpointing),
            "decoder": samples * decoder,
            "head": samples * flops(self.head, answer_tokens, answer_tokens**2),
        }

    def forward(self, tokens: float, answer_tokens: float) -> float:
        """FLOPs of a sample's forward alone, with the pictures of the sample that was counted."""
        decoder = self.around + np.sum(self.layers, (0, 1))
        parts = [
            decoder[FORWARD] * (tokens, tokens**2),
            self.pictures[FORWARD] * (self.patches, self.pairs),
            self.head[FORWARD] * (answer_tokens, answer_tokens**2),
        ]
        return float(np.sum(parts))


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

    batch = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, dict(batch))
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
            log.warning(
                "FLOPs of pictures are a rough figure for model_type %r (%s)",
                config.model_type, error,
            )  # fmt: skip
            return _roughly_counted(model, batch)


def _counted(model: PreTrainedModel, batch: Mapping[str, Any]) -> Counts:
    watch = TowerWatch(model)
    rows, length = batch["input_ids"].shape
    lengths = [-(-length // LONGER) * LONGER + more for more in (0, LONGER)]
    runs = [record(model, _stretched(batch, tokens)) for tokens in lengths]
    patches, pairs = (total / rows / len(runs) for total in watch.read())

    def by_tokens(place: counting.Place) -> Cost:
        """What both runs say of a place: a line in tokens, times tokens."""
        short, long = (
            run[place].sum(1) / rows / tokens for run, tokens in zip(runs, lengths, strict=True)
        )
        of_pair = (long - short) / LONGER
        return np.stack([short - of_pair * lengths[0], of_pair], 1)

    layers = [
        (by_tokens((ATTENTION, i)), by_tokens((MLP, i)))
        for i in range(len(decoder_layers_of(model)))
    ]
    for attention, _ in layers:  # checkpointing goes on to the MLP
        attention[RECOMPUTED] = attention[FORWARD]
    run = runs[0]
    of_tower = [cost for (name, _), cost in run.items() if name == counting.TOWER]
    for cost in of_tower:
        cost[RECOMPUTED] *= cost[counting.BACKWARD].any()  # else nothing needs its output
    projector = run[counting.PICTURES]
    projector[RECOMPUTED] = 0
    pictures = (projector + sum(of_tower)) / rows
    return Counts(
        layers=layers,
        around=by_tokens(counting.AROUND),
        head=by_tokens(counting.HEAD),
        pictures=pictures / (patches or 1, pairs or 1),
        patches=patches,
        pairs=pairs,
        visual_tokens=_placeholders(model, batch).sum().item() / rows,
        width=model.get_input_embeddings().weight.shape[1],
        tower_width=watch.width,
        tower_layers=watch.layers,
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
    pictures = np.array([[2.0 * weights, 0], [4.0 * trained, 0], [0, 0]])
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
