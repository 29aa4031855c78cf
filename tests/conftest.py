"""Tiny shared material: a LLaVA in two parts, its processor, prepared data and a resolved config.

Everything is real (Hugging Face classes, Arrow files, manifests of the pipeline's own shape) and
small enough that a whole training stage takes seconds on one core.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest

# What libraries keep in the user's folders and forget in the temporary one goes with the session;
# of pytest's own folders those of failed tests stay where they always are (see pyproject.toml).
LITTER = tempfile.TemporaryDirectory(prefix="sts-tests-", ignore_cleanup_errors=True)
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
HOMES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "MPLCONFIGDIR", "DVC_SITE_CACHE_DIR")
os.environ |= {name: str(Path(LITTER.name, name)) for name in HOMES} | {"TMPDIR": LITTER.name}
tempfile.tempdir = None  # to be read again
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> Path:
    """Manifest of untrained tiny backbones: vision width 32, Llama width 32 with 6 layers."""
    import torch
    from processors import IMAGE, PATCH, tiny_processor
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("backbone")
    processor = tiny_processor()
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=IMAGE, patch_size=PATCH,
    )  # fmt: skip
    language = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=6, num_attention_heads=2, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    LlamaForCausalLM(language).save_pretrained(folder / "language")
    processor.save_pretrained(folder / "processor")
    parts = {part: str(folder / part) for part in ("vision", "language", "processor")}
    (folder / "manifest.json").write_text(json.dumps({**parts, "sha256": "tiny"}))
    return folder / "manifest.json"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Manifest of `scenes`, prepared: 24 rows in `align` and in `instruct`, 1 in each benchmark
    and of each skill in `validation`."""
    from sts.pipeline.config import MINI, deep_merge, load_yaml, validate
    from sts.pipeline.data.prepare import prepare

    sizes = {"data": {"scenes": {"align": 24, "instruct": 24, "validation": 1, "test": 1}}}
    out = tmp_path_factory.mktemp("data") / "manifest.json"
    prepare(validate(deep_merge(load_yaml(MINI), sizes), "conftest.py"), "scenes", out)
    return out
