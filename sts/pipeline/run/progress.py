"""How far a whole call of the workflow is, and about how long it still takes.

Nothing here knows Snakemake: workflow/rules/progress.smk says which jobs there are, which run and
which are done. What a job takes is measured on the jobs before it. A training says itself how far
it is, by the bar in its log. Of a kind of job that has not run yet, the samples that go through the
model say how long it takes beside the others. No torch: the workflow reads this in any environment.
"""

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

SMALL = 10.0  # seconds of a job without `size` before one of its kind was seen: mostly imports
BAR = re.compile(r"(\d+)/(\d+) \[([\d:]+)<[^\]]*(?:step/s|s/step)")  # of sts/pipeline/run/bar.py


@dataclass
class Job:
    """A job of this call. `see` notes what becomes of it.

    kind: jobs of one kind take equally long per unit of `size`. size: samples that go through the
    model, a forward pass of one as the unit; 0 for a job of some seconds. uses: what it holds while
    it runs, as {"_cores": 2}. needs: ids of jobs that must be done before. steps: of a training,
    whose bar `log` shows. idle: it runs nothing.
    """

    kind: str
    size: float = 0.0
    uses: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[Hashable, ...] = ()
    steps: int = 0
    log: Path | None = None
    idle: bool = False
    began: float | None = None
    ended: float | None = None
    bar: tuple[int, int, float] | None = None  # first step here, steps done, seconds for these

    def see(self, running: bool, finished: bool, now: float) -> None:
        """Note when it began and ended, in seconds of any clock, and how far its bar is."""
        if self.ended is not None or not (running or finished):
            return
        if self.began is None:
            self.began = now
        if self.steps and self.log:
            self.bar = last_bar(self.log, self.steps)
        if finished:
            self.ended = now


def last_bar(log: Path, steps: int) -> tuple[int, int, float] | None:
    """(step it began with, steps done, seconds in between) by the bar of a training in its log."""
    text = log.read_text(errors="replace") if log.exists() else ""
    bars = [(int(done), spent) for done, total, spent in BAR.findall(text) if int(total) == steps]
    if not bars:
        return None
    seconds = 0
    for part in bars[-1][1].split(":"):
        seconds = 60 * seconds + int(part)
    return bars[0][0], bars[-1][0], float(seconds)


def line(jobs: Mapping[Hashable, Job], available: Mapping[str, float], now: float) -> str:
    """As `12 of 41 jobs, 38 % of the work, about 14 min left`.

    available: how much there is of what jobs use. now: on the clock of `Job.see`.
    """
    done = sum(job.ended is not None for job in jobs.values())
    text = f"{done} of {len(jobs)} jobs"
    seconds = durations(jobs.values())
    if seconds is None:
        return f"{text}, time left not known yet"
    left = {id: _left(job, seconds(job), now) for id, job in jobs.items()}
    spent = {id: _spent(job, now) for id, job in jobs.items()}
    past, future = (
        sum(jobs[id].uses.get("_cores", 1) * value for id, value in part.items())
        for part in (spent, left)
    )
    share = past / (past + future) if past + future else 1.0
    time_left = words(until_the_end(jobs, left, available))
    return f"{text}, {100 * share:.0f} % of the work, {time_left} left"


def durations(jobs: Iterable[Job]) -> Callable[[Job], float] | None:
    """What gives the seconds that a job is expected to take; None while nothing was measured."""
    sized: dict[str, list[tuple[float, float]]] = {}  # kind -> (seconds, size of what they did)
    small: dict[str, list[float]] = {}
    waiting = False
    for job in jobs:
        waiting |= bool(job.size) and job.ended is None
        if job.steps:  # one without a bar found its weights ready, and says nothing of the others
            first, steps, seconds = job.bar or (0, 0, 0.0)
            if steps > first and seconds:
                sized.setdefault(job.kind, []).append(
                    (seconds, job.size * (steps - first) / job.steps)
                )
        elif job.ended is not None and not job.idle:
            if job.size:
                sized.setdefault(job.kind, []).append((job.ended - job.began, job.size))
            else:
                small.setdefault(job.kind, []).append(job.ended - job.began)
    if waiting and not sized:
        return None

    def pace(kind: str) -> float:
        """Seconds per unit of size: of this kind, else of all."""
        found = sized.get(kind) or [pair for pairs in sized.values() for pair in pairs]
        seconds, size = map(sum, zip(*found, strict=True))
        return seconds / size

    def of(job: Job) -> float:
        if job.idle:
            return 0.0
        if job.size:
            return job.size * pace(job.kind) if sized else 0.0
        seen = small.get(job.kind)
        return sum(seen) / len(seen) if seen else SMALL

    return of


def until_the_end(
    jobs: Mapping[Hashable, Job], left: Mapping[Hashable, float], available: Mapping[str, float]
) -> float:
    """Seconds until the last job ends: what is left, shared out among what there is, and no less
    than the longest row of jobs that wait for each other."""
    ends: dict[Hashable, float] = {}

    def end(id: Hashable) -> float:
        if id not in ends:
            before = (end(other) for other in jobs[id].needs if other in jobs)
            ends[id] = left[id] + max(before, default=0.0)
        return ends[id]

    shared = (
        sum(job.uses.get(name, 0) * left[id] for id, job in jobs.items()) / amount
        for name, amount in available.items()
        if amount
    )
    return max([*map(end, jobs), *shared], default=0.0)


def words(seconds: float) -> str:
    """A time in words that claim no more than is known: `about 14 min`."""
    minutes = seconds / 60
    if minutes < 1:
        return "less than a minute"
    if minutes < 20:
        return f"about {minutes:.0f} min"
    if minutes < 115:
        return f"about {5 * round(minutes / 5)} min"
    if minutes < 48 * 60:
        return f"about {minutes / 60:.0f} h"
    return f"about {minutes / 60 / 24:.0f} days"


def _spent(job: Job, now: float) -> float:
    return 0.0 if job.began is None else (now if job.ended is None else job.ended) - job.began


def _left(job: Job, expected: float, now: float) -> float:
    if job.ended is not None:
        return 0.0
    first, steps, seconds = job.bar or (0, 0, 0.0)
    if steps > first and seconds:
        return seconds / (steps - first) * (job.steps - steps)
    return max(0.0, expected - _spent(job, now))


# ---- what shows it ------------------------------------------------------------------------------


def follow(
    jobs: Mapping[Hashable, Job],
    status: Callable[[Hashable], tuple[bool, bool]],
    available: Mapping[str, float],
    handler: logging.StreamHandler | None,
    say: Callable[[str], None],
    every: float,
) -> Callable[[], None]:
    """Show `line` from a thread until all jobs are done, or what is returned is called.

    status: whether a job (its id) runs, and whether it is finished. handler: what writes the call's
    messages; the line stays below them if that is a terminal, else `say` gets one every `every`
    seconds. Whatever goes wrong ends the line and not the call.
    """
    over = threading.Event()
    lively = handler and handler.stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    terminal = Terminal(handler) if lively else None

    def watch() -> None:
        said = time.monotonic()
        try:
            while not over.wait(1) and any(job.ended is None for job in jobs.values()):
                now, active = time.monotonic(), False
                for id, job in jobs.items():
                    running, finished = status(id)
                    job.see(running, finished, now)
                    active |= running
                if terminal:
                    terminal.show(line(jobs, available, now) if active else "")
                elif active and now - said >= every:
                    said = now
                    say(line(jobs, available, now))
        except Exception as error:  # a broken pipe, another version of Snakemake
            say(f"No more lines of progress: {error!r}")
        finally:
            if terminal:
                terminal.close()

    def stop() -> None:
        over.set()
        thread.join(timeout=5)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    return stop


class Terminal:
    """The last line of a terminal, below whatever a handler writes to it."""

    def __init__(self, handler: logging.StreamHandler):
        self.handler, self.shown, self.emit = handler, "", handler.emit
        handler.emit = self._above  # which the handler calls with its lock held

    def show(self, text: str) -> None:
        """Put `text` in place of the line; nothing: none is left."""
        text = text[: shutil.get_terminal_size().columns - 1]
        self.handler.acquire()
        try:
            if text != self.shown:
                self.handler.stream.write(f"\r\033[K{text}")
                self.handler.stream.flush()
            self.shown = text
        finally:
            self.handler.release()

    def close(self) -> None:
        """Leave the handler as it was."""
        self.show("")
        self.handler.emit = self.emit

    def _above(self, record: logging.LogRecord) -> None:
        shown = self.shown
        with suppress(OSError, ValueError):  # of a terminal that is gone
            self.show("")
        self.emit(record)
        with suppress(OSError, ValueError):
            self.show(shown)
