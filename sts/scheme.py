"""The Sparse Training Scheme on a Hugging Face model: VTC and LDS for one training stage.

    scheme = sparsify(model, vtc=VTC(kind="avgpool2d", keep=0.25), total_steps=1000)
    scheme.begin_step(step)      # once per optimizer step, before its first micro-batch
    model(**batch).loss.backward()
    unsparsify(model)            # or `with sparsify(...) as scheme:`

Only a forward in training mode with labels is touched; all else goes to the model's own forward.
Tensor shapes: B batch, T tokens of a row, V visual tokens in the batch, D model width.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, update_wrapper
from inspect import signature

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from sts.architectures import ClassAttention, Grid, architecture_of, output_class
from sts.compressor import COMPRESSORS, compress, keep_at
from sts.layers import ForwardOnly, Instead, PassThrough, SomeTokens, altered
from sts.schedule import SCHEDULES, expect
from sts.sequence import (
    WRONG_ATTENTION,
    at,
    attended,
    pack,
    position_ids,
    put,
    segments,
    shorter,
    without_newlines,
)
from sts.skipper import POLICIES, check_rate, keyed_generator, rate_at, skipped_layers

log = logging.getLogger(__name__)

MEASURED_TOKENS = 64  # of each row, evenly spaced: enough for a layer's mean influence
NO_LABEL = -100


def _check_schedule(name: str, schedule: str, anneal: float) -> None:
    expect(schedule in SCHEDULES, f"{name}.schedule", schedule, f"one of {', '.join(SCHEDULES)}")
    expect(0 <= anneal <= 1, f"{name}.anneal", anneal, "a number in [0, 1]")


@dataclass(frozen=True)
class VTC:
    """Visual token compression. Raises ValueError for a value that is not accepted.

    kind: a key of COMPRESSORS. keep: share of the visual tokens that reaches the language model,
    in (0, 1]. schedule: constant, or linear, cosine, staged from `keep` to 1 over the stage.
    anneal: last share of the stage run with all tokens. positions: the outputs take the position
    ids of the tokens they stand at (keep), or the mean of those they average (mean).
    """

    kind: str = "none"
    keep: float = 1.0
    schedule: str = "constant"
    anneal: float = 0.0
    positions: str = "keep"

    def __post_init__(self) -> None:
        expect(self.kind in COMPRESSORS, "VTC.kind", self.kind, f"one of {', '.join(COMPRESSORS)}")
        expect(0 < self.keep <= 1, "VTC.keep", self.keep, "a number in (0, 1]")
        _check_schedule("VTC", self.schedule, self.anneal)
        expect(self.positions in ("keep", "mean"), "VTC.positions", self.positions, "keep or mean")


@dataclass(frozen=True)
class LDS:
    """Layer dynamic skipping. Raises ValueError for a value that is not accepted.

    policy: a key of POLICIES. rate: mean share of the unprotected layers skipped, in [0, 1).
    schedule: constant, or linear, cosine, staged from 0 to `rate`. anneal: last share of the stage
    run with all layers. protect_first, protect_last: layers that always run. exact: the same number
    of layers each step. explore, ema: share of uniform skipping and memory of the moving average
    of policy `need`.
    """

    policy: str = "none"
    rate: float = 0.0
    schedule: str = "constant"
    anneal: float = 0.0
    protect_first: int = 1
    protect_last: int = 1
    exact: bool = True
    explore: float = 0.1
    ema: float = 0.9

    def __post_init__(self) -> None:
        expect(self.policy in POLICIES, "LDS.policy", self.policy, f"one of {', '.join(POLICIES)}")
        expect(0 <= self.rate < 1, "LDS.rate", self.rate, "a number in [0, 1)")
        _check_schedule("LDS", self.schedule, self.anneal)
        for name in ("protect_first", "protect_last"):
            expect(getattr(self, name) >= 0, f"LDS.{name}", getattr(self, name), "0 or more layers")
        expect(0 <= self.explore <= 1, "LDS.explore", self.explore, "a number in [0, 1]")
        expect(0 <= self.ema < 1, "LDS.ema", self.ema, "a number in [0, 1)")


@contextmanager
def _class_scores(attention: ClassAttention) -> Iterator[dict[str, Tensor]]:
    """Collects the queries and keys [tiles, 1 + N, width] that the attention computes anyway."""
    seen: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        seen[name] = output.detach()

    with ExitStack() as stack:
        for name in ("queries", "keys"):
            module = attention.module.get_submodule(getattr(attention, name))
            stack.enter_context(module.register_forward_hook(partial(record, name)))
        yield seen


def class_attention(queries: Tensor, keys: Tensor, head_dim: int, scale: float) -> Tensor:
    """Attention of the class token (first of `queries`, `keys` [images, 1 + N, width]) to the
    N patches, mean over heads: softmax(q_cls k^T * scale), [images, N]."""
    query = queries[:, :1].unflatten(-1, (-1, head_dim)).float()
    keys = keys.unflatten(-1, (-1, head_dim)).float()
    attention = torch.einsum("nqhd,nkhd->nhk", query, keys).mul(scale).softmax(-1)
    return attention.mean(1)[:, 1:]


@torch.no_grad()
def block_influence(before: Tensor, after: Tensor, mask: Tensor | None) -> Tensor:
    """(sum, count) of 1 - cos(before, after) [B, T, D] over real tokens (mask [B, T]), [2].

    Block influence of ShortGPT (arXiv 2403.03853), on about MEASURED_TOKENS tokens of each row.
    """
    stride = math.ceil(before.shape[1] / MEASURED_TOKENS)
    before, after = before[:, ::stride].float(), after[:, ::stride].float()
    influence = 1 - F.cosine_similarity(before, after, dim=-1)
    mask = torch.ones_like(influence) if mask is None else mask[:, ::stride].to(influence)
    return torch.stack([(influence * mask).sum(), mask.sum()])


def answer_loss(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """The model's own loss with logits computed only where the next label is a target.

    hidden [B, T, D], labels [B, T] (-100 = no target). Same value as the full computation.
    """
    targets = labels[:, 1:].to(hidden.device)
    answers = targets != NO_LABEL
    logits = model.get_output_embeddings()(hidden[:, :-1][answers])
    return model.loss_function(
        logits=logits,
        labels=None,
        shift_labels=targets[answers],
        vocab_size=logits.shape[-1],
        num_items_in_batch=num_items,
    )


class Scheme:
    """What `sparsify` puts onto a model. `begin_step` decides, forwards of that step follow."""

    def __init__(
        self, model: PreTrainedModel, vtc: VTC, lds: LDS, total_steps: int | None, seed: int
    ) -> None:
        self.model, self.vtc, self.lds = model, vtc, lds
        self.total_steps, self.seed = total_steps, seed
        self.attached = True
        self.architecture = architecture_of(model)
        self.language_model = model.get_submodule(self.architecture.language_model)
        self.num_layers = len(getattr(self.language_model, self.architecture.layers))
        check_rate(self.num_layers, lds.rate, lds.protect_first, lds.protect_last)
        self.original = model.forward
        self.influence = [math.inf] * self.num_layers  # infinite = not measured yet
        self.step: int | None = None
        self.keep, self.rate, self.skipped = 1.0, 0.0, frozenset()
        self._count_from_zero()
        self._measured = torch.zeros(2, self.num_layers)  # sum and count since begin_step
        self._warned: set[str] = set()
        if COMPRESSORS[vtc.kind].needs_scores:
            self.architecture.class_attention(model)  # fails now rather than in the first step

    def __enter__(self) -> "Scheme":
        return self

    def __exit__(self, *_: object) -> None:
        unsparsify(self.model)

    def begin_step(self, step: int) -> None:
        """Fix what optimizer step `step` (0 = first) keeps and skips.

        Call it on every rank: with policy `need` it averages the influence over them. Raises
        ValueError for a step outside the stage.
        """
        last = math.inf if self.total_steps is None else self.total_steps - 1
        expect(0 <= step <= last, "step", step, f"0..{last} (total_steps={self.total_steps})")
        if self.lds.policy == "need":
            self._update_influence()
        fraction = 0.0 if self.total_steps is None else step / self.total_steps
        vtc, lds = self.vtc, self.lds
        self.keep = 1.0
        if vtc.kind != "none":
            self.keep = keep_at(fraction, vtc.keep, vtc.schedule, vtc.anneal)
        self.rate = rate_at(fraction, lds.rate, lds.schedule, lds.anneal)
        self.skipped = skipped_layers(
            lds.policy,
            num_layers=self.num_layers,
            rate=self.rate,
            seed=self.seed,
            step=step,
            protect_first=lds.protect_first,
            protect_last=lds.protect_last,
            exact=lds.exact,
            stats=self.influence,
            explore=lds.explore,
        )
        self.step = step
        self._count_from_zero()
        if self.skipped:
            self._care_for_several_processes()

    def _count_from_zero(self) -> None:
        self._micro = self._samples = self._positions = self._thinned = 0
        self._visual_before = self._visual_after = self._answers = 0

    def metrics(self) -> dict[str, object]:
        """What the forwards since `begin_step` really did, on this rank.

        keep_ratio: visual tokens that reached the language model / those there were. Means per
        sample: visual_tokens (reached), tokens (reached, padding and visual included),
        answer_tokens (logits computed). layers_run: wholly; skipped: sorted ids of the others, of
        which forward_only run without a backward and thinned_layers on thinned_tokens of a sample.
        """
        before, after = int(self._visual_before), int(self._visual_after)
        samples = max(self._samples, 1)
        acts = POLICIES[self.lds.policy].acts_on
        return {
            "keep_ratio": after / before if before else 1.0,
            "visual_tokens": after / samples,
            "tokens": self._positions / samples,
            "answer_tokens": int(self._answers) / samples,
            "layers_run": self.num_layers - len(self.skipped),
            "skipped": sorted(self.skipped),
            "forward_only": len(self.skipped) if acts == "backward" else 0,
            "thinned_layers": len(self.skipped) if acts == "tokens" else 0,
            "thinned_tokens": self._thinned / samples / max(1, len(self.skipped)),
        }

    def state_dict(self) -> dict[str, object]:
        """All that later decisions depend on besides the settings. Not a collective operation.

        With several ranks the influence measured since the last `begin_step` is this rank's.
        """
        measured = self._measured.tolist()
        return {"step": self.step, "influence": list(self.influence), "measured": measured}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up a `state_dict`; call `begin_step` next. Raises ValueError for another depth."""
        layers = len(state["influence"])
        expect(layers == self.num_layers, "layers in state", layers, f"{self.num_layers}")
        self.influence = list(state["influence"])
        self._measured = torch.tensor(state["measured"])

    def warn_once(self, text: str) -> None:
        if text not in self._warned:
            log.warning("sts: %s", text)
        self._warned.add(text)

    def _care_for_several_processes(self) -> None:
        """Say what is lost where parameters are not sharded layer by layer; see to ZeRO-3."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        layers = getattr(self.language_model, self.architecture.layers)
        zero3 = any(hasattr(p, "ds_id") for p in layers.parameters())
        sharded = any(isinstance(p, DTensor) for p in layers.parameters())
        if zero3:
            self.warn_once(
                "DeepSpeed ZeRO-3: skipped layers are neither computed nor gathered, but have a "
                "gradient of zero rather than none: weight decay and momentum still move them"
            )
            self._forget_gradients(layers)
        elif distributed.get_world_size() > 1 and not sharded:
            self.warn_once(
                "skipped layers are not computed, but without FSDP2 (fully_shard on each decoder "
                "layer) their gradients' place in the all-reduce is still sent; DDP needs "
                "find_unused_parameters=True; with DeepSpeed their gradient is zero rather than "
                "none, so that weight decay and momentum still move them"
            )

    def _forget_gradients(self, layers: nn.ModuleList) -> None:
        """ZeRO-3 would else apply a skipped layer's last gradient again: it writes over what it
        keeps for a parameter only when a new one comes."""
        from deepspeed.utils import safe_set_local_grad  # there, as the parameters are its own

        for index in self.skipped:
            for parameter in layers[index].parameters():
                if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
                    safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))

    def _update_influence(self) -> None:
        """Fold what the last step measured, averaged over ranks, into the moving averages."""
        measured = self._measured.to(next(self.model.parameters()).device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(measured)
        for layer, (total, count) in enumerate(zip(*measured.tolist(), strict=True)):
            if count:
                new, old = total / count, self.influence[layer]
                first = math.isinf(old)
                self.influence[layer] = new if first else old + (1 - self.lds.ema) * (new - old)
        self._measured = torch.zeros_like(measured)

    def training_forward(self, inputs: dict) -> object:
        """The outer forward of a training step, with the loss on answer tokens only."""
        if self.step is None:
            raise RuntimeError("call scheme.begin_step(step) before the forwards of each step")
        labels, num_items = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
        return_dict = inputs.pop("return_dict", True)
        inputs.pop("logits_to_keep", None)
        batch = {"labels": labels, "visual": self._visual_mask(inputs), "inputs": inputs}
        with ExitStack() as stack:
            hook = partial(self._enter_language_model, batch)
            stack.enter_context(
                self.language_model.register_forward_pre_hook(hook, with_kwargs=True)
            )
            if self.keep < 1 and COMPRESSORS[self.vtc.kind].needs_scores:
                batch["attention"] = self.architecture.class_attention(self.model)
                batch["seen"] = stack.enter_context(_class_scores(batch["attention"]))
            if self.lds.policy == "need":
                for hook in self._influence_hooks(batch):
                    stack.enter_context(hook)
            if self.skipped:
                attribute = self.architecture.layers
                instead = {i: self._instead(i) for i in self.skipped}
                stack.enter_context(altered(self.language_model, attribute, instead))
            base = self.model.get_submodule(self.architecture.base)
            outputs = base(**inputs | {"use_cache": False, "return_dict": True})
        loss = answer_loss(self.model, outputs[0], batch["labels"], num_items)
        self._micro += 1
        self._samples += len(labels)
        self._answers += (batch["labels"][:, 1:] != NO_LABEL).sum().detach()
        kind = output_class(self.model)
        output = kind(loss=loss, **{k: v for k, v in outputs.items() if k in _PASSED_ON})
        return output if return_dict else output.to_tuple()

    def _visual_mask(self, inputs: dict) -> Tensor:
        """Where the image placeholders stand, [B, T]."""
        if inputs.get("input_ids") is None:
            raise ValueError(
                "input_ids=None: the scheme finds visual tokens by their placeholders, "
                "so pass input_ids rather than inputs_embeds in training"
            )
        return inputs["input_ids"] == self.model.config.image_token_id

    def _influence_hooks(self, batch: dict) -> Iterator:
        """Measure the influence of every layer that is called."""

        def measure(index: int, layer: nn.Module, args: tuple, output: Tensor) -> None:
            found = block_influence(args[0], output, batch["mask"])
            self._measured[:, index] += found.to(self._measured.device)

        for index, layer in enumerate(getattr(self.language_model, self.architecture.layers)):
            yield layer.register_forward_hook(partial(measure, index))

    def _instead(self, layer: int) -> Instead:
        """What stands in for a layer that the policy chose for this step."""
        real = getattr(self.language_model, self.architecture.layers)[layer]
        acts = POLICIES[self.lds.policy].acts_on
        if acts == "backward":
            return ForwardOnly(real)
        if acts == "tokens":
            return SomeTokens(real, partial(self._some_tokens, layer, self._micro))
        return PassThrough(real)

    def _some_tokens(self, layer: int, micro: int, hidden: Tensor) -> Tensor:
        """Tokens [B, k] of each row of `hidden` [B, T, D] that the layer sees, ascending."""
        rows, length = hidden.shape[:2]
        count = max(1, length - round(self.rate * length))
        self._thinned += rows * count
        draws = torch.rand(rows, length, generator=self._generator(micro, "ltd", layer))
        return draws.topk(count, dim=1).indices.sort(dim=1).values.to(hidden.device)

    def _generator(self, *purpose: object) -> torch.Generator:
        """Keyed by seed, step and purpose; on the CPU: the same draw on every device."""
        generator = torch.Generator()
        key = keyed_generator(self.seed, self.step, *purpose)
        return generator.manual_seed(int(key.random() * 2**53))

    def _enter_language_model(
        self, batch: dict, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        """Pre-hook of the language model: here the embeddings hold the visual tokens."""
        before = batch["visual"].sum()
        batch["mask"] = attended(batch)
        if self.keep < 1 and (count := int(before)):
            kwargs, after = self._compress(batch, kwargs, count)
        else:
            after = before
        self._positions += kwargs["inputs_embeds"].shape[:2].numel()
        self._visual_before += before
        self._visual_after += after
        return args, kwargs

    def _compress(self, batch: dict, kwargs: dict, count: int) -> tuple[dict, Tensor]:
        """Shorten the inputs of the language model and batch["labels"]; the visual tokens left."""
        self._check_images(batch["inputs"], count)
        full = self._carry(batch, kwargs, count)
        order, real = pack(full["keep"])
        batch["mask"] = real
        batch["labels"] = batch["labels"].gather(1, order).masked_fill(~real, NO_LABEL)
        embeddings = full["embeddings"].take_along_dim(order[..., None], dim=1)
        shortened = {
            "inputs_embeds": embeddings,
            "attention_mask": self._shorter_mask(batch, kwargs, embeddings, order, real),
            "position_ids": at(full["positions"], order),
        }
        left = full["keep"] & batch["visual"]
        names = self.architecture
        if names.visual_mask and kwargs.get(names.visual_mask) is not None:
            shortened[names.visual_mask] = left.gather(1, order) & real
            of_visual = left[batch["visual"]]
            shortened[names.visual_features] = [x[of_visual] for x in full["features"]]
        return kwargs | shortened, left.sum()

    def _check_images(self, inputs: dict, count: int) -> None:
        """Raises ValueError for what VTC can't take."""
        if all(inputs.get(key) is None for key in ("pixel_values", "mm_encoder_outputs")):
            raise ValueError(
                f"input_ids hold {count} image placeholders, but there are no images: pass "
                "pixel_values (or mm_encoder_outputs)"
            )
        if inputs.get("pixel_values_videos") is not None:
            raise ValueError("pixel_values_videos: VTC compresses images only; leave videos out")
        if inputs.get("past_key_values") is not None:
            raise ValueError(
                "past_key_values: VTC trains on whole sequences, so leave the cache out"
            )

    def _carry(self, batch: dict, kwargs: dict, count: int) -> dict:
        """Write the compressed tokens to the places of the tokens they stand at.

        Returns embeddings [B, T, D], positions [B, T] or [axes, B, T], features (each [V, D]), and
        keep [B, T]: true at those places and at text.
        """
        visual, embeddings = batch["visual"], kwargs["inputs_embeds"]
        names = self.architecture
        features = list((names.visual_features and kwargs.get(names.visual_features)) or ())
        positions = position_ids(kwargs)
        average = self.vtc.positions == "mean" and COMPRESSORS[self.vtc.kind].averages
        positions = positions.float() if average else positions
        axes = positions.shape[:-2]
        by_place = positions.reshape(-1, visual.numel()).T  # [B * T, axes]
        vectors, keep = embeddings.flatten(0, 1), (attended(batch) & ~visual).flatten()
        scores = self._scores(batch, count)
        generator = self._generator(self._micro, "tokens")
        places = visual.flatten().nonzero()[:, 0]
        for grid, index in self._images(batch, count).items():
            index, ends = without_newlines(grid, index.to(visual.device), self.keep)
            keep = keep.index_fill(0, places[ends.flatten()], True)
            if not grid.width:
                continue
            where = places[index]  # [images, N] in the flattened batch
            out, chosen, apply = compress(
                self.vtc.kind,
                vectors[where],
                self.keep,
                (grid.height, grid.width),
                scores=None if scores is None else scores[index],
                generator=generator,
            )
            carriers = where.gather(1, chosen)
            vectors = put(vectors, carriers, out)
            keep = keep.index_fill(0, carriers.flatten(), True)
            if average:
                by_place = put(by_place, carriers, apply(by_place[where]))
            features = [put(x, index.gather(1, chosen), apply(x[index])) for x in features]
        return {
            "embeddings": vectors.view_as(embeddings),
            "positions": by_place.T.reshape(*axes, *visual.shape),
            "features": features,
            "keep": keep.view_as(visual),
        }

    def _shorter_mask(
        self, batch: dict, kwargs: dict, embeddings: Tensor, order: Tensor, real: Tensor
    ) -> object:
        """The language model's attention mask for the places `order` [B, T'], which are `real`."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, dict):  # made already, one for each kind of layer
            return {
                kind: None if one is None else shorter(one, order, real)
                for kind, one in mask.items()
            }
        if mask is not None:
            return shorter(mask, order, real)
        packed = None if positions is None else segments(positions)
        if packed is None:
            # Explicit even if all true: without a mask, gaps in the positions read as packing.
            return real.long()
        config = self.language_model.config
        if config._attn_implementation not in ("sdpa", "eager"):
            name = f"{config._attn_implementation} attention"
            raise ValueError(WRONG_ATTENTION.format("VTC on packed sequences", name))
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise ValueError(
                "position_ids of packed sequences: VTC can't shorten them for a language model "
                "with sliding-window layers; pass attention_mask [batch, tokens], one sample a row"
            )
        packed = packed.gather(1, order).masked_fill(~real, -1)
        starts = packed.diff(dim=1, prepend=packed[:, :1] - 1) != 0
        counted = torch.arange(order.shape[1], device=order.device).expand_as(order)
        counted = counted - counted.where(starts, 0).cummax(1).values
        return create_causal_mask(  # which takes a restart for the next sequence
            config, embeddings, None, None, counted, allow_is_causal_skip=False
        )

    def _images(self, batch: dict, count: int) -> dict[Grid, Tensor]:
        """Grid -> which of the `count` visual tokens are its images', [images, tokens]."""
        grids = self.architecture.grids(self.model, batch["inputs"], count)
        sizes = [grid.tokens for grid in grids]
        if sum(sizes) != count:
            shown = [tuple(grid) for grid in grids]
            raise ValueError(
                f"input_ids hold {count} image placeholders, but the images have {sum(sizes)} "
                f"tokens by their grids (height, width, newline) {shown}: they must be as many"
            )
        ranges = torch.arange(count).split(sizes)
        return {
            grid: torch.stack([r for g, r in zip(grids, ranges, strict=True) if g == grid])
            for grid in dict.fromkeys(grids)
        }

    def _scores(self, batch: dict, count: int) -> Tensor | None:
        """A score for each of the `count` visual tokens, where the kind needs one."""
        if not COMPRESSORS[self.vtc.kind].needs_scores:
            return None
        seen, module = batch["seen"], batch["attention"].module
        if not seen:
            raise ValueError(
                f"VTC.kind={self.vtc.kind!r} needs the vision tower to run in this forward: "
                "pass pixel_values rather than precomputed features"
            )
        scores = class_attention(seen["queries"], seen["keys"], module.head_dim, module.scale)
        scores = self.architecture.token_scores(self.model, batch["inputs"], scores)
        expect(len(scores) == count, "image placeholders", count, f"one of {len(scores)} patches")
        return scores


_PASSED_ON = ("hidden_states", "attentions", "image_hidden_states")


def _forward(scheme: Scheme, /, *args, **kwargs) -> object:
    """The outer forward of a model with a scheme on it."""
    model = scheme.model
    if not (scheme.attached and model.training):
        return scheme.original(*args, **kwargs)
    inputs = signature(scheme.original).bind(*args, **kwargs).arguments
    inputs.update(inputs.pop("kwargs", {}))
    if inputs.get("labels") is None:
        scheme.warn_once("forward in training mode without labels: the scheme does not act")
        return scheme.original(*args, **kwargs)
    return scheme.training_forward(inputs)


def sparsify(
    model: PreTrainedModel,
    vtc: VTC | None = None,
    lds: LDS | None = None,
    *,
    total_steps: int | None = None,
    seed: int = 0,
) -> Scheme:
    """Train `model` sparsely for one stage of `total_steps` optimizer steps.

    Acts only in training mode with labels, where the output holds the loss and no logits: they are
    computed on answer tokens only. `sparsify(model)` alone does just that, so that a dense run is
    timed with the same loss. Call it before accelerate, DDP or the like wrap the model. Raises
    ValueError for an unknown architecture, settings the model can't have, total_steps missing
    where a schedule or anneal needs it, or a model whose forward is wrapped already.
    """
    vtc, lds = vtc or VTC(), lds or LDS()
    timed = [part for part in (vtc, lds) if part.schedule != "constant" or part.anneal]
    expect(
        (total_steps is None and not timed) or (total_steps or 0) > 0,
        "total_steps",
        total_steps,
        "the number of optimizer steps of the stage (schedules and anneal are shares of it)",
    )
    return attach(model, vtc, lds, total_steps, seed)


def attach(
    model: PreTrainedModel, vtc: VTC, lds: LDS, total_steps: int | None, seed: int
) -> Scheme:
    """`sparsify` for callers that set `scheme.total_steps` before the first step."""
    if "forward" in vars(model):
        raise ValueError(
            f"{type(model).__name__}.forward is already wrapped: call unsparsify(model) before a "
            "second sparsify, and sparsify before accelerator.prepare or a device map"
        )
    scheme = Scheme(model, vtc, lds, total_steps, seed)
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
    inner.args[0].attached = False
    if inner is forward:
        del model.forward  # else another wrapper (accelerate's autocast) now calls the original
