"""Where the time of a step goes: input, tower with projector, the rest of the forward, backward,
optimizer. On a GPU each part is waited for, which takes time: the steps that count are others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.benchmark import timer

from sts.architectures import projector_of, tower_of
from sts.pipeline.train.train import Training

PARTS = ("input", "tower", "forward", "backward", "optimizer")


class Laps:
    """Seconds of each part of a step, from lap to lap."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin again, at the start of a step."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last = _now()

    def end(self, part: str) -> None:
        """What passed since the last lap was of this part."""
        now = _now()
        self.seconds[part] += now - self.last
        self.last = now


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return timer()


@contextmanager
def laps_of(training: Training) -> Iterator[Laps]:
    """Laps of the steps that are taken in the body: `input` ends at the model's forward,
    `optimizer` is ended by the caller. VTC's compression is of `forward`, clipping of
    `optimizer`."""
    model, accelerator, laps = training.plain, training.accelerator, Laps()
    backward, inside = accelerator.backward, []  # a tower may hold the projector

    def enter(module: Any, *_: Any) -> None:
        if not inside:
            laps.end("forward")
        inside.append(module)

    def leave(*_: Any) -> None:
        inside.pop()
        if not inside:
            laps.end("tower")

    def timed_backward(loss: torch.Tensor) -> None:
        backward(loss)
        laps.end("backward")

    parts = {id(m): m for m in (*tower_of(model).values(), *projector_of(model).values())}
    handles = [model.register_forward_pre_hook(lambda *_: laps.end("input"))]
    handles.append(model.register_forward_hook(lambda *_: laps.end("forward")))
    for module in parts.values():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    accelerator.backward = timed_backward
    try:
        yield laps
    finally:
        del accelerator.backward
        for handle in handles:
            handle.remove()
