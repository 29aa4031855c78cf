"""`make gpu-check`: what it would run on a GPU, and what it does with what goes wrong. Nothing here
needs a GPU; the benches are rehearsed on the CPU."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest
import torch
from project import ROOT

from sts.__main__ import main
from sts.pipeline.files import read_json
from sts.pipeline.measure import shape_bench
from sts.pipeline.measure.shape_bench import ATTENTION, parse_setting
from sts.pipeline.measure.shapes import SHAPES
from workflow import gpu_check
from workflow.gpu_check import Part, check

ABOUT = {"device": "made up", "commit": "0"}
WITHOUT_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def python(name, code, **more):
    return Part(name, [sys.executable, "-c", code], **more)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder; the result is `kept.json` in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(folder):
    return read_json(folder / "kept.json")


def test_each_part_survives_the_others_and_says_why_it_failed(here):
    out = here / "out.json"
    written = f"open({str(out)!r}, 'w').write('{{}}')"
    todo = [
        python("no_memory", "print('step 1'); raise MemoryError('2 GB more')"),
        python("no_result", "print('all is well')", says=lambda: json.loads(out.read_text())),
        python("killed", "import os; os.kill(os.getpid(), 9)"),
        python("silent", "raise SystemExit(3)"),
        python("no_package", written, needs="no_such_package"),
        python("well", written, writes=[out], says=lambda: {"found": json.loads(out.read_text())}),
    ]
    assert not check(todo, ABOUT, here / "kept.json")
    result = outcome(here)
    rows = result.pop("parts")
    assert result == ABOUT
    assert {name: row["status"] for name, row in rows.items()} == {
        "no_memory": "failed", "no_result": "failed", "killed": "failed", "silent": "failed",
        "no_package": "not run", "well": "passed",
    }  # fmt: skip
    assert rows["no_memory"]["why"] == "status 1: MemoryError: 2 GB more"
    assert rows["no_result"]["why"].startswith("no result: FileNotFoundError")
    assert rows["killed"]["why"] == "signal 9: nothing was printed"
    assert rows["silent"]["why"] == "status 3: nothing was printed"
    assert rows["no_package"]["why"] == "the package no_such_package is not installed"
    assert rows["well"]["found"] == {} and "why" not in rows["well"]
    for row in rows.values():
        assert row["command"].startswith("python -c")
    assert "step 1" in (here / gpu_check.LOGS / "no_memory.log").read_text()


@pytest.mark.slow
def test_a_part_that_hangs_ends_with_all_that_it_has_started(here):
    code = (
        "import pathlib, subprocess, sys, time; "
        "job = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "pathlib.Path('pid').write_text(str(job.pid)); time.sleep(600)"
    )
    todo = [python("hangs", code, limit=5), python("next", "")]
    assert not check(todo, ABOUT, here / "kept.json")
    rows = outcome(here)["parts"]
    assert rows["hangs"]["why"].startswith("not done after 5 s")
    assert rows["next"]["status"] == "passed"
    left = psutil.pids()
    pid = int((here / "pid").read_text())
    assert pid not in left or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_what_an_earlier_call_left_is_no_result_of_this_one(here):
    folder = here / "made"
    folder.mkdir()
    (folder / "old").write_text("")
    part = python("late", "", writes=[folder], says=lambda: {"left": os.listdir(folder)})
    assert not check([part], ABOUT, here / "kept.json")
    assert "FileNotFoundError" in outcome(here)["parts"]["late"]["why"]


def test_other_parts_stay_where_machine_and_code_are_the_same(here):
    kept, first, second = here / "kept.json", python("first", ""), python("second", "")
    assert check([first], ABOUT, kept) and check([second], ABOUT, kept)
    assert set(outcome(here)["parts"]) == {"first", "second"}
    assert check([second], ABOUT | {"commit": "1"}, kept)
    assert set(outcome(here)["parts"]) == {"second"}


def test_an_error_is_named_without_this_folder(here):
    log = here / "x.log"
    log.write_text(f"2 %\r3 %\ntorch.OutOfMemoryError: {here}/a is full\nshutting down\n")
    assert gpu_check.reason(log) == "torch.OutOfMemoryError: a is full"
    log.write_text("2 %\r3 %\n\n")
    assert gpu_check.reason(log) == "3 %"
    log.write_text(f"ConnectionError: {socket.gethostname()}:80 is closed\n")
    assert gpu_check.reason(log) == "ConnectionError: this machine:80 is closed"


def test_tests_that_were_all_skipped_are_no_success(here):
    suite = '<testsuites><testsuite tests="{}" failures="0" errors="0" skipped="{}"/></testsuites>'
    report = here / "report.xml"
    report.write_text(suite.format(7, 2))
    assert gpu_check.counts(report) == {"passed": 5, "failures": 0, "errors": 0, "skipped": 2}
    report.write_text(suite.format(7, 7))
    with pytest.raises(ValueError, match="7 were skipped"):
        gpu_check.counts(report)


def test_a_training_without_a_gpu_is_no_run_on_one(here):
    with pytest.raises(ValueError, match="of 0 trainings"):
        gpu_check.run_of(here, gpu=False)
    for key, gpus in (("a", ["NVIDIA H100"]), ("b", [])):
        (here / "weights" / key).mkdir(parents=True)
        provenance = {"hardware": {"gpus": gpus}}
        (here / f"weights/{key}/provenance.json").write_text(json.dumps(provenance))
    assert gpu_check.run_of(here, gpu=False)["trainings"] == 2
    with pytest.raises(ValueError, match="of 2 trainings 1 ran without a GPU"):
        gpu_check.run_of(here, gpu=True)


def test_the_benches_are_all_that_was_asked_for(monkeypatch):
    """Both shapes, whole; both attentions; with and without checkpointing; align and instruct."""
    calls = []
    monkeypatch.setattr(
        shape_bench,
        "speed",
        lambda shape, settings, out, **more: calls.append((shape, settings, more)),
    )
    for part in gpu_check.parts():
        if "bench" in part.command:
            assert main(part.command[3:]) == 0
    every = {
        (shape, more["attention"], *more["checkpointing"], more["autocast"])
        for shape, _, more in calls
    }
    assert every == {("llava-1.5-7b", "sdpa", True, True)} | {
        (shape, attention, checkpointing, False)
        for shape in ("llava-1.5-7b", "qwen2.5-vl-7b")
        for attention in ("sdpa", "flash_attention_2")
        for checkpointing in (False, True)
    }
    for shape, settings, more in calls:
        assert shape in SHAPES and more["attention"] in ATTENTION
        assert (more["layers"], more["width"]) == (None, None)
        assert tuple(more["stages"]) == ("align", "instruct")
        units = {parse_setting(setting)[1].unit for setting in settings}
        assert units == {"layer", "samples", "tokens", "backward"}
    assert len({part.name for part in gpu_check.parts()}) == len(gpu_check.parts())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_what_it_would_do_and_fails():
    command = [sys.executable, "-m", "workflow.gpu_check"]
    process = subprocess.run(command, cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True)
    assert process.returncode == 1
    assert "There is no NVIDIA GPU here" in process.stderr
    for text in ("pytest -m gpu", "--shape qwen2.5-vl-7b", "scale=gpu_smoke"):
        assert text in process.stderr
    assert not process.stdout


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--rehearse", "--only", "bench"])
    assert end.value.code == 2
    assert "expected some of llava-1.5-7b-sdpa" in capsys.readouterr().err
