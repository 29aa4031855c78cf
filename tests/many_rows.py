"""What a set of many rows takes of a process's memory, from JSON to batches.

    PYTHONPATH=tests:. python tests/many_rows.py 665298 /tmp/many

prints the most anonymous memory (what can't be read again from a file), in MB, of each step.
"""

import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from processors import tiny_processor

from recipes.mini import lessons
from sts.pipeline.config import MINI, deep_merge, load_yaml, validate
from sts.pipeline.data.collator import collate
from sts.pipeline.data.prepare import prepare
from sts.pipeline.data.templates import CHAT_TEMPLATE
from sts.pipeline.train.feed import load_data
from sts.pipeline.train.job import Job

WORDS = [*lessons.vocabulary()]
TURNS = 5  # pairs of a conversation, of 25 and 12 words: about 1,300 characters as in the 665K set
TEXT_ONLY = 16  # one row of so many


def made_up(file: Path, rows: int) -> None:
    """A LLaVA JSON of rows of one picture each, or of none."""
    draw = random.Random(0)
    with file.open("w") as out:
        for n in range(rows):
            turns = []
            for _ in range(TURNS):
                turns += [
                    {"from": "human", "value": " ".join(draw.choices(WORDS, k=25))},
                    {"from": "gpt", "value": " ".join(draw.choices(WORDS, k=12))},
                ]
            row: dict[str, Any] = {"id": f"{n:09d}", "conversations": turns}
            if n % TEXT_ONLY:
                row["image"] = f"{n % 50}.jpg"
                turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            out.write(("[" if n == 0 else ",\n") + json.dumps(row))
        out.write("]")


def anonymous_mb() -> float:
    """Memory of this process that no file holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def most(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What some work gives, and the most memory during it and its seconds."""
    done, readings, began = threading.Event(), [anonymous_mb()], time.monotonic()

    def watch() -> None:
        while not done.wait(0.1):
            readings.append(anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    readings.append(anonymous_mb())
    return result, {"mb": round(max(readings)), "seconds": round(time.monotonic() - began)}


def measure(rows: int, folder: Path) -> dict[str, dict[str, float]]:
    """Prepare, tokenise and read so many rows in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(50):
        Image.new("RGB", (16, 16), (n, n, n)).save(folder / f"{n}.jpg")
    made_up(folder / "rows.json", rows)
    custom = {"custom": {"many": {"json": str(folder / "rows.json"), "images": str(folder)}}}
    config = validate(deep_merge(load_yaml(MINI), {"data": custom}), "many.yaml")
    processor = tiny_processor()
    processor.chat_template = CHAT_TEMPLATE
    block, manifest = config.stage("instruct"), folder / "manifest.json"
    taken: dict[str, dict[str, float]] = {}
    _, taken["prepare"] = most(lambda: prepare(config, "many", manifest))

    out = folder / "runs" / "dense" / "seed0" / "instruct.json"
    job = Job(config, "dense", 0, "instruct", [manifest], manifest, out)

    def load() -> Any:
        return load_data(job, processor)

    _, taken["tokenise"] = most(load)
    (samples, order), taken["load"] = most(load)
    some = random.Random(0).sample(range(rows // block.global_batch), 20)
    _, taken["batches"] = most(
        lambda: [collate(processor, [samples[n] for n in order(step)]) for step in some]
    )
    return taken


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), Path(sys.argv[2]))))
