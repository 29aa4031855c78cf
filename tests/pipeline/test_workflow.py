"""The workflow as a user runs it: real Snakemake on a copy of the project.

In the copy the long work is cut short: `train`, `evaluate` and the others write small results of
the same shape at once. What is tested is what is run, when, and what a user is told.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cases import turns
from hub_sets import OFFICIAL, write_sets
from PIL import Image
from project import (
    ABLATIONS,
    BIN,
    BOTH,
    ROOT,
    SMOKE,
    call,
    edit,
    environment,
    jobs_in,
    make_project,
    planned,
    real_project,
    run,
    wait_for,
)

from sts.pipeline.plan import load_plan

# ---- what runs --------------------------------------------------------------------------------


def test_the_default_makes_the_tables_and_figures_of_the_main_job(finished):
    files = {str(p.relative_to(finished / "results/smoke")) for p in finished.rglob("results/**/*")}
    assert {"tables/main.md", "tables/main.csv", "tables/main.tex"} <= files
    assert {"tables/components.md", "figures/pareto.svg", "figures/loss.png"} <= files
    shown = json.loads((finished / "results/smoke/tables/main.md").read_text())
    assert list(shown) == ["dense", "vtc", "lds", "both"]


def test_a_stage_that_two_ablations_share_is_trained_once(finished):
    files = (finished / "done.txt").read_text().split()
    aligned = {line for line in files if line.endswith("/align.json")}
    ids = ("dense", "vtc", "pool")
    assert aligned == {f"results/smoke/runs/{id}/seed0/align.json" for id in ids}
    assert len(files) == len(set(files)), "something was made twice"


SLOW = pytest.mark.slow
PLAN = load_plan(ROOT / SMOKE, ROOT / "workflow/ablations.yaml")


def members(table: str) -> int:
    """Ablations that a table of the project shows."""
    return len(PLAN.members(table))


@pytest.mark.parametrize("target", ["table_compressor", pytest.param("real", marks=SLOW)])
def test_a_table_plans_the_runs_that_it_shows(project, target):
    jobs, shown = planned(project, target), members(target.removeprefix("table_"))
    assert {"table": 1, "timing": 1, "evaluate": shown}.items() <= jobs.items()
    assert 2 * shown <= jobs["train"] + jobs.get("share", 0)
    assert jobs["train"] <= 2 * shown + 1


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["fig_tokens"], {"figure": 1, "tokens": 1, "prepare": 1, "backbone": 1}),
        pytest.param(
            ["bench", "data", "backbones"],
            {"timing": 1, "prepare": 1, "rebuild": 4},
            marks=SLOW,
        ),
        pytest.param(
            ["ablations", "fig_pareto"], {"table": 9, "timing": 9, "figure": 1}, marks=SLOW
        ),
    ],
)
def test_every_other_named_target_plans_its_jobs(project, targets, expected):
    jobs = planned(project, *targets)
    assert expected.items() <= jobs.items(), jobs


@pytest.mark.slow
def test_a_checkpoint_in_a_folder_is_one_entry_and_its_files_are_followed(project):
    whole = project / "whole"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    (project / "whole.yaml").write_text("model: {family: whole, checkpoint: whole}\n")
    start = "results/smoke/backbone/dense.json"
    arguments = (start, "--configfile", SMOKE, "whole.yaml")
    run(project, None, *arguments)
    assert planned(project, *arguments, scale=None) == {}
    (whole / "config.json").write_text('{"a": 1}')
    assert planned(project, *arguments, scale=None) == {"backbone": 1}


def test_the_paper_scale_is_planned_with_its_processes_its_data_and_published_scores(project):
    output = run(project, "workflow/config/paper.yaml", "-n", "-p", "expected")
    jobs = {"prepare": 16, "backbone": 1, "train": 2, "evaluate": 1, "expected": 1}
    assert jobs_in(output) == jobs
    assert "torchrun --standalone --nproc-per-node 8 -m -- sts train" in output
    assert "data/paper/llava_pretrain/manifest.json" in output
    assert "scenes" not in output.partition("rule ")[0]


@pytest.mark.slow
def test_by_default_the_scale_is_mini_and_a_baseline_of_its_own_is_compared_with_itself(project):
    output = run(project, None, "-n", "-p", "table_architectures")
    assert jobs_in(output)["evaluate"] == 3 * members("architectures")
    families = ["", "next_", "idefics3_", "qwen_"]
    pairs = " ".join(f"{name}dense {name}dense" for name in families)
    assert f"--relative-to {pairs} --beside  --out-stem results/mini/tables/architectures" in output


@pytest.mark.slow
def test_values_on_the_command_line_have_their_types(project):
    values = (
        "--config",
        "seeds=[0, 7]",
        "stages={align: {steps: 9, lr: 1e-3, vtc: {kind: random, keep: 0.5}}}",
    )
    jobs = planned(project, "all", *values)
    assert jobs["evaluate"] == 2 * members("main")


def test_the_benchmark_of_time_has_all_cores(finished):
    timed = json.loads((finished / "results/smoke/bench/main.json").read_text())
    assert timed["threads"] == "2"
    assert timed["configs"] == ["dense", "vtc", "lds", "both"]


# ---- what goes wrong ----------------------------------------------------------------------------


def started(project: Path, **env: str) -> subprocess.Popen:
    """A call whose trainings take long, when the first of them is at work."""
    (project / "slow").touch()
    began = subprocess.Popen(
        call("--configfile", SMOKE), cwd=project, env=environment(**env), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    logs = project / "results/smoke/logs/runs"
    wait_for(lambda: any(log.stat().st_size for log in logs.rglob("align.log")))
    return began


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["with its jobs", "snakemake alone"])
def test_after_kill_9_the_bare_command_goes_on(project, whole_group):
    began = started(project)
    if whole_group:
        os.killpg(began.pid, signal.SIGKILL)
    else:
        began.kill()
        (project / "slow").unlink()  # the jobs live on, and finish outputs that are marked as begun
    began.wait()
    assert list((project / ".snakemake/locks").iterdir()), "nothing to recover from"
    time.sleep(1)
    (project / "slow").unlink(missing_ok=True)

    run(project, SMOKE)
    assert (project / "results/smoke/tables/main.md").exists()
    assert "Nothing to be done" in run(project, SMOKE)
    os.killpg(began.pid, signal.SIGKILL) if _alive(began.pid) else None


@pytest.mark.slow
def test_after_kill_9_a_call_that_cannot_run_the_jobs_clears_nothing(project, tmp_path):
    began = started(project)
    os.killpg(began.pid, signal.SIGKILL)
    began.wait()
    (project / "slow").unlink()
    begun = sorted((project / ".snakemake/incomplete").iterdir())
    before = state(project)

    output = run(project, SMOKE, ok=False, **without(tmp_path, "torch"))
    assert "lacks: torch" in output and "--use-conda" in output
    assert begun and begun == sorted((project / ".snakemake/incomplete").iterdir())
    assert state(project) == before
    run(project, SMOKE)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_clock_that_went_back_stops_nothing(finished):
    tomorrow = time.time() + 24 * 3600
    os.utime(finished / "results/smoke/tokens.json", (tomorrow, tomorrow))
    (finished / "results/smoke/figures/tokens.svg").unlink()
    run(finished, SMOKE, "fig_tokens")
    assert "Nothing to be done" in run(finished, SMOKE, *BOTH)


@pytest.mark.slow
def test_a_running_call_gives_each_gpu_one_job_and_a_second_call_is_refused(project):
    first = started(project, CUDA_VISIBLE_DEVICES="0")
    try:
        output = run(project, SMOKE, ok=False)
        assert "Another call is at work in this folder" in output and "cannot be locked" in output
        logs = list((project / "results/smoke/logs/runs").rglob("align.log"))
        assert len(logs) == 1, "two trainings, two cores, but one GPU"
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


@pytest.mark.slow
def test_a_dry_run_beside_a_call_says_what_is_left_and_no_advice_that_harms_it(project):
    first = started(project)
    try:
        output = run(project, SMOKE, "-n")
        assert "--rerun-incomplete" not in output
        assert jobs_in(output)["train"] > 1, "what has begun is not made yet"
        assert any((project / ".snakemake/incomplete").iterdir()), "nothing of the call was cleared"
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


@pytest.mark.slow
def test_a_formula_that_is_edited_while_a_call_runs_stops_the_jobs_that_follow_it(project):
    (project / "slow").touch()
    first = started(project)
    with (project / "sts/pipeline/train/step.py").open("a") as file:
        file.write("\nFACTOR = 2\n")
    (project / "slow").unlink()
    assert first.wait(timeout=120), "the call did not fail"
    logs = [log.read_text() for log in (project / "results/smoke/logs/runs").rglob("*.log")]
    assert any("PlanError: the code that this job follows has changed since" in log for log in logs)
    begun = [line for line in (project / "done.txt").read_text().split() if "/runs/" in line]
    assert begun and not [line for line in begun if "instruct" in line], "other than had begun"
    run(project, SMOKE)
    made = (project / "done.txt").read_text().split()
    assert all(made.count(line) == 2 for line in begun), "the old formula is not the new one"
    assert "Nothing to be done" in run(project, SMOKE)


@pytest.mark.slow
def test_the_log_of_a_failed_job_is_shown(project):
    (project / "broken").touch()
    output = run(project, SMOKE, ok=False)
    assert re.search(r"^\w+: out of memory$", output, re.MULTILINE)  # of whichever came first
    (project / "broken").unlink()
    run(project, SMOKE)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("keep: 0.5}", "keep: 1.5}", ["vtc.align.vtc.keep", "1.5", "a number in (0, 1]"]),
        ("\npool:", "\nvtc:", ["vtc", "twice"]),
    ],
)
def test_a_wrong_entry_of_the_main_table_stops_everything_with_one_clear_error(
    project, before, after, message
):
    (project / "workflow/ablations.yaml").write_text(ABLATIONS)
    edit(project / "workflow/ablations.yaml", before, after)
    output = run(project, SMOKE, ok=False)
    assert "Traceback" not in output
    for words in ("workflow/ablations.yaml", *message):
        assert words in output
    assert not (project / "results").exists()


@pytest.mark.slow
def test_the_project_may_lie_in_a_folder_of_almost_any_name(tmp_path):
    folder = tmp_path / 'a?*[b]\'c "d" $HOME;e&%s#ä'
    run(make_project(folder, ABLATIONS), SMOKE, "table_components")


@pytest.mark.slow
def test_a_folder_that_snakemake_would_take_for_a_pattern_is_named_at_the_start(tmp_path):
    folder = make_project(tmp_path / "a{b}c", ABLATIONS)
    output = run(folder, SMOKE, ok=False)
    assert f"{folder}: a path without {{ and }} is needed: rename it" in output
    assert "Traceback" not in output and not (folder / "results").exists()


# ---- GPUs, conda, style -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("evaluate", "evaluate={processes: 3}"),
        ("stages.instruct", "stages={instruct: {processes: 3}}"),
    ],
)
def test_more_processes_than_gpus_are_refused_before_the_first_job(project, key, values):
    target = "results/mini/runs/dense/seed0/eval.json"
    more = ("--config", values, "--", target)
    output = run(project, None, *more, ok=False, CUDA_VISIBLE_DEVICES="0")
    assert f"dense: {key}.processes: 3 is not accepted: at most 1, the GPUs" in output
    assert "Traceback" not in output and not (project / "results/mini/runs").exists()


@pytest.mark.slow
def test_resources_on_the_command_line_win_over_the_number_of_gpus(project):
    output = run(project, SMOKE, "data", "--resources", "gpu=3", CUDA_VISIBLE_DEVICES="0")
    assert "gpu=3" in output


HIDING = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in NAMES
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def without(folder: Path, *packages: str) -> dict[str, str]:
    """Variables with which these packages are not installed; conda jobs don't see them."""
    folder = folder / "-".join(["without", *packages])
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDING.replace("NAMES", repr(packages)))
    return {"PYTHONPATH": str(folder)}


def state(folder: Path) -> dict[Path, tuple]:
    """Bytes and times of all that was made."""
    files = [f for name in ("results", "data") for f in (folder / name).rglob("*") if f.is_file()]
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.mark.slow
def test_use_conda_plans_one_environment(project, conda):
    output = run(project, SMOKE, "-n", "--use-conda", **conda)
    created = re.findall(r"Conda environment .*envs/sts.yaml will be created", output)
    assert len(created) == 1, output


@pytest.mark.slow
def test_a_bare_call_after_one_with_conda_says_what_is_missing_and_deletes_nothing(
    project, conda, tmp_path
):
    variables = conda | without(tmp_path, "torch", "lm_eval")
    manifests = ("data/smoke/scenes/manifest.json", "results/smoke/backbone/dense.json")
    run(project, SMOKE, "--use-conda", *manifests, **variables)
    before = state(project)
    assert before.keys() >= {project / name for name in manifests}
    output = run(project, SMOKE, *manifests, ok=False, **variables)
    for words in ("lacks: .*torch", "--use-conda", "make reproduce", "requirements.lock"):
        assert re.search(words, output), output
    assert state(project) == before
    output = run(project, SMOKE, *manifests, "--sdm", "conda", **variables)
    assert "Nothing to be done" in output


@pytest.mark.slow
def test_calls_that_run_no_job_need_no_packages(finished, tmp_path):
    variables = without(tmp_path, "torch")
    assert "torch" in run(finished, SMOKE, "--forceall", ok=False, **variables)
    assert "Nothing to be done" in run(finished, SMOKE, *BOTH, **variables)
    for flags in ("-n --forceall", "--summary", "--unlock"):
        run(finished, SMOKE, *flags.split(), **variables)
    run(finished, SMOKE, "--report", "report.html", **variables)
    run(finished, SMOKE, "--touch", "--forceall", *BOTH, **variables)
    assert (finished / "report.html").exists()
    assert planned(finished) == {}


COMMAND = f"snakemake --report results/smoke/report.html --configfile {SMOKE}"


@pytest.mark.parametrize(
    ("flags", "missing", "env", "expected"),
    [
        pytest.param(["--use-conda"], ["torch"], {}, COMMAND, marks=pytest.mark.slow),
        pytest.param(
            [], ["pygments"], {}, f"pip install pygments; {COMMAND}", marks=pytest.mark.slow
        ),
        ([], [], {"MAKELEVEL": "1"}, "make report SCALE=smoke"),
    ],
    ids=["conda", "no pygments", "make"],
)
def test_the_last_line_says_how_to_make_the_report_as_it_was_called(
    finished, conda, tmp_path, flags, missing, env, expected
):
    variables = conda | without(tmp_path, *missing) | env
    target = "data/smoke/scenes/manifest.json"
    output = run(finished, SMOKE, "--force", *flags, target, **variables)
    (hint,) = re.findall(r"report: `(.*)`", output)
    assert hint == expected
    if hint == COMMAND:
        run(finished, None, *hint.split()[1:], **variables)
        assert (finished / "results/smoke/report.html").exists()


def test_snakefiles_pass_lint_and_format():
    files = [ROOT / "Snakefile", *sorted((ROOT / "workflow/rules").glob("*.smk"))]
    formatted = subprocess.run(
        [BIN / "snakefmt", "--check", *files], cwd=ROOT, capture_output=True, text=True
    )
    assert formatted.returncode == 0, formatted.stderr
    lint = subprocess.run(
        [BIN / "snakemake", "--lint"], cwd=ROOT, capture_output=True, text=True,
        env=environment(),
    )  # fmt: skip
    assert lint.returncode == 0, lint.stderr
    assert len((ROOT / "Snakefile").read_text().splitlines()) < 80


def test_the_workflow_needs_only_what_snakemake_depends_on(project):
    names = ("plan", "run.follows", "run.device", "run.cluster", "run.progress")
    modules = ", ".join(f"sts.pipeline.{name}" for name in names)
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "datasets", "mlflow", "transformers"} & set(loaded)


def test_the_report_is_one_file_made_offline_that_opens_on_what_was_found(finished):
    table = finished / "results/smoke/tables/main.html"
    table.write_text("<p>What was <b>found</b>: x 0.81</p>")
    run(finished, SMOKE, "--report", "report.html")
    report = (finished / "report.html").read_text()
    assert len(report) > 100_000
    page = json.loads(re.search(r"var workflow_desc = (.*);", report)[1])
    assert "Sparse training, scale smoke" in page
    assert table.read_text() in page
    assert 'src="data:image/svg+xml,' in page


# ---- a user's own data ------------------------------------------------------------------------


@pytest.mark.slow
def test_own_data_are_prepared_again_when_their_files_changed_and_not_when_dates_did(tmp_path):
    """With the real preparation."""
    project = real_project(tmp_path / "project")
    picture, rows, manifest = project / "a.png", project / "a.json", "data/own/mine/manifest.json"
    Image.new("RGB", (8, 8), "red").save(picture)
    row = {"image": "a.png", "conversations": turns("<image>", "red")}
    rows.write_text(json.dumps([row, row]))
    scale = yaml.safe_load((project / SMOKE).read_text())
    scale["data"]["custom"] = {"mine": {"json": "a.json", "images": "."}}
    scale["stages"]["instruct"]["data"] = ["mine"]
    (project / "own.yaml").write_text(json.dumps(scale | {"scale": "own"}))

    def prepares(*flags: str, ok: bool = True) -> bool:
        return "Nothing to be done" not in run(project, "own.yaml", *flags, manifest, ok=ok)

    assert prepares() and not prepares("-n")
    os.utime(picture)
    os.utime(rows)
    assert not prepares("-n")
    Image.new("RGB", (8, 8), "blue").save(picture)
    assert prepares() and not prepares("-n")
    rows.write_text(json.dumps([row]))
    assert prepares()
    assert json.loads((project / manifest).read_text())["splits"]["instruct"]["rows"] == 1
    picture.unlink()
    assert prepares("-n") and prepares(ok=False)
    log = (project / "results/own/logs/data/mine.log").read_text()
    assert "1 of 1 rows of a.json are bad ({'missing image': 1})" in log


@pytest.mark.slow
def test_the_data_of_a_benchmark_are_fetched_by_data_and_noted_again_when_they_changed(tmp_path):
    """With the real fetch, from a mirror."""
    project, path = real_project(tmp_path / "project"), "lmms-lab-encoder/POPE"
    columns, rows = OFFICIAL[path]["default"]["test"]
    mirror = write_sets(project / "mirror", {path: {"default": {"test": (columns, rows)}}})
    scale = yaml.safe_load((project / SMOKE).read_text())
    scale["data"]["mirror"], scale["evaluate"]["benchmarks"] = "mirror", ["pope"]
    (project / "own.yaml").write_text(json.dumps(scale | {"scale": "own"}))
    manifest = project / "data/own/pope/manifest.json"
    assert planned(project, "data", scale="own.yaml") == {"prepare": 2, "data": 1}
    run(project, "own.yaml", str(manifest.relative_to(project)))
    first = json.loads(manifest.read_text())["sha256"]
    [file] = mirror.rglob("*.parquet")
    os.utime(file)
    assert planned(project, str(manifest.relative_to(project)), scale="own.yaml") == {}
    write_sets(mirror, {path: {"default": {"test": (columns, rows[:4])}}})
    run(project, "own.yaml", str(manifest.relative_to(project)))
    assert json.loads(manifest.read_text())["sha256"] != first
