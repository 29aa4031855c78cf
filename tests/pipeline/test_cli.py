"""The command line: every verb, its help, and how it passes on what it was given."""

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

import sts
from sts.__main__ import app, main
from sts.pipeline.config import load_ablations, load_scale, resolve
from sts.pipeline.report import tables

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    "prepare", "backbone", "smollm2", "train", "evaluate", "submission", "bench",
    "tokens", "table", "figure", "expected", "summary", "estimate", "requests", "ui", "reap",
    "close", "config", "verify", "export", "check", "targets", "runs", "compare", "clean",
    "examples", "page", "search",
)  # fmt: skip


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert main([verb, "--help"]) == 0
    output = capsys.readouterr().out
    assert f"Usage: python -m sts {verb}" in output
    assert output.strip().count("\n") > 2


def test_there_are_no_other_verbs():
    assert {command.callback.__name__ for command in app.registered_commands} == set(VERBS)


def test_help_needs_no_heavy_import():
    code = "import sys, sts.__main__ as m; m.main([]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "mlflow", "datasets", "matplotlib"} & set(done.stdout.split())


def test_config_prints_an_ablation_with_its_values_in_place(capsys):
    assert main(["config", "--ablation", "vtc"]) == 0
    assert "kind: random" in capsys.readouterr().out


def test_config_prints_the_papers_formula_with_its_values_and_reads_back(tmp_path, capsys):
    assert main(["config", "--ablation", "sts"]) == 0
    output = capsys.readouterr().out
    (formula,) = [line for line in output.splitlines() if line.startswith("#")]
    assert formula == (
        "# instruct.lds, t = share of the stage done: p_l(t) = 0.5 * (1 - t)^2 * "
        "(1 + 1 (2 l - 11) / 11), l = 0 .. 11; t in steps; draw: independent; unit: layer"
    )
    (tmp_path / "printed.yaml").write_text(output)
    mine = load_scale(ROOT / "workflow/config/mini.yaml")
    sts = load_ablations(ROOT / "workflow/ablations.yaml")["sts"]
    assert load_scale(tmp_path / "printed.yaml") == resolve(mine, sts)


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "sts", "config", "--ablation", "sts"]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as job:
        job.stdout.close()
        output = job.stderr.read()
    assert (job.returncode, output) == (0, "")


def test_config_prints_no_formula_where_nothing_is_skipped(capsys):
    assert main(["config", "--ablation", "vtc"]) == 0
    assert "#" not in capsys.readouterr().out


def test_a_wrong_value_ends_a_verb_with_one_line(tmp_path, capsys):
    (tmp_path / "scale.yaml").write_text("stages: {align: {steps: -1}}\n")
    assert main(["config", "--configfile", str(tmp_path / "scale.yaml")]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert "align.steps" in output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["estimate", "--gpu", "abacus"], "'abacus' is not one of 'a100-40'"),
        (["close", "--status", "OK"], "'OK' is not one of 'FINISHED', 'FAILED', 'KILLED'"),
        (["close"], "Missing option '--status'"),
        (["config", "--ablatio", "sts"], "No such option: --ablatio"),
        (["nope"], "No such command 'nope'"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, text, capsys):
    assert main(words) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert text in output


def test_an_option_takes_several_values_after_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tables, "table", lambda *args: calls.append(args))
    labels = ["--labels", "Dense", "STS <&>", "--sources"]
    words = ["table", "--name", "main", "--ablations", "dense", "sts", *labels, "--out-stem", "t"]
    assert main(words) == 0
    (call,) = calls
    assert call[2] == ["dense", "sts"]
    assert call[4:] == ({"dense": "Dense", "sts": "STS <&>"}, {}, {}, [])


def test_an_unknown_ablation_is_refused(capsys):
    assert main(["config", "--ablation", "nope"]) == 2
    assert "one of dense, vtc" in capsys.readouterr().err


def test_a_value_that_is_nearly_a_name_is_answered_with_it(capsys):
    assert main(["config", "--ablation", "vtcc"]) == 2
    assert capsys.readouterr().err.endswith("Did you mean vtc?\n")
    assert main(["estimat"]) == 2
    assert "Did you mean 'estimate'?" in capsys.readouterr().err


def test_of_several_scale_files_a_later_one_overrides(tmp_path, capsys):
    later = tmp_path / "later.yaml"
    later.write_text("seeds: [7]\n")
    assert main(["config", "--configfile", "workflow/config/smoke.yaml", str(later)]) == 0
    assert "scale: smoke\nseeds:\n- 7\n" in capsys.readouterr().out


def test_ctrl_c_ends_a_verb_with_one_line(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "table", interrupted)
    assert main(["table", "--name", "main", "--ablations", "dense", "--out-stem", "t"]) == 130
    assert capsys.readouterr().err == "Stopped; the same command goes on.\n"


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{sts.__version__}\n"


def test_prepare_writes_a_manifest(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text("data: {scenes: {align: 4, instruct: 8, test: 2}}\n")
    out = tmp_path / "scenes/manifest.json"
    assert main(["prepare", "--config", str(config), "--dataset", "scenes", "--out", str(out)]) == 0
    assert out.exists()


def test_close_without_a_store_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STS_INVOCATION", "test")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["close", "--status", "FINISHED"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_of_processes_that_fail_the_last_lines_show_the_error_and_not_what_torchrun_says(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "sts", "train", "--config", "workflow/config/smoke.yaml", "--ablation", "dense",
        "--seed", "0", "--stage", "algin", "--data", "none.json", "--init", "none.json",
        "--out", tmp_path / "out.json",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode != 0
    shown = "\n".join(ended.stderr.splitlines()[-30:])  # of the log, when a job has failed
    assert "--stage: 'algin' is not accepted. Accepted: one of align, instruct" in shown
