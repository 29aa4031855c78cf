"""The Sparse Training Scheme on a Hugging Face model: VTC and LDS for one training stage.

    scheme = sparsify(model, vtc=VTC("uniform", keep=0.25), total_steps=1000)
    scheme.begin_step(step)      # once per optimizer step, before its first micro-batch
    model(**batch).loss.backward()
    unsparsify(model)            # or `with sparsify(...) as scheme:`

Only a forward in training mode with labels is touched; all else goes to the model's own forward.
"""

import logging
import math
from contextlib import ExitStack
from functools import partial, update_wrapper
from inspect import isclass, signature

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sts.architectures import architecture_of, output_class
from sts.checks import expect
from sts.compression import Compression
from sts.draws import keyed_seed, keyed_torch_generator
from sts.lds.decision import Decision
from sts.lds.skipper import Skipper
from sts.lds.units import standing_in
from sts.loss import answer_loss
from sts.realised import Realised
from sts.schedule import keep_at, share_done
from sts.sequence import Batch, attended
from sts.settings import LDS, VTC
from sts.vtc import kind_of, wants

log = logging.getLogger(__name__)

WEIGHTS = "visual_token_compressor"  # the submodule of a VTC kind that has weights of its own
PASSED_ON = ("hidden_states", "attentions", "image_hidden_states")  # of the base model's output


class Scheme:
    """What `sparsify` puts onto a model. `begin_step` decides, forwards of that step follow."""

    def __init__(
        self, model: PreTrainedModel, vtc: VTC, lds: LDS, total_steps: int | None, seed: int
    ) -> None:
        self.model, self.vtc, self.lds = model, vtc, lds
        self.total_steps, self.seed = total_steps, seed
        self.steps_per_epoch: int | None = None
        self.attached = True
        self.architecture = architecture_of(model)
        self.language_model = model.get_submodule(self.architecture.language_model)
        self.skipper = Skipper(lds, self.language_model, self.architecture, seed)
        self.original = model.forward
        self.step: int | None = None
        self.keep = 1.0
        self._realised = Realised(len(self.skipper.layers))
        self._warned: set[str] = set()
        if "scores" in wants(vtc.kind):
            self.architecture.class_attention(model)  # fails now rather than in the first step

    def __enter__(self) -> "Scheme":
        return self

    def __exit__(self, *_: object) -> None:
        unsparsify(self.model)

    @property
    def decision(self) -> Decision:
        """What LDS decided for this step."""
        return self.skipper.decision

    @property
    def skipped(self) -> frozenset[int]:
        """Layers (0 = first) some of which is off for the whole step."""
        return self.skipper.skipped

    def begin_step(self, step: int) -> None:
        """Fix what optimizer step `step` (0 = first) keeps and skips.

        Call it on every rank: a measured depth is averaged over them. Raises ValueError for a step
        outside the stage.
        """
        last = math.inf if self.total_steps is None else self.total_steps - 1
        expect(0 <= step <= last, "step", step, f"0..{last} (total_steps={self.total_steps})")
        vtc, t = self.vtc, share_done(step, self.total_steps)
        self.keep = keep_at(t, vtc.keep, vtc.schedule, vtc.dense_tail)
        t = share_done(step, self.total_steps, self.lds.clock, self.steps_per_epoch)
        self.skipper.begin_step(step, t, self.warn_once)
        self.step = step
        self._realised = Realised(len(self.skipper.layers))

    def metrics(self) -> dict[str, object]:
        """What the forwards since `begin_step` really did, on this rank.

        keep_ratio: visual tokens that reached the language model / those there were. Means per
        sample: visual_tokens (reached), tokens (reached, padding and visual included),
        answer_tokens (logits computed). Of each layer: asked, the chance p_l by the formula;
        skipped, the share that was left out; work, its shares below 1 (lds.decision.SHARES).
        layers_run: decoder layers run forward, those run in part in part.
        """
        return self._realised.metrics(self.lds, self.decision)

    def state_dict(self) -> dict[str, object]:
        """All that later decisions depend on besides the settings. Not a collective operation.

        With several ranks, what was measured since the last `begin_step` is this rank's.
        """
        return {"step": self.step, **self.skipper.measured.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up a `state_dict`; call `begin_step` next. Raises ValueError for another depth."""
        self.skipper.measured.load_state_dict(state)

    def after_backward(self) -> None:
        """For a policy that looks at gradients: between the last backward of a step and the
        optimizer's. Others need no call."""
        self.skipper.measured.gradients(self.skipper.layers)

    def warn_once(self, text: str) -> None:
        """Log a warning, the same one only once."""
        if text not in self._warned:
            log.warning("sts: %s", text)
        self._warned.add(text)

    def training_forward(self, inputs: dict) -> object:
        """The outer forward of a training step, with the loss on answer tokens only."""
        if self.step is None:
            raise RuntimeError("call scheme.begin_step(step) before the forwards of each step")
        labels, num_items = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
        return_dict = inputs.pop("return_dict", True)
        inputs.pop("logits_to_keep", None)
        visual = self._visual_mask(inputs)
        batch = Batch(inputs, visual, labels, attended(inputs, visual))
        compression = self._compression() if self.keep < 1 else None
        stand_ins = self.skipper.stand_ins(self._realised.micro_batches)
        with ExitStack() as stack:
            if compression:
                stack.enter_context(compression.watching())
            enter = partial(self._enter_language_model, batch, compression)
            stack.enter_context(
                self.language_model.register_forward_pre_hook(enter, with_kwargs=True)
            )
            for hook in self.skipper.measuring(batch, stand_ins):
                stack.enter_context(hook)
            if stand_ins:
                layers = self.architecture.layers
                stack.enter_context(standing_in(self.language_model, layers, stand_ins))
            base = self.model.get_submodule(self.architecture.base)
            outputs = base(**inputs | {"use_cache": False, "return_dict": True})
        loss = answer_loss(self.model, outputs[0], batch.labels, num_items)
        self._realised.micro_batch(batch.labels, self.skipper.work(stand_ins))
        kind = output_class(self.model)
        output = kind(loss=loss, **{k: v for k, v in outputs.items() if k in PASSED_ON})
        return output if return_dict else output.to_tuple()

    def _visual_mask(self, inputs: dict) -> Tensor:
        """Where the image placeholders stand, [B, T]."""
        if inputs.get("input_ids") is None:
            raise ValueError(
                "input_ids=None: the scheme finds visual tokens by their placeholders, "
                "so pass input_ids rather than inputs_embeds in training"
            )
        return inputs["input_ids"] == self.model.config.image_token_id

    def _compression(self) -> Compression:
        """VTC of the next micro-batch."""
        kind = getattr(self.model, WEIGHTS, None) or kind_of(self.vtc.kind)
        key = (self.seed, self.step, self._realised.micro_batches, "tokens")
        generator = keyed_torch_generator(*key)
        return Compression(self.model, self.architecture, self.vtc, kind, self.keep, generator)

    def _enter_language_model(
        self, batch: Batch, compression: Compression | None, _: object, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        """Pre-hook of the language model: here the embeddings hold the visual tokens."""
        before = after = batch.visual.sum()
        if compression and (count := int(before)):
            kwargs, after = compression(batch, kwargs, count)
        self._realised.sequence(kwargs["inputs_embeds"], before, after)
        return args, kwargs

    def detach(self) -> None:
        """Let go of the model."""
        self.attached = False
        self.skipper.let_go()
        self.model._modules.pop(WEIGHTS, None)


def _forward(scheme: Scheme, /, *args, **kwargs) -> object:
    """The outer forward of a model with a scheme on it."""
    model = scheme.model
    if not (scheme.attached and model.training):
        return scheme.original(*args, **kwargs)
    inputs = signature(scheme.original).bind(*args, **kwargs).arguments
    inputs.update(inputs.pop("kwargs", {}))
    if inputs.get("labels") is None:
        scheme.warn_once("forward in training mode without labels: the scheme does not act")
        with scheme.skipper.paused():
            return scheme.original(*args, **kwargs)
    return scheme.training_forward(inputs)


def sparsify(
    model: PreTrainedModel,
    vtc: VTC | None = None,
    lds: LDS | None = None,
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    seed: int = 0,
) -> Scheme:
    """Train `model` sparsely for one stage of `total_steps` optimizer steps.

    Acts only in training mode with labels, where the output holds the loss and no logits: they are
    computed on answer tokens only. `sparsify(model)` alone does just that, so that a dense run is
    timed with the same loss. Call it before the optimizer is made, and before accelerate, DDP or
    the like wrap the model. A VTC kind with weights of its own becomes a submodule of the model
    until `unsparsify`. Raises ValueError for an unknown architecture, settings the model can't
    have, total_steps or steps_per_epoch missing where a schedule or clock needs it, or a model
    whose forward is wrapped already.
    """
    vtc, lds = vtc or VTC(), lds or LDS()
    expect(
        (total_steps is None and not (vtc.timed or lds.timed)) or (total_steps or 0) > 0,
        "total_steps",
        total_steps,
        "the number of optimizer steps of the stage (schedules and dense_tail are shares of it)",
    )
    expect(
        lds.clock == "steps" or (steps_per_epoch or 0) > 0,
        "steps_per_epoch",
        steps_per_epoch,
        f"the number of optimizer steps of an epoch, for LDS.clock={lds.clock!r}",
    )
    scheme = attach(model, vtc, lds, total_steps, seed)
    scheme.steps_per_epoch = steps_per_epoch
    return scheme


def attach(
    model: PreTrainedModel, vtc: VTC, lds: LDS, total_steps: int | None, seed: int
) -> Scheme:
    """`sparsify` for callers that set the scheme's total_steps and steps_per_epoch themselves,
    before the first step."""
    if "forward" in vars(model):
        raise ValueError(
            f"{type(model).__name__}.forward is already wrapped: call unsparsify(model) before a "
            "second sparsify, and sparsify before accelerator.prepare or a device map"
        )
    scheme = Scheme(model, vtc, lds, total_steps, seed)
    kind = kind_of(vtc.kind)
    if isclass(kind):
        weight = model.get_input_embeddings().weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(seed, WEIGHTS))
            model.add_module(WEIGHTS, kind(weight.shape[1]).to(weight))
    # Not a closure: a deep copy of the model must get a scheme of its own.
    model.forward = update_wrapper(partial(_forward, scheme), scheme.original)
    return scheme


def unsparsify(model: PreTrainedModel) -> None:
    """Give back the model as it was. Raises ValueError where no scheme is on it."""
    forward = vars(model).get("forward")
    inner = forward
    while inner is not None and getattr(inner, "func", None) is not _forward:
        inner = getattr(inner, "__wrapped__", None)
    if inner is None:
        raise ValueError(f"{type(model).__name__} has no scheme: sparsify(model) puts one on it")
    inner.args[0].detach()
    if inner is forward:
        del model.forward  # else another wrapper (accelerate's autocast) now calls the original
