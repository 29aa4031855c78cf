"""What the documentation tells a newcomer to do, done to the letter on a copy of the project."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml
from project import ROOT, SMOKE, edit, planned, run

from sts.pipeline.config import deep_merge


def one_file_examples() -> dict[str, str]:
    """File -> text of each example in docs/library.md that says "One file, `NAME`"."""
    page = (ROOT / "docs/library.md").read_text()
    examples = re.findall(r"One file, `(sts/[\w/]+\.py)`.*?```python\n(.*?)```", page, re.DOTALL)
    assert [file for file, _ in examples] == ["sts/vtc/loudest.py", "sts/lds/by_gradient.py"]
    return dict(examples)


ENTRIES = """
mine_vtc:
  groups: [components]
  label: A kind of my own
  overrides:
    align: {vtc: {kind: loudest, keep: 0.25}}

mine_lds:
  groups: [components]
  label: A policy of my own
  overrides:
    instruct: {lds: {policy: by_gradient, rate: 0.4}}
"""


@pytest.mark.slow
def test_a_kind_and_a_policy_of_ones_own_are_a_file_each_and_retrain_nothing_else(finished):
    project = finished
    for file, text in one_file_examples().items():
        (project / file).write_text(text)
    expected = dict.fromkeys(("tokens", "figure", "examples", "page", "all"), 1)
    assert planned(project) == expected, "only the pictures of all kinds"
    with (project / "workflow/ablations.yaml").open("a") as table:
        table.write(ENTRIES)
    output = run(project, SMOKE, "-n", "table_components")
    jobs = set(re.findall(r"(align|instruct|evaluate) (\w+), seed 0$", output, re.MULTILINE))
    mine = {("align", "mine_vtc"), ("instruct", "mine_vtc"), ("instruct", "mine_lds")}
    assert jobs == mine | {("evaluate", "mine_vtc"), ("evaluate", "mine_lds")}
    # a change in one's own file runs again what uses it, and nothing else
    run(project, SMOKE, "table_components")
    assert planned(project, "table_components") == {}
    with (project / "sts/lds/by_gradient.py").open("a") as file:
        file.write("\nFACTOR = 2\n")
    output = run(project, SMOKE, "-n", "table_components")
    again = set(re.findall(r"(align|instruct) (\w+), seed 0$", output, re.MULTILINE))
    assert again == {("instruct", "mine_lds")}


TRAINING = """
import torch
from tiny import CASES
from sts import LDS, VTC, sparsify

model, batch = CASES["llava"].build(), CASES["llava"].batch([["big", 5, 6, 7], ["big", 8, 9, 10]])
scheme = sparsify(model, VTC("loudest", 0.25), LDS("by_gradient", 0.5), total_steps=8)
asked = []
for step in range(8):
    scheme.begin_step(step)
    model.zero_grad()
    model(**batch).loss.backward()
    scheme.after_backward()
    found = scheme.metrics()
    assert found["keep_ratio"] == 0.25 and found["asked"][0] == 0
    asked.append(found["asked"])
assert len(set(asked[1])) > 2, "layers of small gradients are asked for more often"
assert sum(asked[-1]) < sum(asked[1])
"""


@pytest.mark.slow
def test_the_examples_train_a_real_model(tmp_path):
    shutil.copytree(ROOT / "sts", tmp_path / "sts")
    shutil.copy(ROOT / "tests/tiny.py", tmp_path)
    for file, text in one_file_examples().items():
        (tmp_path / file).write_text(text)
    subprocess.run([sys.executable, "-c", TRAINING], cwd=tmp_path, check=True)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def trained(output: str) -> set[tuple[str, str]]:
    """(stage, ablation) of the trainings that a dry run announces."""
    return set(re.findall(r"^Job \d+: (?!evaluate)(\w+) (\w+), seed 0$", output, re.MULTILINE))


@pytest.mark.slow
def test_a_stage_more_at_the_end_between_or_fewer_is_one_entry(finished):
    scale, table = finished / SMOKE, finished / "workflow/ablations.yaml"
    plain, ids = yaml.safe_load(scale.read_text()), set(yaml.safe_load(table.read_text()))
    end, between, fewer = blocks("stages.md", "yaml")

    scale.write_text(yaml.safe_dump(deep_merge(plain, yaml.safe_load(end))))
    assert trained(run(finished, SMOKE, "-n", "table_components")) == {
        ("unfrozen", id) for id in ids
    }
    scale.write_text(yaml.safe_dump(deep_merge(plain, yaml.safe_load(between))))
    output = trained(run(finished, SMOKE, "-n", "table_components"))
    assert {stage for stage, _ in output} == {"warm", "instruct"}
    scale.write_text(yaml.safe_dump(plain))
    table.write_text(table.read_text() + fewer)
    output = run(finished, SMOKE, "-n", "-p", "table_components")
    assert trained(output) == {("instruct", "no_align")}
    assert (
        "--stage instruct --data data/smoke/scenes/manifest.json --init results/smoke/backbone"
        in output
    )


def test_a_knob_is_one_field(finished):
    stages = finished / "sts/pipeline/config/stages.py"
    (knob,) = blocks("stages.md", "python")
    edit(stages, "    steps: Count\n", f"{knob}    steps: Count\n")
    edit(finished / SMOKE, "instruct: {steps: 6", "instruct: {ema: 0.9, steps: 6")
    shown = subprocess.run(
        [sys.executable, "-m", "sts", "config", "--configfile", SMOKE],
        cwd=finished, capture_output=True, text=True, check=True,
    )  # fmt: skip
    stages = yaml.safe_load(shown.stdout)["stages"]
    assert (stages["align"]["ema"], stages["instruct"]["ema"]) == (0.0, 0.9)
    output = trained(run(finished, SMOKE, "-n", "table_components"))
    assert {stage for stage, _ in output} == {"instruct"}


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")]), ids=lambda p: p.name
)
def test_every_file_that_a_page_names_is_there(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`(sts/[\w/]+\.py|workflow/[\w/]+\.(?:yaml|smk))`", page.read_text()):
        own = f"One file, `{name}`" in page.read_text()  # which the page says to write
        assert own or (ROOT / name).exists() or name in one_file_examples(), name
