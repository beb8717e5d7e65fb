"""Batch norm as values, against autograd's own Jacobian."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from bioprop.functional.batch_norm import NormPass, norm_pass, transposed_norm


def make_norm(training: bool) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3).double()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.3, 3.0)
    return norm.train(training)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_transposed_jacobian_of_the_whole_batch(training: bool) -> None:
    norm, maps = make_norm(training), torch.randn(4, 3, 2, 3, dtype=torch.float64)
    expected = jacobian(norm, maps).reshape(maps.numel(), maps.numel())
    each = norm_pass(norm, maps)
    found = jacobian(lambda step: transposed_norm(step, each), torch.zeros_like(maps)).reshape(expected.shape)
    torch.testing.assert_close(found, expected.t(), rtol=1e-10, atol=1e-12)
    couples = expected.view(4, 18, 4, 18)[0, :, 1].abs().max() > 1e-3
    assert couples == training  # in evaluation mode every sample is on its own


def test_the_pass_says_what_the_norm_computes_and_moves_nothing() -> None:
    norm, maps = make_norm(training=True), torch.randn(4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    scale, normalized = norm_pass(norm, maps)
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    expected = norm(maps)
    torch.testing.assert_close(normalized * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1), expected)
    spread = maps.var((0, 2, 3), correction=0)
    torch.testing.assert_close(scale, norm.weight / (spread + 1e-5).sqrt())
    assert not normalized.requires_grad
    assert not scale.requires_grad


def test_without_batch_norm_a_step_stays_as_it_is() -> None:
    step = torch.randn(2, 3, 4, 4)
    assert transposed_norm(step, None) is step
    assert torch.equal(transposed_norm(step, NormPass(torch.full((3,), 2.0), None)), 2.0 * step)
