"""Visual token compression, against references in plain loops and float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sts.compressor import COMPRESSORS, compress, keep_at, pooled_grid
from sts.schedule import SCHEDULES

GRIDS = [(4, 4), (5, 7), (1, 9), (6, 1), (24, 24)]
KEEPS = [0.05, 0.25, 0.5, 0.77]
SLOW_FEW = settings(max_examples=60, deadline=None)


def tokens_of(grid, batch=2, dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid[0] * grid[1], dim, generator=generator, dtype=torch.float64)


def run(kind, tokens, keep, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens.shape[:2], generator=generator)
    return compress(kind, tokens, keep, grid, scores=scores, generator=generator)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("keep", KEEPS)
def test_average_pooling_is_the_mean_of_each_cell(grid, keep):
    (height, width), (rows, columns) = grid, pooled_grid(*grid, keep)
    tokens = tokens_of(grid)
    out, positions, _ = compress("avgpool2d", tokens, keep, grid)
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
    st.sampled_from(sorted(COMPRESSORS)),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(1e-3, 1),
    st.integers(1, 3),
)
def test_every_kind_keeps_at_least_one_and_ascending_positions(kind, height, width, keep, batch):
    tokens = tokens_of((height, width), batch)
    out, positions, _ = run(kind, tokens, keep, (height, width))
    count = out.shape[1]
    assert out.shape == (batch, count, 3) and positions.shape == (batch, count)
    assert 1 <= count <= height * width
    assert positions.dtype == torch.long
    assert positions.min() >= 0 and positions.max() < height * width
    assert (positions.diff(dim=1) > 0).all()
    if kind in (
        "avgpool2d",
        "pixel_shuffle",
    ):  # with room for both neighbours of a grid that can't divide
        assert abs(math.log(count / max(1.0, keep * height * width))) < math.log(2)
    elif kind != "none":
        assert count == max(1, round(keep * height * width))


@pytest.mark.parametrize("kind", sorted(COMPRESSORS))
def test_ratio_one_returns_the_input_itself(kind):
    tokens = tokens_of((3, 5))
    out, positions, _ = compress(kind, tokens, 1.0, (3, 5))
    assert out is tokens
    assert positions.tolist() == [list(range(15))] * 2


def test_of_two_tokens_nearest_a_centre_the_first_counts():
    _, positions, _ = compress("avgpool2d", tokens_of((4, 4)), 0.25, (4, 4))
    assert positions.tolist() == [[0, 2, 8, 10]] * 2


@pytest.mark.parametrize("kind", ["random", "cls_topk", "diverse"])
def test_selected_tokens_are_the_ones_at_their_positions(kind):
    tokens = tokens_of((5, 7))
    out, positions, _ = run(kind, tokens, 0.3, (5, 7))
    for sample in range(2):
        for i, position in enumerate(positions[sample].tolist()):
            assert torch.equal(out[sample, i], tokens[sample, position])


def test_top_k_takes_the_highest_scores():
    tokens, scores = tokens_of((4, 4)), torch.rand(2, 16, dtype=torch.float64)
    _, positions, _ = compress("cls_topk", tokens, 0.25, (4, 4), scores=scores)
    for sample in range(2):
        best = sorted(range(16), key=lambda i: -scores[sample, i])[:4]
        assert positions[sample].tolist() == sorted(best)


def test_random_follows_its_generator_alone_and_is_uniform():
    tokens = tokens_of((4, 4), batch=4000, dim=1)
    before = torch.random.get_rng_state()
    _, first, _ = run("random", tokens, 0.25, (4, 4), seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, run("random", tokens, 0.25, (4, 4), seed=1)[1])
    assert not torch.equal(first, run("random", tokens, 0.25, (4, 4), seed=2)[1])
    share = torch.bincount(first.flatten(), minlength=16) / 4000
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize("kind", sorted(COMPRESSORS))
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
        ({"kind": "cls_topk"}, r"scores.shape=None.*\[2, 16\]"),
        ({"kind": "cls_topk", "scores": torch.rand(2, 9)}, r"scores.shape=\[2, 9\].*\[2, 16\]"),
        ({"kind": "random"}, "generator=None.*torch.Generator"),
    ],
)
def test_bad_input_names_argument_value_and_what_is_accepted(arguments, named):
    valid = {"kind": "avgpool2d", "tokens": tokens_of((4, 4)), "keep": 0.5, "grid": (4, 4)}
    with pytest.raises(ValueError, match=named):
        compress(**valid | arguments)


@SLOW_FEW
@given(
    st.floats(0, 1),
    st.floats(1e-3, 1),
    st.sampled_from(SCHEDULES),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_keep_rises_from_keep_to_one(fraction, keep, schedule, anneal, later):
    value = keep_at(fraction, keep, schedule, anneal)
    assert keep <= value <= 1
    assert keep_at(max(fraction, later), keep, schedule, anneal) >= value
    if anneal and fraction >= 1 - anneal:
        assert value == 1


def test_keep_schedules_at_known_points():
    assert [keep_at(f, 0.25, "constant") for f in (0, 0.5, 1)] == [0.25] * 3
    assert [keep_at(f, 0.25, "linear") for f in (0, 0.5, 1)] == [0.25, 0.625, 1.0]
    assert [keep_at(f, 0.25, "staged") for f in (0.24, 0.25, 0.5, 0.75)] == [0.25, 0.5, 0.75, 1.0]
    assert keep_at(0.25, 0.2, "cosine") == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2)
    assert [keep_at(s / 10, 0.5, "constant", 0.2) for s in (7, 8, 9)] == [0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"schedule='step'.*constant, linear, cosine, staged"):
        keep_at(0.5, 0.5, "step")


def cosine(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("grid", GRIDS[:4])
@pytest.mark.parametrize("keep", KEEPS)
def test_pooling_along_the_sequence_is_the_mean_of_each_stretch(grid, keep):
    tokens = tokens_of(grid)
    length = tokens.shape[1]
    count = max(1, round(keep * length))
    out, positions, _ = compress("avgpool1d", tokens, keep, grid)
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
    out, _, _ = compress("pixel_shuffle", tokens, keep, grid)
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
    out, positions, _ = compress("cls_merge", tokens, keep, grid, scores=scores)
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
    _, positions, _ = compress("diverse", tokens, keep, grid)
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
    out, positions, _ = compress("bipartite", tokens, keep, grid)
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


@pytest.mark.parametrize("kind", sorted(COMPRESSORS))
def test_apply_does_the_same_to_other_features(kind):
    tokens = tokens_of((5, 7), dim=6)
    out, _, apply = run(kind, tokens, 0.3, (5, 7))
    assert torch.equal(apply(tokens), out)
    torch.testing.assert_close(apply(2 * tokens + 1), 2 * out + 1)
