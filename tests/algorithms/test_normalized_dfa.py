"""Normalised direct feedback alignment: errors of unit length."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bioprop.algorithms import DirectFeedbackAlignment, NormalizedDFA
from bioprop.networks import MLP, Network
from bioprop.testing import AlgorithmContract
from bioprop.testing.helpers import CLASSES, SHAPE, copy_state, draw_batch, make_loader, make_trainer


class TestNormalizedDFA(AlgorithmContract):
    one_batch_epochs = 90
    one_batch_settings: ClassVar = {"optimizer": partial(torch.optim.Adam, lr=0.002)}

    def make(self, network: Network, **settings: Any) -> NormalizedDFA:
        return NormalizedDFA(network, **settings)


def by_hand(parameters: list[Tensor], B: list[Tensor], images: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradients of a tanh MLP of two hidden layers, sample by sample."""
    W1, b1, W2, b2, W3, b3 = parameters
    found = [torch.zeros_like(each) for each in parameters]
    for x, label in zip(images.flatten(1), labels, strict=True):
        h1 = torch.tanh(W1 @ x + b1)
        h2 = torch.tanh(W2 @ h1 + b2)
        e = torch.softmax(W3 @ h2 + b3, 0) - torch.eye(CLASSES, dtype=x.dtype)[label]
        unit = e / (e @ e) ** 0.5
        errors = [(B[0].T @ unit) * (1 - h1**2), (B[1].T @ unit) * (1 - h2**2), e]
        parts = [part for d, below in zip(errors, (x, h1, h2), strict=True) for part in (torch.outer(d, below), d)]
        found = [total + part / len(images) for total, part in zip(found, parts, strict=True)]
    return found


def test_gradients_are_those_by_hand_before_and_after_training(tmp_path: Path) -> None:
    algorithm = NormalizedDFA(MLP(SHAPE, CLASSES, hidden=(12, 9), activation="tanh")).double()
    B = [matrix.detach().clone() for matrix in algorithm.backward_weights.values()]
    images, labels = draw_batch()[0].double(), draw_batch()[1]
    for _ in range(2):
        found = algorithm.forward_gradients(images, labels)
        parameters = [value.detach() for value in algorithm.network.parameters()]
        for value, expected in zip(found.values(), by_hand(parameters, B, images, labels), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        make_trainer(tmp_path, max_epochs=1, precision="64-true").fit(algorithm, make_loader())


def test_a_single_image_has_the_direction_of_direct_feedback_alignment() -> None:
    """Each sample's hidden gradient differs by its error's length alone."""
    algorithm = NormalizedDFA(MLP(SHAPE, CLASSES, hidden=(12, 9))).double()
    plain = DirectFeedbackAlignment(algorithm.network).double()
    plain.backward_weights.load_state_dict(copy_state(algorithm.backward_weights))
    images, labels = draw_batch(1)[0].double(), draw_batch(1)[1]
    length = (algorithm(images).softmax(1) - torch.eye(CLASSES, dtype=torch.float64)[labels]).norm()
    found, expected = algorithm.forward_gradients(images, labels), plain.forward_gradients(images, labels)
    for name in ("fc1.linear.weight", "fc2.linear.weight"):
        torch.testing.assert_close(found[name] * length, expected[name])
    torch.testing.assert_close(found["fc3.linear.weight"], expected["fc3.linear.weight"])
