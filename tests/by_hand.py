"""The reference: each row alone, without padding, through the same modules by hand: a sequence that
was shortened here, and layers that do nothing."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tiny import is_visual
from torch import Tensor

from sts import LDS, VTC, sparsify
from sts.architectures import architecture_of
from sts.vtc import Outputs
from sts.vtc._shared import pooled_grid

KEEP = 0.25
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # the loss itself is computed in float32


def decoder_layers(model):
    return model.get_submodule(architecture_of(model).language_model).layers


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, batch, **more):
    """The loss of a batch and all gradients."""
    model.zero_grad()
    loss = model(**batch, **more).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(result, expected, **tolerance):
    """That two results of `backward` are the same."""
    (loss, grads), (expected_loss, expected_grads) = result, expected
    tolerance = tolerance or CLOSE
    torch.testing.assert_close(loss, expected_loss, **tolerance)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        message = lambda m, name=name: f"{name}: {m}"  # noqa: E731
        torch.testing.assert_close(grads[name], grad, **tolerance, msg=message)


def influence(before, after, mask=None) -> tuple[float, int]:
    """Sum of 1 - cosine, and their number, over the real ones of at most 64 evenly spaced tokens of
    each row."""
    total, count = 0.0, 0
    for row in range(len(before)):
        for t in range(0, before.shape[1], math.ceil(before.shape[1] / 64)):
            if mask is None or mask[row][t]:
                x, y = before[row, t].double(), after[row, t].double()
                total += 1 - float(x @ y / x.norm() / y.norm())
                count += 1
    return total, count


def of_language_model(model, batch):
    """What the untouched model hands to its language model."""
    seen = {}

    def catch(module, args, kwargs):
        seen.update(kwargs)

    language_model = model.get_submodule(architecture_of(model).language_model)
    handle = language_model.register_forward_pre_hook(catch, with_kwargs=True)
    model(**batch)
    handle.remove()
    return language_model, seen


@contextmanager
def doing_nothing(layers, off) -> Iterator[None]:
    """The layers `off` hand on what they get."""

    def nothing(hidden, *args, **kwargs):
        if "prev_topk_indices" in kwargs:  # GLM 5 and Mistral Large 4 hand it on too
            return hidden, kwargs["prev_topk_indices"]
        return hidden

    for index in off:
        layers[index].forward = nothing
    yield
    for index in off:
        del layers[index].forward


# ---- the reference: each row alone, without padding ----------------------------------------------

# (height, width, patches [N, D], text [n, D]) -> of each output the tokens (row by row) that it is
# the mean of, and the one at whose place it stands
Choice = Callable[[int, int, Tensor, Tensor], list[tuple[list[int], int]]]


def cells(size: int, count: int) -> list[range]:
    """The indices of each adaptive pooling cell."""
    return [
        range(math.floor(i * size / count), math.ceil((i + 1) * size / count)) for i in range(count)
    ]


def middle(cell: range) -> int:
    return (cell[0] + cell[-1]) // 2


def pooled(height, width, patches, text):
    """avgpool2d."""
    rows, columns = pooled_grid(height, width, KEEP)
    return [
        ([y * width + x for y in ys for x in xs], middle(ys) * width + middle(xs))
        for ys in cells(height, rows)
        for xs in cells(width, columns)
    ]


EVERY_SECOND = {  # of uniform at 1/4, by hand
    (4, 4): ([0, 2], [0, 2]),
    (6, 8): ([0, 2, 4], [0, 2, 4, 6]),
    (8, 4): ([0, 2, 4, 6], [0, 2]),
    (4, 6): ([0, 2], [0, 2, 4]),
    (2, 4): ([0], [0, 2]),
    (2, 2): ([0], [0]),
    (3, 4): ([0, 1, 2], [1]),  # every third column: 3 tokens, where strides of 2 would leave 4
}


def strided(height, width, patches, text):
    """uniform."""
    rows, columns = EVERY_SECOND[height, width]
    return [([y * width + x], y * width + x) for y in rows for x in columns]


def about_the_text(height, width, patches, text):
    """text_guided."""
    mean = sum(vector / vector.norm() for vector in text) / len(text)
    cosines = [float(patch @ mean / patch.norm() / mean.norm()) for patch in patches]
    best = sorted(range(len(patches)), key=lambda i: -cosines[i])[: round(KEEP * len(patches))]
    return [([i], i) for i in sorted(best)]


def the_positive(height, width, patches, text):
    """The kind `positive` below."""
    return [([i], i) for i in range(len(patches)) if i == 0 or patches[i, 0] > 0]


def positive(tokens: Tensor, keep: float) -> Outputs:
    """A kind that keeps another number of tokens in each image: those of a positive channel 0."""
    everything = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return Outputs(everything, lambda x: x, real=(tokens[..., 0] > 0) | (everything == 0))


def left_by_hand(case, names, visual, vectors, text, choose) -> list[tuple[list[int], int]]:
    """(tokens averaged, place) of each token that is left of a row's images; the row's visual
    tokens are at the places `visual`, a list."""
    left, start = [], 0
    for height, width, newline in [grid for name in names for grid in case.images[name]]:
        stride = width + newline
        lines = [visual[start + y * stride :][:stride] for y in range(height)]
        patches = [place for line in lines for place in line[:width]]
        for sources, target in choose(height, width, vectors[patches], text) if width else ():
            left.append(([patches[source] for source in sources], patches[target]))
        if newline:  # width 0: nothing but such a token
            rows = pooled_grid(height, width, KEEP)[0] if width else height
            ends = [lines[middle(ys)][-1] for ys in cells(height, rows)]
            left += [([end], end) for end in ends]
        start += height * stride
    return left


def softcapped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def head(model, hidden: Tensor) -> Tensor:
    """Logits, with what the outer forward of these types does to them after the head."""
    linear = model.get_output_embeddings() or model.language_model.get_output_embeddings()
    logits, text = linear(hidden), model.config.get_text_config()
    match model.config.model_type:
        case "granite4_vision" | "granite_docling":
            return logits / text.logits_scaling
        case "gemma3n" | "mistral_large4" | "inkling2":
            return softcapped(logits, text.final_logit_softcapping)
        case "muse_glimmer" | "muse_spark":
            return softcapped(logits * text.output_multiplier, text.final_logit_softcapping)
    cap = getattr(text, "final_logit_softcapping", None)  # Gemma's, where it is set
    return logits if cap is None else softcapped(logits, cap)


def of_row(mask: Tensor, row: int, places: list[int]) -> Tensor:
    """Of a mask [B, T] or [B, 1, T, T]."""
    one = mask[row : row + 1][..., places]
    return one if mask.ndim == 2 else one[:, :, places]


KNOWN = ("inputs_embeds", "position_ids", "attention_mask")


def by_hand(model, case, rows, batch, choose: Choice | None = None, off=None, positions="keep"):
    """Loss and gradients of each row alone, without padding. choose: what is left of its images,
    None: all of it. off: of each row the layers that do nothing for it."""
    model.zero_grad()
    language_model, full = of_language_model(model, batch)
    layers = decoder_layers(model)
    where, mask = full.get("position_ids"), full.get("attention_mask")
    every = full["inputs_embeds"]
    if where is None:
        where = torch.arange(every.shape[1])[None]
    visual_before, total, count = 0, 0.0, 0
    for row, items in enumerate(rows):
        ids = batch["input_ids"][row]
        attended = batch["attention_mask"][row].bool()
        visual = is_visual(ids).nonzero()[:, 0].tolist()
        means = {place: [place] for place in visual}
        if choose:
            names = [x for x in items if isinstance(x, str)]
            text = every[row][attended & ~is_visual(ids)].detach()
            left = left_by_hand(case, names, visual, every[row].detach(), text, choose)
            means = {place: sources for sources, place in left}
        places = [
            t for t in range(len(ids)) if attended[t] and (not is_visual(ids[t]) or t in means)
        ]
        vectors = [every[row, means.get(t, [t])].mean(0) for t in places]
        mine = where[..., min(row, where.shape[-2] - 1), :]
        at = [mine[..., t] for t in places]
        if positions == "mean":
            at = [mine[..., means.get(t, [t])].double().mean(-1) for t in places]
        inputs = {
            "inputs_embeds": torch.stack(vectors)[None],
            "position_ids": torch.stack(at, -1)[..., None, :],
            "attention_mask": torch.ones(1, len(places), dtype=torch.long),
        }
        if isinstance(mask, dict):
            inputs["attention_mask"] = {
                kind: None if one is None else of_row(one, row, places)
                for kind, one in mask.items()
            }
        elif mask is not None and mask.ndim == 4:
            inputs["attention_mask"] = of_row(mask, row, places)
        for name, value in full.items():
            if isinstance(value, dict) and name not in KNOWN:  # of some layers
                inputs[name] = {
                    layer: features[visual_before : visual_before + len(visual)]
                    for layer, features in value.items()
                }
            elif isinstance(value, list) and value:  # features of the visual tokens
                inputs[name] = [
                    torch.stack(
                        [
                            features[[visual_before + visual.index(s) for s in means[t]]].mean(0)
                            for t in places
                            if t in means
                        ]
                    )
                    if means
                    else features[:0]
                    for features in value
                ]
            elif name not in KNOWN and isinstance(value, Tensor) and value.ndim:
                inputs[name] = value[row : row + 1][:, places]  # one of each token
        visual_before += len(visual)
        with doing_nothing(layers, off[row] if off else ()):
            hidden = language_model(**inputs, use_cache=False)[0]
        labels = batch["labels"][row][places]
        for i in range(1, len(places)):
            if labels[i] != -100:
                logits = head(model, hidden[0, i - 1])
                total = total - logits.float().log_softmax(-1)[labels[i]]
                count += 1
    loss = total / count
    loss.backward()
    return loss.detach(), gradients(model)


def skipping_is_by_hand(
    case,
    rows,
    vtc: VTC | None = None,
    choose: Choice | None = None,
    lds: LDS | None = None,
    steps=(0, 1, 2),
) -> set[int]:
    """Asserts for some steps that VTC does what `choose` says, and that layers that LDS skips might
    as well not be there and have no gradient; the layers that were ever skipped."""
    model, batch = case.build(), case.batch(rows)
    lds = LDS("sts", rate=0.6, epsilon=0.5) if lds is None else lds
    scheme, ever = sparsify(model, vtc, lds, total_steps=8, seed=3), set()
    for step in steps:
        scheme.begin_step(step)
        result, off = backward(model, batch), scheme.skipped
        ever |= off
        for layer in off:
            assert all(p.grad is None for p in decoder_layers(model)[layer].parameters())
        shorter = choose if scheme.keep < 1 else None
        assert (scheme.metrics()["keep_ratio"] < 0.6) == bool(shorter)
        model.eval()  # the scheme doesn't act
        assert_same(result, by_hand(model, case, rows, batch, shorter, [off] * len(rows)))
        model.train()
    return ever
