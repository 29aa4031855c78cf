"""Which tokens each compressor keeps, by a real vision tower, and that the file says it all."""

import base64
import io
from collections import Counter

import numpy as np
import pytest
from parts import joined
from PIL import Image
from processors import IMAGE

from sts.pipeline.measure.kept_tokens import kept_tokens
from sts.vtc import KINDS


def test_every_kind_is_there_that_needs_no_text_and_no_training(kept):
    left_out = {"text_guided", "text_guided_max", "learned"}
    assert list(kept["kinds"]) == [kind for kind in KINDS if kind not in left_out]
    assert {len(outputs) for kind, outputs in kept["kinds"].items() if kind != "none"} == {4}


def test_an_output_names_its_tokens_with_their_weights(kept):
    assert kept["grid"] == [4, 4]
    assert kept["kinds"]["none"] == [[[token, 1.0]] for token in range(16)]
    blocks = kept["kinds"]["avgpool2d"]
    assert blocks[0] == [[token, 0.25] for token in (0, 1, 4, 5)]
    assert sorted(token for output in blocks for token, _ in output) == list(range(16))
    for kind in ("uniform", "random", "cls_topk", "diverse"):
        tokens = Counter(token for output in kept["kinds"][kind] for token, _ in output)
        assert len(tokens) == tokens.total() == 4
    merged = Counter(token for output in kept["kinds"]["bipartite"] for token, _ in output)
    assert len(merged) == 16


def test_the_picture_is_the_brightest_as_the_tower_sees_it(kept, prepared):
    from datasets import Dataset

    rows = Dataset.from_file(str(prepared.parent / "align.arrow"))
    with Image.open(io.BytesIO(base64.b64decode(kept["picture"]))) as picture:
        pictures = [row["image"].convert("RGB") for row in rows.select(range(min(32, len(rows))))]
        brightest = max(pictures, key=lambda picture: np.asarray(picture.convert("L")).mean())
        shown = brightest.resize((IMAGE, IMAGE), Image.Resampling.BICUBIC)
        assert picture.tobytes() == shown.tobytes()


def test_a_tower_without_a_class_token_has_the_other_kinds(prepared, tmp_path):
    clip, siglip = (
        kept_tokens(joined(tmp_path / tower, tower), prepared, tmp_path / f"{tower}.json")
        for tower in ("clip", "siglip")
    )
    assert clip["grid"] == siglip["grid"] == (4, 4)
    assert clip["kinds"].keys() - siglip["kinds"].keys() == {
        "cls_topk",
        "cls_merge",
        "cls_clusters",
    }


def test_a_missing_manifest_is_named(backbone, prepared, tmp_path):
    with pytest.raises(FileNotFoundError, match="Run snakemake, which makes it"):
        kept_tokens(backbone, tmp_path / "none.json", tmp_path / "out.json")
    with pytest.raises(FileNotFoundError, match=r"no_backbone\.json"):
        kept_tokens(tmp_path / "no_backbone.json", prepared, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
