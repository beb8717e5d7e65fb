"""Difference targets through feedback weights that are never trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.algorithms import DTP, LDRL, Backprop, FixedWeightDTP
from bioprop.feedback.noise import RandomStreams
from bioprop.networks import MLP, LeNet, Network, ResNet
from bioprop.testing import AlgorithmContract
from bioprop.testing.helpers import (
    CLASSES,
    SHAPE,
    changed,
    copy_state,
    draw_batch,
    make_loader,
    make_trainer,
    on_every_network,
    refused,
    sgd,
    small_lenet,
)
from tests.algorithms.plain import SGD, unpool
from tests.published_steps import in_units_of_backprop

Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def standardized_mlp() -> Network:
    return MLP(SHAPE, CLASSES, hidden=(12, 9), activation="tanh", standardize=True)


class TestFixedWeightDTP(AlgorithmContract):
    phases = ("_train_feedback", "_local_gradients", "_step_forward_weights")
    loss_falls_to = 0.9
    bf16_mixed_differs_by = 0.3  # its lower stages barely move: Adam makes steps of gradients near its eps

    def make(self, network: Network, **settings: Any) -> FixedWeightDTP:
        return FixedWeightDTP(network, **settings)


class StandardizedSuite(TestFixedWeightDTP):
    """The suite on a network that standardises; where it looks at every tensor it would take buffers for weights."""

    __test__ = False

    def make(self, network: Network, **settings: Any) -> FixedWeightDTP:
        return FixedWeightDTP(standardized_mlp(), **settings)


CHECKS: dict[str, Callable[[StandardizedSuite, Path], None]] = {
    "runs": lambda suite, at: suite.test_it_runs_on_every_network(standardized_mlp, at),
    "changes nothing": lambda suite, _: suite.test_forward_gradients_cover_every_parameter_and_change_nothing(
        standardized_mlp
    ),
    "same seed": lambda suite, at: suite.test_the_same_seed_gives_the_same_weights(at),
    "resumes": lambda suite, at: suite.test_a_resumed_run_equals_the_uninterrupted_one(at),
    "checkpoint": lambda suite, at: suite.test_a_checkpoint_brings_everything_back(standardized_mlp, at),
    "evaluates": lambda suite, at: suite.test_a_checkpoint_evaluates_as_it_did(at),
    "double": lambda suite, at: suite.test_double_precision_works_throughout(at),
    "learns": lambda suite, at: suite.test_the_loss_of_one_batch_falls(at),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_the_suite_holds_on_a_network_that_standardises(
    check: Callable[[StandardizedSuite, Path], None], tmp_path: Path
) -> None:
    check(StandardizedSuite(), tmp_path)


def test_evaluation_goes_by_the_running_statistics(tmp_path: Path) -> None:
    algorithm, trainer = FixedWeightDTP(standardized_mlp()), make_trainer(tmp_path, max_epochs=1)
    trainer.fit(algorithm, make_loader())
    before = copy_state(algorithm)
    (tested,) = trainer.test(algorithm, make_loader(), verbose=False)
    assert changed(before, copy_state(algorithm)) == set()
    images, labels = draw_batch(24)
    assert tested["test/loss"] == pytest.approx(F.cross_entropy(algorithm.eval()(images), labels).item(), rel=1e-5)


# -- whole training steps, written out ---------------------------------------------------------------------------------


def standardized(values: Tensor) -> Tensor:
    mean = values.sum(0) / len(values)
    std = (((values - mean) ** 2).sum(0) / (len(values) - 1)).sqrt()
    return (values - mean) / (std + 1e-12)


def unchanged(values: Tensor) -> Tensor:
    return values


class PlainMLP:
    """FW-DTP on an MLP of tanh stages with autograd alone; both norms standardise or do nothing."""

    def __init__(
        self,
        algorithm: FixedWeightDTP,
        norm: Callable[[Tensor], Tensor],
        output_norm: Callable[[Tensor], Tensor] = unchanged,
    ) -> None:
        self.output_norm = output_norm
        self.weights = [weight.detach().clone().requires_grad_() for weight in algorithm.network.parameters()]
        self.feedback = [mirror.weight.T.clone() for mirror in algorithm.feedback.values()]  # B_n
        self.norm, self.beta = norm, algorithm.beta
        self.optimizer = torch.optim.SGD(self.weights, **SGD)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.weights[::2], self.weights[1::2], strict=True))

    def stage(self, number: int, inputs: Tensor) -> Tensor:
        weight, bias = self.pairs()[number]
        affine = inputs @ weight.T + bias
        return self.output_norm(affine) if number == len(self.pairs()) - 1 else self.norm(torch.tanh(affine))

    def back(self, number: int, values: Tensor) -> Tensor:
        return self.norm(torch.tanh(values @ self.feedback[number - 1].T))

    def corrected(self, target: Tensor) -> Tensor:
        return self.norm(target)

    def local_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        states = [images.flatten(1)]
        for number in range(len(self.pairs())):
            states.append(self.stage(number, states[-1].detach()))
        logits = states[-1].detach()
        targets = [logits - self.beta * (logits.softmax(1) - torch.eye(CLASSES, dtype=logits.dtype)[labels])]
        for number in range(len(self.pairs()) - 1, 0, -1):
            difference = self.back(number, targets[0]) - self.back(number, states[number + 1])
            targets.insert(0, self.corrected(states[number] + difference))
        losses = [
            0.5 * ((state - target.detach()) ** 2).sum() / len(images)
            for state, target in zip(states[1:], targets, strict=True)
        ]
        return sum(losses)

    def train(self, loader: Any) -> None:
        for images, labels in loader:
            self.optimizer.zero_grad()
            self.local_loss(images.double(), labels).backward()
            self.optimizer.step()


#: Norm of hidden stages, norm of the output, and how the network is asked for them.
NORMS: dict[str, tuple[Any, Any, Any]] = {
    "plain": (unchanged, unchanged, False),
    "standardized": (standardized, unchanged, True),
    "output too": (standardized, standardized, "all"),
}


def make_pair(norm: str, feedback_init: str = "orthogonal") -> tuple[FixedWeightDTP, PlainMLP]:
    network = MLP(SHAPE, CLASSES, hidden=(12, 9, 8), activation="tanh", standardize=NORMS[norm][2])
    optimizer = sgd(**in_units_of_backprop("SGD", SGD, 0.7))
    algorithm = FixedWeightDTP(network, beta=0.7, feedback_init=feedback_init, optimizer=optimizer).double()
    return algorithm, PlainMLP(algorithm, *NORMS[norm][:2])


def train_both(algorithm: FixedWeightDTP, plain: PlainMLP, folder: Path) -> None:
    make_trainer(folder, max_epochs=1, precision="64-true").fit(algorithm, make_loader())
    plain.train(make_loader())


def assert_same_weights(algorithm: FixedWeightDTP, plain: PlainMLP) -> None:
    for found, expected in zip(algorithm.network.parameters(), plain.weights, strict=True):
        assert (found - expected).norm() < 1e-8 * expected.norm()


@pytest.mark.parametrize("norm", NORMS)
def test_training_equals_the_plain_implementation(norm: str, tmp_path: Path) -> None:
    algorithm, plain = make_pair(norm)
    train_both(algorithm, plain, tmp_path)
    assert_same_weights(algorithm, plain)


class SubtractsTheDifference(PlainMLP):
    def back(self, number: int, values: Tensor) -> Tensor:
        return -super().back(number, values)


class PlainFeedback(PlainMLP):
    """``g`` without the standardisation after its tanh."""

    def back(self, number: int, values: Tensor) -> Tensor:
        return torch.tanh(values @ self.feedback[number - 1].T)


class PlainTargets(PlainMLP):
    """Without the standardisation after the difference step."""

    def corrected(self, target: Tensor) -> Tensor:
        return target


class LinearFeedback(PlainMLP):
    def back(self, number: int, values: Tensor) -> Tensor:
        return self.norm(values @ self.feedback[number - 1].T)


@pytest.mark.parametrize(
    ("norm", "mutated"),
    [
        ("plain", SubtractsTheDifference),
        ("plain", LinearFeedback),
        ("standardized", SubtractsTheDifference),
        ("standardized", PlainFeedback),
        ("standardized", PlainTargets),
        ("standardized", LinearFeedback),
    ],
)
def test_another_rule_is_noticed(norm: str, mutated: type[PlainMLP], tmp_path: Path) -> None:
    algorithm, _ = make_pair(norm)
    plain = mutated(algorithm, *NORMS[norm][:2])
    train_both(algorithm, plain, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_weights(algorithm, plain)


def test_conv_stages_have_feedback_through_their_switches() -> None:
    """``t^1 - s^1 = tanh(convT(P^T t^2)) - tanh(convT(P^T s^2))`` on a LeNet, written out."""
    algorithm = FixedWeightDTP(LeNet(SHAPE, CLASSES, channels=(3, 4), hidden=6), feedback_scale=0.3).double()
    images, labels = draw_batch()
    conv1, conv2, fc1, fc2 = (stage for _, stage in algorithm.network.stages())
    maps = F.elu(F.conv2d(images.double(), conv1.weight, conv1.bias, padding=2))
    s1 = F.max_pool2d(maps, 3, 2, 1)
    s2, switches = F.max_pool2d(F.elu(F.conv2d(s1, conv2.weight, conv2.bias, padding=2)), 3, 2, 1, return_indices=True)
    s3 = F.elu(s2.flatten(1) @ fc1.weight.T + fc1.bias)
    logits = s3 @ fc2.weight.T + fc2.bias
    t4 = logits - algorithm.beta * (logits.softmax(1) - torch.eye(CLASSES, dtype=torch.float64)[labels])

    def back(name: str, values: Tensor) -> Tensor:
        return torch.tanh(values @ algorithm.feedback[name].weight)

    def back_through_conv(values: Tensor) -> Tensor:
        unpooled = unpool(values.view_as(s2), switches, (8, 8), adding=True)
        return torch.tanh(F.conv_transpose2d(unpooled, algorithm.feedback["conv2"].weight, padding=2))

    t3 = s3 + back("fc2", t4) - back("fc2", logits)
    t2 = s2.flatten(1) + back("fc1", t3) - back("fc1", s3)
    difference = (back_through_conv(t2) - back_through_conv(s2)).detach()
    loss = -(s1 * difference).sum() / len(images) / algorithm.beta
    (expected,) = torch.autograd.grad(loss, conv1.weight)
    found = algorithm.forward_gradients(images.double(), labels)["conv1.conv.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


# -- the feedback weights ----------------------------------------------------------------------------------------------


@on_every_network
def test_feedback_weights_never_change(build: Callable[[], Network], tmp_path: Path) -> None:
    algorithm = FixedWeightDTP(build())
    feedback = copy_state(algorithm.feedback)
    assert list(algorithm.feedback) == [name for name, _ in algorithm.network.stages()[1:]]
    assert set(feedback) == {f"{name}.weight" for name in algorithm.feedback}  # no biases
    assert algorithm.train_feedback(draw_batch()[0]) == {}
    make_trainer(tmp_path, max_epochs=2).fit(algorithm, make_loader())
    assert changed(feedback, copy_state(algorithm.feedback)) == set()
    assert not any(parameter.requires_grad for parameter in algorithm.feedback.parameters())
    assert len(algorithm.optimizers().param_groups[0]["params"]) == len(list(algorithm.network.parameters()))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1e-3),
        ({"feedback_init": "gaussian"}, 1e-3),
        ({"feedback_init": "orthogonal"}, 1.0),
        ({"feedback_init": "sparse"}, 1e-3),
        ({"feedback_init": "orthogonal", "feedback_scale": 0.25}, 0.25),
    ],
)
def test_feedback_weights_are_drawn_as_published(settings: dict[str, Any], scale: float) -> None:
    algorithm = FixedWeightDTP(MLP(SHAPE, CLASSES, hidden=(200, 100)), **settings)
    weight, kind = algorithm.feedback["fc2"].weight, settings.get("feedback_init", "uniform")
    if kind == "orthogonal":
        torch.testing.assert_close(weight @ weight.T, scale**2 * torch.eye(100), rtol=0, atol=1e-5)
    else:
        assert 0.9 * scale < weight.abs().max() < (6 if kind == "gaussian" else 1) * scale
    assert ((weight == 0).float().mean().item() == pytest.approx(0.9)) == (kind == "sparse")


def test_a_checkpoint_remembers_the_draw(tmp_path: Path) -> None:
    settings = {"feedback_init": "sparse", "feedback_scale": 0.01, "sparsity": 0.5}
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(FixedWeightDTP(small_lenet(), optimizer=sgd(), **settings), make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with refused("feedback_init was sparse and is now uniform", "sparsity was 0.5 and is now 0.9"):
        other = FixedWeightDTP(small_lenet(), optimizer=sgd())
        make_trainer(tmp_path, max_epochs=2).fit(other, make_loader(), ckpt_path=tmp_path / "half.ckpt")


def test_angles_and_symmetric_feedback() -> None:
    algorithm = FixedWeightDTP(standardized_mlp())
    assert all(60 < angle < 120 for angle in algorithm.feedback_angles().values())
    algorithm.symmetrize_feedback()
    assert all(angle < 1e-5 for angle in algorithm.feedback_angles().values())
    assert not any(parameter.requires_grad for parameter in algorithm.feedback.parameters())


def test_updates_far_below_the_output_keep_their_digits() -> None:
    """Differences fall by about a hundred a stage; in float32 they must not drown in the rounding of activations."""
    algorithm = FixedWeightDTP(MLP(SHAPE, CLASSES, hidden=(50,) * 6, activation="tanh"), beta=0.04)
    images, labels = draw_batch()
    single = algorithm.forward_gradients(images, labels)
    double = algorithm.double().forward_gradients(images.double(), labels)
    assert double["fc1.linear.weight"].norm() < 1e-9 * double["fc7.linear.weight"].norm()
    for name, expected in double.items():
        assert (single[name] - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"feedback_init": "zeros"}, "feedback_init 'zeros' is not known"),
        ({"feedback_scale": 0.0}, "feedback_scale is 0.0"),
        ({"feedback_scale": float("nan")}, "feedback_scale holds nan"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"beta": 0.0}, "beta is 0.0"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with refused(named):
        FixedWeightDTP(small_lenet(), **settings)


def test_networks_without_such_feedback_are_refused() -> None:
    with refused("a BasicBlockStage has no feedback operator with its activation outside", "ConvStage, LinearStage"):
        FixedWeightDTP(ResNet(SHAPE, CLASSES, blocks=(1, 1), widths=(4, 6)))
    for make in (DTP, LDRL, lambda network: DTP(network, mirror="outer")):
        with refused("a StandardizedStage has no"):
            make(standardized_mlp())


def test_there_is_nothing_random_but_the_draw() -> None:
    assert not any(isinstance(module, RandomStreams) for module in FixedWeightDTP(small_lenet()).modules())


def test_bp_trains_a_network_that_standardises(tmp_path: Path) -> None:
    algorithm = Backprop(standardized_mlp())
    images, labels = draw_batch()
    gradients = algorithm.forward_gradients(images, labels)
    F.cross_entropy(algorithm.network(images), labels).backward()
    assert all(torch.equal(gradients[name], p.grad) for name, p in algorithm.network.named_parameters())
    before = copy_state(algorithm)
    make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader())
    assert changed(before, copy_state(algorithm)) == set(before)
