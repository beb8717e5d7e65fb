"""Direct Kolen-Pollack: the matrices' steps by hand, and the theorem for the last hidden stage."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import DirectKolenPollack
from bioprop.networks import MLP, LeNet, Network
from bioprop.testing import AlgorithmContract
from bioprop.testing.helpers import (
    CLASSES,
    NETWORKS,
    SHAPE,
    Phases,
    cosine,
    draw_batch,
    make_loader,
    make_trainer,
    refused,
    sgd,
)


class TestDirectKolenPollack(AlgorithmContract):
    """On one batch as direct feedback alignment; its matrices learn with ``W``, in phase 2."""

    one_batch_epochs = 90
    one_batch_settings: ClassVar = {
        "optimizer": partial(torch.optim.Adam, lr=0.002),
        "feedback_optimizer": partial(torch.optim.Adam, lr=1e-4),
    }

    def make(self, network: Network, **settings: Any) -> DirectKolenPollack:
        return DirectKolenPollack(network, **({"feedback_optimizer": sgd(lr=1e-3)} | settings))

    def test_phase_1_leaves_forward_weights_and_phase_2_feedback_weights(self, tmp_path: Path) -> None:
        algorithm = self.make(self.small_network())
        phases = Phases(algorithm, self.phases)
        self.fit(algorithm, tmp_path)
        learning = {name for name in algorithm.state_dict() if name.startswith(("network.", "backward_weights."))}
        course = [("train_feedback", set()), ("_gradients", set()), ("_step_forward_weights", learning)]
        assert phases.course == course * 3


def make(**settings: Any) -> DirectKolenPollack:
    """An algorithm with one optimizer for both, unless the settings have another."""
    network, optimizer = MLP(SHAPE, CLASSES, hidden=(12, 9), activation="tanh"), sgd(lr=0.1, weight_decay=0.0)
    both = {"optimizer": optimizer, "feedback_optimizer": settings.get("optimizer", optimizer)}
    return DirectKolenPollack(network, **(both | settings)).double()


def fit(algorithm: DirectKolenPollack, folder: Path, epochs: int = 1, batches: int = 3) -> None:
    make_trainer(folder, max_epochs=epochs, precision="64-true").fit(algorithm, make_loader(batches))


def states_of(parameters: list[Tensor], images: Tensor) -> list[Tensor]:
    W1, b1, W2, b2, W3, b3 = parameters
    h1 = torch.tanh(images.flatten(1) @ W1.T + b1)
    h2 = torch.tanh(h1 @ W2.T + b2)
    return [images.flatten(1), h1, h2, h2 @ W3.T + b3]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_whole_steps_are_those_by_hand(momentum: float, tmp_path: Path) -> None:
    """Three batches of SGD on weights and matrices, with weight decay for both."""
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.02}
    algorithm = make(optimizer=sgd(**settings))
    weights = [value.detach().clone() for value in algorithm.network.parameters()]
    B = [value.detach().clone() for value in algorithm.backward_weights.values()]
    first = [matrix.clone() for matrix in B]
    velocities = [torch.zeros_like(each) for each in (*weights, *B)]
    for images, labels in make_loader():
        states = states_of(weights, images.double())
        e = (torch.softmax(states[-1], 1) - torch.eye(CLASSES, dtype=torch.float64)[labels]) / len(images)
        errors = [(e @ B[0]) * (1 - states[1] ** 2), (e @ B[1]) * (1 - states[2] ** 2), e]
        pairs = zip(errors, states, strict=False)
        gradients = [part for d, below in pairs for part in (d.T @ below, d.sum(0))]
        gradients += [e.T @ states[1], e.T @ states[2]]
        for tensor, gradient, velocity in zip((*weights, *B), gradients, velocities, strict=True):
            velocity.mul_(momentum).add_(gradient + 0.02 * tensor)
            tensor -= 0.1 * velocity
    fit(algorithm, tmp_path)
    found = [*algorithm.network.parameters(), *algorithm.backward_weights.values()]
    for mine, theirs in zip(found, (*weights, *B), strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=1e-10, atol=1e-12)
    assert all((one - other).norm() > 1e-3 * other.norm() for one, other in zip(B, first, strict=True))


@pytest.mark.parametrize("optimizer", [{"momentum": 0.9}, {"momentum": 0.0}])
def test_the_last_matrix_differs_from_the_output_weight_by_what_decays(
    optimizer: dict[str, float], tmp_path: Path
) -> None:
    """``B - W`` is as at first without decay; with plain SGD it shrinks by ``1 - lr decay`` in every batch."""
    decay = 0.0 if optimizer["momentum"] else 0.5
    algorithm = make(optimizer=sgd(lr=0.1, weight_decay=decay, **optimizer), scheduler=cosine(10**9))

    def difference() -> Tensor:
        return (algorithm.backward_weights["fc2"] - algorithm.network[2].linear.weight).detach()

    before = difference()
    fit(algorithm, tmp_path, epochs=2)
    torch.testing.assert_close(difference(), (1 - 0.1 * decay) ** 6 * before, rtol=1e-9, atol=1e-12)


def test_the_matrices_have_an_optimizer_of_their_own(tmp_path: Path) -> None:
    algorithm = make(feedback_optimizer=sgd(lr=1e-9, momentum=0.0, weight_decay=0.0))
    before = algorithm.backward_weights["fc1"].detach().clone()
    fit(algorithm, tmp_path)
    assert 0 < (algorithm.backward_weights["fc1"] - before).norm() < 1e-7
    trainer = make_trainer(tmp_path, max_epochs=1)
    first = DirectKolenPollack(NETWORKS["strided"](), feedback_optimizer=sgd(lr=0.1))
    trainer.fit(first, make_loader(1))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = DirectKolenPollack(NETWORKS["strided"](), feedback_optimizer=sgd(lr=0.2))
    with refused("feedback_optimizer.lr was 0.1 and is now 0.2"):
        make_trainer(tmp_path, max_epochs=2).fit(other, make_loader(1), ckpt_path=tmp_path / "one.ckpt")


def test_matrices_of_conv_stages_learn_from_their_maps(tmp_path: Path) -> None:
    steps = sgd(lr=1.0, momentum=0.0, weight_decay=0.0)
    algorithm = DirectKolenPollack(LeNet(SHAPE, CLASSES, channels=(3, 4), hidden=6), feedback_optimizer=steps)
    images, labels = draw_batch(8)
    B, output = algorithm.backward_weights["conv1"].detach().clone(), algorithm.network[0](images).detach()
    e = (algorithm(images).softmax(1) - torch.eye(CLASSES)[labels]) / len(images)
    make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader(1))
    expected = B - (e.t() @ output.flatten(1)).detach()
    torch.testing.assert_close(algorithm.backward_weights["conv1"].detach(), expected, rtol=1e-4, atol=1e-6)
