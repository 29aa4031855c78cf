"""Weights in bf16, each trained one with a float32 master that the optimizer steps on.

Autocast casts float32 weights anew in every forward. Here they are bf16, and processes send
gradients of half the size. A gradient is summed over micro-batches, clipped and stepped in float32:
a step of bf16 weights alone would be lost where it is below half a part in 256 of the weight.
"""

import torch
from torch import Tensor, nn

from sts.pipeline.config import StageConfig
from sts.pipeline.run.device import precision_here

MASTER = "master"  # attribute of a parameter: its master, a float32 tensor of the same shape
Pairs = list[tuple[nn.Parameter, Tensor]]  # of a parameter and its master


def has_masters(block: StageConfig) -> bool:
    """Whether weights are bf16 here; a processor without bf16 keeps them float32."""
    return block.weights == "bf16" and precision_here(block.precision) == "bf16"


def master_of(parameter: nn.Parameter) -> Tensor:
    """What the optimizer steps on: the master, or without one the parameter itself."""
    return getattr(parameter, MASTER, parameter)


@torch.no_grad()
def keep_masters(model: nn.Module, device: torch.device) -> None:
    """Make the parameters of a model bf16, and masters on `device` of those that are trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            setattr(parameter, MASTER, parameter.to(device, torch.float32, copy=True))
        parameter.data = parameter.to(torch.bfloat16)


def with_masters(model: nn.Module) -> Pairs:
    """The parameters that have a master, and it."""
    parameters = (p for p in model.parameters() if hasattr(p, MASTER))
    return [(parameter, master_of(parameter)) for parameter in parameters]


@torch.no_grad()
def collect_gradients(pairs: Pairs) -> None:
    """Add what a backward left to the gradients of the masters. One that got none has none."""
    for parameter, master in pairs:
        if parameter.grad is not None:
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None


@torch.no_grad()
def show_gradients(pairs: Pairs) -> None:
    """Give the parameters their whole gradients, for a policy that looks at them."""
    for parameter, master in pairs:
        parameter.grad = None if master.grad is None else master.grad.to(parameter.dtype)


@torch.no_grad()
def take_over(pairs: Pairs) -> None:
    """Set the parameters to their masters, rounded to bf16; their gradients are gone."""
    for parameter, master in pairs:
        parameter.copy_(master)
        parameter.grad = None
