"""Counts the FLOPs of a forward and backward, by torch's formulas and by place in the model.

What is computed from weights may lie on the `meta` device, so that any size costs next to nothing.
All else, as token ids, masks and sizes of pictures, is real, so that a forward can look at it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
Place = tuple[str, int]  # one of the names below, and its layer; 0 where it has none
PICTURES, AROUND, HEAD = (("pictures", 0), ("around", 0), ("head", 0))
ATTENTION, MLP, TOWER = "attention", "mlp", "tower"
FORWARD, BACKWARD, RECOMPUTED = range(3)
OF_PAIRS = (aten.bmm, aten.baddbmm)  # attention's products of tokens with each other


class Recorder(TorchDispatchMode):
    """The FLOPs of what runs under it.

    The place of a product is in the forward the module that runs, in the backward the one that
    made the node of the graph. (torch's FlopCounterMode takes a module for done once the gradient
    of its positional input is there, which misplaces what others made of that input.)

    Attributes:
        flops: Place -> [forward, backward, recomputed] x [others, of pairs of tokens]. Recomputed
            is the part of the forward before the last tensor that the backward needs, where
            checkpointing stops.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = defaultdict[Place, np.ndarray](lambda: np.zeros((3, 2)))
        self.running: list[Place] = [PICTURES]
        self._places: dict[int, Place] = {}  # number of a node of the graph -> where it was made

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        args, kwargs = _on_one_device(func, args, kwargs or {})
        is_value = func is aten._local_scalar_dense.default and args[0].is_meta
        if is_value and args[0].dtype == torch.bool:  # a check of what has no values
            return True
        output = func(*args, **kwargs)
        if node := torch._C._current_autograd_node():
            place, direction = self._places.get(node._sequence_nr(), PICTURES), BACKWARD
        else:
            place, direction = self.running[-1], FORWARD
            self._places.setdefault(torch.autograd._get_sequence_nr() - 1, place)
        packet = func.overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=output)
            self.flops[place][direction, int(packet in OF_PAIRS)] += flops
        return output

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor is kept for the backward."""
        flops = self.flops[self.running[-1]]
        flops[RECOMPUTED] = flops[FORWARD]
        return tensor


def _on_one_device(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments on one device: `meta` if any is there, else the processor."""
    if func is aten.nonzero.default:
        args = (_values(args[0]),)
    elif func is aten.index.Tensor:  # how many are chosen follows from the values of a mask
        places: list[Tensor | None] = []
        for index in args[1]:
            is_mask = index is not None and index.dtype == torch.bool
            places += _values(index).nonzero().unbind(1) if is_mask else [index]
        args = (args[0], places)
    elif func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
        return (args[0], args[0]), kwargs
    is_meta = any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs)))
    if is_meta:
        args = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, args)
    if "device" in kwargs:
        kwargs = kwargs | {"device": "meta" if is_meta else "cpu"}
    return args, kwargs


def _values(mask: Tensor) -> Tensor:
    """A mask, all true where its values are not known."""
    return torch.ones(mask.shape, dtype=torch.bool, device="cpu") if mask.is_meta else mask


def record(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[Place, np.ndarray]:
    """`Recorder.flops` of a forward and backward on a batch.

    Raises:
        Exception: Whatever a forward raises that needs values of what weights on `meta` made.
    """
    recorder = Recorder()
    with (
        _places(model, recorder.running),
        saved_tensors_hooks(recorder.keep, lambda tensor: tensor),
        sdpa_kernel(SDPBackend.MATH),
        recorder,
    ):
        model(**batch, use_cache=False).loss.backward()
    model.zero_grad()
    return recorder.flops


@contextmanager
def _places(model: PreTrainedModel, running: list[Place]) -> Iterator[None]:
    """Keep `running` the stack of places where the forward is."""
    architecture = architecture_of(model)
    modules: dict[nn.Module, Place] = {
        module: (TOWER, i)
        for i, module in enumerate(model.modules())
        if isinstance(module, GradientCheckpointingLayer)
    }
    modules |= {model.get_submodule(architecture.language_model): AROUND, head_of(model): HEAD}
    for i, layer in enumerate(decoder_layers_of(model)):
        modules[layer] = (MLP, i)
        for name, child in layer.named_children():
            if name in architecture.attention or "attention" in type(child).__name__.lower():
                modules[child] = (ATTENTION, i)
    with ExitStack() as hooks:
        for module, place in modules.items():
            enter = module.register_forward_pre_hook(lambda *_, at=place: running.append(at))
            leave = module.register_forward_hook(lambda *_: (running.pop(), None)[1])
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        yield


class TowerWatch:
    """How much the vision towers of a model see in its forwards, read from their layers' inputs.

    Attributes:
        width: Channels.
        layers: Of the towers.
    """

    def __init__(self, model: PreTrainedModel):
        layers = tower_layers_of(model) or [*projector_of(model).values()]
        self.width, self.layers = 0, max(1, len(layers))
        self._patches, self._pairs = 0, 0.0  # sums over layers
        for layer in layers:
            layer.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch._C._current_autograd_node():  # checkpointing runs the layer once more
            return
        hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        bounds = kwargs.get("cu_seqlens")  # of windows or pictures in one sequence
        tokens, self.width = hidden.shape[:-1].numel(), hidden.shape[-1]
        pairs: Any = tokens * hidden.shape[-2]
        if bounds is not None and hidden.numel() and int(bounds[-1]) == tokens:
            pairs = bounds.diff().double().square().sum()
        self._patches, self._pairs = self._patches + tokens, self._pairs + pairs

    def read(self) -> tuple[float, float]:
        """(tokens, class tokens included; pairs of them that see each other) since the last call,
        means of the layers."""
        means = self._patches / self.layers, float(self._pairs) / self.layers
        self._patches, self._pairs = 0, 0.0
        return means
