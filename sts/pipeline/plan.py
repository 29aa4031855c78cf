"""What a scale and the table of ablations come to: runs, who trains and who shares, tables, figures
and jobs.

The Snakefile, the estimate, what jobs ask a cluster for and the line of progress all ask this plan.
Standard library and the configuration alone, so that the workflow can ask in any environment.
"""

import ast
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from sts.pipeline.config import (
    BACKBONE,
    CODE,
    SHIPPED,
    SMOLLM2,
    Ablation,
    Config,
    ConfigError,
    StageConfig,
    check_inputs,
    config_hash,
    load_ablations,
    load_scale,
    resolve,
)
from sts.pipeline.files import read_json

MAIN = "main"  # the table that the bare command makes, and whose runs figures show
FIGURES = CODE / "pipeline" / "report" / "figures"
TIME_TOLERANCE = 0.05  # of a ratio of times; what two timings of one machine differ by
INPUTS = ("runs", "eval", "bench", "tokens")  # what a figure may read


RULES = {  # with rules of their own
    "data": "only the prepared data",
    "bench": f"only the training times of table_{MAIN}",
    "expected": "published scores beside those obtained (scale paper)",
    "page": f"the page of results, index.html, with table_{MAIN} and what it needs",
    "search": "what the studies of workflow/config/search.yaml found",
    "backbones": "the toy backbones trained anew; no run needs it",
}


class Target(NamedTuple):
    """What a call can name."""

    description: str
    files: tuple[str, ...]
    """Empty: a rule of the workflow says them."""


class Training(NamedTuple):
    """One stage of one run."""

    ablation: str
    seed: int
    stage: str


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is to be done with a scale.

    Args:
        configs: Resolved configuration of each ablation, by its id; the first is the baseline.
        ablations: The entries of the table of ablations, by id.
        refused: Ablations that don't go with the scale, with the reason; `configs` lacks them.
    """

    configs: Mapping[str, Config]
    ablations: Mapping[str, Ablation]
    refused: Mapping[str, ConfigError] = field(default_factory=dict)

    # ---- which there are ------------------------------------------------------------------------

    @cached_property
    def baseline(self) -> str:
        """Id of the first ablation, which overrides nothing."""
        return next(iter(self.configs))

    @cached_property
    def scale(self) -> Config:
        """The configuration of the baseline: the scale's own values."""
        return self.configs[self.baseline]

    @cached_property
    def tables(self) -> list[str]:
        """Names of the tables: the `groups` of the ablations, in the order of their first use."""
        ids = [*self.configs, *self.refused]
        return unique(name for id in ids for name in self.ablations[id].groups)

    def members(self, table: str) -> list[str]:
        """Ids of the ablations that a table shows."""
        return [id for id in self.configs if table in self.ablations[id].groups]

    def tables_with_baseline(self) -> list[str]:
        """The tables that compare with the scale's baseline; others have data or a model of their
        own, which may have to be fetched."""
        return [table for table in self.tables if self.baseline in self.members(table)]

    @cached_property
    def _spoilt_tables(self) -> dict[str, ConfigError]:
        """The tables that would show a refused ablation, and why it was refused."""
        pairs = [(name, id) for id in self.refused for name in self.ablations[id].groups]
        return {name: self.refused[id] for name, id in pairs}

    def why_not(self, table: str) -> ConfigError | None:
        """Why this scale can't make a table, if it can't: an ablation was refused, or has no steps,
        or a toy checkpoint would stand beside a pretrained model, whose recipe and benchmarks are
        nothing for toys."""
        if table in self._spoilt_tables:
            return self._spoilt_tables[table]
        for entry in map(self.ablations.__getitem__, self.members(table)):
            if entry.share_of(self.scale.scale) is None:
                accepted = f"one more for scale {self.scale.scale}, without which it has no table "
                accepted += f"{table}: that with which it takes the time of {entry.time_of}, as "
                accepted += f"{self.timing(MAIN)} has it"
                key = f"{entry.id}.steps_share"
                return ConfigError(entry.file, key, entry.steps_share, accepted)
        toys = [id for id in self.members(table) if _is_toy(self.configs[id].model.checkpoint)]
        if not toys or all(map(_is_toy, self.scale.model.sources)):
            return None
        toy, *_ = toys
        key, value = f"{toy}.model.checkpoint", self.configs[toy].model.checkpoint
        scale = self.scale.scale
        accepted = (
            f"in scale {scale} a checkpoint of its size, without which it has no table {table}"
        )
        return ConfigError(self.ablations[toy].file, key, value, accepted)

    def unlike_timing(self) -> list[str]:
        """What of `steps_share` is not what the scale's timings have measured, if there are any."""
        texts = []
        for id, entry in self.ablations.items():
            share = entry.share_of(self.scale.scale)
            for file in map(Path, map(self.timing, unique([MAIN, *entry.groups]))):
                variants = read_json(file).get("variants", {}) if file.exists() else {}
                times = {name: variant["time_s"] for name, variant in variants.items()}
                if share and not entry.overrides and self.baseline in times:
                    times.setdefault(id, share * times[self.baseline])
                if share is None or not {id, entry.time_of} <= times.keys():
                    continue
                fair = share * times[entry.time_of] / times[id]
                if abs(share - fair) > TIME_TOLERANCE:
                    texts.append(
                        f"{entry.file}: {id}.steps_share: {share:g}, but by {file} it takes "
                        f"{fair:.3f} to have the time of {entry.time_of}: set that"
                    )
                break
        return texts

    def stages(self, table: str) -> list[StageConfig]:
        """The stages of all members of a table."""
        return [block for id in self.members(table) for block in self.configs[id].stages.values()]

    def compared_with(self, table: str) -> list[str]:
        """For each member of a table the ablation that it is compared with: the one that its entry
        names, itself if an entry names it, else the first of the table."""
        ids = self.members(table)
        named = {self.ablations[id].relative_to for id in ids}
        return [self.ablations[id].relative_to or (id if id in named else ids[0]) for id in ids]

    def of_equal_time(self, table: str) -> list[tuple[str, str]]:
        """The members of a table that take the time of another that is not the first, as pairs
        (other, member): what the control of the same time is there for."""
        others = self.members(table)[1:]
        pairs = ((self.ablations[id].time_of, id) for id in others)
        return [(other, id) for other, id in pairs if other in others]

    # ---- who trains, who shares -----------------------------------------------------------------

    @cached_property
    def _model_keys(self) -> dict[str, str]:
        return {id: config_hash(config.model) for id, config in self.configs.items()}

    def model_of(self, ablation: str) -> str:
        """The first ablation that starts from the same model: one manifest serves them all."""
        keys = self._model_keys
        return next(id for id in self.configs if keys[id] == keys[ablation])

    @cached_property
    def _trainers(self) -> dict[tuple[str, str], str]:
        first: dict[str, str] = {}  # what weights depend on -> ablation
        trainers = {}
        for id, config in self.configs.items():
            past: list = [self._model_keys[id]]
            for stage, block in config.stages.items():
                past += [stage, block.identity()]
                trainers[id, stage] = first.setdefault(config_hash(past), id)
        return trainers

    def trainer(self, ablation: str, stage: str) -> str:
        """The first ablation that trains this stage, and all before it, in the same way and from
        the same model: one training serves them all."""
        return self._trainers[ablation, stage]

    def trains(self, ablation: str, stage: str) -> bool:
        """Whether an ablation trains a stage itself, and doesn't take another's weights."""
        return self.trainer(ablation, stage) == ablation

    def runs(self, ablations: Iterable[str]) -> list[tuple[str, int]]:
        """(ablation, seed) of all runs of these ablations."""
        return [(id, seed) for id in ablations for seed in self.configs[id].seeds]

    def stage_jobs(self, ablations: Iterable[str]) -> list[Training]:
        """Every stage that the runs of these ablations need, trained or shared; also those of the
        ablations that train for them."""
        waiting = [
            Training(id, seed, stage)
            for id, seed in self.runs(ablations)
            for stage in self.configs[id].stages
        ]
        jobs: dict[Training, None] = {}
        for job in waiting:  # which grows
            if job in jobs:
                continue
            jobs[job] = None
            before = self.configs[job.ablation].before(job.stage)
            if not self.trains(job.ablation, job.stage):
                waiting.append(job._replace(ablation=self.trainer(job.ablation, job.stage)))
            elif before != BACKBONE:
                waiting.append(job._replace(stage=before))
        return list(jobs)

    def trainings(self, ablations: Iterable[str]) -> list[Training]:
        """The stages that are trained so that these ablations have their runs."""
        return [job for job in self.stage_jobs(ablations) if self.trains(job.ablation, job.stage)]

    # ---- files ----------------------------------------------------------------------------------

    @cached_property
    def results(self) -> str:
        """Folder of the scale's results."""
        return f"results/{self.scale.scale}"

    def manifest(self, ablation: str, seed: int | str, stage: str) -> str:
        """The file that says what a stage trained; stage `eval`: how the run was measured."""
        return f"{self.results}/runs/{ablation}/seed{seed}/{stage}.json"

    def start_of(self, ablation: str, seed: int | str, stage: str) -> str:
        """What a stage starts from: the manifest of the one before, or of the model."""
        before = self.configs[ablation].before(stage)
        if before == BACKBONE:
            return self.backbone(ablation)
        return self.manifest(ablation, seed, before)

    def backbone(self, ablation: str) -> str:
        """The manifest of the model that a run starts from."""
        return f"{self.results}/backbone/{self.model_of(ablation)}.json"

    def timing(self, table: str) -> str:
        """The file with the times of a table's runs."""
        return f"{self.results}/bench/{table}.json"

    def run_files(self, table: str, stage: str | None = None) -> list[str]:
        """The manifests of a stage, or of all stages, of every run that a table shows."""
        return [
            self.manifest(id, seed, name)
            for id, seed in self.runs(self.members(table))
            for name in ([stage] if stage else self.configs[id].stages)
        ]

    def figure_files(self, figure: str) -> list[str]:
        """The result files that a figure shows."""
        files = {
            "runs": self.run_files(MAIN),
            "eval": self.run_files(MAIN, "eval"),
            "bench": [self.timing(MAIN)],
            "tokens": [f"{self.results}/tokens.json"],
        }
        return [file for name in figures()[figure] for file in files[name]]

    @cached_property
    def page(self) -> str:
        """The page of results."""
        return f"{self.results}/index.html"

    def example_runs(self) -> list[str]:
        """The evaluations whose answers the page shows: of the first seed of the baseline and of
        the last method of the main table."""
        ids = (self.baseline, [self.baseline, *self.members(MAIN)][-1])
        return [self.manifest(id, self.configs[id].seeds[0], "eval") for id in ids]

    # ---- what can be asked for ------------------------------------------------------------------

    def targets(self) -> dict[str, Target]:
        """What a call can name, `snakemake --cores all NAME`, but for files."""
        tables = {name: f"{self.results}/tables/{name}.md" for name in self.tables}
        drawn = {name: f"{self.results}/figures/{name}.svg" for name in figures()}
        comparable = self.tables_with_baseline()
        unfit = {name for name in self.tables if self.why_not(name)} - self._spoilt_tables.keys()
        makeable = [tables[name] for name in comparable if name not in unfit]
        named = {"all": Target(f"table_{MAIN}, all figures and the page (the default)", ())}
        for name, file in tables.items():
            text = f"table: {', '.join(self.members(name))}"
            text += "" if name in comparable else f" (also as {name})"
            text += " (not of this scale)" if name in unfit else ""
            text += " (one is refused)" if name in self._spoilt_tables else ""
            named[f"table_{name}"] = Target(text, (file,))
        for name, file in drawn.items():
            summary, *_ = (ast.get_docstring(_syntax(name)) or name).splitlines()
            named[f"fig_{name}"] = Target(f"figure: {summary}", (file,))
        text = f"all tables in which {self.baseline} stands and that the scale can make"
        named["ablations"] = Target(text, (*makeable,))
        files = (*makeable, *drawn.values(), self.page)
        named["evidence"] = Target("ablations, all figures and the page", files)
        return named | {name: Target(text, ()) for name, text in RULES.items()}

    # ---- how many jobs --------------------------------------------------------------------------

    def jobs(self, tables: Collection[str] = (MAIN,), drawn: bool = True) -> dict[str, int]:
        """Jobs of a call from an empty folder, by the name of their rule.

        Args:
            tables: The tables that are made.
            drawn: Whether all figures and the page are made, too; they show the runs of the main
                table, which is one of `tables` then.
        """
        timed = unique([*tables, *([MAIN] if drawn else [])])
        ids = unique(id for table in timed for id in self.members(table))
        stages, trainings = self.stage_jobs(ids), self.trainings(ids)
        data, models = self.data(ids), {self.model_of(id) for id in ids}
        reads_tokens = drawn and any("tokens" in inputs for inputs in figures().values())
        if reads_tokens:
            data += self.scale.training_data()[:1]
            models.add(self.baseline)
        counts = {
            "prepare": len({*data, *self.hub_benchmarks(ids)}),
            "smollm2": int(any(self.configs[id].model.language == SMOLLM2 for id in models)),
            "backbone": len(models),
            "train": len(trainings),
            "share": len(stages) - len(trainings),
            "evaluate": len(self.runs(ids)),
            "timing": len(timed),
            "table": len(unique(tables)),
            "tokens": int(reads_tokens),
            "figure": len(figures()) if drawn else 0,
            "examples": int(drawn),
            "page": int(drawn),
        }
        return {rule: count for rule, count in counts.items() if count}

    def data(self, ablations: Iterable[str]) -> list[str]:
        """Names of the data sets that these ablations are trained or evaluated on."""
        configs = [self.configs[id] for id in ablations]
        return unique(name for c in configs for name in c.training_data() + c.evaluation_data())

    def hub_benchmarks(self, ablations: Iterable[str]) -> list[str]:
        """Names of the benchmarks of the hub that these ablations are evaluated on."""
        return unique(name for id in ablations for name in self.configs[id].hub_benchmarks())


def _is_toy(checkpoint: str | None) -> bool:
    """Whether a checkpoint is one of the mini scale's."""
    return checkpoint is not None and Path(checkpoint).parent == SHIPPED.parent


def make_plan(
    scale: Config, ablations: Mapping[str, Ablation], file: str | Path, tolerant: bool = False
) -> Plan:
    """The plan of a scale that `file` says.

    Args:
        scale: Its configuration.
        ablations: The table of ablations.
        file: Named in an error.
        tolerant: An ablation of other tables than the main one that doesn't go with the scale stops
            only those who ask for its tables.

    Raises:
        ConfigError: Something is not on this machine, or an ablation doesn't go with the scale.
    """
    check_inputs(scale, file)
    configs, refused = {}, {}
    for id, entry in ablations.items():
        try:
            config = resolve(scale, entry)
            check_inputs(config, entry.file, id)
            configs[id] = config
        except ConfigError as error:
            if not tolerant or not configs or MAIN in entry.groups:
                raise
            refused[id] = error
    return Plan(configs, ablations, refused)


def load_plan(configfile: str | Path | Sequence[Path], ablations: str | Path) -> Plan:
    """The plan of a scale, in one file or several, and a table of ablations; it is tolerant. Raises
    ConfigError."""
    files = [configfile] if isinstance(configfile, str | Path) else configfile
    return make_plan(load_scale(*files), load_ablations(ablations), files[-1], tolerant=True)


@cache
def figures() -> dict[str, tuple[str, ...]]:
    """Name -> what it reads (of `INPUTS`) of every figure: the files of `FIGURES` that don't begin
    with _, each with its own `INPUTS`. They are read, not imported: they need matplotlib."""
    return {file.stem: _inputs(file.stem) for file in sorted(FIGURES.glob("[!_]*.py"))}


def _syntax(figure: str) -> ast.Module:
    file = FIGURES / f"{figure}.py"
    return ast.parse(file.read_bytes(), filename=str(file))


def _inputs(figure: str) -> tuple[str, ...]:
    """The value of INPUTS in a figure's file."""
    inputs, file = None, FIGURES / f"{figure}.py"
    for statement in _syntax(figure).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "INPUTS":
            inputs = ast.literal_eval(statement.value)
    if not (isinstance(inputs, tuple) and set(inputs) <= set(INPUTS)):
        accepted = f"a tuple of names among {', '.join(INPUTS)}"
        raise ValueError(f"{file}: INPUTS: {inputs!r} is not accepted. Accepted: {accepted}")
    return inputs


def unique(items: Iterable) -> list:
    """Each item once, in the order in which they come first."""
    return list(dict.fromkeys(items))
