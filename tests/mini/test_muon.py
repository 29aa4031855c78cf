"""Muon in float32 against torch's own, which rounds to bf16 on its way."""

import pytest
import torch

from recipes.mini.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_a_matrix_is_made_nearly_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = left.T @ orthogonal(matrix) @ right.T  # in the matrix's own directions
    assert kept.diagonal().min() > 0.6 and kept.diagonal().max() < 1.3
    torch.testing.assert_close(kept, kept.diagonal().diag(), atol=1e-4, rtol=0)


def test_steps_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(48, 16, generator=generator)
    gradients = torch.randn(5, 48, 16, generator=generator)
    ends = []
    for kind in (Muon, torch.optim.Muon):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=0.02, momentum=0.95, weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach() - start)
    torch.testing.assert_close(*ends, atol=0.02 * ends[1].abs().max().item(), rtol=0)
