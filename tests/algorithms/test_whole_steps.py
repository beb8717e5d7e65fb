"""Whole training steps, through a Trainer, against the plain implementation of `plain.py`, in float64."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import DTP, LDRL, TargetAlgorithm
from bioprop.feedback.noise import NoiseStream
from bioprop.networks import MLP, LeNet, Network
from bioprop.testing.helpers import CLASSES, SHAPE, make_loader, make_trainer, sgd
from tests.algorithms.plain import SGD, PlainLearner, PlainStage, TargetRule, difference_target
from tests.published_steps import in_units_of_backprop

BETA, BATCHES = 0.7, 3
NETWORKS: dict[str, Callable[[], Network]] = {
    "mlp": lambda: MLP(SHAPE, CLASSES, hidden=(7, 6)),
    "lenet": lambda: LeNet(SHAPE, CLASSES, channels=(3, 4), hidden=6),
}


class Method(NamedTuple):
    """An algorithm and what the plain implementation calls it."""

    make: Callable[..., TargetAlgorithm]
    name: str
    mirror: str
    feedback_lr: float
    normalized: bool = False
    clean_switches: bool = False
    second_noise: str = "independent"
    is_auto: bool = False


def make_ldrl(**ours: str) -> Callable[..., TargetAlgorithm]:
    return lambda network, **settings: LDRL(network, **ours, **settings)


AS_PUBLISHED = make_ldrl(second_noise="independent", feedback_step="sgd", switches="noisy")
EXPECTED = make_ldrl(second_noise="expected")
METHODS = {
    "ldrl as published": Method(AS_PUBLISHED, "ldrl", "paper", 1e-3),
    "ldrl exact with sgd": Method(AS_PUBLISHED, "ldrl", "exact", 1e-3),
    "ldrl normalized": Method(make_ldrl(second_noise="independent"), "ldrl", "exact", 0.1, True, True),
    "ldrl by default": Method(LDRL, "ldrl", "exact", 0.0, True, True, "echo", is_auto=True),
    "ldrl, the paper's mirror": Method(LDRL, "ldrl", "paper", 0.0, True, True, "echo", is_auto=True),
    "ldrl with numbers": Method(LDRL, "ldrl", "exact", 0.1, True, True, "echo"),
    "ldrl with sgd": Method(make_ldrl(feedback_step="sgd"), "ldrl", "exact", 1e-2, False, True, "echo"),
    "ldrl expected": Method(EXPECTED, "ldrl", "exact", 0.0, True, True, "expected", is_auto=True),
    "ldrl expected with numbers": Method(EXPECTED, "ldrl", "exact", 0.1, True, True, "expected"),
    "dtp": Method(DTP, "dtp", "exact", 1e-3),
    "dtp with the paper's mirror": Method(DTP, "dtp", "paper", 1e-3),
}


def per_stage(network: Network, *values: float) -> list[float]:
    return list(values[: len(network.stages()) - 1])


def make_pair(method: Method, build: Callable[[], Network]) -> tuple[TargetAlgorithm, PlainLearner]:
    network = build()
    iterations = [int(number) for number in per_stage(network, 2, 3, 1)]
    lr = per_stage(network, method.feedback_lr, 2 * method.feedback_lr, 3 * method.feedback_lr)
    numbers = {
        "noise": tuple(per_stage(network, 0.3, 0.2, 0.1)),
        "feedback_lr": tuple(lr),
        "iterations": tuple(iterations),
    }
    algorithm = method.make(
        network,
        beta=BETA,
        mirror=method.mirror,
        optimizer=sgd(**in_units_of_backprop("SGD", SGD, BETA)),
        **({} if method.is_auto else numbers),
    ).double()
    mirrors = [None, *(mirror for _, _, mirror in algorithm.mirrored_stages())]
    stages = []
    for (_, stage), mirror in zip(network.stages(), mirrors, strict=True):
        feedback = [torch.zeros(0, dtype=torch.float64)] * 2 if mirror is None else [mirror.weight, mirror.bias]
        weights = [tensor.detach().clone() for tensor in (stage.weight, stage.bias, *feedback)]
        stages.append(PlainStage(*weights, tuple(stage.input_shape), stage is network[-1]))
    given = [[None] * len(lr)] * 2 if method.is_auto else [iterations, lr]
    rules = (method.normalized, method.clean_switches, difference_target, method.second_noise)
    return algorithm, PlainLearner(stages, method.name, method.mirror, BETA, *given, *rules)


@pytest.fixture
def recorded_noise(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All noise that is drawn while the test runs, in order, of standard deviation 1."""
    draws: list[Tensor] = []
    draw = NoiseStream.draw

    def record(self: NoiseStream, sigma: float, *shapes: tuple[int, ...]) -> list[Tensor]:
        drawn = draw(self, sigma, *shapes)
        draws.extend(tensor / sigma for tensor in drawn)
        return drawn

    monkeypatch.setattr(NoiseStream, "draw", record)
    return draws


def double_batches() -> Iterator[tuple[Tensor, Tensor]]:
    return ((images.double(), labels) for images, labels in make_loader(BATCHES))


def train_both(algorithm: TargetAlgorithm, plain: PlainLearner, draws: list[Tensor], folder: Path) -> None:
    batches, loader = list(double_batches()), make_loader(BATCHES)
    draws.clear()  # of what the images were drawn from
    make_trainer(folder, max_epochs=1, precision="64-true").fit(algorithm, loader)
    noise = iter(list(draws))
    for images, labels in batches:
        plain.training_step(images, labels, noise, list(algorithm.feedback_training.noise.values()))
    assert next(noise, None) is None  # both drew as often


def assert_same_weights(algorithm: TargetAlgorithm, plain: PlainLearner) -> None:
    """Relative difference below 1e-10, of every forward and feedback weight as a whole."""
    mirrors = [None, *(mirror for _, _, mirror in algorithm.mirrored_stages())]
    for (_, stage), mirror, expected in zip(algorithm.network.stages(), mirrors, plain.stages, strict=True):
        pairs = [(stage.weight, expected.weight), (stage.bias, expected.bias)]
        if mirror is not None:
            pairs += [(mirror.weight, expected.feedback), (mirror.bias, expected.feedback_bias)]
        for found, wanted in pairs:
            assert (found - wanted).norm() < 1e-10 * wanted.norm()


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_equals_the_plain_implementation(
    method: Method, build: Callable[[], Network], recorded_noise: list[Tensor], tmp_path: Path
) -> None:
    algorithm, plain = make_pair(method, build)
    train_both(algorithm, plain, recorded_noise, tmp_path)
    assert_same_weights(algorithm, plain)


@pytest.mark.parametrize(
    "rule",
    [
        lambda state, back_target, back_state: state - (back_target - back_state),
        lambda state, back_target, back_state: state,
        lambda state, back_target, back_state: back_target,
    ],
    ids=["sign flipped", "difference dropped", "correction dropped"],
)
@pytest.mark.parametrize("method", [METHODS["ldrl by default"], METHODS["dtp"]], ids=["ldrl", "dtp"])
def test_another_hidden_target_is_noticed(
    rule: TargetRule, method: Method, recorded_noise: list[Tensor], tmp_path: Path
) -> None:
    algorithm, plain = make_pair(method, NETWORKS["mlp"])
    plain.target_rule = rule
    train_both(algorithm, plain, recorded_noise, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_weights(algorithm, plain)


@pytest.mark.parametrize("clean_switches", [True, False])
def test_the_other_passs_switches_are_noticed(
    clean_switches: bool, recorded_noise: list[Tensor], tmp_path: Path
) -> None:
    method = METHODS["ldrl by default" if clean_switches else "ldrl exact with sgd"]
    algorithm, plain = make_pair(method, NETWORKS["lenet"])
    plain.clean_switches = not clean_switches
    train_both(algorithm, plain, recorded_noise, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_weights(algorithm, plain)


@pytest.mark.parametrize("method", [METHODS["ldrl by default"], METHODS["dtp"]], ids=["ldrl", "dtp"])
def test_forward_gradients_are_those_of_the_local_losses_over_beta(method: Method) -> None:
    algorithm, plain = make_pair(method, NETWORKS["lenet"])
    images, labels = next(double_batches())
    plain.local_loss(images, labels).backward()
    expected = [tensor.grad / BETA for stage in plain.stages for tensor in stage[:2]]
    for found, wanted in zip(algorithm.forward_gradients(images, labels).values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert plain.target_rule is difference_target
