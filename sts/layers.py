"""What stands in for a decoder layer that LDS chose: skipped, without backward, or on some tokens.

The model's own loop over its layers calls them, outside the region that checkpointing computes
again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sts.sequence import WRONG_ATTENTION, at, of_queries_and_keys


class Instead:
    """Stands in for a decoder layer; what it doesn't define is the layer's own."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __getattr__(self, name: str):
        return getattr(self._layer, name)


class PassThrough(Instead):
    """The layer does not run: the hidden state [B, T, D] goes through."""

    def __call__(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        return hidden


class ForwardOnly(Instead):
    """The layer runs, but what it adds is a constant to the backward pass."""

    def __call__(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        with torch.no_grad():
            added = self._layer(hidden, *args, **kwargs) - hidden
        return hidden + added


class SomeTokens(Instead):
    """The layer sees the tokens [B, k] that `draw(hidden)` names; the others go through."""

    def __init__(self, layer: nn.Module, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__(layer)
        self._draw = draw

    def __call__(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        index = self._draw(hidden)
        kwargs = {name: _of_tokens(name, value, index) for name, value in kwargs.items()}
        some = self._layer(hidden.take_along_dim(index[..., None], 1), *args, **kwargs)
        return hidden.scatter(1, index[..., None].expand_as(some), some)


def _of_tokens(name: str, value: object, index: Tensor) -> object:
    """A decoder layer's keyword argument for the tokens `index` [B, k] of each row."""
    if name == "position_embeddings":  # two tensors [..., B or 1, T, head_dim]
        return tuple(at(x.movedim(-1, 0), index).movedim(0, -1) for x in value)
    if name == "position_ids" and value is not None:  # [B or 1, T]
        return at(value, index)
    if name == "attention_mask" and value is not None:
        if not isinstance(value, Tensor):
            raise ValueError(WRONG_ATTENTION.format("random_ltd", type(value).__name__))
        return at(value, index) if value.ndim == 2 else of_queries_and_keys(value, index)
    return value


class _Altered(nn.ModuleList):
    """Decoder layers some of which others stand in for when iterated or indexed.

    All real layers stay registered, so parameters(), hooks and state_dict() miss none.
    """

    def __init__(self, layers: nn.ModuleList, instead: dict[int, Instead]) -> None:
        super().__init__(layers)
        self._view = [instead.get(i, layer) for i, layer in enumerate(layers)]

    def __iter__(self) -> Iterator:
        return iter(self._view)

    def __getitem__(self, index):
        return self._view[index]


@contextmanager
def altered(
    language_model: nn.Module, attribute: str, instead: dict[int, Instead]
) -> Iterator[None]:
    """The language model with some of its layers stood in for."""
    layers = getattr(language_model, attribute)
    language_model._modules[attribute] = _Altered(layers, instead)
    try:
        yield
    finally:
        language_model._modules[attribute] = layers
