"""A model's own placeholder in words of a user's: words, and no place of an image.

While a conversation is rendered, its letters are written as letters for private use (`hide`), so
that nothing takes it for a placeholder. At the end a copy of the tokenizer that knows placeholders
by private letters alone makes the tokens (`encode`).
"""

import json
import re
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer
from transformers import ProcessorMixin

PRIVATE = 0x100000  # where the last plane for private use begins: no text has its letters
HIDDEN = re.compile(f"[{chr(PRIVATE)}-{chr(PRIVATE + 0xFFFD)}]+")


def hide(processor: ProcessorMixin, text: str) -> str:
    """A text of a user's, as long as before, with its placeholders in private letters."""
    return _placeholders(processor).sub(lambda match: _moved(match[0], PRIVATE), text)


def encode(
    processor: ProcessorMixin, text: str, add_special_tokens: bool
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Ids, int32 [tokens], and offsets of a rendered text with hidden placeholders."""
    pieces = re.split(f"({HIDDEN.pattern})", text)
    pieces[::2] = [hide(processor, piece) for piece in pieces[::2]]
    pieces[1::2] = [_moved(piece, -PRIVATE) for piece in pieces[1::2]]
    tokenizer, ids = _copy(processor)
    encoded = tokenizer.encode("".join(pieces), add_special_tokens=add_special_tokens)
    return np.array([ids.get(id, id) for id in encoded.ids], np.int32), encoded.offsets


@lru_cache(maxsize=8)
def _copy(processor: ProcessorMixin) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer with placeholders in private letters, and its ids -> those of the model."""
    content = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["content"] = hide(processor, token["content"])
    copy = Tokenizer.from_str(json.dumps(content))
    copy.no_truncation()
    copy.no_padding()
    return copy, {copy.token_to_id(t["content"]): t["id"] for t in content["added_tokens"]}


@lru_cache(maxsize=8)
def _placeholders(processor: ProcessorMixin) -> re.Pattern:
    ids = [number for number in processor.image_token_ids if number is not None]
    names = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
    tokens = {*processor.tokenizer.convert_ids_to_tokens(ids), *filter(None, names)}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _moved(text: str, by: int) -> str:
    return "".join(chr(ord(letter) + by) for letter in text)
