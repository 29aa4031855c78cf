"""What runs again after an edit: the table of docs/workflow.md, made by real dry runs.

Each kind of edit is done to a copy of the project in which everything is finished; Snakemake says
what it would do. `PYTHONPATH=tests python tests/pipeline/test_reruns.py` prints the table.
"""

import ast
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from project import ABLATIONS, BOTH, ROOT, SMOKE, edit, make_project, run

PAGE = ROOT / "docs/workflow.md"
HEAD = "| edit | runs again |\n|---|---|\n"
NOTHING = "nothing"


def formula(*names: str) -> Callable[[Path], None]:
    """An edit of what these files compute."""

    def do(project: Path) -> None:
        for name in names:
            with (project / "sts" / name).open("a") as file:
                file.write("\nFACTOR = 2\n")

    return do


def remarks(project: Path) -> None:
    for name in ("pipeline/train/train.py", "pipeline/train/step.py", "vtc/sampling.py"):
        with (project / "sts" / name).open("a") as file:
            file.write("\n# a remark\n")
    edit(
        project / "sts/pipeline/train/step.py", "def lr_factor(", "# a remark\n\n\ndef  lr_factor("
    )
    edit(project / "workflow/rules/train.smk", "rule train:", "# a remark\n\n\nrule train:")
    edit(project / SMOKE, "scale: smoke", "scale: smoke  # small")
    for file in (*project.rglob("*.py"), *project.rglob("results/**/*.json")):
        os.utime(file)


def moved(project: Path) -> None:
    """The first function of step.py goes to a file of its own."""
    step, new = (project / "sts/pipeline/train" / name for name in ("step.py", "new.py"))
    text = step.read_text()
    imports = [n for n in ast.parse(text).body if isinstance(n, ast.Import | ast.ImportFrom)]
    function = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef))
    formula = ast.get_source_segment(text, function)
    assert formula and not function.decorator_list
    head = "\n".join(map(ast.unparse, imports))
    new.write_text(f"{head}\n\n\n{formula}\n")
    step.write_text(text.replace(formula, f"from sts.pipeline.train.new import {function.name}"))


def new_knobs(project: Path) -> None:
    """Each at its neutral value: of a stage, of VTC, of an evaluation."""
    config, library = project / "sts/pipeline/config", project / "sts/settings.py"
    knob = 'Annotated[{}, Neutral(0.0)] = 0.0\n    """A new knob."""\n{}'
    steps, blind = "    steps: Count\n", "    blind: Share = 0.25\n"
    edit(config / "stages.py", steps, "    ema: " + knob.format("float", steps))
    edit(config / "blocks.py", blind, "    noise: " + knob.format("Share", blind))
    heat = '    heat: float = setting(1.0, interval(0, 2), "Heat", neutral=True)\n'
    edit(library, "    keep: float = ", f"{heat}    keep: float = ")


def new_kind(project: Path) -> None:
    text = "def mine(tokens, keep): ...\n"
    (project / "sts/vtc/mine.py").write_text(text)
    (project / "sts/lds/my_policy.py").write_text(
        "from sts.lds import Policy\n\nPOLICY = Policy(depth='linear')\n"
    )


def one_stage_more(project: Path) -> None:
    stage = "  late: {like: instruct, trains: [language_model], lr: 1e-3, steps: 2}\n"
    edit(project / SMOKE, "evaluate:", f"{stage}evaluate:")


EDITS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "comment": ("a comment, a docstring, formatting, dates of files", remarks),
    "moved": ("a formula that moves to another file, as it is", moved),
    "progress": (
        "a progress bar, tracking, what the history notes",
        formula("pipeline/run/progress.py", "pipeline/run/tracking.py"),
    ),
    "flops": ("a formula that counts FLOPs", formula("pipeline/cost/flops.py")),
    "knob": ("a new knob of a stage, of VTC or of evaluation, at its neutral value", new_knobs),
    "kind": ("a new VTC kind and a new LDS policy, one file each", new_kind),
    "other formula": (
        "a formula of a kind, an architecture or a data set that no run uses",
        formula("vtc/merging.py", "architectures/tiles.py", "pipeline/data/sets/nlvr.py"),
    ),
    "used formula": ("the formula of a VTC kind that some runs use", formula("vtc/sampling.py")),
    "lds": ("a formula of LDS", formula("lds/units.py")),
    "step": ("a formula that every training uses", formula("pipeline/train/step.py")),
    "mini": ("the recipe of the toy backbones", formula("../recipes/mini/vision.py")),
    "table": ("a formula of the tables", formula("pipeline/report/tables.py")),
    "benchmark": (
        "a benchmark's file",
        lambda p: edit(p / "sts/pipeline/tasks/counting.yaml", "version: 1", "version: 2"),
    ),
    "seed": ("one more seed", lambda p: edit(p / SMOKE, "seeds: [0]", "seeds: [0, 1]")),
    "data": ("the size of the data", lambda p: edit(p / SMOKE, "align: 96", "align: 104")),
    "stage": (
        "a value of one stage",
        lambda p: edit(p / SMOKE, "instruct: {steps: 6", "instruct: {steps: 7"),
    ),
    "new stage": ("one more stage at the end", one_stage_more),
    "saved": (
        "how often a training is saved",
        lambda p: edit(p / SMOKE, "checkpoint_every: 2", "checkpoint_every: 3"),
    ),
    "processes": (
        "how many processes share the questions of an evaluation",
        lambda p: edit(p / SMOKE, "batch_tokens: 2048", "batch_tokens: 2048, processes: 2"),
    ),
}  # fmt: skip


def again(project: Path) -> str:
    """What would run, in words: of the trainings which, of other jobs how many of how many."""
    output = run(project, SMOKE, "-n", *BOTH)
    if "Nothing to be done" in output:
        return NOTHING
    rows = re.findall(r"^(\w+) +(\d+)$", output.partition("Job stats:")[2], re.MULTILINE)
    jobs = {rule: int(count) for rule, count in rows}
    order = list(yaml.safe_load((project / "workflow/ablations.yaml").read_text()))
    trained = re.findall(r"runs/(\w+)/seed0/(\w+)\.json$", (project / "done.txt").read_text(), re.M)
    words = []
    trainings = set(re.findall(r"^Job \d+: (?!evaluate)(\w+) \w+, seed (\d)$", output, re.M))
    for stage, seed in sorted(trainings):
        ids = set(re.findall(rf"^Job \d+: {stage} (\w+), seed {seed}$", output, re.M))
        every = {id for id, name in trained if name == stage} or set(order)
        whose = "all" if ids == every else ", ".join(id for id in order if id in ids)
        words.append(f"{stage} of {whose}" + f" (seed {seed})" * (seed != "0"))
    others = (
        "prepare",
        "backbone",
        "evaluate",
        "timing",
        "tokens",
        "table",
        "figure",
        "examples",
        "page",
    )
    words += [f"{jobs[rule]} {rule}" for rule in others if rule in jobs]
    return "; ".join(words)


def row(name: str, project: Path) -> str:
    """The line of the page's table for an edit, done to this copy of the project."""
    text, do = EDITS[name]
    do(project)
    return f"| {text} | {again(project)} |\n"


DAILY = ("comment", "moved", "knob", "used formula", "stage")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in DAILY else pytest.mark.slow) for n in EDITS],
)
def test_what_runs_again_is_what_the_page_says(finished, name):
    assert row(name, finished) in PAGE.read_text().partition(HEAD)[2]


def test_the_page_has_no_other_edits():
    table = PAGE.read_text().partition(HEAD)[2].partition("\n\n")[0]
    assert table.count("\n") + 1 == len(EDITS)


def test_the_second_time_there_is_nothing_to_be_done_in_under_ten_seconds(finished):
    before = os.times()
    assert "Nothing to be done" in run(finished, SMOKE, *BOTH)
    after = os.times()  # processor time of the child: other work on the machine doesn't count
    spent = after.children_user + after.children_system
    assert spent - before.children_user - before.children_system < 10


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trained = make_project(Path(folder, "finished"), ABLATIONS)
        run(trained, SMOKE, *BOTH)
        copies = {name: Path(folder, name.replace(" ", "_")) for name in EDITS}
        print(HEAD, end="")
        for name, copy in copies.items():
            print(row(name, Path(shutil.copytree(trained, copy, symlinks=True))), end="")
