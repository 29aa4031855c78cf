"""What the forwards of a step did: counted, not derived from the decision."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sts.lds.decision import SHARES, Decision, Work, skipped_share
from sts.settings import LDS


class Realised:
    """Counts over the micro-batches of an optimizer step, on one rank. Counts of visual tokens stay
    on the device."""

    def __init__(self, layers: int) -> None:
        self.micro_batches = 0
        self.tokens = 0  # at the language model, padding included
        self._full = 0  # those that there would be without VTC
        self._samples = self._answers = 0
        self._before = self._after = 0
        self._ran = [0.0] * layers  # tokens that ran through each layer
        self._work: list[dict[str, float]] = [{} for _ in range(layers)]  # share x samples

    def add(
        self,
        tokens: Sequence[int],
        full: int,
        visual: Sequence[Tensor],
        logits: int,
        work: Mapping[int, Work],
    ) -> None:
        """Add a micro-batch.

        Args:
            tokens: (samples, tokens of each) at the language model.
            full: The tokens of all samples before compression.
            visual: The visual tokens (before, after) compression, scalars.
            logits: The tokens that the head saw.
            work: Layer -> its work, of those layers that did less than all of it.
        """
        samples = tokens[0]
        for layer, totals in enumerate(self._work):
            shares = work.get(layer, {})
            for share in shares.keys() | totals.keys():
                before = totals.get(share, float(self._samples))
                totals[share] = before + samples * shares.get(share, 1.0)
            run = shares.get("rows", 1.0) * shares.get("tokens", 1.0)
            self._ran[layer] += samples * tokens[1] * run
        self.micro_batches += 1
        self._samples += samples
        self.tokens += samples * tokens[1]
        self._full += full
        self._before += visual[0]
        self._after += visual[1]
        self._answers += logits

    def totals(self) -> list[float]:
        """The counts that `metrics_of` reads, which add up over ranks; waits for the device."""
        visual = torch.tensor([0, 0])
        if self.micro_batches:
            visual = torch.stack([self._before, self._after])
        counts = (self._samples, self.tokens, self._answers, *visual.tolist())
        work = (totals.get(share, self._samples) for totals in self._work for share in SHARES)
        return [*map(float, counts), *map(float, work)]

    def left_out_flops(self, weights: Sequence[Mapping[str, int]]) -> float:
        """FLOPs that the layers did not do, at 2 a weight and token forward and 4 backward.

        Args:
            weights: Of each layer how many it has: `layer`, and of its sublayers by the share of
                their backward.
        """
        total = 0.0
        for of_layer, ran, work in zip(weights, self._ran, self._work, strict=True):
            total += 6 * of_layer["layer"] * (self._full - ran)
            constant = (n * (1 - work[x] / self._samples) for x, n in of_layer.items() if x in work)
            total += 4 * ran * sum(constant)
        return total


def metrics_of(totals: Sequence[float], lds: LDS, decision: Decision) -> dict[str, object]:
    """See Scheme.metrics; totals: of one rank or the sums of several."""
    count, tokens, answers, before, after = totals[:5]
    samples = max(count, 1.0)
    starts = range(5, len(totals), len(SHARES))
    by_layer = (zip(SHARES, totals[start:], strict=False) for start in starts)
    work = [{share: x / samples for share, x in of_layer if x < count} for of_layer in by_layer]
    return {
        "keep_ratio": after / before if before else 1.0,
        "visual_tokens": after / samples,
        "tokens": tokens / samples,
        "answer_tokens": answers / samples,
        "layers_run": sum(each.get("rows", 1.0) * each.get("tokens", 1.0) for each in work),
        "asked": list(decision.chances),
        "skipped": skipped_share(lds, work),
        "work": work,
    }
