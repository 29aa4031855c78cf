"""What is missing or spoilt of a scale's files, and what makes each again.

    python -m sts verify --results results/mini

Every reader compares the bytes that it uses; this compares all of them, and looks for what a
finished table or figure was made from: Snakemake doesn't miss a file behind one that is there.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sts.pipeline.config import load_ablations, load_scale
from sts.pipeline.files import SpoiltError, listed_file, read_json
from sts.pipeline.plan import MAIN, Plan, figures, unique
from sts.pipeline.run.weights import DONE, check_weights, weights_of
from sts.pipeline.train.model import read_backbone

TABLE, FIGURE = (".md", ".csv", ".tex", ".html", ".json"), (".svg", ".png")


def verify(results: Path, ablations: Path) -> list[str]:
    """A line for each file of a scale that is missing or spoilt.

    Args:
        results: Folder of the scale's results.
        ablations: Table of ablations.
    """
    scales = {file.stem: load_scale(file) for file in sorted(results.glob("configs/*.yaml"))}
    entries = {id: entry for id, entry in load_ablations(ablations).items() if id in scales}
    plan = Plan({id: scales[id] for id in entries}, entries)
    lines = [*_missing(plan, results), *map(_problem, _checks(results, Path("data", results.name)))]
    return unique(filter(None, lines))


def _problem(check: Callable[[], Any]) -> str:
    try:
        check()
    except (SpoiltError, FileNotFoundError) as error:
        return str(error)
    return ""


def _checks(results: Path, data: Path) -> Iterator[Callable[[], Any]]:
    """Of each file of results and prepared data what a reader does first."""
    checked: set[str] = set()
    for file in sorted(results.rglob("*.json")):
        if file.relative_to(results).parts[0] not in ("weights", "tokens"):
            yield partial(_check_json, file, checked)
    for folder in sorted(done.parent for done in results.glob(f"weights/*/{DONE}")):
        if str(folder) not in checked:  # no manifest names it now
            yield partial(check_weights, folder, f"Delete it: rm -r {folder}")
    for manifest in sorted(data.glob("*/manifest.json")):
        yield partial(_check_data, manifest)


def _check_json(file: Path, checked: set[str]) -> None:
    """A result file and what it names, but for weights that are among those `checked`."""
    content = read_json(file)
    if file.parent.name == "backbone":
        read_backbone(file)
    elif isinstance(content, dict) and "weights" in content and content["weights"] not in checked:
        checked.add(content["weights"])
        weights_of(file)


def _check_data(manifest: Path) -> None:
    for split in read_json(manifest)["splits"].values():
        listed_file(manifest, split["file"])


def _missing(plan: Plan, results: Path) -> Iterator[str]:
    """What a table or figure that is there was made from and isn't there any more."""
    for name in plan.tables:
        stem = results / "tables" / name
        sources = [*plan.run_files(name, "eval"), *plan.run_files(name)]
        members = plan.members(name)
        data = [*plan.data(members), *plan.hub_benchmarks(members)]
        backbones = [plan.backbone(id) for id in members]
        manifests = [f"data/{results.name}/{id}/manifest.json" for id in data]
        sources += [f"{results}/bench/{name}.json", *backbones, *manifests]
        yield from _behind(stem, TABLE, sources)
    sources = [f"{results}/tables/{MAIN}.csv", f"{results}/examples.json"]
    yield from _behind(results / "index", (".html",), sources)
    for name in figures():
        yield from _behind(results / "figures" / name, FIGURE, plan.figure_files(name))


def _behind(stem: Path, endings: tuple[str, ...], sources: list[str]) -> Iterator[str]:
    outputs = [stem.with_name(stem.name + ending) for ending in endings]
    if not any(map(Path.exists, outputs)):
        return
    for file in (*outputs, *map(Path, sources)):
        if not file.exists() or not file.stat().st_size:
            yield f"{file}: missing or empty. snakemake {file} makes it again"
