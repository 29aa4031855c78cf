"""The stand-in for CLIP, trained on the generator's ground truth.

Every patch is told what it shows, the CLS token which things the picture holds.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from sts.mini import scenes
from sts.mini.words import MEAN, STD
from sts.pipeline.device import bf16_is_native
from sts.pipeline.step import lr_factor

WIDTH = 128  # channels, of the language model too
BATCH = 48  # pictures of a step


def vision_config() -> CLIPVisionConfig:
    """Five layers: LLaVA reads the fourth (`vision_feature_layer: -2`), CLS learns on the last."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=scenes.SIZE,
        patch_size=scenes.PATCH,
    )


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [batch, 64, 64, 3] -> float [batch, 3, 64, 64], as the image processor does it."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def batched(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    """Lists of `size` rows."""
    while batch := list(islice(rows, size)):
        yield batch


def patch_places() -> Tensor:
    """[64, 2]: row and column of every patch, from 0."""
    patch = torch.arange(scenes.GRID**2)
    return torch.stack([patch // scenes.GRID, patch % scenes.GRID], -1)


def projected(hidden_states: tuple[Tensor, ...]) -> Tensor:
    """What the projector will be given: the patches [batch, 64, dim] of the layer before the last,
    here as unit-variance features."""
    return F.layer_norm(hidden_states[-2][:, 1:].float(), (WIDTH,))


def autocast() -> torch.autocast:
    """Forward passes in bf16, on a processor that computes in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_native())


def train_vision(
    steps: int, batch: int = BATCH, seed: int = 0, lr: float = 1.5e-3
) -> CLIPVisionModel:
    """Dense supervision: from a patch's feature, each attribute of the thing that it shows, and
    its row and column (the decoder reads places from the features, not from their order)."""
    torch.manual_seed(seed)
    model = CLIPVisionModel(vision_config()).train()
    model.set_attn_implementation("eager")  # the backward of the fused kernel is slow on a CPU
    sizes = [len(values) + 1 for values in scenes.ATTRIBUTES.values()]
    patch_head = nn.Linear(WIDTH, sum(sizes))
    place_head = nn.Linear(WIDTH, 2 * scenes.GRID)
    scene_head = nn.Linear(WIDTH, sum(sizes))
    heads = nn.ModuleList([patch_head, place_head, scene_head])
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(s, steps, 50))
    rows_of = batched(scenes.rows("vision", steps * batch, seed, turns=1), batch)
    bar = tqdm(rows_of, "vision", total=steps, mininterval=10)
    for rows in bar:
        truth = torch.from_numpy(np.stack([row["truth"] for row in rows])).long()
        with autocast():
            out = model(pixels(np.stack([row["image"] for row in rows])), output_hidden_states=True)
        features = projected(out.hidden_states)
        logits = patch_head(features).split(sizes, -1)
        where = place_head(features).unflatten(-1, (2, scenes.GRID))
        # nine patches of ten show background: they weigh a tenth, or the things are learnt late;
        # an attribute is asked for only where it applies; centres, which counting hangs on, triply
        things = truth[..., 0] > 0
        weight = torch.where(things, 1.0, 0.1)
        weights = [weight, *((truth[..., i] > 0).float() for i in range(1, len(sizes) - 1)), things]
        factors = [1.0] * (len(sizes) - 1) + [3.0]
        loss = sum(
            (
                F.cross_entropy(part.movedim(-1, 1), truth[..., i], reduction="none") * weights[i]
            ).sum()
            * factors[i]
            / weights[i].sum().clamp(min=1)
            for i, part in enumerate(logits)
        )
        place = patch_places().expand(len(rows), -1, -1)
        loss = loss + F.cross_entropy(where.movedim(-1, 1), place)
        present = torch.cat(
            [F.one_hot(truth[..., i], n).amax(1) for i, n in enumerate(sizes)], -1
        ).float()
        seen = scene_head(out.pooler_output.float())
        loss = loss + F.binary_cross_entropy_with_logits(seen, present)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def seeing(model: CLIPVisionModel, rows: int = 768) -> dict[str, float]:
    """Share of patches that show a thing of which a linear probe (discriminant analysis, fitted on
    three quarters of the pictures) names an attribute rightly; of those only that have it."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # only a rebuild needs it

    pictures = list(scenes.rows("seeing", rows, 0, turns=1))
    outputs = (
        model(pixels(np.stack([row["image"] for row in part])), output_hidden_states=True)
        for part in batched(iter(pictures), 64)
    )
    seen = torch.cat([projected(out.hidden_states) for out in outputs]).numpy()
    truth = np.stack([row["truth"] for row in pictures])
    fitted = 3 * rows // 4
    shares = {}
    for index, name in enumerate(scenes.ATTRIBUTES):
        asked = truth[..., 0 if name == "centre" else index] > 0
        known, judged = asked[:fitted], asked[fitted:]
        probe = LinearDiscriminantAnalysis()
        probe.fit(seen[:fitted][known], truth[:fitted, :, index][known])
        right = probe.score(seen[fitted:][judged], truth[fitted:, :, index][judged])
        shares[name] = round(float(right), 3)
    return shares
