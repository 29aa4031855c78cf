"""Where a model keeps its parts: by the entry of its type, or where most models have them.

The parts are vision tower, projector, language model with its head. That of a parameter follows
from its name alone, so that it is the same on every rank, sharded or not, and on the `meta` device.
"""

import pkgutil
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from sts.architectures._base import Architecture
from sts.architectures._refused import REFUSED

ARCHITECTURES: dict[str, Architecture] = {
    name: entry
    for module in pkgutil.iter_modules([str(Path(__file__).parent)])
    if not module.name.startswith("_")
    for name, entry in import_module(f"sts.architectures.{module.name}").ARCHITECTURES.items()
}

PARTS = ("projector", "language_model", "vision_tower")
# What transformers calls the encoders of images, and, wherever it lies, what joins them to a
# language model (Qwen's merger lies in its tower)
TOWER = re.compile(r"(tower|visual|vision_model|vision_encoder|vqmodel)\.")
PROJECTOR = re.compile("projector|merger|connector")


def architecture_of(model: nn.Module) -> Architecture:
    """Where `model` keeps its parts, with every path filled in.

    Raises:
        ValueError: The model can't be carried, and why; or its parts are not where an entry says or
            where models usually have them.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    shown = f"{type(model).__name__} (model_type={name!r})"
    if name in REFUSED:
        raise ValueError(f"{shown} can't be trained with STS: {REFUSED[name]}")
    has_vision = name in ARCHITECTURES or getattr(config, "vision_config", None) is not None
    if head_of(model) is None or not has_vision:
        raise ValueError(
            f"{shown} is not an image-text-to-text model with a language head. Pass the one that "
            "has it (of AutoModelForImageTextToText)"
        )
    entry = ARCHITECTURES.get(name, Architecture())
    base = (model.base_model_prefix or "") if entry.base is None else entry.base
    language_model = entry.language_model or _path_of(model, _decoder(model))
    layers = entry.layers or _layers_of(model, language_model)
    if entry.base is None and not language_model.startswith(f"{base}."):
        base = ""
    if not layers or not _has(model, base):
        raise ValueError(
            f"{shown}: no list of decoder layers where most models have one. Add an entry: "
            f"sts.architectures.ARCHITECTURES[{name!r}] = Architecture(base=..., "
            "language_model=..., layers=...), paths in the model (sts/architectures/_base.py)"
        )
    return replace(entry, base=base, language_model=language_model, layers=layers)


def head_of(model: nn.Module) -> nn.Module | None:
    """The language head, the outer model's or that of the language model in it."""
    if not hasattr(model, "get_output_embeddings"):
        return None
    head = model.get_output_embeddings()
    return model.get_decoder().get_output_embeddings() if head is None else head


def _decoder(model: nn.Module) -> nn.Module:
    """The innermost module that calls itself a decoder: a language model without its head."""
    part = model.get_decoder()
    while hasattr(part, "get_decoder") and part.get_decoder() is not part:
        part = part.get_decoder()
    return part


def _path_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _layers_of(model: nn.Module, path: str) -> str | None:
    """The attribute of a language model that is a list of as many layers as its config says."""
    if not _has(model, path):
        return None
    language_model = model.get_submodule(path)
    config = getattr(language_model, "config", model.config).get_text_config()
    lists = [
        name
        for name, module in language_model.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    return lists[0] if len(lists) == 1 else None


def _has(model: nn.Module, path: str) -> bool:
    try:
        return model.get_submodule(path) is not None
    except AttributeError:
        return False


def part_finder(model: PreTrainedModel) -> Callable[[str], str]:
    """The function from the name of a parameter or module of `model` to its part, one of PARTS.

    The head belongs to the language model, and what is in neither it nor the tower is the
    projector: LLaVA-NeXT's `image_newline`, for one.
    """
    head = head_of(model)
    heads = [name for name, module in model.named_modules() if module is head]
    language = tuple(f"{path}." for path in (architecture_of(model).language_model, *heads))

    def part_of(name: str) -> str:
        if f"{name}.".startswith(language):
            return "language_model"
        in_tower = TOWER.search(f"{name}.") and not PROJECTOR.search(name)
        return "vision_tower" if in_tower else "projector"

    return part_of


def decoder_layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of the language model, the first one first."""
    return model.get_submodule(architecture_of(model).decoder_layers)


def tower_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path -> module of each vision tower; most models have one, Fuyu has none.

    A tower may hold the projector (Qwen's `visual.merger`).
    """
    part_of = part_finder(model)
    return _outermost(model, lambda path, _: part_of(path) == "vision_tower")


def tower_layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the vision towers, in their order."""
    part_of = part_finder(model)

    def is_stack(path: str, module: nn.Module) -> bool:
        return isinstance(module, nn.ModuleList) and part_of(path) == "vision_tower"

    return [layer for stack in _outermost(model, is_stack).values() for layer in stack]


def projector_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path -> module of the projector, the largest modules that hold nothing else: what they are
    called with comes from the vision tower."""
    part_of = part_finder(model)

    def is_projector(path: str, module: nn.Module) -> bool:
        if isinstance(module, nn.ModuleList):  # is never called itself
            return False
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        return bool(names) and all(part_of(name) == "projector" for name in names)

    return _outermost(model, is_projector)


def _outermost(
    model: PreTrainedModel, condition: Callable[[str, nn.Module], bool]
) -> dict[str, nn.Module]:
    """Path -> module that meets the condition and lies in no other that does."""
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        is_inside = any(path.startswith(f"{outer}.") for outer in modules)
        if not is_inside and condition(path, module):
            modules[path] = module
    return modules
