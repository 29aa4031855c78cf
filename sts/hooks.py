"""The hooks of a scheme: what happens to a forward pass on its way through the model and back.

    the model           labels: its head is to get the hidden states before answer tokens only
      the base model    gets the inputs as the caller gave them
        language model  gets fewer visual tokens; skips layers
      the base model    gives as many hidden states as there were tokens, or those before answers
    the model           gives the loss, and no logits where they would be those of the answers only

A forward pass may begin at any of the three modules. The scheme acts in training mode, as dropout
does, with gradients or without, but not on generation. What is drawn for a micro-batch depends on
its inputs: whoever computes them again, for checkpointing or to compare two forwards, draws alike.
Shapes: B batch, T tokens of a row, D model width, A answer tokens of the batch.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sts.architectures import Architecture
from sts.checks import expect
from sts.compression import Compression
from sts.draws import digest, keyed_torch_generator
from sts.lds.skipper import Skipper
from sts.lds.units import with_replacements
from sts.loss import (
    answer_keywords,
    before_targets,
    is_of_library,
    needs_only_answers,
    whole_labels,
)
from sts.realised import Realised
from sts.sequence import Batch, not_padding, take
from sts.settings import VTC
from sts.vtc import kind_of

log = logging.getLogger(__name__)

WEIGHTS = "visual_token_compressor"  # the submodule of a VTC kind that has weights of its own
MEDIA = ("image", "video")
# Model -> what `needs_only_answers` said of its forwards: it costs a few tokens' logits
_NEEDS_ONLY_ANSWERS: WeakKeyDictionary[nn.Module, dict[tuple, bool]] = WeakKeyDictionary()


@dataclass
class Call:
    """A forward pass under way."""

    entered: nn.Module  # the module at which it began
    arguments: dict[str, Any]  # the keywords of that module
    taken: dict[str, Any] = field(default_factory=dict)  # of those, what another's hook took away
    acts: bool = False  # else the plain model runs
    counts: bool = False  # as a micro-batch of the step
    inputs: dict[str, Any] = field(default_factory=dict)  # of all modules outside language_model
    answers_only: bool = False  # the head gets the hidden states before answer tokens only
    places: tuple[Tensor, ...] = ()  # where those stand: (rows [A], places [A])
    originals: dict[str, Any] = field(default_factory=dict)  # of inputs that were changed
    compression: Compression | None = None  # None: all visual tokens are kept
    batch: Batch | None = None  # set while the language model runs
    replacements: dict = field(default_factory=dict)  # layer -> what is called instead of it
    tokens: list[int] = field(default_factory=list)  # [rows, tokens] that the language model gets
    visual: tuple[Tensor, ...] = ()  # visual tokens (before, after) compression
    stack: ExitStack = field(default_factory=ExitStack)  # undone when the language model returns
    count: Callable[[], None] | None = None  # what is counted, once the whole forward is through

    @cached_property
    def digest(self) -> str:
        """Of the batch's tokens, or else of its mask or shape: what is drawn depends on it."""
        for name in ("input_ids", "attention_mask"):
            if isinstance(self.arguments.get(name), Tensor):
                return digest(self.arguments[name])
        return str(tuple(self.arguments["inputs_embeds"].shape))


class Hooks:
    """What hangs on a model, and does what a scheme decided for the step.

    Attributes:
        realised: What the forwards since `begin_step` did.
        failed: Whether one of them raised, or was interrupted.
        with_gradients, without_gradients: How many there were, but for those in a backward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wrapped: nn.Module,
        architecture: Architecture,
        vtc: VTC,
        skipper: Skipper,
        seed: int,
    ) -> None:
        self.model, self.wrapped, self.architecture = model, wrapped, architecture
        self.vtc, self.skipper, self.seed = vtc, skipper, seed
        self._handles: list = []
        self._call: Call | None = None
        self._of_caller: dict[str, Any] = {}  # what the wrapped model is called with
        self.begin_step(None, 1.0)

    def begin_step(self, step: int | None, keep: float) -> None:
        """From now on forwards belong to optimizer step `step`, with this keep ratio."""
        self.close()
        self._step, self._keep = step, keep
        self.realised = Realised(len(self.skipper.layers))
        self.failed = False
        self.with_gradients = self.without_gradients = 0

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a pickle of the model. Raises RuntimeError within a forward."""
        if self._call and self._call.acts:
            raise RuntimeError(
                "a forward was interrupted: call scheme.begin_step(step) or unsparsify(model) "
                "before the model is copied"
            )
        return vars(self)

    def attach(self) -> None:
        """Hang the hooks on the model."""
        base, language_model = self.architecture.base, self.architecture.language_model
        self._handles = [
            self.wrapped.register_forward_pre_hook(self._note, with_kwargs=True, prepend=True),
            self.wrapped.register_forward_hook(self._forget, always_call=True),
        ]
        hooks = [("", self._enter_model, self._without_logits)]
        hooks += [(base, self._enter_base, None)] if base else []
        hooks += [(language_model, self._enter_language_model, self._with_hidden_states)]
        for path, enter, change in hooks:
            module = self.model.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            if change:
                self._handles.append(module.register_forward_hook(change))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Take the hooks off the model."""
        self.close()
        for handle in self._handles:
            handle.remove()
        self.skipper.remove_hooks()

    # ---- entering and leaving whichever module --------------------------------------------------

    def _note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._of_caller = kwargs

    def _forget(self, *_: Any) -> None:
        self._of_caller = {}

    def _taken(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the caller gave and a hook before this one took away: ms-swift's runs the tower by
        itself, and goes on with `inputs_embeds` that no longer tell where placeholders were."""
        ids, embeddings = self._of_caller.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is None or embeddings is None or ids.shape != embeddings.shape[:2]:
            return {}
        return {name: x for name, x in self._of_caller.items() if kwargs.get(name) is None}

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any] | None:
        """The inputs of `module` by name, with a call under way; None: the scheme does not act."""
        if getattr(module, "_is_replica", False):
            raise RuntimeError("nn.DataParallel copies the model to threads: use DDP (torchrun)")
        if args:
            names = list(signature(type(module).forward).parameters)[1:]  # without self
            kwargs = dict(zip(names, args, strict=False)) | kwargs
        if self._call and self._call.entered is module:
            self.close()
        if self._call is None:
            taken = self._taken(kwargs)
            self._call = Call(module, kwargs | taken, taken=taken)
            self._begin(self._call)
        if not self._call.acts:
            return None
        if module is not self.model:
            kwargs = self._as_called(kwargs)
        if module is not self.skipper.language_model:
            self._call.inputs |= kwargs | self._call.taken
        return kwargs

    def _begin(self, call: Call) -> None:
        """Decide what the scheme does in a call, and begin its VTC if it has one.

        A micro-batch counts once: not where it is only compared with, without gradients, and not
        where a backward computes it again, unless no forward of the step recorded gradients before
        its backward, as under re-entrant checkpointing of the whole model.
        """
        records, in_backward = torch.is_grad_enabled(), _in_backward()
        if not self.model.training or (not records and _generates(call.arguments)):
            return
        if self._step is None:
            if records:
                raise RuntimeError("call scheme.begin_step(step) before the forwards of each step")
            return
        if in_backward and not (self.with_gradients or self.without_gradients):
            raise RuntimeError(
                "a backward computes a forward of another step again: end all backward passes of a "
                "step before the next scheme.begin_step"
            )
        call.acts, call.counts = True, records and not (in_backward and self.with_gradients)
        self.with_gradients += records and not in_backward
        self.without_gradients += not records and not in_backward
        if self._keep < 1:
            kind = getattr(self.model, WEIGHTS, None) or kind_of(self.vtc.kind)
            call.compression = Compression(
                self.model,
                self.architecture,
                self.vtc,
                kind,
                self._keep,
                lambda: keyed_torch_generator(self.seed, self._step, call.digest, "tokens"),
            )
            call.stack.enter_context(call.compression.recording())

    def _as_called(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of an inner module as the model's forward would have passed them, had it got
        what the caller gave."""
        originals, self._call.originals = self._call.originals, {}
        if self._call.answers_only:
            kwargs = {name: value for name, value in kwargs.items() if name != "shift_labels"}
        return kwargs | {name: value for name, value in originals.items() if name in kwargs}

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """End the call if it began at this module; output None: it raised."""
        if self._call and self._call.entered is module:
            if output is not None and self._call.count:
                self._call.count()
            self.close(failed=output is None)

    def close(self, failed: bool = True) -> None:
        """End the call under way, if there is one: what no hook sees has left it, as Ctrl-C."""
        if self._call:
            call, self._call = self._call, None
            self.failed |= failed and call.acts
            call.stack.close()

    # ---- the outer model ------------------------------------------------------------------------

    def _enter_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Give the model's forward the labels of the answers only, if its loss is the same then."""
        inputs = self._enter(model, args, kwargs)
        labels = None if inputs is None else inputs.get("labels")
        if labels is None or inputs.get("shift_labels") is not None:
            return None
        labels = self._call.inputs["labels"] = whole_labels(labels, inputs)
        if not self._needs_only_answers(inputs):
            return None
        call = self._call
        call.answers_only, call.places = True, before_targets(labels)
        call.originals = {"labels": labels, "attention_mask": inputs.get("attention_mask")}
        changed = inputs | answer_keywords(labels, *call.places)
        changed.pop("logits_to_keep", None)
        if self._balances_experts(inputs):
            # its loss looks at the mask, which is as long as the whole sequence
            changed["attention_mask"] = None
        return (), changed

    def _needs_only_answers(self, inputs: dict[str, Any]) -> bool:
        """Whether the loss is the same if the head gets the answers only; found out once."""
        forward = getattr(self.model.forward, "__func__", self.model.forward)
        key = (forward, self.model.loss_function, frozenset(inputs))
        by_forward = _NEEDS_ONLY_ANSWERS.setdefault(self.model, {})
        if key not in by_forward:
            path = self.architecture.base or self.architecture.language_model
            stays = is_of_library(self.model.forward) and is_of_library(self.model.loss_function)
            by_forward[key] = stays and needs_only_answers(self.model, path, inputs)
            if not by_forward[key]:
                why = "this forward asks for them" if stays else "forward or loss is one's own"
                log.info("sts: logits are computed for every token, as %s", why)
        return by_forward[key]

    def _balances_experts(self, inputs: dict[str, Any]) -> bool:
        """Whether the model's loss balances experts by the logits of their routers."""
        is_on = inputs.get("output_router_logits")
        if is_on is None:
            text_config = self.model.config.get_text_config()
            is_on = getattr(text_config, "output_router_logits", False)
        return bool(is_on)

    def _without_logits(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """The model's output without logits that are those of the answers only."""
        if self._call is None or not self._call.answers_only:
            return None
        if isinstance(output, tuple):  # loss, logits, ...
            return (output[0], *output[2:])
        return type(output)(**{name: x for name, x in output.items() if name != "logits"})

    # ---- the base model, which may be called by itself, as TRL does ------------------------------

    def _enter_base(self, base: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        inputs = self._enter(base, args, kwargs)
        return None if inputs is None else ((), inputs)

    # ---- the language model ----------------------------------------------------------------------

    def _enter_language_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Compress the visual tokens, which the embeddings now hold, and skip layers."""
        kwargs = self._enter(module, args, kwargs)
        if kwargs is None:
            return None
        call = self._call
        is_blind = call.entered is module and kwargs.get("input_ids") is None
        if is_blind and (call.compression or _in_backward()):
            raise RuntimeError(
                f"the forward began at the {type(module).__name__}, which doesn't see the tokens: "
                "call model(...), not model.forward(...), and checkpoint the model or its layers"
            )
        if kwargs.get("inputs_embeds") is None:
            embed = self.model.get_input_embeddings()
            kwargs = kwargs | {"inputs_embeds": embed(kwargs["input_ids"]), "input_ids": None}
        is_plain = self.vtc.keep == 1 and call.inputs.get("position_ids") is not None
        if kwargs.get("past_key_values") is None and not is_plain:
            # A cache is of no use here, and without one transformers reads restarts among positions
            # as packed samples, which VTC keeps apart in every step; without VTC as the model does.
            kwargs = kwargs | {"use_cache": False}
        media = self._placeholders(call.inputs, kwargs["inputs_embeds"])
        visual = torch.stack([*media.values()]).any(0)
        call.batch = Batch(call.inputs, media, visual, not_padding(call.inputs, visual))
        before = after = visual.sum()
        if call.compression:
            kwargs, after = call.compression(call.batch, kwargs)
        call.tokens = list(kwargs["inputs_embeds"].shape[:2])
        call.visual = (before, after)
        self._skip_layers(call)
        return (), kwargs

    def _placeholders(self, inputs: dict[str, Any], embeddings: Tensor) -> dict[str, Tensor]:
        """Medium -> where its placeholders stand, [B, T]; at least one medium."""
        ids, by_token = inputs.get("input_ids"), {}
        for medium in MEDIA:
            token = getattr(self.model.config, f"{medium}_token_id", None)
            if not isinstance(token, int) or token in by_token:
                continue
            if ids is not None:
                by_token[token] = medium, ids == token
            elif inputs.get("inputs_embeds") is not None:  # as transformers does
                table = self.model.get_input_embeddings()
                vector = table(torch.tensor([token], device=embeddings.device))
                by_token[token] = medium, (inputs["inputs_embeds"] == vector).all(-1)
        if by_token:
            return dict(by_token.values())
        nowhere = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        return {"image": nowhere}

    def _skip_layers(self, call: Call) -> None:
        """Put replacements of decoder layers, and hooks that measure them, into the model."""
        skipper = self.skipper
        if call.counts and not self.realised.micro_batches:
            skipper.drop_zero_gradients()
        call.replacements = skipper.replacements(lambda: call.digest)
        is_partial = call.replacements and not skipper.unit.drawn_by_step
        is_refused = is_partial and self._balances_experts(call.inputs)
        accepted = f"unset for LDS unit {skipper.lds.unit!r}: experts see other tokens in each "
        expect(not is_refused, "output_router_logits", True, accepted + "layer")
        is_refused = is_partial and call.inputs.get("past_key_values") is not None
        accepted = f"none for LDS unit {skipper.lds.unit!r} (prefix tuning passes one: use LoRA)"
        expect(not is_refused, "past_key_values", "a cache", accepted)
        if call.counts:
            for hook in skipper.measuring_hooks(call.batch, call.replacements):
                call.stack.enter_context(hook)
        if call.replacements:
            layers = (skipper.language_model, self.architecture.layers)
            call.stack.enter_context(with_replacements(*layers, call.replacements))

    def _with_hidden_states(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """The language model's output with as many hidden states as there were tokens, or with
        those before the answers."""
        call = self._call
        if call is None or call.batch is None:
            return None
        call.stack.close()
        hidden = output[0]
        if list(hidden.shape[:2]) != call.tokens:
            raise RuntimeError(
                f"{type(module).__name__} returned hidden states {list(hidden.shape)} for "
                f"{call.tokens} tokens: do its decoder layers return something else than one "
                "tensor? LDS can't replace them"
            )
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # text alone where a projector is trained: a backward then leaves no gradient
            hidden = hidden.detach().requires_grad_()
        work = self.skipper.work(call.replacements)
        self.skipper.check_backward(hidden)
        batch, call.batch = call.batch, None
        if call.answers_only:
            row, place = (x.to(hidden.device) for x in call.places)
            place = place if batch.shows is None else batch.shows[row, place]
            hidden = hidden.flatten(0, 1).index_select(0, row * hidden.shape[1] + place)[None]
        elif batch.shows is not None:
            hidden = take(hidden, batch.shows)
        if call.counts:
            full, logits = batch.visual.numel(), hidden.shape[:2].numel()
            call.count = partial(self.realised.add, call.tokens, full, call.visual, logits, work)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        between = getattr(output, "hidden_states", None)  # if they were asked for
        if between and batch.shows is not None:
            output.hidden_states = tuple(x if x is None else take(x, batch.shows) for x in between)
        if getattr(output, "router_logits", None) and self._balances_experts(batch.inputs):
            self._keep_real_router_logits(output, batch, call.answers_only)
        return output

    def _keep_real_router_logits(self, output: Any, batch: Batch, answers_only: bool) -> None:
        """Leave out the router logits of padding: [tokens, experts] a layer.

        Raises:
            ValueError: The loss would read them wrongly.
        """
        accepted = "unset: experts can't be balanced over shortened sequences in this forward"
        is_readable = answers_only or batch.shows is None
        expect(is_readable, "output_router_logits", True, accepted)
        if answers_only:
            real = batch.mask.flatten()
            logits = output.router_logits
            output.router_logits = tuple(
                None if x is None else x.flatten(0, -2)[real] for x in logits
            )


def _in_backward() -> bool:
    """Whether a backward is under way, which computes again what was checkpointed."""
    return torch._C._current_graph_task_id() != -1


def _generates(inputs: dict[str, Any]) -> bool:
    """Whether a forward without gradients is one of a generation: it has a cache, or wants the
    logits of the last token alone."""
    has_cache = inputs.get("past_key_values") is not None or inputs.get("use_cache") is True
    last = inputs.get("logits_to_keep")
    return has_cache or (isinstance(last, int) and last == 1)
