"""Difference target propagation and its variants."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.algorithms import DTP, LDRL
from bioprop.networks import MLP, Network
from bioprop.testing import AlgorithmContract, TargetPropagationContract
from bioprop.testing.helpers import CLASSES, SHAPE, changed, copy_state, draw_batch, refused, small_lenet
from tests.algorithms.plain import PlainLearner
from tests.algorithms.plain_outer import outer_stage
from tests.algorithms.test_whole_steps import (
    METHODS,
    NETWORKS,
    assert_same_weights,
    double_batches,
    make_pair,
    recorded_noise,
    train_both,
)

__all__ = ["recorded_noise"]  # the fixture


class TestDTP(TargetPropagationContract):
    loss_falls_to = 0.9

    def make(self, network: Network, **settings: Any) -> DTP:
        return DTP(network, **({"iterations": 2, "noise": 0.1, "feedback_lr": 3e-4} | settings))


class TestOuterDTP(TargetPropagationContract):
    """The feedback operator of Lee et al."""

    loss_falls_to = 0.9

    def make(self, network: Network, **settings: Any) -> DTP:
        return DTP(network, **({"iterations": 2, "noise": 0.1, "feedback_lr": 3e-3, "mirror": "outer"} | settings))


class TestDTPWithThePenultimateTargetByGradient(AlgorithmContract):
    phases = ("_train_feedback", "_local_gradients", "_step_forward_weights")
    loss_falls_to = 0.9

    def make(self, network: Network, **settings: Any) -> DTP:
        return DTP(network, **({"feedback_lr": 3e-4, "penultimate_target": "gradient"} | settings))


# -- the variants against the plain implementation --------------------------------------------------------------------


def make_outer_pair(build: Callable[[], Network]) -> tuple[DTP, PlainLearner]:
    algorithm, plain = make_pair(METHODS["dtp"]._replace(mirror="outer"), build)
    plain.stages = [outer_stage(stage, F.elu) for stage in plain.stages]
    return algorithm, plain


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_the_outer_form_trains_as_the_plain_implementation(
    build: Callable[[], Network], recorded_noise: list[Tensor], tmp_path: Path
) -> None:
    algorithm, plain = make_outer_pair(build)
    train_both(algorithm, plain, recorded_noise, tmp_path)
    assert_same_weights(algorithm, plain)


def test_another_outer_activation_is_noticed(recorded_noise: list[Tensor], tmp_path: Path) -> None:
    algorithm, plain = make_outer_pair(NETWORKS["mlp"])
    plain.stages = [outer_stage(stage, torch.tanh) for stage in plain.stages]
    train_both(algorithm, plain, recorded_noise, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_weights(algorithm, plain)


def gradients_with_penultimate_target_by_gradient(algorithm: DTP, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Lee et al.'s targets for an MLP of three tanh stages and ``outer`` feedback, written out."""
    weights = [parameter.detach().clone().requires_grad_() for parameter in algorithm.network.parameters()]
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = zip(*[iter(weights)] * 2, strict=True)
    s0 = images.flatten(1)
    s1 = torch.tanh(s0 @ w1.T + b1)
    s2 = torch.tanh(s1 @ w2.T + b2)
    s3 = torch.tanh(s2 @ w3.T + b3)
    logits = s3 @ w4.T + b4
    loss = F.cross_entropy(logits, labels, reduction="sum")
    below_output, output = torch.autograd.grad(loss, [s3, logits], retain_graph=True)

    def back(name: str, values: Tensor) -> Tensor:
        return torch.tanh(values @ algorithm.feedback[name].weight + algorithm.feedback[name].bias)

    t4, t3 = logits - algorithm.beta * output, s3 - algorithm.beta * below_output
    t2 = s2 + back("fc3", t3) - back("fc3", s3)
    t1 = s1 + back("fc2", t2) - back("fc2", s2)
    local = torch.zeros((), dtype=torch.float64)
    for inputs, weight, bias, target in ((s0, w1, b1, t1), (s1, w2, b2, t2), (s2, w3, b3, t3), (s3, w4, b4, t4)):
        affine = inputs.detach() @ weight.T + bias
        output = affine if weight is w4 else torch.tanh(affine)
        local = local + 0.5 * (output - target.detach()).square().sum() / len(images)
    return [gradient / algorithm.beta for gradient in torch.autograd.grad(local, weights)]


def tanh_mlp() -> Network:
    return MLP(SHAPE, CLASSES, hidden=(9, 8, 7), activation="tanh")


@pytest.mark.parametrize(("penultimate_target", "same"), [("gradient", True), ("feedback", False)])
def test_the_penultimate_target_comes_from_the_gradient(penultimate_target: str, same: bool) -> None:
    algorithm = DTP(tanh_mlp(), beta=0.3, mirror="outer", penultimate_target=penultimate_target).double()
    images, labels = next(double_batches())
    expected = gradients_with_penultimate_target_by_gradient(algorithm, images, labels)
    found = list(algorithm.forward_gradients(images, labels).values())
    close = [torch.allclose(*pair, rtol=1e-9, atol=1e-13) for pair in zip(found, expected, strict=True)]
    assert close == [same] * 6 + [True] * 2  # the output's own update is the gradient in any case


def test_with_the_gradient_the_output_stage_has_no_feedback() -> None:
    algorithm = DTP(tanh_mlp(), penultimate_target="gradient", noise=(0.1, 0.2), iterations=(1, 2))
    assert list(algorithm.feedback) == list(algorithm.feedback_angles()) == ["fc2", "fc3"]
    assert list(algorithm.train_feedback(draw_batch()[0])) == ["fc2", "fc3"]
    with refused("noise has 3 values", "2 stages", "fc2, fc3"):
        DTP(tanh_mlp(), penultimate_target="gradient", noise=(0.1, 0.2, 0.3))
    shallow = DTP(MLP(SHAPE, CLASSES, hidden=(9,)), penultimate_target="gradient")
    assert not shallow.feedback
    assert shallow.train_feedback(draw_batch()[0]) == {}


def test_unknown_variants_are_refused() -> None:
    with refused("penultimate_target 'output' is not known", "feedback, gradient"):
        DTP(small_lenet(), penultimate_target="output")
    with refused("mirror 'inner' is not known", "exact, paper, outer"):
        DTP(small_lenet(), mirror="inner")
    with refused("mirror 'outer' is not known", "paper, exact"):
        LDRL(small_lenet(), mirror="outer")  # its loss wants an operator that is linear in its weights


# -- what feedback training does --------------------------------------------------------------------------------------


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
