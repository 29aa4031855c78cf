"""What tests of benchmarks ask, and who answers."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from lm_eval.api.model import LM
from PIL import Image


class Oracle(LM):
    """Answers what `reply(question, *images)` says; remembers what it was shown, and how many
    questions at once."""

    MULTIMODAL = True
    tokenizer_name = "oracle"
    max_length, max_gen_toks = 4096, 256

    def __init__(self, reply):
        super().__init__()
        self.reply, self.shown, self.at_once = reply, [], []

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return chat_history[-1]["content"]

    def length(self, request):
        return len(request.args[0])

    def generate_until(self, requests, disable_tqdm=False):
        shown = [
            (prompt, settings, [np.asarray(image) for image in extra["visual"]])
            for prompt, settings, extra in (request.args for request in requests)
        ]
        self.shown += shown
        self.at_once.append(len(shown))
        return [self.reply(prompt, *images) for prompt, _, images in shown]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(colours).convert(mode)


def write_arrow(rows: list[dict], columns: dict, file: Path) -> None:
    """As `prepare` writes a split."""
    file.parent.mkdir(parents=True)
    features = datasets.Features(columns)
    table = datasets.Dataset.from_list(rows, features=features).data.table
    schema = features.arrow_schema
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table.select(schema.names).cast(schema))


def write_parquet(rows: list[dict], columns: dict, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=datasets.Features(columns)).to_parquet(file)
