"""Temporary changes to the modules of any model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def replaced(model: nn.Module, path: str, replacement: nn.Module) -> Iterator[None]:
    """The model with `replacement` at the submodule `path`."""
    parent, _, name = path.rpartition(".")
    siblings = model.get_submodule(parent)._modules
    original = siblings[name]
    siblings[name] = replacement
    try:
        yield
    finally:
        siblings[name] = original


def show_hooks_to_compile() -> None:
    """Make torch.compile see hooks that come after it: by default it leaves them out in silence."""
    import torch._dynamo.config as dynamo  # here, as it takes a second

    dynamo.skip_nnmodule_hook_guards = False
