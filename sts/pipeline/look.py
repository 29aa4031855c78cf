"""Verbs that look at what a scale can make and has made: its targets, its runs, two of them side by
side, what of its files nothing names any more, and all that was found, on a page.

Files that are there and the plan alone; what a run was is read from its manifests.
"""

import fcntl
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sts.pipeline.command import (
    ABLATIONS,
    MINI,
    RESULTS,
    Beside,
    Results,
    Scales,
    Table,
    option,
    pairs_of,
    refuse,
)
from sts.pipeline.config import ConfigError, load_ablations, load_scale, load_yaml
from sts.pipeline.files import read_json
from sts.pipeline.plan import load_plan, unique
from sts.pipeline.run.weights import DONE

AGES = {"d": 86400, "h": 3600, "min": 60}  # seconds
Run = Annotated[str, typer.Argument(help="an ablation, or one run of it: sts, sts/seed0")]
Runs = dict[int, list[Path]]  # seed -> its manifests


def targets(configfile: Scales = (MINI,), ablations: Table = ABLATIONS) -> None:
    """List what `snakemake --cores all NAME` makes of a scale."""
    plan = load_plan(configfile, ablations)
    _print_columns((name, target.description) for name, target in plan.targets().items())


def runs(results: Results = RESULTS, ablations: Table = ABLATIONS) -> None:
    """List the runs of a scale: ablation and seed, what is finished, size of the weights, age, and
    the tables that show them."""
    groups = {id: entry.groups for id, entry in load_ablations(ablations).items()}
    lines, all_weights = [("run", "finished", "size", "age", "tables")], set()
    by_id = _manifests(results)
    for id in sorted(by_id, key=lambda id: ([*groups, id].index(id), id)):  # as the table has them
        shown = ", ".join(groups[id]) if id in groups else f"none: not in {ablations}"
        for seed, files in by_id[id].items():
            weights = {path for file in files for path in _weights(results, file)}
            all_weights |= weights
            stages = [file.stem for file in files]
            age = time.time() - max(file.stat().st_mtime for file in files)
            size = _readable(sum(map(_bytes, weights)))
            lines.append((f"{id}/seed{seed}", ", ".join(stages), size, _age(age), shown))
    _print_columns(lines)
    total = _readable(sum(map(_bytes, all_weights)))
    print(f"{len(lines) - 1} runs, {total}: weights that several share are there once.")


def compare(first: Run, second: Run, results: Results = RESULTS) -> None:
    """Show in what two runs, or two ablations, differ: configuration, scores, loss, time. Of two
    ablations it takes the seeds that both have."""
    names = (first, second)
    pair = [_chosen(results, name) for name in names]
    if not any("/" in name for name in names) and (both := pair[0].keys() & pair[1].keys()):
        pair = [{seed: run[seed] for seed in sorted(both)} for run in pair]
    ids = [name.partition("/")[0] for name in names]
    configs = [dict(_flat(load_yaml(results / "configs" / f"{id}.yaml"))) for id in ids]
    differing = [key for key in unique([*configs[0], *configs[1]])
                 if configs[0].get(key) != configs[1].get(key)]  # fmt: skip
    lines = [("", *names)]
    lines += [(key, *(str(config.get(key, "none")) for config in configs)) for key in differing]
    measured = [_measured(run) | _times(results, id) for run, id in zip(pair, ids, strict=True)]
    for key in unique([*measured[0], *measured[1]]):
        lines.append((key, *(f"{m[key]:.4g}" if key in m else "none" for m in measured)))
    _print_columns(lines)
    seeds = unique(f"seed {', '.join(map(str, run))}" for run in pair)
    print(f"Scores in %, mean over {' and '.join(seeds)}.")


def examples(
    config: Annotated[Path, option("resolved configuration of the first run", "FILE")],
    backbone: Annotated[Path, option("backbone manifest", "FILE")],
    data: Annotated[list[Path], option("manifests of prepared data sets", "FILE ...")],
    runs: Annotated[list[Path], option("evaluations (eval.json) of two runs", "FILE FILE")],
    out: Annotated[Path, option("file to write", "FILE")],
) -> None:
    """Choose questions with their pictures and what two runs answered, for the page of results."""
    from sts.pipeline.measure.examples import examples

    if len(runs) != 2:
        refuse("runs", len(runs), "two")
    examples(load_scale(config), backbone, data, (runs[0], runs[1]), out)


def page(
    out: Annotated[Path, option("file to write", "FILE")],
    tables: Annotated[list[str], option("finished tables, the main one first", "NAME ...")] = (
        "main",
    ),
    beside: Beside = (),
    configfiles: Annotated[list[str], option("the scale, as commands name it", "FILE ...")] = (),
    results: Results = RESULTS,
) -> None:
    """Write the page of all that was found, for a browser, from result files."""
    from sts.pipeline.report.page import page

    page(results, out, tables, pairs_of(beside), configfiles)


def clean(
    results: Results = RESULTS, yes: Annotated[bool, option("don't ask", None, "--yes")] = False
) -> int:
    """Delete what no manifest of a scale names: weights, checkpoints of unfinished trainings,
    tokens. It lists them and asks."""
    with _alone():
        unnamed = dict(_unnamed(results))
        if not unnamed:
            print("Nothing to delete.")
            return 0
        _print_columns((str(path), _readable(_bytes(path)), why) for path, why in unnamed.items())
        total = _readable(sum(map(_bytes, unnamed)))
        if not yes and not typer.confirm(f"Delete them, {total}?"):
            return 1
        for path in unnamed:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            path.with_suffix(".lock").unlink(missing_ok=True)
        print(f"Deleted {total}.")
        return 0


@contextmanager
def _alone() -> Iterator[None]:
    """Keep calls of the workflow in this folder out, by the lock that they hold (recovery.smk)."""
    file = Path(".snakemake/alive")
    file.parent.mkdir(exist_ok=True)
    with open(file, "a") as alive:
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            accepted = "a folder in which no call is at work: wait until it ends"
            raise ConfigError("clean", "the folder", str(Path.cwd()), accepted) from None
        yield


def _unnamed(results: Path) -> Iterator[tuple[Path, str]]:
    """What no manifest names, and what it is."""
    files = [
        file
        for by_seed in _manifests(results, 0).values()
        for it in by_seed.values()
        for file in it
    ]
    named = {path for file in files for path in _weights(results, file)}
    for folder in sorted(path for path in results.glob("weights/*") if path.is_dir()):
        if folder not in named:
            is_finished = (folder / DONE).exists()
            yield folder, "weights" if is_finished else "a training that its call would go on with"
    for file in sorted(results.glob("tokens/*")):
        if file.suffix != ".lock":
            yield file, "tokens, which the next training makes again"


def _manifests(results: Path, least: int = 1) -> dict[str, Runs]:
    """The manifests and evaluations of all runs by ablation and seed, oldest first.

    Raises:
        FileNotFoundError: There are fewer runs than `least`.
    """
    by_id: dict[str, Runs] = {}
    for folder in sorted(
        results.glob("runs/*/seed*"), key=lambda it: (it.parent, int(it.name[4:]))
    ):
        files = sorted(
            folder.glob("*.json"), key=lambda file: (file.stem == "eval", file.stat().st_mtime_ns)
        )
        if files:
            by_id.setdefault(folder.parent.name, {})[int(folder.name[4:])] = files
    if len(by_id) < least:
        raise FileNotFoundError(f"{results}/runs: no run yet; run snakemake first")
    return by_id


def _chosen(results: Path, name: str) -> Runs:
    """The manifests of an ablation, or of one run of it."""
    by_id = _manifests(results)
    id, _, seed = name.partition("/seed")
    by_seed = by_id.get(id, {})
    chosen = {n: files for n, files in by_seed.items() if seed in ("", str(n))}
    if not chosen:
        accepted = f"one of {', '.join([*by_id, *(f'{id}/seed{n}' for n in by_seed)])}"
        raise ConfigError("command line", "a run", name, accepted)
    return chosen


def _weights(results: Path, manifest: Path) -> list[Path]:
    """The folder of the weights that a manifest names; none of an evaluation's."""
    content = read_json(manifest)
    return [results / "weights" / Path(content["weights"]).name] if "weights" in content else []


def _measured(run: Runs) -> dict[str, float]:
    """Mean over seeds of the scores, in %, and of each stage's last loss."""
    values: dict[str, list[float]] = {}
    for content in (read_json(file) for files in run.values() for file in files):
        if "benchmarks" in content:
            scores = {name: 100 * entry["score"] for name, entry in content["benchmarks"].items()}
            scores = {"average": statistics.fmean(scores.values()), **scores}
        else:
            scores = {f"loss of {content['stage']}": content["final_loss"]}
        for name, value in scores.items():
            values.setdefault(name, []).append(value)
    return {name: statistics.fmean(numbers) for name, numbers in values.items()}


def _times(results: Path, id: str) -> dict[str, float]:
    """Seconds of a training by each timing: those of one table are comparable."""
    timings = {file.stem: read_json(file)["variants"] for file in results.glob("bench/*.json")}
    return {
        f"seconds (table {name})": variants[id]["time_s"]
        for name, variants in sorted(timings.items())
        if id in variants
    }


def _flat(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration with dotted names."""
    for key, value in block.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _age(seconds: float) -> str:
    unit = next((unit for unit, length in AGES.items() if seconds >= length), "min")
    return f"{seconds / AGES[unit]:.0f} {unit}"


def _print_columns(lines: Iterable[tuple[str, ...]]) -> None:
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
