"""Backpropagation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.algorithms import Backprop
from bioprop.networks import Network
from bioprop.testing import AlgorithmContract
from bioprop.testing.helpers import copy_state, cosine, draw_batch, make_loader, make_trainer, refused, sgd, small_lenet


class TestBackprop(AlgorithmContract):
    loss_falls_to = 0.1

    def make(self, network: Network, **settings: Any) -> Backprop:
        return Backprop(network, **settings)


def test_gradients_are_those_of_backward() -> None:
    algorithm = Backprop(small_lenet())
    images, labels = draw_batch()
    gradients = algorithm.forward_gradients(images, labels)
    F.cross_entropy(algorithm(images), labels).backward()
    assert all(torch.equal(gradients[name], p.grad) for name, p in algorithm.network.named_parameters())


def test_there_is_no_feedback() -> None:
    algorithm = Backprop(small_lenet())
    algorithm.symmetrize_feedback()
    assert algorithm.train_feedback(*draw_batch()) == {}
    assert algorithm.feedback_angles() == {}
    assert all(name.startswith("network.") for name in algorithm.state_dict())


def test_training_is_a_plain_torch_loop(tmp_path: Path) -> None:
    """Two epochs by hand: SGD with momentum and decay, cosine schedule stepped once an epoch."""
    algorithm, network = Backprop(small_lenet(), optimizer=sgd(), scheduler=cosine(2)), small_lenet()
    network.load_state_dict(copy_state(algorithm.network))
    optimizer = sgd()(network.parameters())
    scheduler = cosine(2)(optimizer)
    for _ in range(2):
        for images, labels in make_loader():
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
        scheduler.step()
    make_trainer(tmp_path, max_epochs=2).fit(algorithm, make_loader())
    for name, expected in network.state_dict().items():
        torch.testing.assert_close(algorithm.network.state_dict()[name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_supported_precisions_train(precision: str, tmp_path: Path) -> None:
    algorithm = Backprop(small_lenet())
    before = F.cross_entropy(algorithm(draw_batch()[0]), draw_batch()[1])
    make_trainer(tmp_path, max_epochs=8, precision=precision).fit(algorithm, make_loader(1))
    assert F.cross_entropy(algorithm.float()(draw_batch()[0]), draw_batch()[1]) < 0.9 * before


class SquaredErrorSuite(TestBackprop):
    """The checks that look at the loss, on the one of algorithms that descend the squared error."""

    __test__ = False

    def make(self, network: Network, **settings: Any) -> Backprop:
        return Backprop(network, **({"loss": "squared_error"} | settings))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * (logits - torch.eye(logits.shape[1])[labels]).square().sum(1).mean()


def test_the_suite_holds_on_squared_error(tmp_path: Path) -> None:
    suite = SquaredErrorSuite()
    suite.test_the_loss_of_one_batch_falls(tmp_path)
    suite.test_the_loss_of_training_is_logged(tmp_path)
    suite.test_evaluation_trains_nothing(tmp_path)
    suite.test_a_checkpoint_brings_everything_back(small_lenet, tmp_path)


def test_an_unknown_loss_is_refused() -> None:
    with refused("loss 'hinge' is not known", "cross_entropy, squared_error"):
        Backprop(small_lenet(), loss="hinge")


def test_resuming_with_another_loss_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Backprop(small_lenet()), make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with refused("loss was cross_entropy and is now squared_error"):
        other = Backprop(small_lenet(), loss="squared_error")
        make_trainer(tmp_path, max_epochs=2).fit(other, make_loader(), ckpt_path=tmp_path / "half.ckpt")
