"""A bar of progress for one job."""

import os
import sys

from tqdm import tqdm


def bar_of(title: str, first: int, steps: int) -> tqdm:
    """A bar with the time left: lively on a terminal, a line now and then in a log file."""
    every = 0.5 if sys.stderr.isatty() else 10
    return tqdm(
        desc=title, initial=first, total=steps, unit="step", mininterval=every, maxinterval=every,
        disable=os.environ.get("RANK", "0") != "0", dynamic_ncols=sys.stderr.isatty(),
    )  # fmt: skip
