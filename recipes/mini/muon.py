"""Muon: momentum whose direction is made orthogonal, for a model's matrices.

It needs about half the steps of AdamW here. torch's own computes in bf16, which takes ten times as
long as float32 on a processor that has no bf16.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from sts.pipeline.train.step import lr_factor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's coefficients, as torch has them


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """[rows, columns] -> about U V^T of its singular value decomposition U S V^T: five steps leave
    singular values between 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = wide @ wide.T
        square = torch.addmm(square, square, square, beta=b, alpha=c)
        wide = torch.addmm(wide, square, wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """As torch.optim.Muon, with Nesterov's momentum, in float32."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - momentum)
                update = orthogonal(parameter.grad.lerp(mean, momentum))
                rows, columns = parameter.shape
                parameter.mul_(1 - lr * group["decay"])
                parameter.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)


def apart(named: Iterable[tuple[str, nn.Parameter]]) -> tuple[list, list]:
    """Parameters by name -> (the matrices that are for Muon, those for AdamW: embeddings, norms,
    biases and convolutions)."""
    matrices, others = [], []
    for name, parameter in named:
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return matrices, others


def learner(
    matrices: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter],
    first: int,
    leg: int,
    **adamw: float | bool,
) -> Callable[[Tensor], None]:
    """The function that takes a step from a loss: Muon on the matrices, AdamW on the others, the
    gradients' norm clipped to 1. The learning rate makes a leg of `first` steps, then legs of `leg`
    at half of it; each rises over 50 steps and falls by half a cosine."""
    optimizers = [Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.98), **adamw)]

    def rate(step: int) -> float:
        if step < first:
            return lr_factor(step, first, 50)
        return lr_factor((step - first) % leg, leg, 50) / 2

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]

    def learn(loss: Tensor) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for part in (*optimizers, *schedulers):
            part.step()

    return learn
