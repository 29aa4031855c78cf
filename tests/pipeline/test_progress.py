"""The line that says how far a whole call is, and about how long it still takes."""

import io
import logging
import os
import pty
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from project import SMOKE, call, environment, run

from sts.pipeline.run.progress import Job, Terminal, durations, follow, last_bar, line, words

TRAINING = {"kind": "train", "size": 100.0, "uses": {"_cores": 1}, "steps": 50}


def done(began: float, ended: float, **what) -> Job:
    return Job(began=began, ended=ended, **what)


# ---- how long ------------------------------------------------------------------------------------


def test_a_new_call_knows_nothing_yet():
    jobs = {"a": Job(**TRAINING), "b": Job("table", needs=("a",))}
    assert line(jobs, {"_cores": 2}, 0.0) == "0 of 2 jobs, time left not known yet"


def test_two_trainings_side_by_side_take_the_time_of_one():
    jobs = {
        "a": done(0, 600, **TRAINING, bar=(0, 50, 600.0)),
        "b": Job(**TRAINING),
        "c": Job(**TRAINING),
    }
    assert line(jobs, {"_cores": 2}, 600) == "1 of 3 jobs, 33 % of the work, about 10 min left"
    assert line(jobs, {"_cores": 1}, 600) == "1 of 3 jobs, 33 % of the work, about 20 min left"
    jobs["c"].needs = ("b",)
    assert line(jobs, {"_cores": 2}, 600) == "1 of 3 jobs, 33 % of the work, about 20 min left"


def test_what_there_is_few_of_counts():
    jobs = {"a": done(0, 600, **TRAINING, bar=(0, 50, 600.0))}
    jobs |= {id: Job(**TRAINING | {"uses": {"_cores": 1, "gpu": 1}}) for id in range(4)}
    assert line(jobs, {"_cores": 8, "gpu": 2}, 600).endswith("about 20 min left")
    assert line(jobs, {"_cores": 8, "gpu": 0}, 600).endswith("about 10 min left")  # no such limit


def test_a_running_training_says_itself_how_far_it_is():
    resumed = Job(**TRAINING, began=0, bar=(20, 30, 300.0))  # 10 steps in five minutes, 20 to go
    assert line({"a": resumed}, {"_cores": 2}, 400) == (
        "0 of 1 jobs, 40 % of the work, about 10 min left"
    )


def test_a_job_of_an_unknown_kind_takes_as_long_for_a_sample_as_the_others():
    jobs = [done(0, 600, **TRAINING, bar=(0, 50, 600.0)), Job("evaluate", 25.0)]
    assert durations(jobs)(jobs[1]) == 150
    jobs.append(done(0, 20, kind="evaluate", size=10.0))
    assert durations(jobs)(jobs[1]) == 50


def test_weights_that_were_there_do_not_make_trainings_look_short():
    jobs = [done(0, 5, **TRAINING), done(0, 600, **TRAINING, bar=(0, 50, 600.0)), Job(**TRAINING)]
    assert durations(jobs)(jobs[2]) == 600


def test_jobs_without_samples_take_what_their_like_took():
    jobs = [done(0, 4, kind="table"), done(0, 8, kind="table"), Job("table"), Job("all", idle=True)]
    seconds = durations(jobs)
    assert (seconds(jobs[2]), seconds(jobs[3])) == (6, 0)


@pytest.mark.parametrize(
    ("seconds", "output"),
    [
        (20, "less than a minute"),
        (100, "about 2 min"),
        (33 * 60, "about 35 min"),
        (5.4 * 3600, "about 5 h"),
        (80 * 3600, "about 3 days"),
    ],
)
def test_no_more_is_said_than_is_known(seconds, output):
    assert words(seconds) == output


BARS = """
import sys
from sts.pipeline.run.progress import bar_of
for title, first, steps, upto in (("tokenise", 0, 7, 7), ("dense seed 0 align", 300, 480, 312)):
    bar = bar_of(title, first, steps)
    bar.start_t -= 3661
    bar.update(upto - first)
    bar.refresh()
"""


def test_the_bar_of_a_real_training_log_is_read(tmp_path):
    log = tmp_path / "align.log"
    assert last_bar(log, 480) is None
    with log.open("w") as file:
        subprocess.run([sys.executable, "-c", BARS], stderr=file, check=True)
    first, steps, seconds = last_bar(log, 480)
    assert (first, steps) == (300, 312) and 3661 <= seconds < 3700
    assert last_bar(log, 481) is None, "of another training"


# ---- what shows it -------------------------------------------------------------------------------


def test_messages_stand_above_the_line():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    terminal = Terminal(handler)
    terminal.show("1 of 2 jobs")
    handler.handle(logging.LogRecord("", logging.INFO, "", 0, "Finished", (), None))
    terminal.close()
    erased = "\r\033[K"
    line = f"{erased}1 of 2 jobs"
    assert stream.getvalue() == f"{line}{erased}Finished\n{line}{erased}"
    handler.handle(logging.LogRecord("", logging.INFO, "", 0, "later", (), None))
    assert stream.getvalue().endswith(f"{erased}later\n")


def test_what_goes_wrong_is_said_once_and_ends_the_line():
    output: queue.Queue[str] = queue.Queue()

    def status(id):
        raise AttributeError("no such thing in this Snakemake")

    stop = follow({"a": Job("table")}, status, {}, None, output.put, every=0)
    told = "No more lines of progress: AttributeError('no such thing in this Snakemake')"
    assert output.get(timeout=60) == told
    stop()
    assert output.empty() and "progress" not in {thread.name for thread in threading.enumerate()}


VERBS = """
import sys, time
from pathlib import Path
from sts.pipeline.run.progress import bar_of

def value(flag): return sys.argv[sys.argv.index(flag) + 1]

if sys.argv[1] == "train":
    bar = bar_of("a training", 0, {"align": 4, "instruct": 6}[value("--stage")])
    for _ in range(2):
        time.sleep(1)
        bar.update()
    bar.refresh()
    until = time.monotonic() + 120
    while not Path("go").exists() and time.monotonic() < until:
        time.sleep(0.05)
if sys.argv[1] != "close":
    Path(value("--out")).write_text("{}")
"""


@pytest.fixture
def waiting(project) -> Path:
    """The project with verbs that do nothing, but a training waits for the file `go`."""
    (project / "sts/__main__.py").write_text(VERBS)
    return project


ONE_RUN = "results/smoke/runs/dense/seed0/instruct.json"
SAID = re.compile(rb"[\d]+ of 4 jobs, \d+ % of the work, (?:about \d+ min|less than a minute) left")


@pytest.mark.slow
@pytest.mark.parametrize("on_a_terminal", [False, True], ids=["log", "terminal"])
def test_a_call_says_how_far_it_is(on_a_terminal, waiting):
    ours, theirs = pty.openpty() if on_a_terminal else os.pipe()
    with subprocess.Popen(
        call(ONE_RUN, "--configfile", SMOKE), cwd=waiting, stderr=theirs,
        env=environment(STS_PROGRESS="1", TERM="xterm"),
    ) as begun:  # fmt: skip
        os.close(theirs)
        output = b""
        while part := _read(ours):
            output += part
            if SAID.search(output):
                (waiting / "go").touch()
    os.close(ours)
    assert begun.returncode == 0, output.decode()
    assert SAID.search(output), output.decode()
    last = output[output.rindex(b"of 4 jobs, ") :]
    if on_a_terminal:
        assert b"\r\033[K" in last, "left on the terminal"
    else:
        assert b"\033" not in output


def _read(end: int) -> bytes:
    try:
        return os.read(end, 65536)
    except OSError:  # how a terminal says that nobody writes to it any more
        return b""


@pytest.mark.slow
def test_a_wrong_number_of_seconds_costs_the_line_and_not_the_call(waiting):
    output = run(waiting, SMOKE, "data", STS_PROGRESS="often")
    assert "No lines of progress" in output and "often" in output
    assert (waiting / "data/smoke/scenes/manifest.json").exists()
