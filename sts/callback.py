"""The Sparse Training Scheme inside a `transformers` Trainer.

    trainer = Trainer(model, arguments, callbacks=[SparseCallback(model, VTC("uniform", 0.25))])

Without a model it takes the one that is trained, so that `model_init` works.
"""

import math
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from sts.checks import NotAccepted, expect
from sts.comparison import check_loss, check_references
from sts.scheme import SCHEME, Scheme, model_in, unsparsify
from sts.settings import LDS, VTC


class SparseCallback(TrainerCallback, ExportableState):
    """Sparse from the first step of the Trainer to its last; what it saves is the plain model.

    The stage is the Trainer's: schedules and dense_tail are shares of `max_steps`. A decision holds
    for all micro-batches of an accumulation, evaluation in between is dense, and a resumed Trainer
    goes on as if it had not stopped. A model that isn't the Trainer's is an error at once, and a
    step without a sparse forward is one before the optimizer moves. So is a loss that compares with
    forwards that can't have the same sparsity (comparison.py).

    Args:
        model: The Trainer's; None: the scheme goes onto the model that it trains.
        vtc: As in `sparsify`, or its fields as a dict; so are the others.
        peak_flops: Of a process's device in a second, by its data sheet; the log then has
            `sts_mfu`, the share of it that was used.

    Raises:
        ValueError: As `sparsify`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        vtc: VTC | dict | None = None,
        lds: LDS | dict | None = None,
        *,
        seed: int = 0,
        dense_step: str = "error",
        peak_flops: float | None = None,
    ) -> None:
        self.vtc = VTC(**vtc) if isinstance(vtc, dict) else vtc or VTC()
        self.lds = LDS(**lds) if isinstance(lds, dict) else lds or LDS()
        self.seed, self.dense_step, self.peak_flops = seed, dense_step, peak_flops
        self.takes_any_model = model is None
        self.scheme: Scheme | None = None
        self.stored: dict[str, Any] | None = None  # set by a Trainer that restores callbacks
        # of this process since the last sum: FLOPs left out, tokens; of all: Scheme.totals
        self._counts, self._totals = [0.0, 0.0], None
        if model is not None:
            self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        self.scheme = Scheme(model, self.vtc, self.lds, self.seed, self.dense_step).attach()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse the Trainer's arguments before it does anything long."""
        self._check_ddp(args)
        check_loss(args, kwargs["model"], self.vtc, self.lds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_init_end(args, state, control, **kwargs)  # it may have been added after that
        self._check_model(kwargs["model"])
        steps_per_epoch = None
        if self.lds.clock == "epochs":
            batches = _batches(kwargs["train_dataloader"])
            steps_per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
        self.scheme.set_stage(state.max_steps, steps_per_epoch)
        self._begin_log(state)
        stored = (state.stateful_callbacks or {}).get(type(self).__name__)
        stored = self.stored or (stored and stored["attributes"]["stored"])
        if state.global_step and stored:
            average = [math.inf if x is None else x for x in stored["average"]]
            self.scheme.load_state_dict(stored | {"average": average})

    def _check_model(self, model: nn.Module) -> None:
        """Make sure that the scheme is on the model that is trained."""
        trained = model_in(model)
        scheme = vars(trained).get(SCHEME)
        if self.scheme is None and scheme and (scheme.vtc, scheme.lds) == (self.vtc, self.lds):
            self.scheme = scheme  # of a callback that the Trainer replaced by this one
        elif self.scheme is None or (self.scheme.model is trained and not self.scheme.attached):
            self._attach(model)  # a Trainer's second train(), or the first without a model
        elif self.scheme.model is not trained and self.takes_any_model:
            if self.scheme.attached:  # a training that failed, and model_init made the next model
                self.scheme.detach()
            self._attach(model)
        elif self.scheme.model is not trained:
            raise ValueError(
                f"SparseCallback is on a {type(self.scheme.model).__name__} that this Trainer does "
                "not train: give it the Trainer's model, or none where model_init makes it"
            )

    def _check_ddp(self, args: Any) -> None:
        """DDP waits for gradients of skipped layers unless it is told that there may be none."""
        is_sharded = bool(args.fsdp) or args.deepspeed is not None
        accepted = f"False with LDS unit {self.lds.unit!r}: each step trains other parameters"
        is_static = getattr(args, "ddp_static_graph", False)  # transformers 5.20 has it first
        expect(not (is_static and self.lds.leaves_out), "ddp_static_graph", is_static, accepted)
        if args.world_size > 1 and not is_sharded:
            check_ddp(self.lds, "ddp_find_unused_parameters", args.ddp_find_unused_parameters)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scheme.begin_step(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scheme.after_backward()
        if self.vtc.keep < 1 or self.lds.rate:
            check_references(args, *self.scheme.forwards)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._counts[0] += self.scheme.left_out_flops()
        self._counts[1] += self.scheme.tokens
        if control.should_log or control.should_save or control.should_training_stop:
            self._add_up(args, state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._add_up(args, state)  # what logs or saves by epochs comes after it

    def _add_up(self, args: Any, state: Any) -> None:
        """Take off the Trainer's `total_flos`, 6 FLOPs a weight and token, what all processes left
        out since the last time."""
        sums = torch.tensor([*self._counts, *self.scheme.totals()], dtype=torch.float64)
        if dist.is_available() and dist.is_initialized():
            sums = sums.to(args.device)
            dist.all_reduce(sums)
        left_out, tokens, *self._totals = sums.tolist()
        state.total_flos -= left_out
        self._tokens += tokens
        self._counts = [0.0, 0.0]

    def _begin_log(self, state: Any) -> None:
        self._since, self._tokens, self._flops = time.monotonic(), 0.0, state.total_flos

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """What the last step of all processes really did, in `state.log_history`: sts_keep_ratio
        and so on; and sts_tokens_per_s and sts_mfu of all steps since the last log."""
        if logs is not None and "loss" in logs:
            realised = self.scheme.metrics(self._totals)
            names = ("keep_ratio", "visual_tokens", "layers_run")
            metrics = {f"sts_{name}": realised[name] for name in names}
            seconds = time.monotonic() - self._since
            metrics["sts_tokens_per_s"] = self._tokens / seconds / args.world_size
            if self.peak_flops:
                flops = (state.total_flos - self._flops) / args.world_size
                metrics["sts_mfu"] = flops / seconds / self.peak_flops
            self._begin_log(state)
            state.log_history[-1].update(metrics)
            logs.update(metrics)  # for the callbacks that come after this one

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unsparsify(self.scheme.model)

    def state(self) -> dict[str, Any]:
        """For trainer_state.json: the arguments of an equal callback, and the scheme's state."""
        stored = None
        if self.scheme is not None:
            stored = self.scheme.state_dict()
            stored["average"] = [None if math.isinf(x) else x for x in stored["average"]]
        arguments = {"vtc": asdict(self.vtc), "lds": asdict(self.lds)}
        arguments |= {name: getattr(self, name) for name in ("seed", "dense_step", "peak_flops")}
        return {"args": arguments, "attributes": {"stored": stored}}


def _batches(loader: Any) -> int:
    """The micro-batches of an epoch.

    Raises:
        ValueError: The data are a stream, of which nobody knows how long it is.
    """
    try:
        return len(loader)
    except TypeError:
        accepted = "'steps' with a train_dataset that has no length: its epochs can't be counted"
        raise NotAccepted("LDS.clock", "epochs", accepted) from None


def check_ddp(lds: LDS, name: str, find_unused: object) -> None:
    """Raise ValueError if DDP would wait for gradients of skipped layers: it must be told, by the
    setting `name`, that there may be none."""
    accepted = f"True with LDS unit {lds.unit!r}, whose skipped layers have no gradient (units "
    accepted += "samples and tokens need it not)"
    expect(not lds.leaves_out or find_unused is True, name, find_unused, accepted)
