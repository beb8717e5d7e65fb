"""L-DRL."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from bioprop.algorithms import LDRL
from bioprop.networks import Network
from tests.algorithms.contract import (
    WITHOUT_VALIDATION,
    changed,
    copy_state,
    draw_batch,
    refused,
    small_lenet,
)
from tests.algorithms.target_propagation_contract import TargetPropagationContract

pytestmark = WITHOUT_VALIDATION


class TestLDRL(TargetPropagationContract):
    loss_falls_to = 0.5

    def make(self, network: Network, **settings: Any) -> LDRL:
        return LDRL(network, **({"iterations": 3} | settings))


class TestLDRLAntithetic(TargetPropagationContract):
    """With noise of both signs."""

    def make(self, network: Network, **settings: Any) -> LDRL:
        return LDRL(network, **{"iterations": 2, "sampling": "antithetic"} | settings)


class TestLDRLExpected(TargetPropagationContract):
    """With the noise integrated out."""

    def make(self, network: Network, **settings: Any) -> LDRL:
        return LDRL(network, **{"iterations": 2, "sampling": "expected"} | settings)

    def test_every_batch_draws_noise_of_its_own(self) -> None:
        """Only where windows are pooled is anything sampled."""
        first, second = (self.made_from_seed(3) for _ in range(2))
        second.streams.next_batch()
        losses = [algorithm.train_feedback(draw_batch()[0]) for algorithm in (first, second)]
        assert losses[0]["conv2"] != losses[1]["conv2"]
        assert all(losses[0][name] == losses[1][name] for name in ("fc1", "fc2"))

    @pytest.mark.parametrize("step", ["sgd", "normalized"])
    def test_all_iterations_at_once_equal_one_by_one(self, step: str) -> None:
        """Watched training goes one by one; the second batch starts from momentum."""
        weights = []
        for watched in (False, True):
            algorithm = self.made_from_seed(3, feedback_step=step, feedback_lr=0.01, iterations=4).double()
            with algorithm.observe_feedback(lambda event: None) if watched else nullcontext():
                losses = [algorithm.train_feedback(draw_batch(seed=seed)[0].double()) for seed in (1, 2)]
            weights.append((copy_state(algorithm.feedback), losses))
        for name, weight in weights[0][0].items():
            torch.testing.assert_close(weight, weights[1][0][name], rtol=1e-12, atol=1e-14)
        for at_once, one_by_one in zip(weights[0][1], weights[1][1], strict=True):
            for name, loss in at_once.items():
                torch.testing.assert_close(loss, one_by_one[name], rtol=1e-10, atol=1e-12)

    def test_it_goes_where_the_sampled_rule_goes_on_average(self) -> None:
        """Many small sampled steps against an expected one, within what sampling leaves."""
        images, steps = draw_batch()[0].double(), {}
        for sampling, iterations in (("expected", 1), ("antithetic", 400)):
            algorithm = self.made_from_seed(
                3,
                sampling=sampling,
                feedback_step="sgd",
                feedback_momentum=0.0,
                feedback_lr=1e-4,
                iterations=iterations,
            ).double()
            before = copy_state(algorithm.feedback)
            algorithm.train_feedback(images)
            steps[sampling] = {
                name: (weight - before[name]).flatten() for name, weight in algorithm.feedback.state_dict().items()
            }
        for name in ("conv2.weight", "fc1.weight", "fc2.weight"):
            cosine = torch.cosine_similarity(steps["expected"][name], steps["antithetic"][name], 0)
            assert cosine > 0.8, name

    def test_stages_it_does_not_cover_are_refused_by_name(self) -> None:
        with refused("stage conv2", "mirror 'exact'"):
            self.make(small_lenet(), mirror="paper")


class TestLDRLAsPublished(TargetPropagationContract):
    def make(self, network: Network, **settings: Any) -> LDRL:
        published = {"switches": "noisy", "mirror": "paper", "feedback_step": "sgd"}
        return LDRL(network, **({"noise": 0.2, "iterations": 3, "feedback_lr": 0.02} | published | settings))


def test_an_unknown_feedback_step_is_refused() -> None:
    with refused("feedback_step 'adam' is not known", "sgd", "normalized"):
        LDRL(small_lenet(), feedback_step="adam")


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
        algorithm = LDRL(small_lenet(), iterations=1, feedback_step="sgd", feedback_momentum=momentum)
        algorithm.train_feedback(draw_batch()[0])
        ends.append([copy_state(algorithm.feedback)])
        algorithm.train_feedback(draw_batch()[0])
        ends[-1].append(copy_state(algorithm.feedback))
    (first_plain, second_plain), (first, second) = ends
    assert changed(first_plain, first) == set()
    assert {name for name in second if "weight" in name} <= changed(second_plain, second)


def test_the_biases_of_feedback_stay_as_drawn() -> None:
    """They cancel in the L-DRL loss."""
    algorithm = LDRL(small_lenet(), iterations=3, feedback_step="sgd", feedback_lr=0.01)
    before = copy_state(algorithm.feedback)
    algorithm.train_feedback(draw_batch()[0])
    assert changed(before, copy_state(algorithm.feedback)) == {name for name in before if name.endswith("weight")}
