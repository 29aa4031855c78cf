"""A small folder of results, and the table that is made of it."""

import csv
import json

import yaml

from sts.pipeline.report import tables

SCORES = {  # id -> seed -> (colour, text)
    "dense": {0: (0.8, 0.5), 1: (1.0, 0.4)},
    "sts": {0: (0.8, 0.4), 1: (0.9, 0.4)},
}
BENCH = {  # id -> (seconds, FLOPs of align, of instruct)
    "dense": (100.0, 4e9, 6e9),
    "sts": (80.0, 1e9, 5e9),
}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value))


def make_results(folder):
    """Fill a folder with two seeds of each method, and their times."""
    for id, seeds in SCORES.items():
        config = {"seeds": [0, 1], "evaluate": {"benchmarks": ["colour", "text"]}}
        write(folder / "configs" / f"{id}.yaml", config)
        for seed, values in seeds.items():
            write(
                folder / "runs" / id / f"seed{seed}" / "eval.json",
                {
                    "benchmarks": {
                        name: {"score": score, "blind": 0.2, "majority": 0.3, "chance": 0.25}
                        for name, score in zip(("colour", "text"), values, strict=True)
                    }
                },
            )
    variants = {
        id: {"time_s": time, "flops": {"align": align, "instruct": instruct}}
        for id, (time, align, instruct) in BENCH.items()
    }
    write(folder / "bench" / "main.json", {"variants": variants})
    return folder


def make(results, *ids, labels=None, sources=None, relative_to=None):
    """(csv rows by id, Markdown without the table of differences, LaTeX, metrics) of the main
    table."""
    stem = results / "tables" / "main"
    tables.table("main", results, list(ids), stem, labels, sources, relative_to)
    with open(stem.with_suffix(".csv")) as file:
        rows = {row["ablation"]: row for row in csv.DictReader(file)}
    texts = (stem.with_suffix(suffix).read_text() for suffix in (".md", ".tex", ".json"))
    markdown, latex, metrics = texts
    return rows, markdown.partition("### Differences")[0], latex, json.loads(metrics)
