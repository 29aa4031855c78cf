"""A search of knobs by the held-out loss: trials of one cost, one after the other.

    python -m sts search --config results/mini/configs/dense.yaml --study sts \
        --data data/mini/scenes/manifest.json --init results/mini/backbone/sts.json \
        --out results/mini/search/sts.json

A trial is a run like any other, `runs/search_<study>_<number>`, whose stages are trained by the
verb `train`: it is tracked, goes on from its checkpoints, and its weights serve whoever trains the
same. No question of a benchmark is asked. What was tried lies in an sqlite file beside `out`: after
a kill the same trials follow, as what a trial draws depends on its number and those before alone.
"""

import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import yaml
from optuna.trial import Trial, TrialState

from sts.pipeline.config import (
    VALIDATION,
    Ablation,
    Config,
    ConfigError,
    Range,
    SearchConfig,
    check_study,
    config_hash,
    deep_merge,
    dump,
    load_search,
    nested,
    resolve,
    value_at,
)
from sts.pipeline.files import read_json, sha256_json, write_json_atomic, write_text_atomic
from sts.pipeline.measure.bench import of_stage
from sts.pipeline.measure.stage_cost import stage_costs
from sts.pipeline.run import cluster, follows
from sts.pipeline.run.weights import read_held_out
from sts.pipeline.train.held_out import held_out_steps
from sts.pipeline.train.job import Job, derived_seed

WAIT = 0.5  # seconds between two looks at a training
# A trial is ended early if its loss is above the median of those before at the same point; not in
# its first half, as what is skipped there is meant to be made up for, and not one of the first
PRUNER = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=3)

log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The loss of a trial was not finite."""


@dataclass(frozen=True)
class Search:
    """One study of a search on one scale.

    Attributes:
        scale: The scale's own configuration, which is the baseline's.
        ablation: What a trial is apart from its knobs.
        data: Manifests of prepared data sets.
        init: The backbone manifest.
        out: The result, <results>/search/<study>.json.
    """

    scale: Config
    ablation: Ablation
    settings: SearchConfig
    name: str
    data: Sequence[Path]
    init: Path
    out: Path

    @property
    def space(self) -> Mapping[str, Range | list]:
        return self.settings.studies[self.name].space

    def run(self) -> dict[str, Any]:
        """Make the trials that are missing; write and return the result.

        Raises:
            ConfigError: The last stage has no held-out loss.
            RuntimeError: A training failed; the next call goes on with this trial.
        """
        self._check()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file = self.out.with_name(f"{self.name}_{self._key()}.db")
        study = optuna.create_study(
            storage=f"sqlite:///{file}", study_name=self.name, load_if_exists=True, pruner=PRUNER
        )
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(self._values_of_ablation())
        while trial := self._next(study):
            self._try(study, trial)
        result = self._result(study)
        write_json_atomic(self.out, result)
        write_text_atomic(self.out.with_suffix(".md"), page(result))
        return result

    def _check(self) -> None:
        stage = self._base.last
        files = of_stage(self.data, self._base.stage(stage))
        has_loss = any(VALIDATION in read_json(file)["splits"] for file in files)
        if not (has_loss and held_out_steps(self._base.stage(stage))):
            accepted = "conversations of a data set with a validation split, and validations"
            raise ConfigError(self.ablation.file, f"{self.ablation.id}.{stage}", stage, accepted)

    @cached_property
    def _base(self) -> Config:
        return resolve(self.scale, self.ablation)

    @cached_property
    def _flops_of_scale(self) -> float:
        return _flops(self.scale)

    def _key(self) -> str:
        """8 hex digits of all that a trial's loss depends on, but for its knobs."""
        base = self._base
        code = [follows.of_training(base, stage)[1] for stage in base.stages]
        data = [read_json(file)["sha256"] for file in self.data]
        about = self.settings.model_dump(exclude={"trials", "studies"})
        space = self.settings.studies[self.name].model_dump()
        start = read_json(self.init)["sha256"]
        return sha256_json([about, space, config_hash(base.stages), code, data, start])[:8]

    def _values_of_ablation(self) -> dict[str, Any]:
        """The first trial: the ablation's own values, where the space has them."""
        stages, values = self._base.model_dump()["stages"], {}
        for key, knob in self.space.items():
            own = value_at(stages, key)
            if not isinstance(knob, Range):
                alike = [json.dumps(choice) for choice in knob if _is_part(choice, own)]
                values.update((key, choice) for choice in alike[:1])
            elif knob.low <= own <= knob.high:
                values[key] = own
        return values

    def _next(self, study: optuna.Study) -> Trial | None:
        """The trial that a killed call has left, else a new one; None: there were enough."""
        trials = study.get_trials(deepcopy=False)
        left = [trial for trial in trials if trial.state == TrialState.RUNNING]
        if left:
            return Trial(study, left[0]._trial_id)
        done = sum(trial.state.is_finished() for trial in trials)
        return study.ask() if done < self.settings.trials[self.scale.scale] else None

    def _draw(self, study: optuna.Study, trial: Trial) -> dict[str, Any]:
        """The values of a trial's knobs. Each has a sampler of its own, so that one that a killed
        call has drawn already moves no other."""
        values = {}
        for key, knob in self.space.items():
            seed = derived_seed(self.settings.draws, f"{trial.number}/{key}")
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            if isinstance(knob, Range):
                values[key] = trial.suggest_float(key, knob.low, knob.high, log=knob.log)
            else:
                choice = trial.suggest_categorical(key, [json.dumps(value) for value in knob])
                values[key] = json.loads(choice)
        return values

    def config_of(self, values: Mapping[str, Any]) -> Config:
        """The configuration of a trial, whose steps are as many as its cost allows. Raises
        ConfigError for values that don't go together."""
        overrides = deep_merge(self.ablation.overrides, nested(values))
        entry = self.ablation.model_copy(update={"overrides": overrides})
        config = resolve(self.scale, entry)
        if self.settings.flops is None:
            return config
        own = entry.share_of(self.scale.scale) or 1.0
        share = own * self.settings.flops * self._flops_of_scale / _flops(config)
        return resolve(self.scale, entry.model_copy(update={"steps_share": share}))

    def _try(self, study: optuna.Study, trial: Trial) -> None:
        """Make one trial, and tell how it ended."""
        try:
            config = self.config_of(self._draw(study, trial))
            losses = [
                self._loss(trial, config, seed, is_first=not number)
                for number, seed in enumerate(self.settings.seeds)
            ]
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
        except (ConfigError, Diverged) as error:
            log.warning("trial %d: %s", trial.number, error)
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, fmean(losses))
        log.info("trial %d: %s", trial.number, study.trials[trial.number].state.name)

    def _loss(self, trial: Trial, config: Config, seed: int, is_first: bool) -> float:
        """The held-out loss at the end of a run. Raises TrialPruned where the first is no good."""
        results, id = self.out.parents[1], f"search_{self.name}_{trial.number:03d}"
        write_text_atomic(results / f"configs/{id}.yaml", dump(config))
        before, loss = self.init, float("nan")
        for stage, block in config.stages.items():
            data, out = of_stage(self.data, block), results / f"runs/{id}/seed{seed}/{stage}.json"
            job = Job(config, id, seed, stage, data, before, out)
            with closing(losses_of(job)) as points:
                for point, loss in enumerate(points):
                    if is_first and stage == config.last:
                        trial.report(loss, point)
                        if trial.should_prune():
                            raise optuna.TrialPruned
            before = out
        return loss

    def _result(self, study: optuna.Study) -> dict[str, Any]:
        trials = [
            {"number": trial.number, "state": trial.state.name.lower(), "loss": trial.value}
            | {"values": {key: _decoded(value) for key, value in trial.params.items()}}
            for trial in study.get_trials(deepcopy=False)
            if trial.state.is_finished()
        ]
        complete = [trial for trial in trials if trial["loss"] is not None]
        best = min(complete, key=lambda trial: trial["loss"], default=None)
        about = {"study": self.name, "ablation": self.ablation.id, "flops": self.settings.flops}
        about |= {"seeds": self.settings.seeds, "best": best and best["number"]}
        return about | {"trials": trials}


def search(
    scale: Config,
    ablations: Mapping[str, Ablation],
    file: Path,
    study: str,
    data: Sequence[Path],
    init: Path,
    out: Path,
) -> dict[str, Any]:
    """Make one study of a search that `file` says, and check it before: see Search."""
    settings = load_search(file)
    check_study(settings, study, str(file), ablations, scale)
    entry = ablations[settings.studies[study].ablation]
    return Search(scale, entry, settings, study, data, init, out).run()


def losses_of(job: Job) -> Generator[float, None, None]:
    """Train a stage, or take what it is; its held-out losses in their order, as soon as each is
    measured. To close it ends the training.

    Raises:
        Diverged: The loss was not finite.
        RuntimeError: The training failed otherwise.
    """
    is_made = job.out.exists() and read_json(job.out)["key"] == job.key
    if is_made:
        yield from (row["loss"] for row in read_json(job.out).get("held_out", []))
        return
    told, file = 0, job.out.with_suffix(".log")
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        file.open("w") as output,
        subprocess.Popen(_command(job), stdout=output, stderr=output) as process,
    ):
        try:
            while True:
                has_ended = process.poll() is not None
                rows = read_held_out(job.folder)
                for row in rows[told:]:
                    yield row["loss"]
                told = len(rows)
                if has_ended:
                    break
                time.sleep(WAIT)
        finally:
            process.terminate()  # nothing where it has ended
    if process.returncode:
        text = file.read_text(encoding="utf-8", errors="replace")
        if "FloatingPointError" in text:
            raise Diverged(f"{job.name}: the loss was not finite")
        raise RuntimeError(f"{job.name} failed: {file}. The next call goes on with this trial")


def _command(job: Job) -> list[str]:
    """The call that trains a stage, as the workflow makes it."""
    program, *words = shlex.split(cluster.launch(job.block))
    config = job.out.parents[3] / f"configs/{job.ablation}.yaml"
    options = {"config": config, "ablation": job.ablation, "seed": job.seed, "stage": job.stage}
    options |= {"init": job.init, "out": job.out}
    pairs = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    program = sys.executable if program == "python" else program
    return [program, *words, "train", *pairs, "--data", *map(str, job.data)]


def _flops(config: Config) -> float:
    return sum(cost.flops for cost in stage_costs(config, on_gpu=False).values())


def _is_part(choice: Any, own: Any) -> bool:
    """Whether a choice says what is so: a mapping may leave out keys."""
    both = isinstance(choice, Mapping) and isinstance(own, Mapping)
    return choice.items() <= own.items() if both else choice == own


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def page(result: Mapping[str, Any]) -> str:
    """A study in Markdown: its trials, best first, and the best as overrides of an ablation."""
    finite = sorted(result["trials"], key=lambda t: (t["loss"] is None, t["loss"] or 0))
    lines = [f"# Search `{result['study']}`, from row `{result['ablation']}`", ""]
    lines += ["| trial | held-out loss | values |", "|--:|--:|---|"]
    for trial in finite:
        loss = trial["state"] if trial["loss"] is None else f"{trial['loss']:.4f}"
        lines.append(f"| {trial['number']} | {loss} | `{json.dumps(trial['values'])}` |")
    lines += [
        "",
        "Trial 0 has the row's own values. A loss is the mean over the seeds "
        f"{', '.join(map(str, result['seeds']))}.",
        "",
    ]
    if result["best"] is not None:
        best = result["trials"][result["best"]]
        overrides = yaml.safe_dump(nested(best["values"]), sort_keys=False)
        lines += ["The best:", "", "```yaml", overrides.rstrip(), "```", ""]
    return "\n".join(lines)
