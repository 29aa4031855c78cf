"""The model's own loss, with logits only where they count."""

from torch import Tensor
from transformers import PreTrainedModel

from sts.settings import IGNORE_INDEX


def answer_loss(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """The model's own loss with logits computed only where the next label is a target.

    hidden [B, T, D], labels [B, T] (IGNORE_INDEX = no target). Same value as the full computation.
    """
    targets = labels[:, 1:].to(hidden.device)
    answers = targets != IGNORE_INDEX
    logits = model.get_output_embeddings()(hidden[:, :-1][answers])
    return model.loss_function(
        logits=logits,
        labels=None,
        shift_labels=targets[answers],
        vocab_size=logits.shape[-1],
        num_items_in_batch=num_items,
    )
