"""What the pipeline survives: one campaign of faults, and a table of what came of each.

    python tests/campaign.py                 # all of it; make campaign
    python tests/campaign.py --only verbs --kills 2 --out /tmp/some

A small project is made whole once. Then copies of it, or parts that are taken away and made again,
meet one fault after the other, at moments drawn from a seed. After each the same command is given
again. A fault is survived if that command then ends well, every file that was made is the same byte
by byte as without the fault (the weights above all; of what is timed, that it is there), nothing is
left lying about, and one more call has nothing to do. The exit status is 1 if one was not survived.

Whole calls and trainings of several processes are started as a user starts them. Single verbs run
in processes forked from this one, which has loaded the packages: a kill then falls on what a verb
does and not on the ten seconds of Python's imports, in which nothing of ours is touched.
"""

import argparse
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # no pool of threads here, which a fork would lose

import psutil  # noqa: E402
from project import SMOKE, call, environment, real_project, wait_for  # noqa: E402

from sts.__main__ import main as sts  # noqa: E402
from sts.pipeline.files import hashes, sha256_file, sha256_json, write_json_atomic  # noqa: E402
from sts.pipeline.run import provenance  # noqa: E402
from sts.pipeline.train import checkpoint  # noqa: E402

OUT = ROOT / "results/reference/survival"
MOUNTS = "STS_CAMPAIGN_MOUNTS"  # 1: this process may mount, and nobody else sees it
TARGETS = ("table_main", "fig_loss", "fig_tokens")
TRAINED = "results/smoke/runs/{}/seed0/{}.json"
SHARDED = TRAINED.format("sharded", "instruct")
EVERY = 2  # steps between two checkpoints
SCALE = f"""
scale: smoke
seeds: [0]
data: {{scenes: {{align: 64, instruct: 64, validation: 1, test: 4}}}}
stages:
  align: {{steps: 9, batch_size: 4, checkpoint_every: {EVERY}}}
  instruct: {{steps: 11, batch_size: 4, checkpoint_every: {EVERY}}}
evaluate: {{benchmarks: [existence, counting], batch_tokens: 2048}}
bench: {{points: 1, warmup: 0}}
"""
ABLATIONS = """
dense: {groups: [main], label: Dense, source: baseline}
sts:
  groups: [main]
  label: STS
  overrides:
    align: {vtc: {kind: random, keep: 0.5}}
    instruct: {lds: {policy: sts, rate: 0.5, epsilon: 1.0}}
sharded:
  groups: [components]
  label: STS in shards
  overrides:
    instruct:
      processes: 2
      batch_size: 2
      parallel: fsdp2
      lds: {policy: sts, rate: 0.5, epsilon: 1.0}
"""
# Of 50 kills, how many fall on which single verb; the others on whole calls.
SHARE = {
    "train": 24, "prepare": 4, "evaluate": 4, "backbone": 2, "tokens": 2,
    "bench": 2, "table": 2, "figure": 2,
}  # fmt: skip
# done.json lists the hash of the history, which has times
VOLATILE = re.compile(r"/logs/|(provenance|done)\.json$|mlflow|\.lock$|/configs/|bad_rows")
TIMED = re.compile(r"/(bench|tables|figures)/")


@dataclass
class Trial:
    """One fault and what came of it."""

    fault: str
    where: str
    moment: float | None = None
    """Seconds after the beginning, where a clock decides."""
    again: int = 0
    """Steps that were finished and had to be taken again."""
    survived: bool = True
    note: str = ""


@dataclass(frozen=True)
class Verb:
    """A job of the workflow as it is called by hand."""

    words: tuple[str, ...]
    """Of the command line, after `python -m sts`."""
    log: str
    seconds: float
    """That it took as a part of the undisturbed call."""

    @property
    def name(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        about = map(self.value_of, ("--name", "--dataset", "--stage", "--ablation"))
        return " ".join([self.name, *filter(None, about)])

    def value_of(self, option: str) -> str | None:
        words = self.words
        return words[words.index(option) + 1] if option in words else None

    def outputs(self, project: Path) -> list[Path]:
        """The files that it writes, as far as they are there."""
        if out := self.value_of("--out"):
            return [file for file in [project / out] if file.exists()]
        stem = project / str(self.value_of("--out-stem"))
        return list(stem.parent.glob(f"{stem.name}.*"))

    def clear(self, project: Path) -> None:
        """Take away what it has made, with the bytes that its manifest names."""
        for file in self.outputs(project):
            manifest = json.loads(file.read_text()) if self.name == "train" else {}
            if "weights" in manifest:
                shutil.rmtree(project / manifest["weights"])
            shutil.rmtree(file.parent) if self.name == "prepare" else file.unlink()


@dataclass
class Campaign:
    """Where it is fought, what shall be as it was, and the trials so far."""

    work: Path
    targets: Sequence[str]
    kills: int
    draw: random.Random
    finished: Path = field(init=False)
    """The project that no fault met."""
    expected: dict[str, str] = field(init=False)
    jobs: list[Verb] = field(init=False)
    trials: list[Trial] = field(default_factory=list)

    def begin(self) -> None:
        """Make the undisturbed project."""
        self.finished = new_project(self.work / "whole")
        go_on(self.finished, *self.targets)
        idle(self.finished, *self.targets)
        self.expected, self.jobs = facts(self.finished), verbs(self.finished, self.targets)

    def copy(self) -> Path:
        """A new copy of the undisturbed project, dates and all."""
        shutil.rmtree(self.work / "copy", ignore_errors=True)
        return shutil.copytree(self.finished, self.work / "copy", symlinks=True)

    def clear_from(self, project: Path, first: Verb) -> None:
        """Take away what a job has made and all that began after it: of a file that is missing
        behind a table that is there, Snakemake says that there is nothing to do."""
        for job in self.jobs[self.jobs.index(first) :]:
            job.clear(project)

    def verbs(self, *names: str) -> list[Verb]:
        return [job for job in self.jobs if job.name in names]

    @contextmanager
    def trial(self, fault: str, where: object, moment: float | None = None) -> Iterator[Trial]:
        """One fault and all that follows it: an error in the body says that something is lost."""
        trial = Trial(fault, str(where), moment)
        self.trials.append(trial)
        try:
            yield trial
        except Exception as error:
            trial.survived, trial.note = False, f"{type(error).__name__}: {error}"
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        print(asdict(trial), flush=True)

    @contextmanager
    def end_of(self, trials: Sequence[Trial]) -> Iterator[None]:
        """What several trials lead to: an error in the body is one of all of them."""
        with self.trial("", "to the end") as end:
            yield
        self.trials.remove(end)
        for trial in trials if not end.survived else ():
            trial.survived, trial.note = False, trial.note or end.note


# ---- the project, its jobs, and what they made ---------------------------------------------------


def new_project(folder: Path) -> Path:
    """The real project with a very small scale and three ablations."""
    project = real_project(folder)
    (project / SMOKE).write_text(SCALE)
    (project / "workflow/ablations.yaml").write_text(ABLATIONS)
    return project


class Call(subprocess.Popen):
    """A call of Snakemake, in a process group of its own."""

    def __init__(self, project: Path, *targets: str) -> None:
        self.text = tempfile.TemporaryFile("a+")  # noqa: SIM115
        super().__init__(
            call("--configfile", SMOKE, "--", *targets),
            cwd=project, env=environment(STS_TRACKING="on", STS_PROGRESS="0"),
            stdout=self.text, stderr=self.text, start_new_session=True,
        )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Exit status, and what it has said."""
        self.wait(timeout=900)
        self.text.seek(0)
        return self.returncode, self.text.read()


def go_on(project: Path, *targets: str) -> str:
    """A call to its end; what it says."""
    status, output = Call(project, *targets).end()
    assert status == 0, f"the next call ended with {status}: {output[-1500:]}"
    return output


def idle(project: Path, *targets: str) -> None:
    """One more call has nothing to do."""
    assert "Nothing to be done" in go_on(project, *targets), "a second call ran jobs again"


def verbs(project: Path, targets: Sequence[str]) -> list[Verb]:
    """The jobs of a finished project in the order in which they ran, with the time each took."""
    took = {}
    for file in (project / ".snakemake/metadata").rglob("*"):
        record = json.loads(file.read_text()) if file.is_file() else {"log": []}
        took |= {log: (record["starttime"], record["endtime"]) for log in record["log"]}
    plan = subprocess.run(
        call("--configfile", SMOKE, "-n", "-p", "--forceall", "--", *targets),
        cwd=project, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = re.findall(r"-m sts (.*?)\)? > (\S+) 2>&1$", plan.stdout + plan.stderr, re.M)
    return [
        Verb(tuple(shlex.split(words)), log, took[log][1] - took[log][0])
        for words, log in sorted(lines, key=lambda line: took[line[1]])
    ]


def facts(project: Path, timed: bool = False) -> dict[str, str]:
    """Name -> what a file that was made is: the hash of its bytes; of a history without the times;
    of what is timed only that it is there, but for timed=True."""
    contents = {}
    for top in ("data/smoke", "results/smoke"):
        for file in sorted((project / top).rglob("*")):
            name = str(file.relative_to(project))
            if not file.is_file() or VOLATILE.search(name):
                continue
            if TIMED.search(name) and not timed:
                contents[name] = "there" if file.stat().st_size else "empty"
            elif file.name == "history.jsonl":
                rows = [json.loads(line) for line in file.read_text().splitlines()]
                own = ("seconds", "peak_mem_mb")
                contents[name] = sha256_json(
                    [{key: value for key, value in row.items() if key not in own} for row in rows]
                )
            else:
                contents[name] = sha256_file(file)
    return contents


def equal(project: Path, expected: dict[str, str], timed: bool = False) -> None:
    """All that was made is as without a fault, there is nothing else, and the weights are those
    whose hash the manifests have."""
    contents = facts(project, timed)
    wrong = {name: "missing" for name in expected.keys() - contents.keys()}
    wrong |= {name: "left over" for name in contents.keys() - expected.keys()}
    wrong |= {
        name: "other bytes"
        for name in contents
        if expected.get(name, contents[name]) != contents[name]
    }
    assert not wrong, f"{len(wrong)} files: {dict(sorted(wrong.items())[:5])}"
    for file in (project / "results/smoke/runs").rglob("seed*/*.json"):
        manifest = json.loads(file.read_text())
        if "weights" in manifest:
            folder = project / manifest["weights"]
            here = checkpoint.weights_sha256(hashes(folder, folder.glob("*.safetensors")))
            assert here == manifest["weights_sha256"], (
                f"{manifest['weights']} are not those of {file}"
            )


def under_way(project: Path) -> dict[int, tuple[int, int]]:
    """Of each training that is not finished: steps taken, and step of the last checkpoint. The key
    is that of its history's file, which is a new one when it goes on."""
    steps = {}
    for history in (project / "results/smoke/weights").glob("*/history.jsonl"):
        if not (history.parent / "done.json").exists():
            saved = [int(state.name) for state in checkpoint.saved(history.parent)]
            taken = history.read_bytes().count(b"\n")
            steps[history.stat().st_ino] = taken, max(saved, default=0)
    return steps


def steps_again(project: Path, before: Collection[int] = ()) -> int:
    """Finished steps that trainings have to take again when they go on. before: the trainings that
    were under way, of which those that have not gone on yet don't count again."""
    steps = under_way(project).items()
    return sum(taken - saved for key, (taken, saved) in steps if key not in before)


def soon(condition: Callable[[], object], what: str) -> None:
    """Wait until it is so, and not much longer: a fault is to fall where it was drawn."""
    wait_for(condition, seconds=300, what=what, every=0.005)


def wait_for_steps(project: Path, number: int = 1) -> None:
    """Until a training has taken so many."""
    soon(lambda: any(n >= number for n, _ in under_way(project).values()), f"step {number}")


# ---- starting and ending processes ---------------------------------------------------------------


def fork(project: Path, verb: Verb, log: str | None = None, **env: str) -> int:
    """Start a verb in a process forked from this one; its number."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    status: Any = 1
    try:
        os.chdir(project)
        os.environ.update({"STS_TRACKING": "off", "CUDA_VISIBLE_DEVICES": ""} | env)
        file = Path(log or verb.log)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(text, 1)
        os.dup2(text, 2)
        status = sts(verb.words)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def ended(number: int) -> int:
    """How a forked process ended, negative by a signal; it is killed if it hangs."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    killed(number)
    raise AssertionError("it hung")


def killed(number: int) -> None:
    """kill -9 of a forked process."""
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)


def do(project: Path, verb: Verb, **env: str) -> str:
    """The verb from beginning to end; its log."""
    status = ended(fork(project, verb, **env))
    text = (project / verb.log).read_text()
    assert status == 0, f"{verb} ended with {status}: {text[-1500:]}"
    return text


def living(whose: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Processes that are alive and of which this is so."""
    processes = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if whose(process) and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def end_call(began: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """Send a signal to a call and its jobs, and wait until all of them are gone. Processes of
    torchrun are in groups of their own, and may live on."""
    with suppress(ProcessLookupError):
        os.killpg(began.pid, number)
    began.wait(timeout=300)
    group = began.pid
    soon(lambda: not living(lambda one: os.getpgid(one.pid) == group), "the jobs to end")


def power_cut(began: subprocess.Popen) -> None:
    """kill -9 of all that a call has started."""
    below = psutil.Process(began.pid).children(recursive=True)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    end_call(began)
    psutil.wait_procs(below, timeout=60)


# ---- the faults ----------------------------------------------------------------------------------


def calls(place: Campaign) -> None:
    """kill -9 of a whole call, Snakemake and its jobs, once while each of the jobs is at work"""
    project, trials = new_project(place.work / "calls"), []
    for job in [job for job in place.jobs if job.name != "backbone"][: max(1, place.kills // 4)]:
        if job.outputs(project):
            continue  # made beside one that was killed
        moment = place.draw.uniform(0, job.seconds)
        with place.trial("calls", job, moment) as trial:
            trials.append(trial)
            before, log = under_way(project), project / job.log
            log.unlink(missing_ok=True)
            began = Call(project, *place.targets)
            soon(lambda: log.exists() or began.poll() is not None, f"{job} to begin")  # noqa: B023
            assert began.poll() is None, began.end()
            time.sleep(moment)
            end_call(began)
            trial.again = steps_again(project, before)
    with place.end_of(trials):
        go_on(project, *place.targets)
        equal(project, place.expected)
        idle(project, *place.targets)
    shutil.rmtree(project)


def single_verbs(place: Campaign) -> None:
    """kill -9 of a single verb, twice in a row, then the same verb to its end"""
    for name, share in SHARE.items():
        jobs, project = place.verbs(name), place.copy()
        rounds = place.kills * share // 100 if jobs else 0
        trials = [
            trial
            for i in range(rounds)
            for trial in kill_twice(place, project, jobs[i % len(jobs)])
        ]
        if trials:
            with place.end_of(trials):
                idle(project, *place.targets)


def kill_twice(place: Campaign, project: Path, job: Verb) -> list[Trial]:
    trials, expected = [], facts(project, timed=True)
    kept = {file: file.read_bytes() for file in job.outputs(project)}
    job.clear(project)
    began = time.monotonic()
    do(project, job)
    took = time.monotonic() - began
    job.clear(project)
    for _ in range(2):
        moment = place.draw.uniform(0, took)
        with place.trial("verbs", job, moment) as trial:
            trials.append(trial)
            before = under_way(project)
            number = fork(project, job)
            time.sleep(moment)
            killed(number)
            trial.again = steps_again(project, before)
    with place.end_of(trials):
        saved = max((step for _, step in under_way(project).values()), default=0)
        log = do(project, job)
        assert not saved or f"going on from step {saved}:" in log, f"{job}: not from step {saved}"
        if job.name == "train":
            assert "is finished: reused" in do(project, job), f"{job}: trained a second time"
        if job.name in ("bench", "table"):  # which hold times, and the command of this process
            for file, content in kept.items():
                assert file.stat().st_size, f"{file} is empty"
                file.write_bytes(content)
        equal(project, expected, timed=True)
    return trials


def shards(place: Campaign) -> None:
    """a training of two processes in shards: kill -9 of all of them; kill -9 of what started them,
    while they live on; SIGTERM"""
    straight = place.copy().rename(place.work / "straight")
    go_on(straight, SHARDED)
    expected = facts(straight)
    ways = {
        "kill -9 of all": power_cut,
        "kill -9 of Snakemake and torchrun": end_call,
        "SIGTERM": lambda began: end_call(began, signal.SIGTERM),
    }
    for way, end in ways.items():
        project, moment = place.copy(), place.draw.uniform(0, 1)
        with place.trial("shards", way, moment) as trial:
            began = Call(project, SHARDED)
            wait_for_steps(project)
            time.sleep(moment)
            end(began)
            trial.again = steps_again(project)
            log = project / "results/smoke/logs/runs/sharded/seed0/instruct.log"
            go_on(project, SHARDED)
            if "is finished: reused" in log.read_text():
                trial.again, trial.note = 0, "the processes went on to the end by themselves"
            equal(project, expected)
            idle(project, SHARDED)


def sigterm(place: Campaign) -> None:
    """SIGTERM, as a scheduler sends it, to single trainings and to a whole call, far from a regular
    checkpoint: one is written, the next call goes on from there"""
    for job in place.verbs("train"):
        after = place.draw.randint(1, 7)
        with place.trial("sigterm", f"{job}, after {after} steps") as trial:
            project = place.copy()
            job.clear(project)
            rarely(project)
            number = fork(project, job)
            wait_for_steps(project, after)
            os.kill(number, signal.SIGTERM)
            assert ended(number) == 143
            [(taken, saved)] = under_way(project).values()
            trial.again = taken - saved
            assert taken == saved, f"{taken} steps taken, checkpoint of step {saved}"
            assert f"going on from step {saved}:" in do(project, job), f"not from step {saved}"
            equal(project, place.expected)
    with place.trial("sigterm", "a whole call") as trial:
        project = place.copy()
        place.clear_from(project, place.verbs("train")[0])
        began = Call(project, *place.targets)
        wait_for_steps(project)
        end_call(began, signal.SIGTERM)
        trial.again = steps_again(project)
        assert not trial.again, "steps are lost"
        go_on(project, *place.targets)
        equal(project, place.expected)
        idle(project, *place.targets)


def rarely(project: Path) -> None:
    """No regular checkpoints from now on."""
    for config in (project / "results/smoke/configs").glob("*.yaml"):
        text = config.read_text()
        assert f"checkpoint_every: {EVERY}" in text
        config.write_text(text.replace(f"checkpoint_every: {EVERY}", "checkpoint_every: 1000"))


def spoilt_checkpoint(place: Campaign) -> None:
    """the last checkpoint of a killed training has a file truncated, a bit flipped or a file gone:
    the one before is taken; both are spoilt: it begins anew"""
    for job in place.verbs("train"):
        for kind in ("truncated", "bit flipped", "file gone", "both truncated"):
            with place.trial("checkpoint", f"{job}: {kind}") as trial:
                project = place.copy()
                job.clear(project)
                number = fork(project, job)
                soon(lambda: len(states(project)) >= 2, "two checkpoints")  # noqa: B023
                killed(number)
                last, before, *_ = states(project)
                [(taken, _)] = under_way(project).values()
                spoil(last, kind, place.draw)
                start = int(before.name)
                if kind.startswith("both"):
                    spoil(before, kind, place.draw)
                    start = 0
                log = do(project, job)
                assert f"{last.name}: broken" in log, "a broken checkpoint was taken for whole"
                assert not start or f"going on from step {start}:" in log, f"not from {start}"
                equal(project, place.expected)
                trial.again = taken - start


def states(project: Path) -> list[Path]:
    """The checkpoints of the one training that is under way, the last first."""
    histories = (project / "results/smoke/weights").glob("*/history.jsonl")
    begun = [one.parent for one in histories if not (one.parent / "done.json").exists()]
    return [state for folder in begun for state in checkpoint.saved(folder)]


def spoil(state: Path, kind: str, draw: random.Random) -> None:
    """Spoil one of a checkpoint's files."""
    spoil_file(draw.choice(sorted(state.iterdir())), kind, draw)


def spoil_file(file: Path, kind: str, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if "truncated" in kind:
        file.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "bit flipped":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    else:
        file.unlink()


@contextmanager
def tracking_server(work: Path) -> Iterator[tuple[int, str]]:
    """MLflow's server: its process group, and its address."""
    port = 20_000 + os.getpid() % 20_000
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{work}/server.db"]
    with open(work / "server.txt", "w") as text:
        began = subprocess.Popen(
            [*command, *store, "--artifacts-destination", str(work / "artifacts")],
            env=environment(), stdout=text, stderr=text, start_new_session=True,
        )  # fmt: skip

    def answers() -> bool:
        with suppress(OSError):
            return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
        return False

    try:
        soon(answers, "the tracking server")
        yield began.pid, address
    finally:
        end_call(began)


def lost_server(place: Campaign) -> None:
    """the tracking server is gone before a training begins; is killed, or hangs, while it runs"""
    job = place.verbs("train")[-1]
    for way, number in {"killed": signal.SIGKILL, "hanging": signal.SIGSTOP, "gone": 0}.items():
        with place.trial("tracking", f"{job}: server {way}"):
            project = place.copy()
            job.clear(project)
            with tracking_server(place.work) as (group, address):
                if way == "gone":
                    os.killpg(group, signal.SIGKILL)
                tracked = {"STS_TRACKING": "on", "MLFLOW_TRACKING_URI": address}
                training = fork(project, job, **tracked)
                wait_for_steps(project)
                if way != "gone":
                    os.killpg(group, number)
                status = ended(training)
            log = (project / job.log).read_text()
            assert status == 0, f"the training ended with {status}: {log[-1500:]}"
            assert log.count("the job goes on without it") == 1, f"not one warning: {log[-1500:]}"
            equal(project, place.expected)


def clock_jumps(place: Campaign) -> None:
    """all files, code and results, get dates in the past, in the future, or each another: of a
    finished project; while a training is interrupted. The clock itself jumps between the two calls
    (with `faketime`)"""
    day = 24 * 3600
    scattered = "each file on another day"
    dates = {
        "2001": lambda: 1e9,
        "2096": lambda: 4e9,
        scattered: lambda: time.time() + place.draw.uniform(-4000, 4000) * day,
    }
    for name, when in dates.items():
        with place.trial("clock", f"a finished project: {name}"):
            project = place.copy()
            redate(project, when)
            idle(project, *place.targets)
            equal(project, place.expected)
    job = place.verbs("train")[-1]
    jumps = ["-400 days", "+400 days"] if shutil.which("faketime") else []
    for jump in [scattered, *jumps]:
        with place.trial("clock", f"{job}, interrupted: {jump}") as trial:
            project = place.copy()
            place.clear_from(project, job)
            number = fork(project, job)
            wait_for_steps(project, EVERY + 1)
            killed(number)
            trial.again = steps_again(project)
            if jump == scattered:
                redate(project, dates[scattered])
                go_on(project, *place.targets)
            else:
                kept = {"NO_FAKE_STAT": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
                done = subprocess.run(
                    ["faketime", jump, *call("--configfile", SMOKE, "--", *place.targets)],
                    cwd=project, env=environment(**kept),
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
            equal(project, place.expected)
            idle(project, *place.targets)


def redate(project: Path, when: Callable[[], float]) -> None:
    for name in ("sts", "workflow", "data", "results", "Snakefile"):
        for path in [project / name, *(project / name).rglob("*")]:
            os.utime(path, (when(),) * 2)


def together(place: Campaign) -> None:
    """two calls at once, beside what a killed one has left: one is refused; two trainings of the
    same weights at once: one takes the other's"""
    with place.trial("together", "two calls") as trial:
        project = place.copy()
        place.clear_from(project, place.verbs("train")[-1])
        began = Call(project, *place.targets)
        wait_for_steps(project)
        end_call(began)
        trial.again = steps_again(project)
        both = [Call(project, *place.targets) for _ in range(2)]
        ends = [one.end() for one in both]
        for status, output in ends:
            told = re.search("Another call is at work|cannot be locked", output)
            assert status == 0 or told, output[-1500:]
        assert 0 in dict(ends), "both were refused"
        equal(project, place.expected)
        idle(project, *place.targets)
    for job in place.verbs("train"):
        with place.trial("together", f"{job}, twice"):
            project = place.copy()
            job.clear(project)
            logs = (job.log, f"{job.log}.other")
            numbers = [fork(project, job, log) for log in logs]
            statuses = [ended(number) for number in numbers]
            texts = [(project / log).read_text() for log in logs]
            assert statuses == [0, 0], f"{statuses}: {texts}"
            reused = sum("is finished: reused" in text for text in texts)
            assert reused == 1, f"{reused} of two took the weights of the other"
            equal(project, place.expected)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def full_disk(place: Campaign) -> None:
    """the disk of the whole project is full, at three moments of one call, each time with a little
    more room"""
    folder, target = place.work / "disk", TRAINED.format("sts", "eval")
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder))
    try:
        project = new_project(folder / "project")
        start = shutil.disk_usage(folder).used
        files = [f for top in ("results", "data/smoke") for f in (place.finished / top).rglob("*")]
        grows = sum(file.stat().st_size for file in files)
        trials = []
        for share in sorted(place.draw.uniform(0, 0.4) for _ in range(3)):
            room = int(share * grows)
            with place.trial("disk", f"{room / 1e6:.1f} MB of room") as trial:
                trials.append(trial)
                mount("-o", f"remount,size={start + room}", str(folder))
                status, output = Call(project, target).end()
                assert status, "there was room for all"
                assert re.search("No space left|disk full", output), f"not told: {output[-1500:]}"
                trial.again = steps_again(project)
        with place.end_of(trials):
            mount("-o", "remount,size=1g", str(folder))
            go_on(project, target)
            here = facts(project)
            equal(project, {name: one for name, one in place.expected.items() if name in here})
            idle(project, target)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    mount("--bind", str(folder), str(folder))
    mount("-o", "remount,bind,ro", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def read_only_data(place: Campaign) -> None:
    """the data folder can't be written: with prepared data all else is made; without them the call
    says so, and goes on when they can be"""
    with place.trial("readonly", "prepared data"):
        project = place.copy()
        place.clear_from(project, place.verbs("train")[0])
        with read_only(project / "data"):
            go_on(project, *place.targets)
        equal(project, place.expected)
        idle(project, *place.targets)
    with place.trial("readonly", "no data yet"):
        project = place.copy()
        place.clear_from(project, place.jobs[0])
        with read_only(project / "data"):
            status, output = Call(project, *place.targets).end()
        assert status and "Read-only file system" in output, f"not told: {output[-1500:]}"
        go_on(project, *place.targets)
        equal(project, place.expected)
        idle(project, *place.targets)


STS = "runs/sts/seed0"
ROWS = ("train align sts", "bench", "tokens")
SHIPPED = ("backbone", "train align sts", "bench", "tokens")
# Files, in results/smoke if not in data, and the verbs that read them
READERS: dict[str, tuple[str, ...]] = {
    "{align}/*.safetensors": ("train align sts", "train instruct sts"),
    "{align}/config.json": ("train align sts", "train instruct sts"),
    "{align}/done.json": ("train align sts", "train instruct sts"),
    "{align}/history.jsonl": ("train align sts", "train instruct sts", "figure loss"),
    "{instruct}/*.safetensors": ("evaluate sts",),
    "{instruct}/tokenizer.json": ("evaluate sts",),
    f"{STS}/align.json": ("train instruct sts", "figure loss"),
    f"{STS}/instruct.json": ("evaluate sts", "table main", "figure loss"),
    f"{STS}/eval.json": ("table main",),
    "bench/main.json": ("table main",),
    "tokens.json": ("figure tokens",),
    "tokens/*.arrow": ("train align sts", "bench"),
    "backbone/dense.json": ("train align sts", "bench", "tokens"),
    "data/backbones/mini/vision/model.safetensors": SHIPPED,
    "data/backbones/mini/processor/tokenizer.json": SHIPPED,
    "data/smoke/scenes/manifest.json": (*ROWS, "evaluate sts"),
    "data/smoke/scenes/align.arrow": ROWS,
    "data/smoke/scenes/test_counting.arrow": ("evaluate sts",),
}
CURE = re.compile("delete|run snakemake|git checkout|sts verify", re.I)


def spoilt_files(place: Campaign) -> None:
    """every kind of file of a finished project truncated, emptied, with a bit flipped or gone, then
    each verb that reads it: all is made again to the same bytes, or an error names file and cure;
    `sts verify` has named it before"""
    for pattern, readers in READERS.items():
        for kind in ("truncated", "empty", "bit flipped", "file gone"):
            for job in place.jobs:
                is_shown = kind == "file gone" and job.name == "table"  # as a cell that says so
                if str(job) in readers and not is_shown:
                    with place.trial("spoilt", f"{pattern}: {kind}, {job}") as trial:
                        trial.note = read_spoilt(place, pattern, kind, job)


def read_spoilt(place: Campaign, pattern: str, kind: str, job: Verb) -> str:
    """A verb whose result is gone reads a spoilt file; what it made of that."""
    project, smoke = place.copy(), Path("results/smoke")
    manifests = {stage: TRAINED.format("sts", stage) for stage in ("align", "instruct")}
    of_run = {stage: json.loads((project / file).read_text()) for stage, file in manifests.items()}
    weights = {stage: Path(run["weights"]).relative_to(smoke) for stage, run in of_run.items()}
    root = project if pattern.startswith("data/") else project / smoke
    files = sorted(root.glob(pattern.format(**weights)))
    for file in files:
        spoil_file(file, kind, place.draw)
    if not pattern.startswith("tokens/"):  # which nobody need make again
        verify = Verb(("verify", "--results", str(smoke)), f"{job.log}.verify", 0)
        assert ended(fork(project, verify)) == 1, "not found by sts verify"
        assert str(files[0].relative_to(project)) in (project / verify.log).read_text()
    if str(job) == "train align sts" and pattern.startswith("{align}"):
        (project / manifests["align"]).unlink()  # the weights stay, to be reused
    else:
        job.clear(project)
    spoilt = {file: content_of(file) for file in files}
    status = ended(fork(project, job))
    log = (project / job.log).read_text()
    if status:
        [*_, line] = log.strip().splitlines()
        assert "Error: " in line and files[0].name in line, f"not named: {line}"
        assert CURE.search(line), f"no cure: {line}"
        assert not job.outputs(project), "it has written a result"
        return line
    left = [file for file in files if content_of(file) == spoilt[file]]
    assert len(left) < len(files), "the spoilt file was not made again, and no error"
    for file in left:  # tokens of another stage
        shutil.copy2(place.finished / file.relative_to(project), file)
    equal(project, place.expected)
    return "made again"


def content_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def edited_formula(place: Campaign) -> None:
    """a formula is edited while a call runs: jobs that begin later end with an error, and the next
    call makes all that follows it, here to the same weights, as the edit changes no number"""
    with place.trial("edited", "a formula of every training"):
        project = place.copy()
        place.clear_from(project, place.verbs("train")[0])
        began = Call(project, *place.targets)
        wait_for_steps(project)
        with (project / "sts/pipeline/train/step.py").open("a") as file:
            file.write("\nFACTOR = 2\n")
        status, output = began.end()
        assert status and "has changed since the call began" in output, output[-1500:]
        go_on(project, *place.targets)
        for file in place.finished.glob("results/smoke/runs/*/*/*.json"):
            before = json.loads(file.read_text())
            here = json.loads((project / file.relative_to(place.finished)).read_text())
            assert here["weights_sha256"] == before["weights_sha256"], f"{file}: other weights"
            assert "key" not in here or here["key"] != before["key"], f"{file}: the old formula"
        idle(project, *place.targets)


FAULTS = {
    "calls": calls,
    "verbs": single_verbs,
    "shards": shards,
    "disk": full_disk,
    "sigterm": sigterm,
    "checkpoint": spoilt_checkpoint,
    "tracking": lost_server,
    "clock": clock_jumps,
    "together": together,
    "readonly": read_only_data,
    "spoilt": spoilt_files,
    "edited": edited_formula,
}
MOUNTING = ("disk", "readonly")


# ---- the campaign --------------------------------------------------------------------------------


def in_a_place_of_its_own() -> None:
    """Begin again where mounts are seen by nobody else and go with this process, if the machine
    lets us: as root, or in a user namespace."""
    if MOUNTS in os.environ:
        return
    os.environ[MOUNTS] = "0"
    for flags in (["-m"], ["-rm"]):
        command = ["unshare", *flags, "--propagation", "private"]
        with suppress(FileNotFoundError):
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
                os.environ[MOUNTS] = "1"
                os.execvp("unshare", [*command, *sys.orig_argv])


def load_packages() -> None:
    """What a fork shall find loaded: all that the verbs import."""
    import lm_eval.models.hf_vlms  # noqa: F401

    from sts.pipeline.data import prepare  # noqa: F401
    from sts.pipeline.evaluate import evaluate  # noqa: F401
    from sts.pipeline.measure import (
        bench,  # noqa: F401
        kept_tokens,  # noqa: F401
    )
    from sts.pipeline.report import (
        figures,  # noqa: F401
        tables,  # noqa: F401
    )


def report(place: Campaign, skipped: dict[str, str], about: dict[str, Any]) -> str:
    """The table, in Markdown."""
    rows = []
    for name, fault in FAULTS.items():
        own = [trial for trial in place.trials if trial.fault == name]
        again = [trial.again for trial in own if trial.survived]
        cells = [len(own), sum(trial.survived for trial in own), sum(again), max(again, default=0)]
        if name in skipped:
            cells = [f"not tried: {skipped[name]}", "", "", ""]
        if own or name in skipped:
            output = " ".join((fault.__doc__ or "").split())
            rows.append(f"| {output} | {' | '.join(map(str, cells))} |")
    lost = [f"- {one.fault}, {one.where}: {one.note}" for one in place.trials if not one.survived]
    lines = [
        "# What the pipeline survived",
        "",
        f"`{about['command']}`, commit {about['commit']}, seed {about['seed']}; "
        f"{about['machine']}, {about['minutes']} minutes of processor time. Trainings of 9 and 11 "
        f"steps, a checkpoint every {EVERY}. Each trial is in the JSON file beside this one.",
        "",
        "| fault | tried | survived | finished steps taken again | most at once |",
        "| :-- | --: | --: | --: | --: |",
        *rows,
        *(["", "Not survived:", "", *lost] if lost else []),
    ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    top.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    top.add_argument("--kills", type=int, default=50, help="(default: %(default)s)")
    top.add_argument("--targets", nargs="+", default=TARGETS, help="what calls make")
    top.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    top.add_argument("--out", type=Path, default=OUT, metavar="STEM", help="of .md and .json")
    return top


def main() -> int:
    """Run the campaign; 1 if something was lost."""
    args = parser().parse_args()
    in_a_place_of_its_own()
    skipped = {}
    with tempfile.TemporaryDirectory(prefix="sts-campaign-", ignore_cleanup_errors=True) as work:
        place = Campaign(Path(work).resolve(), args.targets, args.kills, random.Random(args.seed))
        place.begin()
        load_packages()
        for name in args.only:
            if name in MOUNTING and os.environ[MOUNTS] != "1":
                skipped[name] = "only root may mount here"
                continue
            FAULTS[name](place)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    hardware, git = provenance.hardware(), provenance.git()
    about = {
        "command": provenance.command_line(),
        "commit": f"{git['commit']}{' with edits' * bool(git['dirty'])}",
        "seed": args.seed,
        "machine": f"{hardware['cores']} x {hardware['cpu']}",
        "minutes": round(sum(one.ru_utime + one.ru_stime for one in used) / 60),
    }
    trials = [asdict(trial) for trial in place.trials]
    write_json_atomic(
        args.out.with_suffix(".json"), {**about, "trials": trials, "not tried": skipped}
    )
    text = report(place, skipped, about)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if trials and all(trial["survived"] for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
