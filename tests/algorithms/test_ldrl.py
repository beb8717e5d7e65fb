"""L-DRL."""

from typing import Any

import pytest
import torch

from bioprop.algorithms import LDRL
from bioprop.networks import Network
from bioprop.testing import TargetPropagationContract
from bioprop.testing.helpers import changed, copy_state, draw_batch, refused, small_lenet

SGD = {"feedback_step": "sgd", "feedback_lr": 0.01, "noise": 0.1}


class TestLDRL(TargetPropagationContract):
    loss_falls_to = 0.5

    def make(self, network: Network, **settings: Any) -> LDRL:
        return LDRL(network, **settings)


@pytest.mark.slow
class TestLDRLWithTheSecondNoiseIntegratedOut(TargetPropagationContract):
    def make(self, network: Network, **settings: Any) -> LDRL:
        return LDRL(network, **({"second_noise": "expected"} | settings))


class TestLDRLAsPublished(TargetPropagationContract):
    def make(self, network: Network, **settings: Any) -> LDRL:
        published = {"second_noise": "independent", "switches": "noisy", "mirror": "paper", "feedback_step": "sgd"}
        return LDRL(network, **({"noise": 0.2, "iterations": 3, "feedback_lr": 0.02} | published | settings))


def test_an_unknown_feedback_step_is_refused() -> None:
    with refused("feedback_step 'mine' is not known", "sgd", "normalized"):
        LDRL(small_lenet(), feedback_step="mine")


def test_unknown_switches_are_refused() -> None:
    with refused("switches 'mine' is not known", "noisy", "clean"):
        LDRL(small_lenet(), switches="mine")


def test_more_than_a_newton_step_is_refused() -> None:
    with refused("feedback_lr 1.5 is above 1", "(0, 1]"):
        LDRL(small_lenet(), feedback_lr=(0.1, 1.5, 0.1))
    LDRL(small_lenet(), feedback_lr=1.5, feedback_step="sgd")


def test_negative_momentum_is_refused() -> None:
    with refused("feedback_momentum is -0.1"):
        LDRL(small_lenet(), feedback_step="sgd", feedback_momentum=-0.1)


def test_momentum_carries_over_from_batch_to_batch() -> None:
    """Without momentum a stage's second batch ends elsewhere: the first batch's velocity plays a part."""
    ends = []
    for momentum in (0.0, 0.9):
        torch.manual_seed(5)
        algorithm = LDRL(small_lenet(), iterations=1, **SGD, feedback_momentum=momentum)
        algorithm.train_feedback(draw_batch()[0])
        ends.append([copy_state(algorithm.feedback)])
        algorithm.train_feedback(draw_batch()[0])
        ends[-1].append(copy_state(algorithm.feedback))
    (first_plain, second_plain), (first, second) = ends
    assert changed(first_plain, first) == set()
    assert {name for name in second if "weight" in name} <= changed(second_plain, second)


@pytest.mark.parametrize("second_noise", ["echo", "expected", "independent"])
def test_the_biases_of_feedback_stay_as_drawn(second_noise: str) -> None:
    """They cancel in the L-DRL loss."""
    algorithm = LDRL(small_lenet(), iterations=3, **SGD, second_noise=second_noise)
    before = copy_state(algorithm.feedback)
    algorithm.train_feedback(draw_batch()[0])
    assert changed(before, copy_state(algorithm.feedback)) == {name for name in before if name.endswith("weight")}
