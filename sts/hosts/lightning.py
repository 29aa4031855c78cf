"""STS in Lightning:

Trainer(callbacks=[SparseTraining(STS_VTC, STS_LDS)], accumulate_grad_batches=2, ...)
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from transformers import PreTrainedModel

from sts.callback import check_ddp
from sts.checks import expect
from sts.hosts import say
from sts.scheme import Scheme, unsparsify
from sts.settings import LDS, VTC


class SparseTraining(Callback):
    """Sparse from the first step of `fit` to its last.

    The scheme goes onto the LightningModule's Hugging Face model before a strategy wraps it. The
    stage is as long as the Trainer estimates, and evaluation in between is dense.

    Args:
        vtc, lds, seed: As in `sparsify`.
        model: The name of the LightningModule's attribute that is the model; default: the only one
            that is a PreTrainedModel.

    Raises:
        ValueError: As `sparsify`.
    """

    def __init__(
        self,
        vtc: VTC | None = None,
        lds: LDS | None = None,
        *,
        model: str | None = None,
        seed: int = 0,
    ) -> None:
        self.vtc, self.lds, self.seed, self.attribute = vtc, lds, seed, model
        self.scheme: Scheme | None = None
        self.stored: dict[str, Any] | None = None  # of a checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            name = self.attribute or self._attribute_of(pl_module)
            model = getattr(pl_module, name)
            self.scheme = Scheme(model, self.vtc, self.lds, self.seed, "error").attach()

    def _attribute_of(self, module: LightningModule) -> str:
        names = [n for n, child in module.named_children() if isinstance(child, PreTrainedModel)]
        accepted = f"an attribute of {type(module).__name__} that is the model"
        expect(len(names) == 1, "model", names or None, accepted)
        return names[0]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if type(trainer.strategy) is DDPStrategy and trainer.world_size > 1:
            unused = trainer.strategy._ddp_kwargs.get("find_unused_parameters")
            check_ddp(self.scheme.lds, "find_unused_parameters of DDPStrategy", unused)
        self.scheme.set_stage(
            int(trainer.estimated_stepping_batches),
            -(-trainer.num_training_batches // trainer.accumulate_grad_batches),
        )
        if self.stored:
            self.scheme.load_state_dict(self.stored)
        say(self.scheme.vtc, self.scheme.lds)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.scheme.step != trainer.global_step:  # which counts optimizer steps
            self.scheme.begin_step(trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self.scheme.after_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = self.scheme.metrics()
        names = ("keep_ratio", "visual_tokens", "layers_run")
        pl_module.log_dict({f"sts_{name}": float(metrics[name]) for name in names})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.scheme is not None and self.scheme.attached:
            unsparsify(self.scheme.model)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        return {"stored": self.scheme and self.scheme.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stored = state_dict["stored"]
