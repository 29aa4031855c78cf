"""Where each Hugging Face architecture keeps what the scheme touches: one short entry each.

A file holds a family: `ARCHITECTURES`, whose keys are `model.config.model_type` of the
image-text-to-text class (the one with the head). A new architecture is one entry, or one file with
such a dict; tests/test_architectures.py runs over all of them.
"""

import pkgutil
from importlib import import_module
from inspect import signature
from typing import get_args

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from sts.architectures._base import Architecture, ClassAttention, Grid

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ClassAttention",
    "Grid",
    "architecture_of",
    "output_class",
]


def _families() -> list[dict[str, Architecture]]:
    """The entries of each file here."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [
        import_module(f"{__name__}.{name}").ARCHITECTURES
        for name in names
        if not name.startswith("_")
    ]


ARCHITECTURES: dict[str, Architecture] = {
    name: entry for family in _families() for name, entry in family.items()
}


def architecture_of(model: nn.Module) -> Architecture:
    """The entry of `model`. Raises ValueError, saying what an entry needs, for an unknown one."""
    name = getattr(getattr(model, "config", None), "model_type", None)
    entry = ARCHITECTURES.get(name)
    headed = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if not (entry and headed and _has(model, entry.language_model)):
        raise ValueError(
            f"{type(model).__name__} (model_type={name!r}) is not a known image-text-to-text model "
            f"with a language head; known: {', '.join(ARCHITECTURES)}. Pass the model itself, "
            "not a wrapper around it (DDP, FSDP, PEFT), or add an entry: "
            f"sts.architectures.ARCHITECTURES[{name!r}] = Architecture(grids=...), where `grids` "
            "says how the visual tokens of a batch lie, and the other fields say where base model, "
            "language model and decoder layers are if not at model, model.language_model, layers"
        )
    return entry


def _has(model: nn.Module, path: str) -> bool:
    try:
        return model.get_submodule(path) is not None
    except AttributeError:
        return False


def output_class(model: PreTrainedModel) -> type[ModelOutput]:
    """What the outer forward says that it returns."""
    annotation = signature(type(model).forward).return_annotation
    (found,) = [a for a in get_args(annotation) or [annotation] if a is not tuple]
    return found
