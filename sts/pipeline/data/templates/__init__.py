"""Chat templates of ours: `CHAT_TEMPLATE` for joined parts that bring none, `V1` LLaVA-1.5's."""

from pathlib import Path


def _read(name: str) -> str:
    return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8").rstrip()


CHAT_TEMPLATE, V1 = _read("joined"), _read("v1")
