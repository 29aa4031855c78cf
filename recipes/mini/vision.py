"""The toy vision towers, trained on the generator's ground truth.

Every feature that a projector is called with is told what its patch shows, and where; a class
token, which things its view holds.
"""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedModel, ProcessorMixin

from recipes.mini.families import FAMILIES, build, places_of, put_tower
from recipes.mini.muon import apart, learner
from recipes.mini.words import make_tokenizer
from sts.architectures import projector_of, tower_of
from sts.mini import scenes
from sts.mini.pictures import ATTRIBUTES, GRID
from sts.pipeline.run.device import bf16_is_native

BATCH = 16  # pictures of a step
SIZES = [len(values) + 1 for values in ATTRIBUTES.values()]  # 0 is "none"


def batched(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    """Lists of `size` rows."""
    while batch := list(islice(rows, size)):
        yield batch


def patch_places() -> Tensor:
    """[144, 2]: row and column of every patch, from 0."""
    return places_of(torch.arange(GRID**2))


def autocast() -> torch.autocast:
    """Forward passes in bf16, on a processor that computes in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_native())


def with_tower(
    family: str, tower: PreTrainedModel | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The family's whole model, with a decoder that is never called, and this tower."""
    text = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    model, processor = build(family, make_tokenizer(), text)
    if tower is not None:
        put_tower(model, tower)
    return model, processor


def features_of(
    family: str, model: PreTrainedModel, processor: ProcessorMixin, images: list[np.ndarray]
) -> tuple[Tensor, Tensor | None]:
    """What the projector is called with for pictures uint8 [72, 72, 3], as features of unit
    variance [pictures, features, dim]; and the class tokens [pictures, views, dim], if any."""
    outputs: dict[str, Tensor] = {}

    def of_projector(_: nn.Module, args: tuple) -> None:
        outputs["features"] = args[0]

    def of_tower(_: nn.Module, args: tuple, out) -> None:
        if FAMILIES[family].class_token:
            outputs["classes"] = out.pooler_output

    [tower], [projector] = tower_of(model).values(), projector_of(model).values()
    hooks = [
        projector.register_forward_pre_hook(of_projector),
        tower.register_forward_hook(of_tower),
    ]
    with autocast():
        model.get_image_features(**processor.image_processor(images=images, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    features, classes = outputs["features"], outputs.get("classes")
    features = F.layer_norm(features.float(), features.shape[-1:])
    features = features.reshape(len(images), -1, features.shape[-1])
    if classes is not None:
        classes = classes.float().view(len(images), -1, classes.shape[-1])
    return features, classes


def shown(family: str, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Truth [batch, 144, attributes] -> that of each feature [batch, features, attributes], and its
    place [batch, features, 2]."""
    patches, places = FAMILIES[family].shows(truth)
    return truth.gather(1, patches[..., None].expand(-1, -1, truth.shape[-1])), places


def truth_of(rows: list[dict]) -> Tensor:
    """[batch, 144, attributes]"""
    return torch.from_numpy(np.stack([row["truth"] for row in rows])).long()


def wave_places(tower: nn.Module) -> None:
    """Let learned position embeddings begin as waves over rows and columns, which tell what lies
    side by side; a tower without any is left as it is."""
    for name, table in tower.named_parameters():
        if name.endswith("position_embedding.weight"):
            side = torch.arange(math.isqrt(len(table)))
            rates = torch.pi / 2 * 0.5 ** torch.linspace(0, 5, table.shape[1] // 4)
            angles = torch.cartesian_prod(side, side)[..., None] * rates
            waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
            table.data[-len(waves) :] = 0.3 * waves  # the class token's comes first


def loss_of(logits: Tensor, truth: Tensor) -> Tensor:
    """Of what features say [batch, features, values of all attributes] about what they show [batch,
    features, attributes]."""
    things = truth[..., 0] > 0
    total = torch.zeros(())
    for index, part in enumerate(logits.split(SIZES, -1)):
        # nine patches of ten show background: they weigh a tenth, or the things are learnt late;
        # an attribute is asked for only where it applies; centres, which counting hangs on, triply
        weight, factor = (truth[..., index] > 0).float(), 1.0
        if index == 0:
            weight = torch.where(things, 1.0, 0.1)
        elif index == len(SIZES) - 1:
            weight, factor = things.float(), 3.0
        losses = F.cross_entropy(part.movedim(-1, 1), truth[..., index], reduction="none")
        total = total + factor * (losses * weight).sum() / weight.sum().clamp(min=1)
    return total


def training_rows(seed: int, words_from: int) -> Iterator[dict]:
    """Rows of pictures without end; after the first `words_from` every second shows a word, not
    every sixth: letters are learnt last."""
    for index, row in enumerate(scenes.rows("vision", 10**9, seed, turns=1)):
        if index < words_from or row["qa"][0]["skill"] == "text" or index % 5 == 0:
            yield row


def train_vision(
    family: str, steps: int, batch: int = BATCH, seed: int = 0, losses: list[float] | None = None
) -> PreTrainedModel:
    """A family's tower, by dense supervision: from a feature, each attribute of the thing that its
    patch shows, and its row and column (the decoder reads places from the features, not from their
    order). Two thirds of the steps are one leg; in the other, at half the learning rate, every
    second picture is a word. `losses` gets that of each step."""
    torch.manual_seed(seed)
    model, processor = with_tower(family)
    [tower], [projector] = tower_of(model).values(), projector_of(model).values()
    tower.train()
    # in bf16 on a CPU the backward of fused attention takes longer than all the rest
    model.set_attn_implementation("eager" if bf16_is_native() else "sdpa")
    wave_places(tower)
    width = tower.config.hidden_size
    _, places = shown(family, torch.zeros(1, GRID**2, len(SIZES), dtype=torch.long))
    spots = int(places.max()) + 1
    patch_head = nn.Linear(width, sum(SIZES))
    place_head = nn.Linear(width, 2 * spots)
    scene_head = nn.Linear(width, sum(SIZES))
    heads = [*patch_head.parameters(), *place_head.parameters(), *scene_head.parameters()]
    unused = set(projector.parameters())  # in Qwen's tower
    named = [(name, p) for name, p in tower.named_parameters() if p not in unused]
    matrices, others = apart(named)
    first = 2 * steps // 3
    learn = learner(
        matrices, [*others, *heads], first, max(steps - first, 1), lr=1.5e-3, weight_decay=0.02
    )
    rows_of = batched(islice(training_rows(seed, first * batch), steps * batch), batch)
    bar = tqdm(rows_of, f"vision {family}", total=steps, mininterval=10)
    for rows in bar:
        features, classes = features_of(family, model, processor, [row["image"] for row in rows])
        truth, places = shown(family, truth_of(rows))
        where = place_head(features).unflatten(-1, (2, spots))
        loss = loss_of(patch_head(features), truth)
        loss = loss + F.cross_entropy(where.movedim(-1, 1), places)
        if classes is not None:
            present = truth.view(*classes.shape[:2], -1, len(SIZES))  # by view
            present = [F.one_hot(present[..., i], size).amax(2) for i, size in enumerate(SIZES)]
            loss = loss + F.binary_cross_entropy_with_logits(
                scene_head(classes), torch.cat(present, -1).float()
            )
        learn(loss)
        if losses is not None:
            losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return tower.eval()


@torch.no_grad()
def seeing(family: str, tower: PreTrainedModel, rows: int = 768) -> dict[str, float]:
    """Share of features that show a thing of which a linear probe (discriminant analysis, fitted on
    three quarters of the pictures) names an attribute rightly, of those only that have it; and its
    row and column."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # only a rebuild needs it

    model, processor = with_tower(family, tower)
    pictures = list(scenes.rows("seeing", rows, 0, turns=1))
    features = torch.cat(
        [
            features_of(family, model.eval(), processor, [row["image"] for row in part])[0]
            for part in batched(iter(pictures), 64)
        ]
    ).numpy()
    attributes = torch.cat(shown(family, truth_of(pictures)), -1).numpy()
    things, fitted, shares = attributes[..., 0] > 0, 3 * rows // 4, {}
    for index, name in enumerate([*ATTRIBUTES, "row", "column"]):
        answer = attributes[..., index]
        is_judged = things if name in ("centre", "row", "column") else answer > 0
        for_fit, for_score = is_judged[:fitted], is_judged[fitted:]
        probe = LinearDiscriminantAnalysis()
        probe.fit(features[:fitted][for_fit], answer[:fitted][for_fit])
        right = probe.score(features[fitted:][for_score], answer[fitted:][for_score])
        shares[name] = round(float(right), 3)
    return shares
