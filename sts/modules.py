"""Temporary changes to the modules of any model, and what their source says."""

import ast
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from textwrap import dedent

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


def returns_tuple(function: Callable) -> bool:
    """Whether a function returns a tuple somewhere, by its source; False where there is none."""
    try:
        tree = ast.parse(dedent(inspect.getsource(inspect.unwrap(function))))
    except OSError:
        return False
    nodes = list(ast.walk(tree))
    tuples = {
        ast.unparse(target)
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        for target in node.targets
    }
    returned = [node.value for node in nodes if isinstance(node, ast.Return) and node.value]
    return any(isinstance(x, ast.Tuple) or ast.unparse(x) in tuples for x in returned)


def show_hooks_to_compile() -> None:
    """Make torch.compile see hooks that come after it: by default it leaves them out in silence."""
    import torch._dynamo.config as dynamo  # here, as it takes a second

    dynamo.skip_nnmodule_hook_guards = False
