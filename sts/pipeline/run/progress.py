"""How far a job is, how far a whole call of the workflow is, and about how long it still takes.

Nothing here knows Snakemake: workflow/rules/progress.smk says which jobs there are, which run and
which are done. What a job takes is measured on the jobs before it. A training says itself how far
it is, by the bar in its log. Of a kind of job that has not run yet, the samples that go through the
model say how long it takes beside the others. No torch: the workflow reads this in any environment.
"""

import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

SMALL = 10.0  # seconds of a job without `size` before one of its kind was measured: mostly imports
BAR = re.compile(r"(\d+)/(\d+) \[([\d:]+)<[^\]]*(?:step/s|s/step)")  # in a log, of `bar_of`


def bar_of(title: str, first: int, steps: int) -> Any:
    """tqdm's bar with the time left: lively on a terminal, a line now and then in a log file."""
    from tqdm import tqdm  # here: the workflow reads this file without it

    is_lively = sys.stderr.isatty()
    every = 0.5 if is_lively else 10
    return tqdm(
        desc=title, initial=first, total=steps, unit="step", mininterval=every, maxinterval=every,
        disable=os.environ.get("RANK", "0") != "0", dynamic_ncols=is_lively,
    )  # fmt: skip


@dataclass
class Job:
    """A job of this call, and what `watch` noted of it. Times are in seconds of any clock."""

    kind: str  # jobs of one kind take equally long per unit of size
    size: float = 0.0  # samples through the model, a forward pass as the unit; 0: of some seconds
    uses: Mapping[str, float] = field(default_factory=dict)  # while it runs, as {"_cores": 2}
    needs: tuple[Hashable, ...] = ()  # ids of jobs that must be done before
    steps: int = 0  # of a training, whose bar is in its log
    log: Path | None = None
    idle: bool = False  # whether it runs nothing
    began: float | None = None
    ended: float | None = None
    bar: tuple[int, int, float] = (0, 0, 0.0)  # first step here, steps done, seconds for these

    def watch(self, running: bool, finished: bool, now: float) -> None:
        """Note when it began and ended, and how far its bar is."""
        if self.ended is not None or not (running or finished):
            return
        if self.began is None:
            self.began = now
        if self.steps and self.log:
            self.bar = last_bar(self.log, self.steps) or self.bar
        if finished:
            self.ended = now

    def measured(self) -> tuple[float, float] | None:
        """(seconds, size of what was done in them); None before anything is known."""
        first, steps, seconds = self.bar
        if self.steps:  # without a bar it found its weights ready, and says nothing of the others
            return (seconds, self.size * (steps - first) / self.steps) if seconds else None
        return None if self.ended is None or self.idle else (self.ended - self.began, self.size)

    def spent(self, now: float) -> float:
        """Seconds that it has run."""
        return 0.0 if self.began is None else (self.ended or now) - self.began

    def left(self, expected: float, now: float) -> float:
        """Seconds until it ends, if all of it takes `expected`; a bar says it better."""
        first, steps, seconds = self.bar
        if self.ended is not None:
            return 0.0
        if seconds and steps > first:
            return seconds / (steps - first) * (self.steps - steps)
        return max(0.0, expected - self.spent(now))


def last_bar(log: Path, steps: int) -> tuple[int, int, float] | None:
    """(step it began with, steps done, seconds in between) by the bar of a training in its log."""
    text = log.read_text(errors="replace") if log.exists() else ""
    bars = [(int(done), time) for done, total, time in BAR.findall(text) if int(total) == steps]
    if not bars:
        return None
    seconds = 0
    for part in bars[-1][1].split(":"):
        seconds = 60 * seconds + int(part)
    return bars[0][0], bars[-1][0], float(seconds)


def line(jobs: Mapping[Hashable, Job], available: Mapping[str, float], now: float) -> str:
    """As `12 of 41 jobs, 38 % of the work, about 14 min left`; available: how much there is of what
    jobs use."""
    text = f"{sum(job.ended is not None for job in jobs.values())} of {len(jobs)} jobs"
    seconds = durations(list(jobs.values()))
    if seconds is None:
        return f"{text}, time left not known yet"
    left = {id: job.left(seconds(job), now) for id, job in jobs.items()}
    cores = {id: job.uses.get("_cores", 1) for id, job in jobs.items()}
    past = sum(cores[id] * job.spent(now) for id, job in jobs.items())
    future = sum(cores[id] * left[id] for id in jobs)
    share = past / (past + future) if past + future else 1.0
    time_left = words(until_the_end(jobs, left, available))
    return f"{text}, {100 * share:.0f} % of the work, {time_left} left"


def durations(jobs: Sequence[Job]) -> Callable[[Job], float] | None:
    """What gives the seconds that a job is expected to take; None while nothing was measured."""
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for job in jobs:
        if pair := job.measured():
            by_kind.setdefault(job.kind, []).append(pair)
    sized = [pair for pairs in by_kind.values() for pair in pairs if pair[1]]
    if not sized and any(job.size and job.ended is None for job in jobs):
        return None

    def expected(job: Job) -> float:
        if job.idle or job.ended is not None:
            return 0.0
        pairs = by_kind.get(job.kind) or (sized if job.size else [(SMALL, 0.0)])
        seconds, size = map(sum, zip(*pairs, strict=True))
        return job.size * seconds / size if job.size else seconds / len(pairs)

    return expected


def until_the_end(
    jobs: Mapping[Hashable, Job], left: Mapping[Hashable, float], available: Mapping[str, float]
) -> float:
    """Seconds until the last job ends: what is left, shared out among what there is, and no less
    than the longest row of jobs that wait for each other."""

    @cache
    def end(id: Hashable) -> float:
        return left[id] + max((end(other) for other in jobs[id].needs if other in jobs), default=0)

    shared = (
        sum(job.uses.get(name, 0) * left[id] for id, job in jobs.items()) / amount
        for name, amount in available.items()
        if amount
    )
    return max([*map(end, jobs), *shared], default=0.0)


def words(seconds: float) -> str:
    """A time in words that claim no more than is known: `about 14 min`."""
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1:
        return "less than a minute"
    if minutes < 115:
        step = 1 if minutes < 20 else 5
        return f"about {step * round(minutes / step)} min"
    return f"about {round(hours)} h" if hours < 48 else f"about {round(hours / 24)} days"


# ---- what shows it ------------------------------------------------------------------------------


def follow(
    jobs: Mapping[Hashable, Job],
    status: Callable[[Hashable], tuple[bool, bool]],
    available: Mapping[str, float],
    handler: logging.StreamHandler | None,
    say: Callable[[str], None],
    every: float,
) -> Callable[[], None]:
    """Show `line` from a thread until all jobs are done. Whatever goes wrong ends the line and not
    the call.

    Args:
        jobs: All jobs of the call, by an id.
        status: Says of an id whether its job runs, and whether it is finished.
        available: How much there is of what jobs use.
        handler: What writes the call's messages; on a terminal the line stays below them.
        say: Takes a line elsewhere, `every` so many seconds.

    Returns:
        What ends the line at once.
    """
    over = threading.Event()
    is_lively = handler and handler.stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    terminal = Terminal(handler) if is_lively else None

    def watch() -> None:
        latest = time.monotonic()
        try:
            while not over.wait(1) and any(job.ended is None for job in jobs.values()):
                now, active = time.monotonic(), False
                for id, job in jobs.items():
                    running, finished = status(id)
                    job.watch(running, finished, now)
                    active |= running
                if terminal:
                    terminal.show(line(jobs, available, now) if active else "")
                elif active and now - latest >= every:
                    latest = now
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
        with self.handler.lock:
            if text != self.shown:
                self.handler.stream.write(f"\r\033[K{text}")
                self.handler.stream.flush()
            self.shown = text

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
