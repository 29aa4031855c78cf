"""All that was found at a scale, on one page that a browser opens without a server.

    python -m sts page --results results/mini --tables main equal_time --out results/mini/index.html

Every number comes from result files that are there; of what is not there the page says so. Plots
are SVG: a fifth of the size of the smallest plotly.js would be, coloured by the style sheet for
light and dark, and there without a script, which only shows values and hides rows.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from sts.pipeline.files import read_json, write_text_atomic
from sts.pipeline.report.compare import compare, time_at
from sts.pipeline.report.figures._shared import histories
from sts.pipeline.report.figures.layers import by_layer
from sts.pipeline.report.findings import configured, findings
from sts.pipeline.report.page.plots import (
    bars,
    colour,
    dot,
    forest,
    framed,
    heat,
    line,
    plot,
)
from sts.pipeline.report.results import configuration, held_out, scores, stages_of, timings
from sts.pipeline.run import provenance

NUMBERS = (  # key of a table's CSV, factor, digits, sign, unit, what it is
    ("time_ratio", 1, 2, "", "×", "of the training time"),
    ("loss_difference", 1, 3, "+", "nats", "held-out loss, less is better"),
    ("average_difference", 100, 1, "+", "points", "average score, more is better"),
    ("retention", 100, 1, "", "%", "of the score kept"),
)
UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
CLOSE, MOST_CARDS = 0.05, 4  # from a ratio of equal times; pairs at the top of the page
Pair = tuple[str, str, pd.Series]  # a method, the one beside which it stands, its row then


class Section(NamedTuple):
    """A part of the page: a question, plots that answer it, or the reason why there are none."""

    id: str
    title: str
    words: str
    plots: Sequence[Markup] = ()
    csv: pd.DataFrame | None = None
    command: str = ""
    legend: Sequence[tuple[str, str]] = ()  # (classes, name) of colours that are no rows


class Shown(NamedTuple):
    """What the plots share."""

    results: Path
    tables: Mapping[str, Sequence[str]]  # name -> ids
    names: Mapping[str, str]  # id -> label, the baseline first
    kinds: Mapping[str, str]  # id -> classes of its colour
    comparable: Sequence[str]  # ids of the methods that are compared with the baseline
    times: Mapping[str, tuple[Mapping[str, Any], float]]  # as `_times` has them

    @property
    def first(self) -> Sequence[str]:
        """ids of the first table, the main one."""
        return next(iter(self.tables.values()))


def page(
    results: str | Path,
    out: str | Path,
    tables: Sequence[str] = ("main",),
    beside: Sequence[tuple[str, str]] = (),
    configfiles: Sequence[str] = (),
) -> None:
    """Write the page of a scale.

    Args:
        results: Folder of a scale's results.
        out: File to write.
        tables: Finished tables, the main one first; `expected` is one of them.
        beside: Pairs of methods that are compared beside each with its base.
        configfiles: Of the scale, for the commands that the page names; none: the default's.

    Raises:
        FileNotFoundError: The main table is missing.
    """
    results = Path(results)
    files = {name: results / "tables" / f"{name}.csv" for name in tables}
    for file in files.values():
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such table; make it with snakemake")
    frames = {name: pd.read_csv(file, keep_default_na=False) for name, file in files.items()}
    expected = frames.pop("expected", None)
    rows = pd.concat(frames.values()).drop_duplicates("ablation").set_index("ablation")
    base, members = rows.index[0], {name: [*frame["ablation"]] for name, frame in frames.items()}
    comparable = [*rows.index[rows["relative_to"] == base]]
    times = _times(results, members, base)
    kinds = {id: colour(place) for place, id in enumerate(rows.index)}
    shown = Shown(results, members, dict(rows["method"]), kinds, comparable, times)
    examples = results / "examples.json"
    flags = f" --configfile {' '.join(configfiles)}" if configfiles else ""
    pairs = _pairs(shown, rows, beside)
    sections = [_cost(shown), _loss(shown), _differences(shown, pairs), _time(shown),
                _layers(shown)]  # fmt: skip
    text = _template().render(
        scale=results.name,
        verdict=_verdict(frames[tables[0]]),
        name=shown.names[shown.first[-1]],
        cards=_cards(shown, pairs),
        findings={name: findings(frame) for name, frame in frames.items()},
        configured=configured(configuration(results, base)),
        legend=[(id, kinds[id], shown.names[id]) for id in comparable],
        sections=sections,
        examples=read_json(examples) if examples.exists() else {"questions": []},
        names=shown.names,
        expected=expected,
        tables=[*files],
        snakemake=f"snakemake --cores all{flags}",
        command=provenance.command_line(),
        commit=provenance.git()["commit"] or "unknown",
    )
    write_text_atomic(out, text)


def _times(
    results: Path, tables: Mapping[str, Sequence[str]], base: str
) -> dict[str, tuple[Mapping[str, Any], float]]:
    """id -> (its timing, seconds on the first table's axis of one of its seconds): each table was
    timed by itself, and the baseline in all."""
    times: dict[str, tuple[Mapping[str, Any], float]] = {}
    for table, ids in tables.items():
        timing = timings(results, table)
        if base in timing:
            first = times.get(base, (timing[base],))[0]
            factor = first["time_s"] / timing[base]["time_s"]
            times = {id: (timing[id], factor) for id in ids if id in timing} | times
    return times


# ---- the verdict --------------------------------------------------------------------------------


def _verdict(main: pd.DataFrame) -> list[str]:
    """What is found of the last method of the main table, without its own name."""
    name = main["method"].iloc[-1]
    return [
        f"{group} {method.removeprefix(f'{name}: ')}"
        for group, methods in findings(main).items()
        for method in methods
        if method.startswith(f"{name}: ")
    ]


def _pairs(shown: Shown, rows: pd.DataFrame, beside: Sequence[tuple[str, str]]) -> list[Pair]:
    """Every method beside what it is compared with, and the pairs that were named."""
    pairs = [(id, base, rows.loc[id]) for id, base in rows["relative_to"].items() if id != base]
    for id, base in beside:
        table = next(name for name, ids in shown.tables.items() if {id, base} <= {*ids})
        lines = scores(shown.results, [id, base])
        row = compare(lines, shown.results, {base: base, id: base}, table)[id]
        pairs.append((id, base, pd.Series(row)))
    return pairs


def _cards(shown: Shown, pairs: Sequence[Pair]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Of the last method of the main table, at equal steps and at equal time, and of those that
    take the time of the first: a heading and (number, what it is, its interval)."""
    last = shown.first[-1]
    first = [pair for pair in pairs if pair[0] == last][:1]
    first += [pair for pair in pairs if abs(_number(pair[2], "time_ratio") - 1) <= CLOSE]
    named = {pair[:2]: pair for pair in reversed(first)}
    cards = []
    for id, base, row in [*reversed(named.values())][:MOST_CARDS]:
        numbers = []
        for key, factor, digits, sign, unit, words in NUMBERS:
            mean, low, high = (_number(row, key + end) for end in ("", "_low", "_high"))
            if np.isnan(mean):
                continue
            number = f"{factor * mean:{sign}.{digits}f}"
            between = "" if unit == "×" else "one seed: no interval"
            if not np.isnan(low):
                ends = (f"{factor * end:{sign}.{digits}f}" for end in (low, high))
                between = f"95 % interval {' to '.join(ends)}"
            numbers.append((f"× {number}" if unit == "×" else f"{number} {unit}", words, between))
        if numbers:
            cards.append((f"{shown.names[id]} beside {shown.names[base]}", numbers))
    return cards


def _number(row: pd.Series, key: str) -> float:
    """A cell as a number, nan for what is none or not there."""
    return float(pd.to_numeric(row.get(key, np.nan), errors="coerce"))


# ---- the plots ----------------------------------------------------------------------------------


def _unit(seconds: Iterable[float]) -> tuple[float, str]:
    """Seconds of the unit of a time axis, and its name."""
    longest = max(seconds, default=0)
    return next(unit for unit in UNITS if longest >= unit[0] or unit is UNITS[-1])


def _cost(shown: Shown) -> Section:
    """Score of each run against its training time."""
    title = "How good is it, for how much time?"
    times = shown.times
    ids = [id for id in shown.comparable if id in times]
    lines = scores(shown.results, ids) if ids else pd.DataFrame({"is_share": []})
    lines = lines[lines["is_share"].astype(bool)]
    if lines.empty or lines["score"].isna().all():
        return Section("cost", title, "No timing, or no score that is a share of 0 to 1.")
    averages = lines.groupby(["ablation", "seed"])["score"].agg(
        lambda x: 100 * x.mean(skipna=False)
    )
    seconds = {id: times[id][0]["time_s"] * times[id][1] for id in ids}
    unit, name = _unit(seconds.values())
    points = [
        (id, seed, seconds[id] / unit, float(score))
        for (id, seed), score in averages.dropna().items()
    ]
    frame = framed([(x, y) for *_, x, y in points])
    marks, table = [], pd.DataFrame(points, columns=["ablation", "seed", name, "average"])
    for id in shown.comparable:
        of_row = table[table["ablation"] == id]
        if of_row.empty:
            continue
        x, mean, sd = of_row[name].iloc[0], of_row["average"].mean(), of_row["average"].std()
        spread = f" ± {sd:.1f}" if len(of_row) > 1 else ""
        for seed, score in zip(of_row["seed"], of_row["average"], strict=True):
            tip = f"{shown.names[id]}, seed {seed}: {score:.1f} % in {x:.3g} {name}"
            marks.append(dot(frame, x, score, 3, f"seed {shown.kinds[id]}", id, tip))
        tip = f"{shown.names[id]}: {mean:.1f}{spread} % in {x:.3g} {name}, {len(of_row)} seeds"
        marks.append(dot(frame, x, mean, 6, f"dot {shown.kinds[id]}", id, tip))
    chance = 100 * lines.groupby("benchmark")["chance"].mean().mean(skipna=False)
    words = "Up is a better score, left is less time. A large point is a mean, a small one a seed."
    words += "" if np.isnan(chance) else f" Guessing scores {chance:.1f} %."
    drawn = plot(frame, marks, title, f"training time, {name}", "average score, %")
    return Section("cost", title, words, [drawn], table, "fig_pareto")


def _loss(shown: Shown) -> Section:
    """Held-out loss of each run against its training time."""
    title, curves = "How soon does the loss fall?", {}
    for id in shown.comparable:
        *before, last = stages_of(shown.results, id)
        timed, factor = shown.times.get(id, ({}, 1.0))
        if not {*before, last} <= timed.keys():
            continue
        spent = sum(timed[stage]["stage_s"] for stage in before)
        for seed, rows in held_out(shown.results, id).items():
            curves[id, seed] = [
                (factor * (spent + time_at(timed[last], row["step"])), row["loss"]) for row in rows
            ]
    if not curves:
        return Section("loss", title, "No run has measured a held-out loss on a timed axis.")
    unit, name = _unit(x for points in curves.values() for x, _ in points)
    curves = {key: [(x / unit, y) for x, y in points] for key, points in curves.items()}
    frame, marks = (
        framed([point for points in curves.values() for point in points], has_log_y=True),
        [],
    )
    for id in shown.comparable:
        seeds = {seed: points for (other, seed), points in curves.items() if other == id}
        for seed, points in seeds.items():
            tip = f"{shown.names[id]}, seed {seed}: ends at {points[-1][1]:.3f} nats"
            marks.append(line(frame, points, f"seed {shown.kinds[id]}", id, tip))
        if len({len(points) for points in seeds.values()}) == 1:
            mean = np.mean([*seeds.values()], axis=0)
            tip = f"{shown.names[id]}: mean of {len(seeds)} seeds ends at {mean[-1][1]:.3f} nats"
            marks.append(line(frame, mean, f"mean {shown.kinds[id]}", id, tip))
    table = pd.DataFrame(
        [(*key, x, y) for key, points in curves.items() for x, y in points],
        columns=["ablation", "seed", name, "loss"],
    )
    words = (
        "Held-out questions, dense inference. Lower and further left is better; a thick line is "
    )
    words += "the mean, a thin one a seed. The scale of the loss is logarithmic."
    drawn = plot(frame, marks, title, f"training time, {name}", "loss, nats per answer token")
    return Section("loss", title, words, [drawn], table, "fig_loss")


def _differences(shown: Shown, pairs: Sequence[Pair]) -> Section:
    """Paired differences with their intervals."""
    title = "What is a difference, and what is chance?"
    table = pd.DataFrame(
        {"ablation": id, "beside": base, "quantity": key, "mean": _number(row, key)}
        | {end: _number(row, f"{key}_{end}") for end in ("low", "high")}
        for id, base, row in pairs
        for key, *_ in NUMBERS[1:3]
    ).dropna()
    if table.empty:
        return Section("differences", title, "An interval takes two seeds of both methods.")
    drawn, first = [], shown.comparable[0]
    for key, factor, digits, sign, unit, quantity in NUMBERS[1:3]:
        intervals = []
        for id, base, _, *values in table[table["quantity"] == key].itertuples(index=False):
            mean, low, high = (factor * value for value in values)
            tip = f"{shown.names[id]} beside {shown.names[base]}: {mean:{sign}.{digits}f} {unit} "
            tip += f"({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"
            words = [shown.names[id], *[f"beside {shown.names[base]}"] * (base != first)]
            intervals.append((id, shown.kinds[id], words, (mean, low, high), tip))
        if intervals:
            name, better = quantity.split(", ")
            drawn.append(forest(intervals, quantity, f"{name}, {unit} ({better})"))
    words = f"Beside {shown.names[first]} with the same seed, or beside the method that is "
    words += "named; 95 % t intervals. An interval that includes 0 shows no difference."
    return Section("differences", title, words, drawn, table, f"table_{[*shown.tables][-1]}")


def _time(shown: Shown) -> Section:
    """Seconds of the parts of a step, a plot for each stage."""
    title, timing = "Where does the time go?", timings(shown.results, next(iter(shown.tables)))
    table = pd.DataFrame(
        [
            (stage, id, part, float(np.mean(seconds)))
            for id in shown.first
            for stage in stages_of(shown.results, id)
            for part, seconds in timing.get(id, {}).get(stage, {}).get("parts_s", {}).items()
        ],
        columns=["stage", "ablation", "part", "seconds"],
    )
    if table.empty:
        return Section("time", title, "The timing of the main table was made without its parts.")
    kinds, drawn = [*table["part"].unique()], []
    for stage, of_stage in table.groupby("stage", sort=False):
        rows = {
            shown.names[id]: dict(zip(parts["part"], parts["seconds"], strict=True))
            for id, parts in of_stage.groupby("ablation", sort=False)
        }
        drawn.append(bars(rows, kinds, f"seconds of the parts of a step of {stage}"))
    words = f"Seconds of a step, a plot for each stage: {', '.join(table['stage'].unique())}."
    legend = [(f"c{1 + i % 6}", kind) for i, kind in enumerate(kinds)]
    return Section("time", title, words, drawn, table, "fig_time_parts", legend)


def _layers(shown: Shown) -> Section:
    """Which layers the last skipping method of the main table skipped."""
    title, drawn, tables = "Which layers were skipped, and when?", [], []
    for id in reversed(shown.first):
        try:
            by_stage = histories(shown.results, {id: shown.names[id]})
        except FileNotFoundError:
            break
        for stage, runs in by_stage.items():
            if not any(any(row["skipped"]) for row in runs[id][0]):
                continue
            steps = min(map(len, runs[id]))
            skipped, chances = (by_layer(runs[id], key, steps) for key in ("skipped", "asked"))
            label = f"layers skipped in {stage} by {shown.names[id]}"
            drawn.append(heat(skipped, chances, steps, label))
            table = pd.DataFrame(skipped).rename_axis("layer").rename_axis("bin", axis=1)
            table = table.stack().rename("skipped").reset_index()
            tables.append(table.assign(stage=stage, asked=chances.ravel()))
        if drawn:
            words = f"{shown.names[id]}. The stronger the colour, the more of the runs "
            words += f"skipped ({len(runs[id])}); lines: the chance that the formula asks for."
            return Section("layers", title, words, drawn, pd.concat(tables), "fig_layers")
    return Section("layers", title, "No history of a training that skips layers is there.")


# ---- of the template ----------------------------------------------------------------------------


def _template() -> Template:
    loader = PackageLoader(__name__, "")
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **blocks)
    environment.filters |= {"data_uri": _data_uri, "overlay": overlay}
    return environment.get_template("page.html.jinja")


def _data_uri(table: pd.DataFrame) -> str:
    """A table as the address of a CSV file that lies in the page."""
    text = table.to_csv(index=False, float_format="%.6g")
    return "data:text/csv;base64," + base64.b64encode(text.encode()).decode()


def overlay(owners: Sequence[int], grid: Sequence[int]) -> dict[str, str]:
    """Paths over a picture of one unit a patch: `dropped` patches, and the `edges` of the areas of
    the outputs that are left."""
    areas = np.pad(np.reshape(owners, grid), 1, constant_values=-1)
    inner = areas[1:-1, 1:-1]
    dropped = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(inner < 0))
    edges = "".join(f"M{x} {y}h1" for y, x in np.argwhere(np.diff(areas[:, 1:-1], axis=0)))
    edges += "".join(f"M{x} {y}v1" for y, x in np.argwhere(np.diff(areas[1:-1], axis=1)))
    return {"dropped": dropped, "edges": edges}
