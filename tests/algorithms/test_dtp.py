"""Difference target propagation."""

from typing import Any

from bioprop.algorithms import DTP
from bioprop.networks import Network
from tests.algorithms.contract import (
    WITHOUT_VALIDATION,
    changed,
    copy_state,
    draw_batch,
    small_lenet,
)
from tests.algorithms.target_propagation_contract import TargetPropagationContract

pytestmark = WITHOUT_VALIDATION


class TestDTP(TargetPropagationContract):
    loss_falls_to = 0.9

    def make(self, network: Network, **settings: Any) -> DTP:
        return DTP(network, **({"iterations": 2, "noise": 0.1, "feedback_lr": 3e-4} | settings))


def test_the_biases_of_feedback_are_trained_too() -> None:
    """Reconstruction, unlike a difference, depends on them."""
    algorithm = DTP(small_lenet())
    before = copy_state(algorithm.feedback)
    algorithm.train_feedback(draw_batch()[0])
    assert changed(before, copy_state(algorithm.feedback)) == set(before)


def test_reconstruction_improves_with_iterations() -> None:
    algorithm, course = DTP(small_lenet(), iterations=60, feedback_lr=3e-4), []
    with algorithm.observe_feedback(course.append):
        algorithm.train_feedback(draw_batch(32)[0])
    for name in ("conv2", "fc1", "fc2"):
        losses = [event.loss.item() for event in course if event.stage == name]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
