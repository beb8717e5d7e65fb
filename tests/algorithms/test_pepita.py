"""PEPITA: two forward passes, written out in numpy, and what they come to for small perturbations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bioprop.algorithms import PEPITA, Backprop
from bioprop.networks import MLP, LeNet, Network
from bioprop.networks.stages import LinearStage
from bioprop.testing import AlgorithmContract
from bioprop.testing.helpers import CLASSES, SHAPE, changed, copy_state, draw_batch, make_loader, make_trainer, refused

Array = np.ndarray[Any, Any]


def as_mlp(network: Network) -> Network:
    """A network of the suite as fully connected stages, as many of them."""
    if all(isinstance(stage, LinearStage) for _, stage in network.stages()):
        return network
    bias = any(name.endswith("bias") for name, _ in network.named_parameters())
    return MLP(SHAPE, CLASSES, hidden=(30, 20, 12)[: len(network.stages()) - 1], activation="tanh", bias=bias)


class TestPEPITA(AlgorithmContract):
    loss_falls_to = 0.9

    def make(self, network: Network, **settings: Any) -> PEPITA:
        return PEPITA(as_mlp(network), **({"feedback_scale": 0.3} | settings))

    def test_resuming_with_another_network_is_refused(self, tmp_path: Path) -> None:
        self.fit(self.make(MLP(SHAPE, CLASSES, hidden=(9, 8))), tmp_path).save_checkpoint(tmp_path / "half")
        with refused("network.init_args.hidden was [9, 8] and is now [9, 7]"):
            other = self.make(MLP(SHAPE, CLASSES, hidden=(9, 7)))
            self.fit(other, tmp_path, epochs=2, ckpt_path=tmp_path / "half")

    def test_a_checkpoint_loads_into_a_network_of_ones_own(self, tmp_path: Path) -> None:
        algorithm, network = self.make(self.small_network()), as_mlp(self.small_network())
        self.fit(algorithm, tmp_path).save_checkpoint(tmp_path / "one.ckpt")
        loaded = PEPITA.load_from_checkpoint(tmp_path / "one.ckpt", network=network)
        assert loaded.network is network
        assert changed(copy_state(algorithm), copy_state(loaded)) == set()


def double_batch() -> tuple[Tensor, Tensor]:
    images, labels = draw_batch()
    return images.double(), labels


def make(scale: float = 0.5) -> PEPITA:
    return PEPITA(MLP(SHAPE, CLASSES, hidden=(12, 9), activation="tanh"), feedback_scale=scale).double()


def run(parameters: list[Array], x: Array) -> list[Array]:
    W1, b1, W2, b2, W3, b3 = parameters
    h1 = np.tanh(x @ W1.T + b1)
    h2 = np.tanh(h1 @ W2.T + b2)
    return [x, h1, h2, h2 @ W3.T + b3]


def error_of(logits: Array, labels: Tensor) -> Array:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True) - np.eye(CLASSES)[labels.numpy()]


def by_hand(parameters: list[Array], F: Array, images: Tensor, labels: Tensor) -> list[Array]:
    first = run(parameters, images.flatten(1).numpy())
    second = run(parameters, first[0] + error_of(first[-1], labels) @ F)
    errors = [first[1] - second[1], first[2] - second[2], error_of(second[-1], labels)]
    pairs = zip(errors, second[:-1], strict=True)
    return [part / len(images) for d, below in pairs for part in (d.T @ below, d.sum(0))]


def parameters_of(algorithm: PEPITA) -> list[Array]:
    return [value.detach().numpy().copy() for value in algorithm.network.parameters()]


def test_gradients_are_those_by_hand_before_and_after_training(tmp_path: Path) -> None:
    algorithm = make()
    F = algorithm.backward_weights["input"].detach().numpy().copy()
    for _ in range(2):
        found = algorithm.forward_gradients(*double_batch()).values()
        for value, expected in zip(found, by_hand(parameters_of(algorithm), F, *double_batch()), strict=True):
            torch.testing.assert_close(value, torch.from_numpy(expected), rtol=1e-10, atol=1e-12)
            assert value.norm() > 0
        make_trainer(tmp_path, max_epochs=1, precision="64-true").fit(algorithm, make_loader())


def test_small_perturbations_give_the_jacobian_of_the_stages_below() -> None:
    """``(s^1 - r^1) / scale -> -tanh'(a^1) o (e F W^1T)``, and the output stage has backpropagation's gradient."""
    found, baseline = {}, Backprop(make().network)
    for scale in (1e-3, 1e-6):
        torch.manual_seed(3)
        algorithm = make(scale)
        images, labels = double_batch()
        W1 = parameters_of(algorithm)[0]
        states = run(parameters_of(algorithm), images.flatten(1).numpy())
        F = algorithm.backward_weights["input"].numpy()
        error = -(error_of(states[-1], labels) @ F @ W1.T) * (1 - states[1] ** 2) / len(images)
        expected = torch.from_numpy(error.T @ states[0])
        gradients = algorithm.forward_gradients(images, labels)
        found[scale] = float((gradients["fc1.linear.weight"] - expected).norm() / expected.norm())
        baseline = Backprop(algorithm.network)
    assert found[1e-6] < 1e-4
    assert found[1e-6] < 0.01 * found[1e-3]
    exact = baseline.forward_gradients(images, labels)["fc3.linear.weight"]
    assert (gradients["fc3.linear.weight"] - exact).norm() < 1e-4 * exact.norm()


def test_the_matrix_is_uniform_of_the_published_size_and_stays() -> None:
    algorithm = PEPITA(MLP((1, 28, 28), 10))
    F = algorithm.backward_weights["input"]
    assert F.shape == (10, 784)
    assert 0.95 < float(F.abs().max()) / (0.05 * (6 / 784) ** 0.5) <= 1.0
    assert not F.requires_grad


@pytest.mark.parametrize(
    "build",
    [lambda: LeNet(SHAPE, CLASSES, channels=(3, 4), hidden=6), lambda: MLP(SHAPE, CLASSES, standardize=True)],
    ids=["conv", "standardised"],
)
def test_other_stages_are_refused(build: Any) -> None:
    with refused("PEPITA is a rule for fully connected stages", "choose MLP"):
        PEPITA(build())


def test_a_scale_of_nothing_is_refused() -> None:
    with refused("feedback_scale is 0.0"):
        make(scale=0.0)
