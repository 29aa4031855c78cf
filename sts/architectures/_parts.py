"""The parts of an image-text-to-text model: vision tower, projector, language model with its head.

A parameter's part follows from its name alone, so that it is the same on every rank, sharded or
not, and on the `meta` device.
"""

import re
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from sts.architectures._lookup import architecture_of, head_of

PARTS = ("projector", "language_model", "vision_tower")
# What transformers calls the encoders of images, and, wherever it lies, what joins them to a
# language model (Qwen's merger lies in its tower)
TOWER = re.compile(r"(tower|visual|vision_model|vision_encoder|vqmodel)\.")
PROJECTOR = re.compile("projector|merger|connector")


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
