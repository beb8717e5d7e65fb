"""Analytic feedback: copies of the forward weights, and backpropagation in the limit of small targets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import LDRL, AnalyticFeedback, Backprop
from bioprop.networks import Network, ResNet
from bioprop.testing import AlgorithmContract
from bioprop.testing.helpers import (
    CLASSES,
    NETWORKS,
    SHAPE,
    changed,
    copy_state,
    draw_batch,
    make_loader,
    make_trainer,
    sgd,
    small_lenet,
)


class TestAnalyticFeedback(AlgorithmContract):
    phases = ("_train_feedback", "_local_gradients", "_step_forward_weights")
    loss_falls_to = 0.3

    def make(self, network: Network, **settings: Any) -> AnalyticFeedback:
        return AnalyticFeedback(network, **settings)


def double_batch() -> tuple[Tensor, Tensor]:
    images, labels = draw_batch()
    return images.double(), labels


SMOOTH: dict[str, Any] = {"activation": "elu"}  # at a kink there is no Jacobian
EVERY: dict[str, Callable[[], Network]] = {
    **NETWORKS,
    "resnet": lambda: ResNet(SHAPE, CLASSES, blocks=(1, 1), widths=(4, 6), **SMOOTH),
    "resnet without batch norm": lambda: ResNet(SHAPE, CLASSES, blocks=(2,), widths=(4,), batch_norm=False, **SMOOTH),
}


@pytest.mark.parametrize("build", EVERY.values(), ids=EVERY)
def test_the_update_tends_to_the_gradient_with_beta(build: Callable[[], Network]) -> None:
    """``O(beta)`` away from it; feedback is there from the start."""
    network = build().double()
    expected = Backprop(network).forward_gradients(*double_batch())
    whole = torch.cat([value.flatten() for value in expected.values()])
    away = []
    for beta in (1e-2, 1e-4, 1e-6):
        found = AnalyticFeedback(network, beta=beta).double().forward_gradients(*double_batch())
        each = torch.cat([found[name].flatten() for name in expected])
        away.append(float((each - whole).norm() / whole.norm()))
    assert away[-1] < 1e-5
    assert away[-1] <= max(0.1 * away[0], 1e-9)


def test_training_is_that_of_ldrl_with_weights_copied_before_every_batch(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"beta": 0.3, "optimizer": sgd(lr=0.05)}
    analytic = AnalyticFeedback(small_lenet(), **settings).double()
    copied = LDRL(small_lenet(), iterations=0, **settings).double()
    copied.network.load_state_dict(copy_state(analytic.network))
    train = copied._train_feedback

    def copy_first(passes: Any) -> Any:
        copied.symmetrize_feedback()
        return train(passes)

    copied._train_feedback = copy_first  # type: ignore[method-assign]
    for algorithm in (analytic, copied):
        make_trainer(tmp_path, max_epochs=2, precision="64-true").fit(algorithm, make_loader())
    for name, weight in analytic.network.state_dict().items():
        torch.testing.assert_close(weight, copied.network.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_feedback_is_a_copy_that_follows_the_weights_batch_by_batch(tmp_path: Path) -> None:
    algorithm = AnalyticFeedback(small_lenet())
    before = copy_state(algorithm.network)
    make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader())
    assert "fc1.linear.weight" in changed(before, copy_state(algorithm.network))
    own = {value.data_ptr() for value in algorithm.network.parameters()}
    assert not own & {value.data_ptr() for value in algorithm.feedback.parameters()}
    assert all(0 < angle < 10 for angle in algorithm.feedback_angles().values())  # those of the last batch's start
    algorithm.train_feedback(draw_batch()[0])
    assert all(angle < 1e-5 for angle in algorithm.feedback_angles().values())
    assert not any(value.requires_grad for value in algorithm.feedback.parameters())
