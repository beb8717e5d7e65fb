"""Gradients as values."""

import torch
import torch.nn.functional as F
from torch import nn

from bioprop.functional.gradients import backprop_gradients, input_gradient, preserve_buffers, preserve_state


def make_network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4))


def test_backprop_gradients_are_those_of_the_mean_loss() -> None:
    network, images, labels = make_network(), torch.randn(6, 3, 2, 2), torch.randint(4, (6,))
    gradients, logits = backprop_gradients(network, images, labels)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not logits.requires_grad
    assert torch.equal(logits, network(images))
    F.cross_entropy(network(images), labels).backward()
    assert list(gradients) == [name for name, _ in network.named_parameters()]
    for name, parameter in network.named_parameters():
        assert torch.equal(gradients[name], parameter.grad)


def test_backprop_gradients_are_those_of_another_loss_if_asked() -> None:
    network, images, labels = make_network(), torch.randn(6, 3, 2, 2), torch.randint(4, (6,))
    gradients, _ = backprop_gradients(network, images, labels, lambda logits, labels: logits.square().sum())
    network(images).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert torch.equal(gradients[name], parameter.grad)


def test_an_error_at_the_output_comes_down_by_the_transposed_jacobian() -> None:
    stage = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()
    inputs, error = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    slope = 1 - torch.tanh(inputs @ stage[0].weight.T + stage[0].bias) ** 2
    with torch.no_grad():
        found = input_gradient(stage, inputs, error)
    torch.testing.assert_close(found, (error * slope) @ stage[0].weight)
    assert not found.requires_grad
    assert not inputs.requires_grad
    assert all(parameter.grad is None for parameter in stage.parameters())


def test_frozen_parameters_have_no_gradient() -> None:
    network = make_network()
    network[1].weight.requires_grad_(False)
    gradients, _ = backprop_gradients(network, torch.randn(6, 3, 2, 2), torch.randint(4, (6,)))
    assert list(gradients) == ["1.bias", "3.weight", "3.bias"]


def test_backprop_gradients_are_formed_without_grad_mode_too() -> None:
    network, images, labels = make_network(), torch.randn(6, 3, 2, 2), torch.randint(4, (6,))
    expected, _ = backprop_gradients(network, images, labels)
    with torch.no_grad():
        gradients, _ = backprop_gradients(network, images, labels)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_preserve_state_puts_buffers_and_random_state_back() -> None:
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    random_state = torch.get_rng_state()
    with preserve_state(network):
        network(torch.randn(8, 4))
        assert not torch.equal(network[0].running_mean, buffers["0.running_mean"])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())


def test_preserve_buffers_leaves_the_random_state_to_its_course() -> None:
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    random_state = torch.get_rng_state()
    with preserve_buffers(network):
        network(torch.randn(8, 4))
    assert not torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())


def test_preserve_buffers_leaves_graphs_made_before_usable() -> None:
    """Batch norm keeps its running statistics for the backward pass, where autograd refuses what was written to."""
    network = nn.BatchNorm1d(4)
    output = network(torch.randn(8, 4))
    with preserve_buffers(network):
        network(torch.randn(8, 4))
    output.square().sum().backward()
    assert network.weight.grad.abs().max() > 0
