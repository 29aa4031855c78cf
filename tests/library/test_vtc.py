"""Visual token compression, against references in plain loops and float64."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sts import vtc
from sts.vtc import FAMILIES, KINDS, Outputs, compress, kind_of, source_of, wants
from sts.vtc._shared import kept_rows, pooled_grid, select

GRIDS = [(4, 4), (5, 7), (1, 9), (6, 1), (24, 24)]
KEEPS = [0.05, 0.25, 0.5, 0.77]
SELECTING = [*FAMILIES["sampling"], *FAMILIES["text"]]
SLOW_FEW = settings(max_examples=60, deadline=None)


def tokens_of(grid, batch=2, dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid[0] * grid[1], dim, generator=generator, dtype=torch.float64)


def run(kind, tokens, keep, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens.shape[:2], generator=generator)
    text, text_mask = text_of(len(tokens), tokens.shape[2], seed)
    inputs = {"scores": scores, "text": text, "text_mask": text_mask, "generator": generator}
    return compress(kind, tokens, keep, grid, **inputs)


def text_of(batch, dim, seed=0, length=5):
    """Embeddings [batch, length, dim] of very different norms, and a mask with other lengths."""
    generator = torch.Generator().manual_seed(seed + 100)
    text = torch.randn(batch, length, dim, generator=generator, dtype=torch.float64)
    text = text * torch.logspace(-2, 2, length, dtype=torch.float64)[None, :, None]
    real = torch.arange(length) < torch.arange(batch)[:, None] % length + 1
    return text, real.flip(0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("keep", KEEPS)
def test_average_pooling_is_the_mean_of_each_cell(grid, keep):
    (height, width), (rows, columns) = grid, pooled_grid(*grid, keep)
    tokens = tokens_of(grid)
    out, (positions, *_) = compress("avgpool2d", tokens, keep, grid)
    image = tokens.numpy().reshape(2, height, width, 3)
    for sample in range(2):
        for cell in range(rows * columns):
            row, column = divmod(cell, columns)
            ys = range(math.floor(row * height / rows), math.ceil((row + 1) * height / rows))
            xs = range(
                math.floor(column * width / columns), math.ceil((column + 1) * width / columns)
            )
            total = np.zeros(3)
            for y in ys:
                for x in xs:
                    total += image[sample, y, x]
            np.testing.assert_allclose(out[sample, cell], total / (len(ys) * len(xs)), rtol=1e-12)
            y, x = divmod(int(positions[sample, cell]), width)
            assert abs(y - (ys[0] + ys[-1]) / 2) <= 0.5 and abs(x - (xs[0] + xs[-1]) / 2) <= 0.5


@pytest.mark.parametrize(
    ("grid", "keep", "expected"),
    [
        ((24, 24), 1 / 4, (12, 12)),
        ((24, 24), 1 / 9, (8, 8)),
        ((8, 8), 0.11, (2, 3)),  # and not a strip of 1 x 7
        ((24, 24), 0.3, (13, 13)),
        ((1, 12), 1 / 4, (1, 3)),
        ((8, 8), 1e-6, (1, 1)),  # never none
    ],
)
def test_pooled_grid(grid, keep, expected):
    assert pooled_grid(*grid, keep) == expected


@SLOW_FEW
@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(1e-3, 1),
    st.integers(1, 3),
)
def test_every_kind_keeps_at_least_one_and_ascending_positions(kind, height, width, keep, batch):
    tokens = tokens_of((height, width), batch)
    out, (positions, *_) = run(kind, tokens, keep, (height, width))
    count = out.shape[1]
    assert out.shape == (batch, count, 3) and positions.shape == (batch, count)
    assert 1 <= count <= height * width
    assert positions.dtype == torch.long
    assert positions.min() >= 0 and positions.max() < height * width
    assert (positions.diff(dim=1) > 0).all()
    if kind in ("avgpool2d", "pixel_shuffle", "uniform"):  # whole rows and columns
        assert abs(math.log(count / max(1.0, keep * height * width))) < math.log(2)
    elif kind == "dual_speed":
        assert count in (height * width, max(1, round(keep * height * width)))
    elif kind != "none":
        assert count == max(1, round(keep * height * width))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_ratio_one_returns_the_input_itself(kind):
    tokens = tokens_of((3, 5))
    out, (positions, *_) = compress(kind, tokens, 1.0, (3, 5))
    assert out is tokens
    assert positions.tolist() == [list(range(15))] * 2


def test_of_two_tokens_nearest_a_centre_the_first_counts():
    _, (positions, *_) = compress("avgpool2d", tokens_of((4, 4)), 0.25, (4, 4))
    assert positions.tolist() == [[0, 2, 8, 10]] * 2


def test_clusters_are_the_mean_of_a_centre_and_the_three_most_like_it():
    """64 tokens, 20 outputs: the 17 of the highest scores, and the next three as centres."""
    tokens, scores = tokens_of((8, 8), dim=5), torch.rand(2, 64, dtype=torch.float64)
    out, (positions, *_) = compress("cls_clusters", tokens, 20 / 64, (8, 8), scores=scores)
    for sample in range(2):
        ranked = sorted(range(64), key=lambda i: -scores[sample, i])
        unit = tokens[sample] / tokens[sample].norm(dim=1, keepdim=True)
        expected = {i: tokens[sample, i] for i in ranked[:17]}
        for centre in ranked[17:20]:
            near = sorted(ranked[20:], key=lambda i: -(unit[i] @ unit[centre]))[:3]
            expected[centre] = tokens[sample, [centre, *near]].mean(0)
        assert positions[sample].tolist() == sorted(expected)
        for output, place in zip(out[sample], sorted(expected), strict=True):
            assert torch.allclose(output, expected[place], rtol=1e-12)


def test_a_tenth_of_dual_speeds_batches_are_slow():
    tokens = tokens_of((4, 4))
    counts = [run("dual_speed", tokens, 0.25, (4, 4), seed)[0].shape[1] for seed in range(1000)]
    assert set(counts) == {4, 16}
    assert counts.count(16) / 1000 == pytest.approx(0.1, abs=0.05)
    fast, _ = run("dual_speed", tokens, 0.25, (4, 4), counts.index(4))
    assert torch.equal(fast, compress("diverse", tokens, 0.25, (4, 4))[0])


@pytest.mark.parametrize("kind", SELECTING)
def test_selected_tokens_are_the_ones_at_their_positions(kind):
    tokens = tokens_of((7, 5)).unflatten(1, (7, 5)).transpose(1, 2).flatten(1, 2)
    out, (positions, *_) = run(kind, tokens, 0.3, (5, 7))
    for sample in range(2):
        for i, position in enumerate(positions[sample].tolist()):
            assert torch.equal(out[sample, i], tokens[sample, position])


def test_top_k_takes_the_highest_scores():
    tokens, scores = tokens_of((4, 4)), torch.rand(2, 16, dtype=torch.float64)
    _, (positions, *_) = compress("cls_topk", tokens, 0.25, (4, 4), scores=scores)
    for sample in range(2):
        best = sorted(range(16), key=lambda i: -scores[sample, i])[:4]
        assert positions[sample].tolist() == sorted(best)


def test_random_follows_its_generator_alone_and_is_uniform():
    tokens = tokens_of((4, 4), batch=4000, dim=1)
    before = torch.random.get_rng_state()
    _, (first, *_) = run("random", tokens, 0.25, (4, 4), seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, run("random", tokens, 0.25, (4, 4), seed=1)[1].positions)
    assert not torch.equal(first, run("random", tokens, 0.25, (4, 4), seed=2)[1].positions)
    share = torch.bincount(first.flatten(), minlength=16) / 4000
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gradients_reach_the_tokens(kind):
    tokens = tokens_of((2, 3)).requires_grad_()

    def output(t):
        return run(kind, t, 0.5, (2, 3))[0]

    assert torch.autograd.gradcheck(output, tokens)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "pool"}, "kind='pool'.*avgpool2d"),
        ({"keep": 0.0}, r"keep=0.0.*\(0, 1\]"),
        ({"keep": 1.5}, r"keep=1.5.*\(0, 1\]"),
        ({"grid": (3, 3)}, r"grid=\(3, 3\).*\[2, 16, 3\]"),
        ({"kind": "cls_topk"}, r"scores=None: expected \[batch, tokens\].* kind 'cls_topk'"),
        ({"kind": "random"}, "generator=None.*torch.Generator, for kind 'random'"),
        ({"kind": "text_guided"}, r"text=None.*\[batch, text tokens, dim\].*'text_guided'"),
        ({"kind": "text_guided_max", "text": torch.rand(2, 5, 3)}, "text_mask=None.*bool"),
        # that some kinds would take as they are
        ({"kind": "cls_topk", "scores": torch.rand(2, 9)}, r"scores.shape=\[2, 9\].*\[2, 16\]"),
        (
            {"kind": "text_guided", "text": torch.rand(2, 5, 3), "text_mask": torch.ones(2, 5)},
            "text_mask.dtype='torch.float32'.*bool",
        ),
        (
            {
                "kind": "text_guided",
                "text": torch.rand(2, 5, 3),
                "text_mask": torch.ones(2, 4, dtype=torch.bool),
            },
            r"text_mask.shape=\[2, 4\].*\[2, 5\]",
        ),
    ],
)
def test_bad_input_names_argument_value_and_what_is_accepted(arguments, named):
    valid = {"kind": "avgpool2d", "tokens": tokens_of((4, 4)), "keep": 0.5, "grid": (4, 4)}
    with pytest.raises(ValueError, match=named):
        compress(**valid | arguments)


def cosine(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("grid", GRIDS[:4])
@pytest.mark.parametrize("keep", KEEPS)
def test_pooling_along_the_sequence_is_the_mean_of_each_stretch(grid, keep):
    tokens = tokens_of(grid)
    length = tokens.shape[1]
    count = max(1, round(keep * length))
    out, (positions, *_) = compress("avgpool1d", tokens, keep, grid)
    assert out.shape == (2, count, 3)
    for i in range(count):
        stretch = range(math.floor(i * length / count), math.ceil((i + 1) * length / count))
        expected = sum(tokens[:, j] for j in stretch) / len(stretch)
        torch.testing.assert_close(out[:, i], expected)
        assert abs(int(positions[0, i]) - (stretch[0] + stretch[-1]) / 2) <= 0.5


@pytest.mark.parametrize("grid", GRIDS[:4])
@pytest.mark.parametrize("keep", KEEPS)
def test_pixel_shuffle_takes_each_channel_from_a_neighbour_in_turn(grid, keep):
    (height, width), (rows, columns) = grid, pooled_grid(*grid, keep)
    tokens = tokens_of(grid, dim=7)
    out, _ = compress("pixel_shuffle", tokens, keep, grid)
    for cell in range(rows * columns):
        row, column = divmod(cell, columns)
        inside = [
            (y, x)
            for y in range(height)
            for x in range(width)
            if row * height / rows - 1 < y < (row + 1) * height / rows
            if column * width / columns - 1 < x < (column + 1) * width / columns
        ]
        for channel in range(7):
            y, x = inside[channel % len(inside)]
            assert torch.equal(out[:, cell, channel], tokens[:, y * width + x, channel])


@pytest.mark.parametrize("grid", GRIDS[:4])
@pytest.mark.parametrize("keep", KEEPS)
def test_the_rest_is_averaged_into_the_most_similar_of_evenly_spaced_targets(grid, keep):
    tokens, length = tokens_of(grid), grid[0] * grid[1]
    scores = torch.rand(2, length, generator=torch.Generator().manual_seed(1))
    out, (positions, *_) = compress("cls_merge", tokens, keep, grid, scores=scores)
    count = max(1, round(keep * length))
    few = min(count - 1, max(1, round(count * 10 / 64)))
    for sample in range(2):
        ranked = sorted(range(length), key=lambda i: -float(scores[sample, i]))
        rest = sorted(ranked[count - few :])
        groups = {i: [i] for i in ranked[: count - few]}
        targets = [rest[i * len(rest) // few] for i in range(few)]
        groups |= {t: [t] for t in targets}
        for i in set(rest) - set(targets) if targets else ():
            like = [cosine(tokens[sample, i], tokens[sample, t]) for t in targets]
            groups[targets[like.index(max(like))]].append(i)
        assert positions[sample].tolist() == sorted(groups)
        for place, own in enumerate(sorted(groups)):
            torch.testing.assert_close(out[sample, place], tokens[sample, groups[own]].mean(0))


@pytest.mark.parametrize("grid", GRIDS[:4])
@pytest.mark.parametrize("keep", KEEPS)
def test_diverse_tokens_are_the_greedy_max_min_choice(grid, keep):
    tokens, length = tokens_of(grid), grid[0] * grid[1]
    _, (positions, *_) = compress("diverse", tokens, keep, grid)
    for sample in range(2):
        row = tokens[sample]
        far = [[1 - cosine(a, b) for b in row] for a in row]
        lonely = [min(d for j, d in enumerate(far[i]) if j != i) for i in range(length)]
        chosen = [lonely.index(max(lonely))]
        while len(chosen) < max(1, round(keep * length)):
            others = [i for i in range(length) if i not in chosen]
            chosen.append(max(others, key=lambda i: min(far[i][c] for c in chosen)))
        assert positions[sample].tolist() == sorted(chosen)


@pytest.mark.parametrize("grid", GRIDS[:4])
@pytest.mark.parametrize("keep", KEEPS)
def test_bipartite_merging_joins_the_most_similar_pairs_first(grid, keep):
    tokens, length = tokens_of(grid), grid[0] * grid[1]
    out, (positions, *_) = compress("bipartite", tokens, keep, grid)
    count = max(1, round(keep * length))
    for sample in range(2):
        groups = [(i, [i]) for i in range(length)]
        while len(groups) > count:
            means = [tokens[sample, members].mean(0) for _, members in groups]
            edges = []
            for a in range(0, len(groups), 2):
                like = {b: cosine(means[a], means[b]) for b in range(1, len(groups), 2)}
                b = max(like, key=like.get)
                edges.append((like[b], a, b))
            edges.sort(reverse=True)
            for _, a, b in edges[: min(len(groups) - count, len(groups) // 2)]:
                groups[b][1].extend(groups[a][1])
                groups[a] = None
            groups = [group for group in groups if group]
        assert positions[sample].tolist() == [place for place, _ in groups]
        for i, (_, members) in enumerate(groups):
            torch.testing.assert_close(out[sample, i], tokens[sample, members].mean(0))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_apply_does_the_same_to_other_features(kind):
    tokens = tokens_of((5, 7), dim=6)
    out, (_, apply, *_) = run(kind, tokens, 0.3, (5, 7))
    assert torch.equal(apply(tokens), out)
    torch.testing.assert_close(apply(2 * tokens + 1), 2 * out + 1)


# --- the paper's kinds ---------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("keep", [*KEEPS, 1 / 9, 0.34])
def test_uniform_keeps_every_row_and_column_of_the_best_strides(grid, keep):
    height, width = grid
    best = None
    for r in range(1, height + 1):
        for c in range(1, width + 1):
            rows = [y for y in range(height) if y % r == (r - 1) // 2]
            columns = [x for x in range(width) if x % c == (c - 1) // 2]
            count = len(rows) * len(columns)
            off = abs(math.log(count / (keep * height * width)))
            cost = round(off + 0.15 * abs(math.log(r) - math.log(c)), 9)
            if best is None or cost < best[0]:
                best = cost, [y * width + x for y in rows for x in columns]
    _, (positions, *_) = compress("uniform", tokens_of(grid), keep, grid)
    assert positions.tolist() == [best[1]] * 2


@pytest.mark.parametrize(
    ("grid", "keep", "rows", "columns"),
    [
        ((24, 24), 1 / 4, list(range(0, 24, 2)), list(range(0, 24, 2))),
        ((24, 24), 1 / 9, list(range(1, 24, 3)), list(range(1, 24, 3))),  # the middle of each three
        ((4, 8), 1 / 2, [0, 1, 2, 3], [0, 2, 4, 6]),
        ((4, 4), 0.9, [0, 1, 2, 3], [0, 1, 2, 3]),  # no whole stride is nearer
        ((1, 12), 1 / 4, [0], [1, 5, 9]),  # a sequence
        ((12, 1), 1 / 4, [1, 5, 9], [0]),
    ],
)
def test_uniform_at_known_ratios(grid, keep, rows, columns):
    _, (positions, *_) = compress("uniform", tokens_of(grid), keep, grid)
    assert positions.tolist() == [[y * grid[1] + x for y in rows for x in columns]] * 2


@pytest.mark.parametrize("grid", GRIDS[:4])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", ["text_guided", "text_guided_max"])
def test_text_guided_keeps_the_tokens_nearest_the_text(kind, grid, keep):
    tokens, length = tokens_of(grid), grid[0] * grid[1]
    text, text_mask = text_of(2, 3)
    _, (positions, *_) = compress(kind, tokens, keep, grid, text=text, text_mask=text_mask)
    for sample in range(2):
        words = [text[sample, t] for t in range(5) if text_mask[sample, t]]
        mean = sum(word / math.sqrt(word @ word) for word in words) / len(words)
        likeness = []
        for i in range(length):
            each = [cosine(tokens[sample, i], word) for word in words]
            likeness.append(max(each) if kind.endswith("max") else cosine(tokens[sample, i], mean))
        ranked = sorted(range(length), key=lambda i: -likeness[i])
        assert positions[sample].tolist() == sorted(ranked[: max(1, round(keep * length))])


@pytest.mark.parametrize("kind", FAMILIES["text"])
@pytest.mark.parametrize("length", [0, 5])
def test_a_sample_without_text_keeps_evenly_spaced_tokens(kind, length):
    tokens, text = tokens_of((1, 12)), text_of(2, 3, length=max(1, length))[0][:, :length]
    mask = torch.zeros(2, length, dtype=torch.bool)
    _, (positions, *_) = compress(kind, tokens, 1 / 3, (1, 12), text=text, text_mask=mask)
    assert positions.tolist() == [[1, 4, 7, 10]] * 2


@pytest.mark.parametrize("kind", FAMILIES["text"])
def test_relevance_is_float32_under_autocast_and_carries_no_gradient_to_the_text(kind):
    tokens, (text, text_mask) = tokens_of((8, 8)).float(), text_of(2, 3)
    text = text.float().requires_grad_()
    inputs = {"text": text, "text_mask": text_mask}
    plain, (positions, *_) = compress(kind, tokens, 0.5, (8, 8), **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        _, (cast, *_) = compress(kind, tokens, 0.5, (8, 8), **inputs)
    assert torch.equal(positions, cast)
    assert not plain.requires_grad


@pytest.mark.parametrize("kind", SELECTING)
def test_a_selection_holds_one_index_a_token_for_its_backward(kind):
    tokens, held = tokens_of((4, 4), dim=64).requires_grad_(), []

    def record(tensor):
        held.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        out, _ = run(kind, tokens, 0.25, (4, 4))
    assert held and sum(held) <= 8 * out.shape[0] * out.shape[1]


@pytest.mark.parametrize(("grid", "keep", "rows"), [((6, 8), 0.25, [0, 2, 4]), ((3, 1), 0.3, [1])])
def test_the_rows_that_pooling_leaves(grid, keep, rows):
    assert kept_rows(*grid, keep) == rows


# --- kinds of one's own --------------------------------------------------------------------------


def above(tokens, keep, *, scores):
    """The tokens whose score is more than 1 - keep: another number in each sample."""
    chosen = scores > 1 - keep
    order = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)
    counts = chosen.sum(1, keepdim=True)
    order = order[:, : int(counts.max())]
    real = torch.arange(order.shape[1]) < counts
    return Outputs(order, lambda x: x[torch.arange(len(x))[:, None], order], real=real)


def test_a_kind_may_keep_another_number_in_each_sample(monkeypatch):
    monkeypatch.setitem(KINDS, "above", above)
    tokens, scores = tokens_of((2, 3)), torch.tensor([[0, 0.9, 0, 0, 0.8, 1], [0, 0, 1.0, 0, 0, 0]])
    out, outputs = compress("above", tokens, 0.5, (2, 3), scores=scores)
    assert [p[r].tolist() for p, r in zip(outputs.positions, outputs.real, strict=True)] == [
        [1, 4, 5],
        [2],
    ]
    assert torch.equal(out[0], tokens[0, [1, 4, 5]]) and torch.equal(out[1, 0], tokens[1, 2])
    assert torch.equal(outputs.apply(2 * tokens), 2 * out)


class Mixer(nn.Module):
    """Every other token, through a linear map of its own."""

    def __init__(self, dim):
        super().__init__()
        self.map = nn.Linear(dim, dim, dtype=torch.float64)

    def forward(self, tokens, keep, *, grid):
        positions = torch.arange(0, grid[0] * grid[1], 2).expand(len(tokens), -1)
        outputs = select(positions)
        return outputs._replace(tokens=self.map(outputs.apply(tokens)))


def test_a_kind_with_weights_gives_its_own_outputs(monkeypatch):
    monkeypatch.setitem(KINDS, "mixer", Mixer)
    assert kind_of("mixer") is Mixer
    assert wants("mixer") == wants(Mixer) == wants(Mixer(3)) == {"grid"}
    mixer, tokens = Mixer(3), tokens_of((2, 3))
    out, outputs = compress(mixer, tokens, 0.5, (2, 3))
    torch.testing.assert_close(out, tokens[:, ::2] @ mixer.map.weight.T + mixer.map.bias)
    assert torch.equal(outputs.apply(tokens), tokens[:, ::2])
    out.sum().backward()
    assert mixer.map.weight.grad is not None
    assert compress(mixer, tokens, 1, (2, 3))[0] is tokens
    with pytest.raises(ValueError, match=r"kind='mixer'.*an instance"):
        compress("mixer", tokens, 0.5, (2, 3))


def test_a_kind_gets_what_it_names_and_may_name_nothing_else(monkeypatch):
    assert wants("none") == wants("bipartite") == frozenset()
    assert wants("random") == {"generator"}
    assert wants("text_guided") == {"text", "text_mask"}
    for kind in (
        lambda tokens, keep, *, scroes: None,
        lambda tokens, keep, **_: None,
        lambda tokens, keep, grid, layer=0: None,
    ):
        monkeypatch.setitem(KINDS, "odd", kind)
        with pytest.raises(ValueError, match=r"kind 'odd'.*grid, scores, text, text_mask, gen"):
            compress("odd", tokens_of((2, 3)), 0.5, (2, 3))


def returning(positions, apply=None, real=None, **more):
    return lambda tokens, keep: Outputs(positions, apply or (lambda x: x[:, :2]), real=real, **more)


PAIR = torch.tensor([[0, 1], [0, 1]])


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (lambda tokens, keep: (PAIR, lambda x: x), "outputs of kind 'odd'='tuple'.*Outputs"),
        (returning(PAIR.int()), "positions of kind 'odd'.*int32.*long"),
        (returning(PAIR[:1]), r"positions of kind 'odd'.*1, 2.*\[2, 1..6\]"),
        (returning(PAIR[:, :0]), r"positions of kind 'odd'.*2, 0.*\[2, 1..6\]"),
        (returning(PAIR + 5), r"positions of kind 'odd'=\(5, 6\).*0..5"),
        (returning(PAIR - 1), r"positions of kind 'odd'=\(-1, 0\).*0..5"),
        (returning(PAIR, real=PAIR), "real of kind 'odd'.*bool"),
        (returning(PAIR, lambda x: x), r"outputs of kind 'odd'=\[2, 6, 3\].*\[2, 2, 3\]"),
        (returning(PAIR, tokens=torch.ones(2, 2, 4)), r"=\[2, 2, 4\].*\[2, 2, 3\]"),
    ],
)
def test_what_a_kind_returns_is_checked(monkeypatch, kind, named):
    monkeypatch.setitem(KINDS, "odd", kind)
    with pytest.raises(ValueError, match=named):
        compress("odd", tokens_of((2, 3)), 0.5, (2, 3))


def test_every_kind_has_its_file():
    folder = Path(vtc.__file__).parent
    for module, names in FAMILIES.items():
        for name in names:
            assert source_of(name) == folder / f"{module}.py"
            assert kind_of(name).__module__ == f"sts.vtc.{module}"
    assert source_of("none") is None
    with pytest.raises(ValueError, match=r"kind='jpeg'.*uniform"):
        source_of("jpeg")


MINE = """
from sts.vtc import Outputs
from sts.vtc._shared import select


def mine(tokens, keep, *, grid):
    return select(tokens[..., 0].topk(grid[0], dim=1).indices)
"""


@pytest.fixture
def copied(tmp_path):
    """Runs code against a copy of the package with a kind in a file of its own."""
    package = Path(vtc.__file__).parents[1]
    for name in ("__init__.py", "checks.py", "vtc"):
        copy = shutil.copytree if (package / name).is_dir() else shutil.copy
        (tmp_path / "sts").mkdir(exist_ok=True)
        copy(package / name, tmp_path / "sts" / name)
    (tmp_path / "sts/vtc/mine.py").write_text(MINE)
    (tmp_path / "sts/vtc/empty.py").write_text("")

    def run(code):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_one_file_is_a_new_kind(copied):
    copied(
        """
import torch
from sts.vtc import KINDS, compress, kind_of, wants

assert KINDS["mine"] == "mine" and "_shared" not in KINDS and wants("mine") == {"grid"}
tokens = torch.tensor([[3.0, 1, 4, 0, 5, 2]])[..., None]
out, outputs = compress("mine", tokens, 0.5, (2, 3))
assert out.tolist() == [[[4.0], [5.0]]] and outputs.positions.tolist() == [[2, 4]]
try:
    kind_of("empty")
except ValueError as error:
    assert "empty.py" in str(error), error
else:
    raise AssertionError
"""
    )


def test_a_file_may_not_take_the_name_of_another_kind(tmp_path):
    (tmp_path / "uniform.py").write_text(MINE)
    with pytest.raises(ValueError, match=r"kind='uniform'.*taken"):
        vtc.discover([str(tmp_path)])


def test_names_and_files_of_kinds_need_no_torch(copied):
    out = copied(
        """
import sys
sys.modules["torch"] = None
from sts.vtc import FAMILIES, KINDS, source_of

print(*(source_of(name).name for name in ("uniform", "mine")), *KINDS)
"""
    )
    every = [name for names in FAMILIES.values() for name in names]
    ours = sorted(["empty", "mine", *KINDS.keys() - {"none", *every}])  # each in its own file
    assert out.split() == ["sampling.py", "mine.py", "none", *every, *ours]
