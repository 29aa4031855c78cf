"""Counts a forward and backward on a model whose weights have no values, by torch's formulas.

What is computed from weights lies on the `meta` device, so that any size costs next to nothing. All
else, as token ids, masks and sizes of pictures, is real, so that a forward that looks at it runs.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sts.architectures import (
    architecture_of,
    decoder_layers_of,
    head_of,
    projector_of,
    tower_layers_of,
)

aten = torch.ops.aten
PICTURES, AROUND, HEAD = "pictures", "around", "head"
ATTENTION, MLP, TOWER = "attention", "mlp", "tower"
Place = tuple[str, int]  # one of the names above, and the layer; 0 where it is none
OF_PAIRS = (aten.bmm, aten.baddbmm)  # attention's products of tokens with each other


class Recorder(TorchDispatchMode):
    """What the operators did that ran under it, by place.

    The place of a product is in the forward the module that runs, in the backward the one that
    made the node of the graph. (torch's FlopCounterMode takes a module for done once the gradient
    of its positional input is there, which misplaces what others made of that input.)

    Attributes:
        forward, backward: FLOPs, [2]: of attention's products of tokens with each other last.
        stored: Bytes that are kept for the backward, [2]: of pairs of tokens last.
        recomputed: The part of `forward` that checkpointing repeats: of layers that it knows what
            comes before the last tensor that the backward needs, where torch stops. Of a decoder
            layer under MLP.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.forward, self.backward, self.stored, self.recomputed = (
            defaultdict[Place, np.ndarray](lambda: np.zeros(2)) for _ in range(4)
        )
        self._without_values = any(weight.is_meta for weight in model.parameters())
        self._running: list[Place] = [(PICTURES, 0)]
        self._of_layer, self._needed = np.zeros(2), np.zeros(2)  # of `forward`, and to be repeated
        self._nodes, self._places = [0], [(PICTURES, 0)]  # first node of the graph -> place
        # kept, so that no two have one address; weights are there in any case
        weights = [weight.untyped_storage() for weight in (*model.parameters(), *model.buffers())]
        self._storages = {weight._cdata: weight for weight in weights}
        experts = [weight.shape[1:] for weight in model.parameters() if weight.ndim == 3]
        self._experts = {shape for size in experts for shape in (size, size[::-1])}

    def enter(self, place: Place) -> None:
        """A module at `place` begins to run."""
        self._running.append(place)
        self._mark()

    def leave(self) -> None:
        """It has run."""
        self._running.pop()
        self._mark()

    def begin_layer(self) -> None:
        """A layer that checkpointing knows begins to run."""
        self._of_layer, self._needed = np.zeros(2), np.zeros(2)

    def end_layer(self) -> None:
        """It has run."""
        name, layer = self._running[-1]
        self.recomputed[MLP if name == ATTENTION else name, layer] += self._needed
        self._of_layer, self._needed = np.zeros(2), np.zeros(2)

    def _mark(self) -> None:
        self._nodes.append(torch.autograd._get_sequence_nr())
        self._places.append(self._running[-1])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = dict(kwargs or {})
        if self._without_values:
            args, kwargs = _on_one_device(func, args, kwargs)
        is_value = func is aten._local_scalar_dense.default and args[0].is_meta
        if is_value and args[0].dtype == torch.bool:  # a check of what has no values
            return True
        output = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in flop_registry:
            flops = np.zeros(2)
            flops[int(packet in OF_PAIRS)] = flop_registry[packet](*args, **kwargs, out_val=output)
            if node := torch._C._current_autograd_node():
                place = bisect_right(self._nodes, node._sequence_nr()) - 1
                self.backward[self._places[place]] += flops
            else:
                self.forward[self._running[-1]] += flops
                self._of_layer += flops
        return output

    def store(self, tensor: Tensor) -> Tensor:
        """A tensor is kept for the backward."""
        self._needed = self._of_layer.copy()
        storage = tensor.untyped_storage()
        is_expert = tensor.ndim == 3 and tensor.shape[1:] in self._experts  # copied for each token
        if storage._cdata not in self._storages and not is_expert:
            self._storages[storage._cdata] = storage
            is_of_pairs = tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2]
            self.stored[self._running[-1]][int(is_of_pairs)] += storage.nbytes()
        return tensor


def _on_one_device(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments on one device: `meta` if any is there, else the processor."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    count = sum(tensor.is_meta for tensor in tensors)
    if "device" in kwargs:
        kwargs["device"] = "meta" if count else "cpu"
    elif count in (0, len(tensors)) and func not in (aten.nonzero.default, aten.index.Tensor):
        return args, kwargs
    if func is aten.nonzero.default:
        return (_values(args[0]),), kwargs
    if func is aten.index.Tensor:  # how many are chosen follows from the values of a mask
        places: list[Tensor | None] = []
        for index in args[1]:
            is_mask = index is not None and index.dtype == torch.bool
            places += _values(index).nonzero().unbind(1) if is_mask else [index]
        args = (args[0], places)
    if func is aten.copy_.default and not args[0].is_meta:
        return (args[0], args[0]), kwargs
    if count:
        args, kwargs = tree_map(
            lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs)
        )
    return args, kwargs


def _values(mask: Tensor) -> Tensor:
    """A mask, all true where its values are not known."""
    return torch.ones(mask.shape, dtype=torch.bool, device="cpu") if mask.is_meta else mask


def record(model: PreTrainedModel, batch: Mapping[str, Any]) -> Recorder:
    """What a forward and backward on a batch do; model: on `meta`, as it is trained.

    Raises:
        Exception: Whatever a forward raises that needs values of what weights made.
    """
    recorder = Recorder(model)
    inputs = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, dict(batch))
    with (
        torch.random.fork_rng(devices=[]),
        _places(model, recorder),
        saved_tensors_hooks(recorder.store, lambda tensor: tensor),
        sdpa_kernel(SDPBackend.MATH),
        recorder,
    ):
        model(**inputs, use_cache=False).loss.backward()
    model.zero_grad()
    return recorder


@contextmanager
def _places(model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder where the forward is."""
    architecture = architecture_of(model)
    modules: dict[nn.Module, Place] = {
        model.get_submodule(architecture.language_model): (AROUND, 0),
        head_of(model): (HEAD, 0),
        **{layer: (TOWER, i) for i, layer in enumerate(tower_layers_of(model))},
    }
    for i, layer in enumerate(decoder_layers_of(model)):
        modules[layer] = (MLP, i)
        for name, child in layer.named_children():
            if name in architecture.attention or "attention" in type(child).__name__.lower():
                modules[child] = (ATTENTION, i)
    hooks = []
    for module, place in modules.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, at=place: recorder.enter(at)))
        hooks.append(module.register_forward_hook(lambda *_: recorder.leave()))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            hooks.append(module.register_forward_pre_hook(lambda *_: recorder.begin_layer()))
            hooks.append(
                module.register_forward_hook(lambda *_: recorder.end_layer(), prepend=True)
            )
    yield
    for hook in hooks:
        hook.remove()


class TowerWatch:
    """How much the vision towers of a model see in its forwards, read from their layers' inputs.

    Attributes:
        patches: Tokens of all layers, class tokens included.
        pairs: Pairs of tokens that see each other, of all layers.
        width: Channels.
    """

    def __init__(self, model: PreTrainedModel):
        self.layers = tower_layers_of(model) or [*projector_of(model).values()]
        self.width = 0
        self._is_forward = False  # else what checkpointing recomputes would count
        model.register_forward_pre_hook(lambda *_: setattr(self, "_is_forward", True))
        model.register_forward_hook(lambda *_: setattr(self, "_is_forward", False))
        for layer in self.layers:
            layer.register_forward_pre_hook(self._look, with_kwargs=True)
        self.patches, self.pairs = 0, 0.0

    def _look(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._is_forward:
            return
        hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        bounds = kwargs.get("cu_seqlens")  # of windows or pictures in one sequence
        tokens, self.width = hidden.shape[:-1].numel(), hidden.shape[-1]
        pairs: Any = tokens * hidden.shape[-2]
        if bounds is not None and hidden.numel() and int(bounds[-1]) == tokens:
            pairs = bounds.diff().double().square().sum()
        self.patches, self.pairs = self.patches + tokens, self.pairs + pairs

    def read(self) -> tuple[float, float]:
        """(patches, pairs), means of the layers, since the last call."""
        layers = max(1, len(self.layers))
        means = self.patches / layers, float(self.pairs) / layers
        self.patches, self.pairs = 0, 0.0
        return means
