"""Direct random target projection: the label straight to every hidden stage."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bioprop.algorithms import DirectRandomTargetProjection
from bioprop.networks import MLP, Network
from bioprop.testing import AlgorithmContract
from bioprop.testing.helpers import CLASSES, SHAPE, draw_batch, make_loader, make_trainer


class TestDirectRandomTargetProjection(AlgorithmContract):
    bf16_mixed_differs_by = 0.3  # its loss falls by a tenth only

    def make(self, network: Network, **settings: Any) -> DirectRandomTargetProjection:
        return DirectRandomTargetProjection(network, **settings)


def by_hand(parameters: list[Tensor], B: list[Tensor], images: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradients of a tanh MLP of two hidden layers, written out."""
    W1, b1, W2, b2, W3, b3 = parameters
    x, targets = images.flatten(1), torch.eye(CLASSES, dtype=images.dtype)[labels]
    h1 = torch.tanh(x @ W1.T + b1)
    h2 = torch.tanh(h1 @ W2.T + b2)
    e = torch.softmax(h2 @ W3.T + b3, dim=1) - targets
    errors = [(-targets @ B[0]) * (1 - h1**2), (-targets @ B[1]) * (1 - h2**2), e]
    pairs = zip(errors, (x, h1, h2), strict=True)
    return [part / len(x) for d, below in pairs for part in (d.T @ below, d.sum(0))]


def test_gradients_are_those_by_hand_before_and_after_training(tmp_path: Path) -> None:
    algorithm = DirectRandomTargetProjection(MLP(SHAPE, CLASSES, hidden=(12, 9), activation="tanh")).double()
    B = [matrix.detach().clone() for matrix in algorithm.backward_weights.values()]
    images, labels = draw_batch()[0].double(), draw_batch()[1]
    for _ in range(2):
        found = algorithm.forward_gradients(images, labels)
        parameters = [value.detach() for value in algorithm.network.parameters()]
        for value, expected in zip(found.values(), by_hand(parameters, B, images, labels), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        make_trainer(tmp_path, max_epochs=1, precision="64-true").fit(algorithm, make_loader())
