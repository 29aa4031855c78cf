"""Which visual tokens each compressor keeps of a picture, as a small result file.

    python -m sts tokens --backbone results/mini/backbone/dense.json \
        --data data/mini/scenes/manifest.json --out results/mini/tokens.json

Left out are kinds that look at text (it is compared with projected tokens, of which there are none
here), those with weights (nothing has trained them), and those that ask for a class token where the
tower has none.
"""

import base64
import io
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image, ImageStat
from torch import Tensor

from sts.pipeline.data.pictures import load_images
from sts.pipeline.data.rows import images_of
from sts.pipeline.files import SEAL, listed_file, read_json, sha256_json, write_text_atomic
from sts.pipeline.train.joined import TOWERS, image_processor, load_tower, remote_code
from sts.pipeline.train.model import read_backbone
from sts.vtc import KINDS, compress, kind_of, wants

KEEP = 0.25  # share of the visual tokens
LOOKED_AT = 32  # pictures
CHANNELS = 8  # of the features through which a kind's weights are measured


def kept_tokens(backbone: str | Path, data: str | Path, out: str | Path) -> dict[str, Any]:
    """Compress a picture of a prepared data set by every kind; write and return the result.

    Args:
        backbone: Manifest of a vision tower and a language model.
        data: Manifest of the data set.
        out: File to write.

    Returns:
        `picture`, what the vision tower sees, as PNG in base64; its `grid` of patches
        [rows, columns]; the keep ratio `keep`; `kinds`, name -> the outputs, each a list of
        [token, weight]: how much of which token is in it.

    Raises:
        FileNotFoundError: A manifest is missing; the message names it.
    """
    picture, grid, features, scores = viewer(read_backbone(backbone))(bright_picture(Path(data)))
    png = io.BytesIO()
    picture.save(png, format="PNG")
    result = {
        "picture": base64.b64encode(png.getvalue()).decode(),
        "grid": grid,
        "keep": KEEP,
        "kinds": {
            kind: weights(kind, features, grid, scores)
            for kind in drawable_kinds(scores is not None)
        },
    }
    result[SEAL] = sha256_json(result)
    write_text_atomic(out, json.dumps(result, separators=(",", ":")) + "\n")
    return result


def drawable_kinds(has_scores: bool) -> list[str]:
    """The kinds that need no text and no weights, nor, without `has_scores`, a class token."""
    missing = {"text"} if has_scores else {"text", "scores"}
    return [
        kind for kind in KINDS if not missing & wants(kind) and not isinstance(kind_of(kind), type)
    ]


def weights(
    kind: str, features: Tensor, grid: tuple[int, int], scores: Tensor | None, seed: int = 0
) -> list[list[tuple[int, float]]]:
    """Of each output of a kind, the tokens in it and how much of each.

    features [1, tokens, dim], scores [1, tokens]; `none` keeps all tokens, the others KEEP.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = 1.0 if kind == "none" else KEEP
    _, outputs = compress(kind, features, keep, grid, scores=scores, generator=generator)
    # [1, outputs, 1, tokens, channels], a mean over channels: a kind may do another thing in each
    summed = lambda x, apply=outputs.apply: apply(x).sum(2)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(summed, features[..., :CHANNELS])
    shares = jacobian[0, :, 0].abs().mean(-1)
    return [[(i, round(float(row[i]), 6)) for i in row.nonzero()[:, 0].tolist()] for row in shares]


def bright_picture(data: Path) -> Image.Image:
    """The brightest of the first LOOKED_AT pictures of the first training split of a data manifest:
    on a dark one lines are hard to see. Raises FileNotFoundError if there is no such file."""
    splits = read_json(data)["splits"]
    split = next((name for name in ("align", "instruct") if name in splits), next(iter(splits)))
    file = listed_file(data, splits[split]["file"])
    rows = Dataset.from_file(str(file)).with_format("arrow")
    cells = filter(images_of, (row.to_pylist()[0] for row in rows))
    pictures = (load_images(cell)[0] for cell in islice(cells, LOOKED_AT))
    return max(pictures, key=lambda picture: ImageStat.Stat(picture.convert("L")).mean[0])


View = tuple[Image.Image, tuple[int, int], Tensor, Tensor | None]


def viewer(backbone: dict[str, Any]) -> Callable[[Image.Image], View]:
    """What the vision tower of a backbone manifest, which is loaded once, makes of a picture.

    Returns:
        A function of a picture. It gives the picture as the tower sees it; its grid of patches
        (rows, columns); their features [1, patches, dim]; the attention that the class token, if
        there is one, pays each [1, patches].
    """
    prepare = image_processor(backbone)
    code = remote_code(backbone)
    tower = load_tower(backbone["vision"], attn_implementation="eager", **code).eval()

    def view(picture: Image.Image) -> View:
        pixels = prepare(picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out = tower(pixels, output_attentions=True, output_hidden_states=True)
        layer = backbone.get("vision_feature_layer", -2) % (len(out.attentions) + 1)
        attention = out.attentions[max(layer - 1, 0)]  # hidden state i is of layer i - 1
        side = tower.config.image_size // tower.config.patch_size
        colours = pixels[0].permute(1, 2, 0).numpy() * prepare.image_std + prepare.image_mean
        image = Image.fromarray((255 * colours.clip(0, 1)).round().astype("uint8"))
        features = out.hidden_states[layer]
        if TOWERS[tower.config.model_type] == "full":
            return image, (side, side), features, None
        return image, (side, side), features[:, 1:], attention.mean(1)[:, 0, 1:]

    return view
