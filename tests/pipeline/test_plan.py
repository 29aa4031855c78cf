"""The plan: which runs, trainings, tables, figures and jobs there are."""

import re
import shutil
from pathlib import Path

import pytest
from project import ROOT, SMOKE, planned, real_project, run

from sts.pipeline import plan as plans
from sts.pipeline.config import ConfigError, load_ablations
from sts.pipeline.files import write_json_atomic
from sts.pipeline.plan import Training, load_plan

SCALES = sorted(
    {*(ROOT / "workflow/config").glob("*.yaml")} - {ROOT / "workflow/config/search.yaml"}
)
TABLE = """
dense: {groups: [main], label: Dense}
vtc:
  groups: [main]
  label: VTC
  overrides: {align: {vtc: {kind: uniform, keep: 0.5}}}
other:
  groups: [main, families]
  label: Another model
  overrides: {model: {family: whole, checkpoint: somewhere}}
wide:
  groups: [families]
  label: The same model and stages, one seed more
  relative_to: other
  seeds: [0, 1]
  overrides: {model: {family: whole, checkpoint: somewhere}}
late:
  groups: [families]
  label: As dense, then one stage more
  overrides: {late: {like: instruct, trains: [language_model], lr: 1e-3}}
"""


@pytest.fixture
def small(tmp_path):
    """The plan of `TABLE` at the smoke scale, whose one seed is 0."""
    (tmp_path / "ablations.yaml").write_text(TABLE)
    return load_plan(ROOT / SMOKE, tmp_path / "ablations.yaml")


def test_equal_stages_of_different_models_are_trainings_of_their_own(small):
    assert small.trainings(["dense", "other"]) == [
        Training(id, 0, stage) for id in ("dense", "other") for stage in ("align", "instruct")
    ]
    assert small.model_of("wide") == "other" and small.model_of("vtc") == "dense"


def test_a_stage_is_shared_where_all_before_it_is_equal(small):
    assert not small.trains("late", "instruct") and small.trains("late", "late")
    assert small.trains("vtc", "align") and small.trains("vtc", "instruct"), "another start"
    assert small.trainings(["late"]) == [
        Training("late", 0, "late"), Training("dense", 0, "align"), Training("dense", 0, "instruct")
    ]  # fmt: skip


def test_whoever_trains_for_others_trains_their_seeds(small):
    assert Training("other", 1, "instruct") in small.trainings(["wide"])
    assert Training("wide", 1, "instruct") in small.stage_jobs(["wide"])


def test_tables_are_the_groups_of_the_entries(small):
    assert small.tables == ["main", "families"]
    assert small.members("families") == ["other", "wide", "late"]
    assert small.compared_with("families") == ["other", "other", "other"]
    assert small.tables_with_baseline() == ["main"]


@pytest.mark.parametrize("scale", SCALES, ids=lambda file: file.stem)
def test_a_scale_of_pretrained_models_has_no_table_of_toy_checkpoints(scale):
    plan = load_plan(scale, ROOT / "workflow/ablations.yaml")
    refused = {table: str(error) for table in plan.tables if (error := plan.why_not(table))}
    if scale.stem in ("mini", "smoke"):
        assert refused == {}
    else:
        assert list(refused) == ["architectures"]
        assert (
            "next_dense.model.checkpoint: 'data/backbones/llava_next'" in refused["architectures"]
        )
        assert f"scale {scale.stem} " in refused["architectures"]


def test_a_name_that_can_be_no_file_is_no_table(tmp_path):
    (tmp_path / "ablations.yaml").write_text("dense: {groups: [my table], label: Dense}\n")
    with pytest.raises(ConfigError, match=r"dense\.groups\.0: 'my table' is not accepted"):
        load_ablations(tmp_path / "ablations.yaml")


def test_figures_are_files_that_say_what_they_read(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "FIGURES", tmp_path)
    read = plans.figures.__wrapped__
    (tmp_path / "_style.py").write_text("import nothing_that_is_here\n")
    (tmp_path / "mine.py").write_text('import no_such\nINPUTS = ("runs", "bench")\n')
    assert read() == {"mine": ("runs", "bench")}
    (tmp_path / "other.py").write_text('INPUTS = ("rows",)\n')
    with pytest.raises(ValueError, match=r"other.py: INPUTS: \('rows',\) is not accepted"):
        read()
    (tmp_path / "other.py").write_text("")
    with pytest.raises(ValueError, match=r"other\.py: INPUTS: None is not accepted"):
        read()


# ---- the plan and Snakemake ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project without results, so that nothing counts as done."""
    return real_project(tmp_path_factory.mktemp("project"))


@pytest.mark.slow
def test_a_table_that_a_scale_cannot_make_is_refused_by_its_target_and_no_part_of_all_ablations(
    copy,
):
    paper = "workflow/config/paper.yaml"
    output = run(copy, paper, "-n", "table_architectures", ok=False)
    assert "next_dense.model.checkpoint: 'data/backbones/llava_next' is not accepted" in output
    assert "in scale paper" in output and "no table architectures" in output
    assert planned(copy, "ablations", scale=paper)["table"] == 8


SHARES = """
dense: {label: Dense, groups: [main, other]}
sts: {label: STS, groups: [main]}
short: {label: Short, groups: [other], steps_share: {smoke: 0.5}, time_of: sts}
"""


def test_a_share_of_the_steps_is_a_scales_own_and_compared_with_its_timing(tmp_path, monkeypatch):
    file = tmp_path / "ablations.yaml"
    file.write_text(SHARES)
    mini, smoke = (load_plan(ROOT / f"workflow/config/{x}.yaml", file) for x in ("mini", "smoke"))
    monkeypatch.chdir(tmp_path)
    steps = [smoke.configs[id].stages["instruct"].steps for id in ("dense", "short")]
    assert steps[1] == steps[0] / 2
    refusal = str(mini.why_not("other"))
    assert "short.steps_share" in refusal and "one more for scale mini" in refusal
    assert not mini.why_not("main") and not smoke.why_not("other")
    for seconds, said in ((5.2, False), (7.0, True)):
        times = {"variants": {"dense": {"time_s": 10.0}, "sts": {"time_s": seconds}}}
        write_json_atomic("results/smoke/bench/main.json", times)
        texts = smoke.unlike_timing()
        assert bool(texts) == said
    text = "short.steps_share: 0.5, but by results/smoke/bench/main.json it takes 0.700 to have"
    assert texts[0].startswith(f"{file}: {text} the time of sts")
    write_json_atomic("results/smoke/bench/main.json", {"variants": {}})
    times = {"dense": 10.0, "sts": 8.0, "short": 4.0}  # its own steps are dearer than dense's
    variants = {id: {"time_s": seconds} for id, seconds in times.items()}
    write_json_atomic("results/smoke/bench/other.json", {"variants": variants})
    assert "other.json it takes 1.000 to have the time of sts" in smoke.unlike_timing()[0]
    file.write_text(SHARES.replace("time_of: sts", "time_of: none"))
    with pytest.raises(ConfigError, match=r"short\.time_of: 'none'"):
        load_ablations(file)


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES, ids=lambda file: file.stem)
def test_the_jobs_of_a_dry_run_are_those_of_the_plan(copy, scale):
    """Of the smallest scale all tables are planned, of the others what the bare command makes."""
    plan = load_plan(scale, ROOT / "workflow/ablations.yaml")
    tables = plan.tables if scale.stem == "smoke" else ["main"]
    targets = ["all", *(f"table_{name}" for name in tables)]
    jobs = planned(copy, *targets, scale=f"workflow/config/{scale.name}")
    assert {rule: count for rule, count in jobs.items() if rule not in targets} == plan.jobs(tables)


def groups_with(project: Path, name: str) -> None:
    """One more group of an entry in the table of ablations."""
    table = (ROOT / "workflow/ablations.yaml").read_text()
    more = table.replace("groups: [compressor]", f"groups: [compressor, {name}]", 1)
    (project / "workflow/ablations.yaml").write_text(more)


@pytest.mark.slow
def test_a_new_table_is_one_word_in_an_entry_but_no_name_of_a_rule(copy):
    try:
        groups_with(copy, "mine")
        jobs = planned(copy, "table_mine")
        assert (jobs["table"], jobs["timing"], jobs["evaluate"]) == (1, 1, 1)
        for name in ("train", "ablations"):
            groups_with(copy, name)
            output = run(copy, SMOKE, "-n", ok=False)
            key = r"workflow/ablations.yaml: \w+\.groups"
            assert re.search(f"{key}: '{name}' is not accepted. Accepted: another name", output)
    finally:
        shutil.copy(ROOT / "workflow/ablations.yaml", copy / "workflow/ablations.yaml")
