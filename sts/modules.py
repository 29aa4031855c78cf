"""What is done to the modules of a model for a while, whatever they are."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_the_place_of(model: nn.Module, path: str, module: nn.Module) -> Iterator[None]:
    """The model with `module` where its submodule `path` is."""
    parent, _, name = path.rpartition(".")
    modules = model.get_submodule(parent)._modules
    real = modules[name]
    modules[name] = module
    try:
        yield
    finally:
        modules[name] = real


def see_hooks() -> None:
    """Make torch.compile see hooks that come after it: by default it leaves them out in silence."""
    import torch._dynamo.config as dynamo  # here, as it takes a second

    dynamo.skip_nnmodule_hook_guards = False
