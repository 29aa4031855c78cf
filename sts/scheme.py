"""The Sparse Training Scheme on a Hugging Face model: VTC and LDS for one training stage.

    scheme = sparsify(model, vtc=VTC("uniform", keep=0.25), total_steps=1000)
    scheme.begin_step(step)      # once per optimizer step, before its first micro-batch
    model(**batch).loss.backward()
    unsparsify(model)            # or `with sparsify(...) as scheme:`

All of it hangs on the modules as hooks (hooks.py), and no forward is replaced. So whoever calls the
model or its base model, with whatever loss, trains sparsely, and gets the loss that is its own.
"""

import logging
import math
from collections.abc import Sequence
from inspect import isclass

import torch
from torch import nn
from transformers import PreTrainedModel

from sts.architectures import NO_LDS, NO_VTC, architecture_of
from sts.checks import expect, is_number
from sts.draws import keyed_seed
from sts.hooks import WEIGHTS, Hooks
from sts.lds.decision import Decision
from sts.lds.skipper import Skipper
from sts.realised import metrics_of
from sts.schedule import keep_at, share_done
from sts.settings import LDS, VTC
from sts.vtc import kind_of, wants

log = logging.getLogger(__name__)

SCHEME = "sparse_training_scheme"  # the model's attribute that is its scheme
DENSE_STEP = ("error", "warn")


class Scheme:
    """What `sparsify` puts onto a model. `begin_step` decides, forwards of that step follow."""

    def __init__(
        self, model: nn.Module, vtc: VTC | None, lds: LDS | None, seed: int, dense_step: str
    ) -> None:
        vtc, lds = VTC() if vtc is None else vtc, LDS() if lds is None else lds
        _check_arguments(model, vtc, lds, seed, dense_step)
        self.model = model_in(model)
        if SCHEME in vars(self.model):
            raise ValueError(
                f"{type(self.model).__name__} has a scheme already: call unsparsify(model) before "
                "a second sparsify"
            )
        if isclass(kind_of(vtc.kind)):
            accepted = f"the model itself: VTC kind {vtc.kind!r} has weights of its own, so "
            accepted += "sparsify before wrapping it"
            expect(self.model is model, "model", type(model).__name__, accepted)
        self.vtc, self.lds, self.seed, self.dense_step = vtc, lds, seed, dense_step
        self.total_steps: int | None = None
        self.steps_per_epoch: int | None = None
        self.step: int | None = None  # of the latest decision
        self.keep = 1.0  # the share of the visual tokens that this step keeps
        self.attached = False
        self._must_be_sparse = False  # the step, and nothing was said about it yet
        architecture = architecture_of(self.model)
        _check_type(self.model, vtc, lds)
        self.skipper = Skipper(lds, self.model, architecture, seed)
        self._hooks = Hooks(self.model, model, architecture, vtc, self.skipper, seed)
        if "scores" in wants(vtc.kind):
            architecture.class_attention(self.model)  # fails now rather than in the first step

    def __enter__(self) -> "Scheme":
        return self

    def __exit__(self, failure: type | None, *_: object) -> None:
        if self.attached:
            self.detach()
        if failure is None:
            self.check_step()

    @property
    def decision(self) -> Decision:
        """What LDS decided for this step."""
        return self.skipper.decision

    @property
    def skipped(self) -> frozenset[int]:
        """Layers (0 = first) some of which is off for the whole step."""
        return self.decision.layers

    def set_stage(self, total_steps: int | None, steps_per_epoch: int | None) -> None:
        """Set the optimizer steps of the stage and of an epoch; the stage begins anew.

        Raises:
            ValueError: They are no such numbers, or missing where a schedule or clock needs them.
        """
        for name, value in (("total_steps", total_steps), ("steps_per_epoch", steps_per_epoch)):
            is_count = value is None or is_number(value, int)
            expect(is_count, name, value, "a number of optimizer steps")
        is_needed = total_steps is not None or self.vtc.timed or self.lds.timed
        accepted = "the number of optimizer steps of the stage (schedules and dense_tail are "
        accepted += "shares of it)"
        expect(not is_needed or (total_steps or 0) > 0, "total_steps", total_steps, accepted)
        is_possible = self.lds.clock == "steps" or (steps_per_epoch or 0) > 0
        accepted = f"the number of optimizer steps of an epoch, for LDS.clock={self.lds.clock!r}"
        expect(is_possible, "steps_per_epoch", steps_per_epoch, accepted)
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        # what a training that broke off has left behind
        self._must_be_sparse = False
        self.skipper.measured.forget()

    def begin_step(self, step: int) -> None:
        """Fix what optimizer step `step` (0 = first) keeps and skips.

        Call it on every rank: a measured depth is averaged over them.

        Raises:
            ValueError: The step is outside the stage.
            RuntimeError: The step before was to be sparse and was not.
        """
        self.check_step()
        self.decide(step)
        self._must_be_sparse = self.keep < 1 or any(self.decision.chances)

    def decide(self, step: int) -> None:
        """`begin_step` for looking at decisions only: no forward has to follow."""
        if not self.attached:
            raise RuntimeError("this scheme is off its model: call sparsify(model, ...) again")
        is_step = is_number(step, int)
        expect(is_step, "step", step, "the number of the optimizer step, 0 = first")
        last = math.inf if self.total_steps is None else self.total_steps - 1
        expect(0 <= step <= last, "step", step, f"0..{last} (total_steps={self.total_steps})")
        vtc, t = self.vtc, share_done(step, self.total_steps)
        self.keep = keep_at(t, vtc.keep, vtc.schedule, vtc.dense_tail)
        t = share_done(step, self.total_steps, self.lds.clock, self.steps_per_epoch)
        self.skipper.begin_step(step, t)
        self.step, self._must_be_sparse = step, False
        self._hooks.begin_step(step, self.keep)

    def totals(self) -> list[float]:
        """Counts of what the forwards since `begin_step` really did, on this rank."""
        return self._hooks.realised.totals()

    def metrics(self, totals: Sequence[float] | None = None) -> dict[str, object]:
        """What the forwards since `begin_step` really did; none: of no samples.

        Args:
            totals: Those of all ranks, added up; by default this rank's.

        Returns:
            keep_ratio: Visual tokens that reached the language model / those there were.
            visual_tokens: That reached the language model, mean per sample.
            tokens: At the language model, padding and visual included, mean per sample.
            answer_tokens: Whose logits were computed, mean per sample.
            layers_run: Decoder layers run forward, those run in part in part.
            asked: Of each layer the chance p_l that it is skipped, by the formula.
            skipped: Of each layer the share that was left out.
            work: Of each layer its shares below 1 (lds.decision.SHARES).
        """
        return metrics_of(self.totals() if totals is None else totals, self.lds, self.decision)

    @property
    def forwards(self) -> tuple[int, int]:
        """The forwards since `begin_step` that recorded gradients, and those that did not."""
        return self._hooks.with_gradients, self._hooks.without_gradients

    @property
    def tokens(self) -> int:
        """At the language model since `begin_step`, on this rank, padding and visual included."""
        return self._hooks.realised.tokens

    def left_out_flops(self) -> float:
        """What the decoder layers did not do since `begin_step`, on this rank, by the usual rule of
        6 FLOPs a weight and token: 2 forward, 4 backward."""
        return self._hooks.realised.left_out_flops(self.skipper.weights())

    def check_step(self) -> None:
        """Raise RuntimeError, or warn as `dense_step` says, if the step was to leave something out
        and no forward of it was sparse."""
        self._hooks.close()
        hooks = self._hooks
        if not self._must_be_sparse or hooks.realised.micro_batches or hooks.failed:
            return
        self._must_be_sparse = False
        text = (
            f"no forward of step {self.step} was sparse: none in training mode with gradients went "
            f"through the language model of this {type(self.model).__name__}. "
        )
        if hooks.without_gradients:
            text += "Has no backward computed again what was run without gradients (checkpointing)?"
        else:
            text += (
                "Is another model trained, or a copy of it, or did something replace its modules?"
            )
        text += " (dense_step='warn' goes on)"
        if self.dense_step == "error":
            raise RuntimeError(text)
        log.warning("sts: %s", text)

    def state_dict(self) -> dict[str, object]:
        """All that later decisions depend on besides the settings.

        Not a collective operation: what was measured since the last `begin_step` is this rank's.
        """
        return {"step": self.step, **self.skipper.measured.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up a `state_dict`; call `begin_step` next.

        Raises:
            ValueError: It is no such state, or one of another LDS depth or number of layers.
        """
        names = {"step", "average", "sums"}
        is_state = isinstance(state, dict) and names <= state.keys()
        accepted = f"a state_dict() of a scheme, with {', '.join(sorted(names))}"
        expect(is_state, "state", state, accepted)
        self.skipper.measured.load_state_dict(state)

    def after_backward(self) -> None:
        """Measure gradients, for a depth that looks at them; check that the step was sparse.

        Call it between the last backward of a step and the optimizer's step. Only such a depth
        needs the call.
        """
        self.check_step()
        self.skipper.measured.gradients(self.skipper.layers)

    def attach(self) -> "Scheme":
        """Hang the scheme on its model, with the weights of a VTC kind that has any."""
        kind = kind_of(self.vtc.kind)
        if isclass(kind):
            weight = self.model.get_input_embeddings().weight
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(keyed_seed(self.seed, WEIGHTS))
                self.model.add_module(WEIGHTS, kind(weight.shape[1]).to(weight))
        self._hooks.attach()
        vars(self.model)[SCHEME] = self  # a plain attribute, no part of the model
        self.attached = True
        return self

    def detach(self) -> None:
        """Let go of the model."""
        self.attached = False
        self._hooks.detach()
        self.model._modules.pop(WEIGHTS, None)
        del vars(self.model)[SCHEME]


def _check_arguments(
    model: object, vtc: object, lds: object, seed: object, dense_step: object
) -> None:
    """Raise ValueError for a wrong argument, and for a kind or policy that is set to do nothing."""
    shown = [type(x).__name__ if isinstance(x, nn.Module) else x for x in (vtc, lds)]
    expect(isinstance(vtc, VTC), "vtc", shown[0], "a VTC(...), before the LDS(...)")
    expect(isinstance(lds, LDS), "lds", shown[1], "an LDS(...), after the VTC(...)")
    expect(is_number(seed, int), "seed", seed, "a whole number")
    expect(isinstance(model, nn.Module), "model", type(model).__name__, "a model of transformers")
    expect(dense_step in DENSE_STEP, "dense_step", dense_step, f"one of {DENSE_STEP}")
    acts = vtc.kind == "none" or vtc.keep < 1
    expect(acts, "VTC.keep", vtc.keep, f"less than 1: VTC.kind={vtc.kind!r} does nothing else")
    acts = lds.policy == "none" or lds.rate > 0
    expect(acts, "LDS.rate", lds.rate, f"more than 0: LDS.policy={lds.policy!r} does nothing")


def _check_type(model: PreTrainedModel, vtc: VTC, lds: LDS) -> None:
    """Raise ValueError for a half of the scheme, or outputs, that this model can't have."""
    name, is_dict = model.config.model_type, model.config.return_dict
    accepted = "True, as most types of transformers fail else (a forward takes return_dict=False)"
    expect(is_dict, "config.return_dict", is_dict, accepted)
    is_carried = name not in NO_VTC or vtc.keep == 1
    expect(is_carried, "VTC.keep", vtc.keep, f"1.0 for {name!r}: {NO_VTC.get(name)}")
    is_carried = name not in NO_LDS or lds.rate == 0
    expect(is_carried, "LDS.rate", lds.rate, f"0.0 for {name!r}: {NO_LDS.get(name)}")
    token = getattr(model.config, "image_token_id", None)
    has_token = isinstance(token, int) or vtc.keep == 1
    expect(has_token, "config.image_token_id", token, "the id of image placeholders, for VTC")


def model_in(model: nn.Module) -> nn.Module:
    """The model itself in what PEFT, DDP, torch.compile or DeepSpeed made of it."""
    while True:
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(inner, nn.Module):
            model = inner
        else:
            return model


def sparsify(
    model: PreTrainedModel,
    vtc: VTC | None = None,
    lds: LDS | None = None,
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    seed: int = 0,
    dense_step: str = "error",
) -> Scheme:
    """Train `model` sparsely for one stage of `total_steps` optimizer steps.

    Acts in training mode, as dropout does, with gradients or without, but not on generation. With
    labels the output holds the loss and no logits: these are computed before answer tokens only, if
    forward and loss are those of transformers and the loss is the same then. `sparsify(model)` does
    just that, so that a dense run is timed with the same loss.

    PEFT, accelerate, DDP, FSDP2 or TRL may come before or after it. A VTC kind with weights of its
    own comes before the optimizer and all of them: it is a submodule of the model until
    `unsparsify`.

    Args:
        model: An image-text-to-text model of transformers, or what wraps it.
        vtc: Visual token compression; none by default.
        lds: Layer dynamic skipping; none by default.
        total_steps: Optimizer steps of the stage, for schedules and `dense_tail`.
        steps_per_epoch: Optimizer steps of an epoch, for LDS with its clock in epochs.
        seed: Of everything that is drawn, together with the step.
        dense_step: `error` or `warn` where no forward of a step was sparse.

    Raises:
        ValueError: The model can't be carried, can't have these settings, or has a scheme; or
            `total_steps` or `steps_per_epoch` is missing where a schedule or clock needs it.
    """
    scheme = Scheme(model, vtc, lds, seed, dense_step)
    scheme.set_stage(total_steps, steps_per_epoch)
    return scheme.attach()


def unsparsify(model: nn.Module) -> None:
    """Give back the model as it was, bit for bit in what it computes.

    Raises:
        ValueError: No scheme is on it.
    """
    inner = model_in(model)
    if SCHEME not in vars(inner):
        raise ValueError(f"{type(inner).__name__} has no scheme: sparsify(model) puts one on it")
    vars(inner)[SCHEME].detach()
