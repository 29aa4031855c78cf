"""A small folder of results, the table that is made of it, and trainings with a history."""

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
    if not isinstance(value, str):
        value = yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value)
    path.write_text(value)


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


# ---- trainings ---------------------------------------------------------------------------------

LAYERS, STEPS = 4, 20


def row(id, stage, step):
    """sts skips layer 1 or 2 in turn, half of the stage each; with what its formula asks."""
    on = (id, stage) == ("sts", "instruct")
    skipped = [float(on and layer == 1 + step % 2) for layer in range(LAYERS)]
    return {
        "step": step,
        "loss": 3 / (step + 1),
        "layers_run": LAYERS - sum(skipped),
        "skipped": skipped,
        "asked": [0.5 * on * (layer in (1, 2)) for layer in range(LAYERS)],
    }


def train(folder, id, seed, stage, rows):
    """The manifest of a stage and the history beside its weights."""
    key = f"{id}-{seed}-{stage}"
    manifest = {"weights": f"results/mini/weights/{key}"}
    if stage == "instruct":
        losses = [{"step": step, "loss": 1 / step + seed, "skills": {}} for step in (10, 20)]
        manifest["held_out"] = losses
    write(folder / f"runs/{id}/seed{seed}/{stage}.json", manifest)
    write(folder / f"weights/{key}/history.jsonl", "")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"weights/{key}/history.jsonl").write_text(lines)
