"""Damped Gauss-Newton targets and their updates, against explicit Jacobians and numpy, in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bioprop.functional.gauss_newton import gauss_newton_differences, gauss_newton_direction, gauss_newton_gradients
from bioprop.functional.gradients import backprop_gradients
from bioprop.networks import MLP, LeNet, Network, ResNet

CLASSES, SHAPE, DAMPING = 5, (2, 8, 8), 0.3
NETWORKS: dict[str, Callable[[], Network]] = {
    "mlp": lambda: MLP(SHAPE, CLASSES, hidden=(9, 7), activation="tanh"),
    "narrow mlp": lambda: MLP(SHAPE, CLASSES, hidden=(9, 3), activation="tanh"),
    "lenet": lambda: LeNet(SHAPE, CLASSES, channels=(3, 4), hidden=6, activation="tanh"),
    "lenet of elu": lambda: LeNet(SHAPE, CLASSES, channels=(3, 4), hidden=6),
    "resnet": lambda: ResNet(SHAPE, CLASSES, blocks=(1, 1), widths=(3, 4)).eval(),
}
on_every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64)
    return images, torch.tensor([0, 3, 1, 4])


def stage_functions(network: Network) -> list[Callable[[Tensor], Tensor]]:
    return [stage for _, stage in network.stages()]


def run_cut(network: Network, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    inputs, outputs = [images], []
    for stage in stage_functions(network):
        outputs.append(stage(inputs[-1]))
        inputs.append(outputs[-1].detach().requires_grad_())
    return outputs, inputs[:-1]


def directions_by_hand(network: Network, images: Tensor, labels: Tensor, damping: float) -> list[Tensor]:
    """``J^T (J J^T + lambda I)^-1 e`` of each sample alone, with the Jacobian of the whole network above."""
    found = []
    for place in range(len(network)):
        rows = []
        for image, label in zip(images, labels, strict=True):
            state = network[: place + 1](image[None]).detach()
            J = torch.autograd.functional.jacobian(network[place + 1 :], state).reshape(CLASSES, -1).numpy()
            logits = network(image[None]).detach().numpy()[0]
            error = np.eye(CLASSES)[label] - np.exp(logits) / np.exp(logits).sum()
            dh = J.T @ np.linalg.inv(J @ J.T + damping * np.eye(CLASSES)) @ error
            rows.append(torch.tensor(dh).view_as(state))
        found.append(torch.cat(rows))
    return found


def errors_at(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    return torch.eye(CLASSES, dtype=torch.float64)[labels] - network(images).detach().softmax(1)


@on_every_network
def test_directions_are_those_of_explicit_jacobians(build: Callable[[], Network], batch: tuple[Tensor, Tensor]) -> None:
    network = build().double()
    found = gauss_newton_differences(*run_cut(network, batch[0]), errors_at(network, *batch), DAMPING)
    expected = directions_by_hand(network, *batch, DAMPING)
    for direction, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(direction, wanted, rtol=1e-10, atol=1e-12)


@on_every_network
def test_updates_are_those_of_the_local_losses(build: Callable[[], Network], batch: tuple[Tensor, Tensor]) -> None:
    """Gradient of ``sum_n mean 1/2 |F^n(s^{n-1}) - t^n|^2`` with targets from explicit Jacobians."""
    network, (images, labels) = build().double(), batch
    found = gauss_newton_gradients(network, stage_functions(network), images, labels, DAMPING)
    loss, state = torch.zeros((), dtype=torch.float64), images
    for (_, stage), dh in zip(network.stages(), directions_by_hand(network, *batch, DAMPING), strict=True):
        output = stage(state.detach())
        loss = loss + 0.5 * (output - (output.detach() + dh)).square().sum() / len(images)
        state = output
    loss.backward()
    assert list(found) == [name for name, _ in network.named_parameters()]
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
        assert not found[name].requires_grad


def test_without_damping_it_is_the_pseudo_inverse() -> None:
    jacobian, error = torch.randn(3, 6, 2, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    found = gauss_newton_direction(jacobian, error, 0.0)
    for sample in range(6):
        J = jacobian[:, sample].flatten(1)
        torch.testing.assert_close(found[sample].flatten(), torch.linalg.pinv(J) @ error[sample])
        torch.testing.assert_close(J @ found[sample].flatten(), error[sample])  # the output moves as wanted


def test_damping_shortens_the_step_and_survives_a_singular_jacobian() -> None:
    jacobian, error = torch.randn(3, 6, 8, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    jacobian[2] = jacobian[0] + jacobian[1]
    lengths = [float(gauss_newton_direction(jacobian, error, damping).norm()) for damping in (1e-3, 0.1, 10.0)]
    assert lengths == sorted(lengths, reverse=True)
    jacobian = torch.zeros_like(jacobian)
    assert torch.equal(gauss_newton_direction(jacobian, error, 0.1), torch.zeros(6, 8, dtype=torch.float64))


def test_much_damping_gives_the_gradient(batch: tuple[Tensor, Tensor]) -> None:
    """``J^T (J J^T + lambda I)^-1 e -> J^T e / lambda``: BP's update, over lambda."""
    network = NETWORKS["lenet"]().double()
    found = gauss_newton_gradients(network, stage_functions(network), *batch, damping=1e8)
    expected, _ = backprop_gradients(network, *batch)
    for name, gradient in expected.items():
        assert (1e8 * found[name] - gradient).norm() < 1e-6 * gradient.norm()


def test_little_damping_does_not(batch: tuple[Tensor, Tensor]) -> None:
    network = NETWORKS["mlp"]().double()
    found = gauss_newton_gradients(network, stage_functions(network), *batch, damping=1e-3)["fc1.linear.weight"]
    gradient = backprop_gradients(network, *batch)[0]["fc1.linear.weight"]
    assert torch.cosine_similarity(found.flatten(), gradient.flatten(), dim=0) < 0.95


def test_frozen_parameters_have_no_update(batch: tuple[Tensor, Tensor]) -> None:
    network = NETWORKS["mlp"]().double()
    whole = gauss_newton_gradients(network, stage_functions(network), *batch, damping=DAMPING)
    network[0].requires_grad_(False)
    network[2].linear.bias.requires_grad_(False)
    part = gauss_newton_gradients(network, stage_functions(network), *batch, damping=DAMPING)
    assert whole.keys() - part.keys() == {"fc1.linear.weight", "fc1.linear.bias", "fc3.linear.bias"}
    assert all(torch.equal(value, whole[name]) for name, value in part.items())
