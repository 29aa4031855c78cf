"""The Sparse Training Scheme inside a `transformers` Trainer.

    trainer = Trainer(model, arguments, callbacks=[SparseCallback(model, VTC("uniform", 0.25))])

Make it before the Trainer: mixed precision, DDP and FSDP then wrap the sparse forward.
"""

import math
from typing import Any

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from sts.scheme import attach, unsparsify
from sts.settings import LDS, VTC


class SparseCallback(TrainerCallback, ExportableState):
    """Sparse from the first step of the Trainer to its last; what it saves is the plain model.

    The stage is the Trainer's: schedules and dense_tail are shares of `max_steps`. A decision holds
    for all micro-batches of an accumulation, evaluation in between is dense, and a resumed Trainer
    goes on as if it had not stopped. Arguments and errors are those of `sparsify`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vtc: VTC | None = None,
        lds: LDS | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.scheme = attach(model, vtc or VTC(), lds or LDS(), None, seed)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scheme.total_steps = state.max_steps
        batches = len(kwargs["train_dataloader"]) if self.scheme.lds.clock == "epochs" else 0
        self.scheme.steps_per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
        stored = (state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step and stored:
            taken = dict(stored["attributes"])
            taken["average"] = [math.inf if x is None else x for x in taken["average"]]
            self.scheme.load_state_dict(taken)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scheme.begin_step(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scheme.after_backward()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """What the last step really did, in `state.log_history`: sts_keep_ratio and so on."""
        if logs is not None and "loss" in logs:
            realised = self.scheme.metrics()
            names = ("keep_ratio", "visual_tokens", "layers_run")
            more = {f"sts_{name}": realised[name] for name in names}
            state.log_history[-1].update(more)
            logs.update(more)  # for the callbacks that come after this one

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unsparsify(self.scheme.model)

    def state(self) -> dict[str, Any]:
        """For trainer_state.json, of every checkpoint: what a measured depth has measured."""
        kept = self.scheme.state_dict()
        kept["average"] = [None if math.isinf(x) else x for x in kept["average"]]
        return {"args": {}, "attributes": kept}
