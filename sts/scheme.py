"""The Sparse Training Scheme on a Hugging Face model: VTC and LDS for one training stage.

    scheme = sparsify(model, vtc=VTC("uniform", keep=0.25), total_steps=1000)
    scheme.begin_step(step)      # once per optimizer step, before its first micro-batch
    model(**batch).loss.backward()
    unsparsify(model)            # or `with sparsify(...) as scheme:`

It acts on forwards in training mode that record gradients, and on nothing else. All of it hangs on
the modules as hooks, and no forward is replaced: at the language model tokens are taken out and
layers are skipped, and the hidden states leave it as long as the sequence was. So whoever calls the
model or its base model, with whatever loss, trains sparsely, and gets the loss that is its own.
"""

import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import isclass, signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sts.architectures import NO_LDS, NO_VTC, architecture_of
from sts.checks import expect
from sts.compression import Compression
from sts.draws import keyed_seed, keyed_torch_generator
from sts.lds.decision import Decision
from sts.lds.skipper import Skipper
from sts.lds.units import with_replacements
from sts.loss import answer_keywords, before_targets, needs_only_answers
from sts.realised import Realised
from sts.schedule import keep_at, share_done
from sts.sequence import Batch, not_padding, take
from sts.settings import LDS, VTC
from sts.vtc import kind_of, wants

log = logging.getLogger(__name__)

SCHEME = "sparse_training_scheme"  # the model's attribute that is its scheme
WEIGHTS = "visual_token_compressor"  # the submodule of a VTC kind that has weights of its own
DENSE_STEP = ("error", "warn")
MEDIA = ("image", "video")
# What the forwards of a model said, whether they see the answers alone: asked once, as it costs a
# few tokens' logits
_ASKED: WeakKeyDictionary[nn.Module, dict[tuple, bool]] = WeakKeyDictionary()


@dataclass
class Call:
    """A forward under way. inputs: of the model, by name. alone: whether the model's head sees the
    answers alone, which then are after (rows, places). restored: what the base model is to get
    instead of what the model's forward was given. tokens, visual: see Realised. stack: what is to
    be undone when the language model returns."""

    entered: nn.Module
    inputs: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    restored: dict[str, Any] = field(default_factory=dict)
    places: tuple[Tensor, ...] = ()
    compression: Compression | None = None
    batch: Batch | None = None
    replacements: dict = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    visual: tuple[Tensor, ...] = ()
    stack: ExitStack = field(default_factory=ExitStack)


class Scheme:
    """What `sparsify` puts onto a model. `begin_step` decides, forwards of that step follow."""

    def __init__(
        self,
        model: PreTrainedModel,
        vtc: VTC,
        lds: LDS,
        total_steps: int | None,
        seed: int,
        dense_step: str,
    ) -> None:
        expect(dense_step in DENSE_STEP, "dense_step", dense_step, f"one of {DENSE_STEP}")
        asks = vtc.kind == "none" or vtc.keep < 1
        expect(asks, "VTC.keep", vtc.keep, f"less than 1: VTC.kind={vtc.kind!r} does nothing else")
        asks = lds.policy == "none" or lds.rate > 0
        expect(asks, "LDS.rate", lds.rate, f"more than 0: LDS.policy={lds.policy!r} does nothing")
        self.model, self.vtc, self.lds = model, vtc, lds
        self.total_steps, self.seed, self.dense_step = total_steps, seed, dense_step
        self.steps_per_epoch: int | None = None
        self.attached = True
        self.architecture = architecture_of(model)
        self.language_model = model.get_submodule(self.architecture.language_model)
        self.skipper = Skipper(lds, self.language_model, self.architecture, seed)
        self._text_config = model.config.get_text_config()
        self.step: int | None = None
        self._begun = False
        self.keep = 1.0
        self._realised = Realised(len(self.skipper.layers))
        self._warned: set[str] = set()
        self._call: Call | None = None
        name = model.config.model_type
        can = name not in NO_VTC or vtc.keep == 1
        expect(can, "VTC.keep", vtc.keep, f"1.0 for {name!r}: {NO_VTC.get(name)}")
        can = name not in NO_LDS or lds.rate == 0
        expect(can, "LDS.rate", lds.rate, f"0.0 for {name!r}: {NO_LDS.get(name)}")
        token = getattr(model.config, "image_token_id", None)
        known = isinstance(token, int) or vtc.keep == 1
        expect(known, "config.image_token_id", token, "the id of image placeholders, for VTC")
        if "scores" in wants(vtc.kind):
            self.architecture.class_attention(model)  # fails now rather than in the first step

    def __enter__(self) -> "Scheme":
        return self

    def __exit__(self, failure: type | None, *_: object) -> None:
        unsparsify(self.model)
        if failure is None:
            self.check_step()

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
        outside the stage, RuntimeError if the step before was to be sparse and was not.
        """
        self.check_step()
        self.decide(step)
        self._begun = True

    def decide(self, step: int) -> None:
        """`begin_step` for looking at decisions alone: no forward has to follow."""
        if not self.attached:
            raise RuntimeError("this scheme is off its model: call sparsify(model, ...) again")
        expect(_whole(step), "step", step, "the number of the optimizer step, 0 = first")
        last = math.inf if self.total_steps is None else self.total_steps - 1
        expect(0 <= step <= last, "step", step, f"0..{last} (total_steps={self.total_steps})")
        vtc, t = self.vtc, share_done(step, self.total_steps)
        self.keep = keep_at(t, vtc.keep, vtc.schedule, vtc.dense_tail)
        t = share_done(step, self.total_steps, self.lds.clock, self.steps_per_epoch)
        self.skipper.begin_step(step, t, self.warn_once)
        self.step, self._begun = step, False
        self._realised = Realised(len(self.skipper.layers))

    def metrics(self) -> dict[str, object]:
        """What the forwards since `begin_step` really did, on this rank; none: of no samples.

        keep_ratio: visual tokens that reached the language model / those there were. Means per
        sample: visual_tokens (reached), tokens (reached, padding and visual included),
        answer_tokens (logits computed). Of each layer: asked, the chance p_l by the formula;
        skipped, the share that was left out; work, its shares below 1 (lds.decision.SHARES).
        layers_run: decoder layers run forward, those run in part in part.
        """
        return self._realised.metrics(self.lds, self.decision)

    @property
    def asks(self) -> bool:
        """Whether this step is to leave anything out."""
        return self.keep < 1 or any(self.decision.chances)

    def check_step(self) -> None:
        """Raise RuntimeError, or warn as `dense_step` says, if the step asked for something and no
        forward of it was sparse."""
        if not (self._begun and self.asks) or self._realised.micro_batches:
            return
        self._begun = False  # said once
        text = (
            f"no forward of step {self.step} was sparse: none in training mode with gradients went "
            f"through the language model of this {type(self.model).__name__}. Is another model "
            "trained, or a copy of it, or did something replace its modules? (dense_step='warn' "
            "goes on)"
        )
        if self.dense_step == "error":
            raise RuntimeError(text)
        log.warning("sts: %s", text)

    def state_dict(self) -> dict[str, object]:
        """All that later decisions depend on besides the settings. Not a collective operation.

        With several ranks, what was measured since the last `begin_step` is this rank's.
        """
        return {"step": self.step, **self.skipper.measured.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up a `state_dict`; call `begin_step` next. Raises ValueError for another depth, or
        what is no such state."""
        names = {"step", "average", "sums"}
        fits = isinstance(state, dict) and names <= state.keys()
        expect(fits, "state", state, f"a state_dict() of a scheme, with {', '.join(sorted(names))}")
        self.skipper.measured.load_state_dict(state)

    def after_backward(self) -> None:
        """For a policy that looks at gradients: between the last backward of a step and the
        optimizer's. Others need no call, but learn here that no forward of the step was sparse."""
        self.check_step()
        self.skipper.measured.gradients(self.skipper.layers)

    def warn_once(self, text: str) -> None:
        """Log a warning, the same one only once."""
        if text not in self._warned:
            log.warning("sts: %s", text)
        self._warned.add(text)

    # ---- the hooks, from the outer model inwards and back ---------------------------------------

    def attach(self) -> None:
        """Hang the scheme on its model."""
        names, model = self.architecture, self.model
        inner = [(self.language_model, self._enter_language_model, self._leave_language_model)]
        if names.base:
            inner.insert(0, (model.get_submodule(names.base), self._enter_base, self._leave_base))
        self._handles = []
        for module, enter, leave in ((model, self._enter_model, self._leave_model), *inner):
            self._handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, with_kwargs=True, always_call=True),
            ]
        vars(model)[SCHEME] = self  # a plain attribute, no part of the model

    def detach(self) -> None:
        """Let go of the model."""
        self.attached = False
        for handle in self._handles:
            handle.remove()
        self.skipper.remove_hooks()
        self.model._modules.pop(WEIGHTS, None)
        del vars(self.model)[SCHEME]

    def _acts(self) -> bool:
        """Whether a forward that begins now is one that trains."""
        if not (self.model.training and torch.is_grad_enabled()):
            return False
        if self.step is None:
            raise RuntimeError("call scheme.begin_step(step) before the forwards of each step")
        return True

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any] | None:
        """The inputs of `module` by name, with a call under way; None: the scheme does not act."""
        if getattr(module, "_is_replica", False):
            raise RuntimeError("nn.DataParallel copies the model to threads: use DDP (torchrun)")
        if self._call and self._call.entered is module:  # left by what no hook sees, as Ctrl-C
            self._end()
        if self._call is None:
            if not self._acts():
                return None
            self._call = Call(module)
            if self.keep < 1:
                self._call.compression = self._compression()
                self._call.stack.enter_context(self._call.compression.watching())
        if args:
            names = list(signature(type(module).forward).parameters)[1:]  # without self
            kwargs = dict(zip(names, args, strict=False)) | kwargs
        if module is not self.model:
            kwargs = self._restore(kwargs)
        if module is not self.language_model:
            self._call.inputs |= kwargs
        return kwargs

    def _end(self) -> None:
        """The call is over."""
        call, self._call = self._call, None
        call.stack.close()

    def _enter_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """The outer forward, which may be shown the answers alone."""
        inputs = self._begin(model, args, kwargs)
        labels = None if inputs is None else inputs.get("labels")
        if labels is None or inputs.get("shift_labels") is not None:
            return None
        kind = type(labels).__name__
        expect(isinstance(labels, Tensor), "labels", kind, "a tensor [batch, tokens]")
        expect(labels.ndim == 2, "labels.shape", list(labels.shape), "[batch, tokens]")
        expect(labels.dtype == torch.long, "labels.dtype", str(labels.dtype), "torch.int64")
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is not None:
            expected = list(tokens.shape[:2])
            expect(list(labels.shape) == expected, "labels.shape", list(labels.shape), expected)
        if not self._answers_alone(inputs):
            return None
        call = self._call
        call.alone = True
        call.restored = {name: inputs.get(name) for name in ("labels", "attention_mask")}
        call.places = before_targets(labels)
        shown = inputs | answer_keywords(labels, *call.places)
        shown.pop("logits_to_keep", None)
        if self._routes(inputs):
            # what balances experts looks at the mask, which is as long as the whole sequence
            shown["attention_mask"] = None
        return (), shown

    def _answers_alone(self, inputs: dict[str, Any]) -> bool:
        """Whether the loss is the same if the model's head sees the answers alone."""
        forward = getattr(self.model.forward, "__func__", self.model.forward)
        key = (forward, self.model.loss_function, frozenset(inputs))
        said = _ASKED.setdefault(self.model, {})
        if key not in said:
            path = self.architecture.base or self.architecture.language_model
            said[key] = needs_only_answers(self.model, path, inputs)
            if not said[key]:
                log.info("sts: logits are computed for every token, as this forward asks for them")
        return said[key]

    def _routes(self, inputs: dict[str, Any]) -> bool:
        """Whether the outer forward balances experts by what their routers said."""
        asked = inputs.get("output_router_logits")
        if asked is None:
            asked = getattr(self._text_config, "output_router_logits", False)
        return bool(asked)

    def _enter_base(self, base: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """The base model, which may be called by itself, as TRL does."""
        inputs = self._begin(base, args, kwargs)
        return None if inputs is None else ((), inputs)

    def _restore(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords as the outer forward would have given them, had it not been shown otherwise."""
        restored, self._call.restored = self._call.restored, {}
        if self._call.alone:
            kwargs = {name: value for name, value in kwargs.items() if name != "shift_labels"}
        return kwargs | {name: value for name, value in restored.items() if name in kwargs}

    def _enter_language_model(
        self, language_model: nn.Module, args: tuple, kwargs: dict
    ) -> tuple | None:
        """The language model: here the embeddings hold the visual tokens."""
        kwargs = self._begin(language_model, args, kwargs)
        if kwargs is None:
            return None
        call = self._call
        if kwargs.get("inputs_embeds") is None:
            embed = self.model.get_input_embeddings()
            kwargs = kwargs | {"inputs_embeds": embed(kwargs["input_ids"]), "input_ids": None}
        if kwargs.get("past_key_values") is None and call.inputs.get("position_ids") is None:
            # A cache is of no use here. Where positions are given it stays: without one,
            # transformers reads restarts among them as packed sequences.
            kwargs = kwargs | {"use_cache": False}
        media = self._media(call.inputs, kwargs["inputs_embeds"])
        image, *video = media.values()
        visual = image | video[0] if video else image
        mask = not_padding(call.inputs, visual)
        call.batch = Batch(call.inputs, media, visual, mask)
        before = after = visual.sum()
        if call.compression and (count := int(before)):
            kwargs, after = call.compression(call.batch, kwargs, count)
        if not self._realised.micro_batches:
            self.skipper.drop_zero_gradients()
        call.tokens = list(kwargs["inputs_embeds"].shape[:2])
        call.visual = (before, after)
        call.replacements = self.skipper.replacements(self._realised.micro_batches)
        parts = call.replacements and not self.skipper.unit.drawn_by_step
        accepted = f"unset for LDS unit {self.lds.unit!r}: experts see other tokens in each layer"
        expect(not (parts and self._routes(call.inputs)), "output_router_logits", True, accepted)
        for hook in self.skipper.measuring_hooks(call.batch, call.replacements):
            call.stack.enter_context(hook)
        if call.replacements:
            name = self.architecture.layers
            call.stack.enter_context(
                with_replacements(self.language_model, name, call.replacements)
            )
        return (), kwargs

    def _media(self, inputs: dict[str, Any], embeddings: Tensor) -> dict[str, Tensor]:
        """Where the placeholders of each medium that has any stand, [B, T]."""
        ids, where = inputs.get("input_ids"), {}
        for medium in MEDIA:
            token = getattr(self.model.config, f"{medium}_token_id", None)
            if not isinstance(token, int) or token in where:
                continue
            if ids is not None:
                where[token] = medium, ids == token
            elif inputs.get("inputs_embeds") is not None:  # as transformers does
                table = self.model.get_input_embeddings()
                one = table(torch.tensor([token], device=embeddings.device))
                where[token] = medium, (inputs["inputs_embeds"] == one).all(-1)
        if where:
            return dict(where.values())
        nowhere = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        return {"image": nowhere}

    def _compression(self) -> Compression:
        """VTC of the next micro-batch."""
        kind = getattr(self.model, WEIGHTS, None) or kind_of(self.vtc.kind)
        key = (self.seed, self.step, self._realised.micro_batches, "tokens")
        generator = keyed_torch_generator(*key)
        return Compression(self.model, self.architecture, self.vtc, kind, self.keep, generator)

    def _leave_language_model(
        self, language_model: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> Any:
        """Back to as many hidden states as there were tokens, or those before the answers."""
        call = self._call
        if call is None or output is None or call.batch is None:
            return self._left(language_model)
        call.stack.close()
        hidden = output[0]
        if list(hidden.shape[:2]) != call.tokens:
            raise RuntimeError(
                f"{type(language_model).__name__} returned hidden states {list(hidden.shape)} for "
                f"{call.tokens} tokens: do its decoder layers return something else than one "
                "tensor? LDS can't stand in for them"
            )
        work = self.skipper.work(call.replacements)
        batch, call.batch = call.batch, None
        if call.alone:
            row, place = (x.to(hidden.device) for x in call.places)
            place = place if batch.shows is None else batch.shows[row, place]
            shown = hidden.flatten(0, 1).index_select(0, row * hidden.shape[1] + place)[None]
        else:
            shown = hidden if batch.shows is None else take(hidden, batch.shows)
        self._realised.micro_batch(call.tokens, call.visual, shown.shape[:2].numel(), work)
        output = _with(output, shown, batch, self._routed(output, batch, call.alone))
        self._left(language_model)
        return output

    def _routed(self, output: Any, batch: Batch, alone: bool) -> tuple | None:
        """What the routers said of real tokens, a tensor [tokens, experts] a layer; None: nothing
        to change. Raises ValueError where the loss would read it wrongly."""
        said = None if isinstance(output, tuple) else getattr(output, "router_logits", None)
        if not said or not self._routes(batch.inputs):
            return None
        accepted = "unset: experts can't be balanced over shortened sequences in this forward"
        expect(alone or batch.shows is None, "output_router_logits", True, accepted)
        if not alone:
            return None
        real = batch.mask.flatten()
        return tuple(None if x is None else x.flatten(0, -2)[real] for x in said)

    def _left(self, module: nn.Module) -> None:
        """The call is over if it began at this module."""
        if self._call and self._call.entered is module:
            self._end()

    def _leave_base(self, base: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._left(base)

    def _leave_model(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """No logits where they would be those of the answers alone."""
        alone = self._call is not None and self._call.alone
        self._left(model)
        if not alone or output is None:
            return None
        if isinstance(output, tuple):  # loss, logits, ...
            return (output[0], *output[2:])
        return type(output)(**{name: x for name, x in output.items() if name != "logits"})


def _with(output: Any, hidden: Tensor, batch: Batch, routed: tuple | None) -> Any:
    """The language model's output with other last hidden states [B, T, D]; those in between, if
    they were asked for, for as many tokens as there were."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    between = getattr(output, "hidden_states", None)
    if between and batch.shows is not None:
        output.hidden_states = tuple(x if x is None else take(x, batch.shows) for x in between)
    if routed is not None:
        output.router_logits = routed
    return output


def model_in(model: nn.Module) -> nn.Module:
    """The model itself in what PEFT, DDP, torch.compile or DeepSpeed made of it."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(
            inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module
        ):
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

    Acts on forwards in training mode with gradients. With labels the output holds the loss and no
    logits, which are computed before answer tokens only, if the model's own forward has the same
    loss then. `sparsify(model)` alone does just that, so that a dense run is timed with the same
    loss. PEFT, accelerate, DDP, FSDP2 or TRL may come before or after it; a VTC kind with weights
    of its own, which becomes a submodule of the model until `unsparsify`, comes before the
    optimizer and all of them. dense_step: `error` or `warn` where no forward of a step was sparse.
    Raises ValueError for a model that can't be carried, settings that it can't have, total_steps or
    steps_per_epoch missing where a schedule or clock needs it, or a model that has a scheme.
    """
    vtc, lds = VTC() if vtc is None else vtc, LDS() if lds is None else lds
    _check_kinds(vtc, lds)
    for name, value in (("total_steps", total_steps), ("steps_per_epoch", steps_per_epoch)):
        expect(value is None or _whole(value), name, value, "a number of optimizer steps")
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
    scheme = attach(model, vtc, lds, total_steps, seed, dense_step)
    scheme.steps_per_epoch = steps_per_epoch
    return scheme


def _check_kinds(vtc: object, lds: object) -> None:
    vtc, lds = (type(x).__name__ if isinstance(x, nn.Module) else x for x in (vtc, lds))
    expect(isinstance(vtc, VTC), "vtc", vtc, "a VTC(...), before the LDS(...)")
    expect(isinstance(lds, LDS), "lds", lds, "an LDS(...), after the VTC(...)")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def attach(
    model: nn.Module, vtc: VTC, lds: LDS, total_steps: int | None, seed: int, dense_step: str
) -> Scheme:
    """`sparsify` for callers that set the scheme's total_steps and steps_per_epoch themselves,
    before the first step."""
    _check_kinds(vtc, lds)
    expect(_whole(seed), "seed", seed, "a whole number")
    expect(isinstance(model, nn.Module), "model", type(model).__name__, "a model of transformers")
    wrapped, model = model, model_in(model)
    if SCHEME in vars(model):
        raise ValueError(
            f"{type(model).__name__} has a scheme already: call unsparsify(model) before a second "
            "sparsify"
        )
    scheme = Scheme(model, vtc, lds, total_steps, seed, dense_step)
    kind = kind_of(vtc.kind)
    if isclass(kind):
        expect(wrapped is model, "model", type(wrapped).__name__, _BEFORE.format(vtc.kind))
        weight = model.get_input_embeddings().weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(seed, WEIGHTS))
            model.add_module(WEIGHTS, kind(weight.shape[1]).to(weight))
    scheme.attach()
    return scheme


_BEFORE = "the model itself: VTC kind {!r} has weights of its own, so sparsify before wrapping it"


def unsparsify(model: nn.Module) -> None:
    """Give back the model as it was. Raises ValueError where no scheme is on it."""
    inner = model_in(model)
    if SCHEME not in vars(inner):
        raise ValueError(f"{type(inner).__name__} has no scheme: sparsify(model) puts one on it")
    vars(inner)[SCHEME].detach()
