"""Losses that compare a sparse forward with another one, as far as a Trainer's arguments show it.

Both forwards have to leave out the same. A second forward of the same model, step and inputs does:
with PEFT the reference of DPO or KTO is such a one, as it is the same model without its adapters.
A reference or a teacher that is another model, and log-probs of another step, are dense or drawn
otherwise, and a loss would take the difference for one of the weights.
"""

from typing import Any

from torch import nn

from sts.checks import expect
from sts.lds import UNITS
from sts.settings import LDS, VTC
from sts.vtc import wants

# Classes of TRL 1.16 whose arguments don't tell: with a reference, or with log-probs of a server
WITH_REFERENCE = {"OnlineDPOConfig"}
NEVER = {"A2POConfig", "AsyncGRPOConfig"}


def check_loss(args: Any, model: nn.Module, vtc: VTC, lds: LDS) -> None:
    """Check the arguments of a Trainer of transformers or TRL.

    Raises:
        ValueError: Its loss compares the sparse forward with one that has another sparsity.
    """
    if vtc.keep == 1 and not lds.rate:
        return
    values, name = vars(args), type(args).__name__
    classes = {each.__name__ for each in type(args).__mro__}
    is_dense = classes & NEVER or any(map(_has_teacher, type(args).__mro__))
    accepted = "a loss of the trained model alone: a teacher or reference beside it is dense"
    expect(not is_dense, "the Trainer's arguments", name, accepted)
    is_before = values.get("precompute_ref_log_probs", False)
    accepted = "False: log-probs of before the training are those of the dense model"
    expect(not is_before, f"{name}.precompute_ref_log_probs", is_before, accepted)
    has_beta = "sync_ref_model" in values and values.get("beta") != 0
    has_reference = has_beta or "precompute_ref_log_probs" in values or classes & WITH_REFERENCE
    accepted = "one with PEFT adapters (peft_config=LoraConfig(...)), whose reference is itself "
    accepted += "without them, as another model would be dense; or a loss without a reference"
    expect(not has_reference or _has_adapters(model), f"model of {name}", _type(model), accepted)
    if "num_iterations" in values:
        _check_rollouts(values, name, vtc, lds, has_beta)


def _check_rollouts(values: dict, name: str, vtc: VTC, lds: LDS, has_reference: bool) -> None:
    """GRPO and RLOO: completions, and the log-probs of them, are used for some steps."""
    parts = {key: values[key] for key in ("num_iterations", "steps_per_generation")}
    every = values["num_iterations"] * values["steps_per_generation"]
    accumulation = values["gradient_accumulation_steps"]
    accepted = f"a product that divides gradient_accumulation_steps={accumulation}: log-probs of "
    accepted += "another step have another sparsity"
    expect(accumulation % every == 0, f"{name}: {parts}", every, accepted)
    # RLOO always compares; these log-probs are of other micro-batches than those trained on
    is_rloo = "normalize_advantages" in values
    compares = has_reference or is_rloo or values["use_vllm"]
    by_unit = lds.rate > 0 and not UNITS[lds.unit].drawn_by_step
    accepted = "one that draws nothing, as uniform" if not by_unit else "layer or backward"
    drawn = ("LDS.unit", lds.unit) if by_unit else ("VTC.kind", vtc.kind)
    is_drawn = by_unit or (vtc.keep < 1 and "generator" in wants(vtc.kind))
    accepted += f": {name} compares with log-probs of other micro-batches, which draw otherwise"
    expect(not (compares and is_drawn), *drawn, accepted)


def check_references(args: Any, forwards: int, references: int) -> None:
    """Check a step of DPO or KTO by its forwards with gradients, and those without.

    Raises:
        ValueError: The reference was another model, as a `ref_model` given beside adapters is.
    """
    values, name = vars(args), type(args).__name__
    # KTO's own loss has the policy and the reference look at mismatched completions too
    each = 3 if values.get("loss_type") == "kto" else 1
    is_itself = "precompute_ref_log_probs" not in values or references >= each * forwards
    accepted = f"{each * forwards} of the trained model, which needs no ref_model beside its "
    accepted += "adapters: another model is dense"
    expect(is_itself, f"{name}: reference forwards of a step", references, accepted)


def _has_teacher(kind: type) -> bool:
    """Whether a class of TRL has arguments for a teacher."""
    names = vars(kind).get("__annotations__", ())
    is_of_trl = kind.__module__.partition(".")[0] == "trl"
    return is_of_trl and any(name.startswith("teacher_") for name in names)


def _has_adapters(model: nn.Module) -> bool:
    """Whether PEFT wraps the model, perhaps below what wraps it for several processes."""
    return hasattr(getattr(model, "module", model), "get_base_model")


def _type(model: nn.Module) -> str:
    return type(getattr(model, "module", model)).__name__
