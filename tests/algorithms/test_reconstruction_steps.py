"""Whole training steps of the DRL family, through a Trainer, against `plain_reconstruction.py`, in float64."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import DDTPRHL, DTPDRL, DDTPControl, DDTPLinear, DifferenceReconstruction
from bioprop.feedback.noise import NoiseStream
from bioprop.networks import MLP, LeNet, Network
from bioprop.testing.helpers import CLASSES, SHAPE, make_loader, make_trainer, refused
from tests.algorithms.plain_reconstruction import PlainReconstruction, Settings
from tests.published_steps import in_units_of_backprop

BATCHES = 3
METHODS: dict[str, Callable[..., DifferenceReconstruction]] = {
    "drl": DTPDRL,
    "linear": DDTPLinear,
    "rhl": partial(DDTPRHL, hidden_units=11),
    "control": DDTPControl,
}
NETWORKS: dict[str, Callable[[], Network]] = {
    "mlp": lambda: MLP(SHAPE, CLASSES, hidden=(8, 7, 6), activation="tanh"),
    "lenet": lambda: LeNet(SHAPE, CLASSES, channels=(3, 4), hidden=6, activation="tanh"),
}
SETTINGS = Settings(
    beta=0.4, sigma=[0.3, 0.2, 0.1], decay=[0.1, 0.02, 0.3], feedback_lr=[1e-2, 2e-2, 5e-3], lr=0.01, iterations=2
)
on_every_method = pytest.mark.parametrize("method", list(METHODS))


def copies(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors if tensor is not None]


def make_pair(method: str, network: str) -> tuple[DifferenceReconstruction, PlainReconstruction]:
    algorithm = METHODS[method](
        NETWORKS[network](),
        beta=SETTINGS.beta,
        noise=tuple(SETTINGS.sigma),
        feedback_lr=tuple(SETTINGS.feedback_lr),
        feedback_decay=tuple(SETTINGS.decay),
        iterations=SETTINGS.iterations,
        optimizer=partial(torch.optim.Adam, **in_units_of_backprop("Adam", {"lr": SETTINGS.lr}, SETTINGS.beta)),
    ).double()
    hidden = copies(*algorithm.hidden.parameters()) if method == "rhl" else []
    forward = [copies(stage.weight, stage.bias) for _, stage in algorithm.network.stages()]
    return algorithm, PlainReconstruction(method, forward, feedback_of(algorithm), hidden, SETTINGS)


def feedback_of(algorithm: DifferenceReconstruction) -> list[list[Tensor]]:
    return [copies(*operator.parameters()) for operator in algorithm.feedback.values()]


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


def train_both(
    algorithm: DifferenceReconstruction, plain: PlainReconstruction, draws: list[Tensor], folder: Path
) -> None:
    make_trainer(folder, max_epochs=1, precision="64-true").fit(algorithm, make_loader(BATCHES))
    noise = iter(draws)
    for images, labels in double_batches():
        plain.training_step(images, labels, noise)
    assert next(noise, None) is None  # both drew as often


def assert_same_weights(algorithm: DifferenceReconstruction, plain: PlainReconstruction) -> None:
    """Relative difference below 1e-10, of every forward and feedback weight as a whole."""
    found = [copies(stage.weight, stage.bias) for _, stage in algorithm.network.stages()] + feedback_of(algorithm)
    for mine, theirs in zip(found, plain.forward_weights + plain.feedback, strict=True):
        for tensor, wanted in zip(mine, theirs, strict=True):
            assert (tensor - wanted).norm() <= 1e-10 * wanted.norm()


@pytest.mark.parametrize("network", list(NETWORKS))
@on_every_method
def test_training_equals_the_plain_implementation(
    method: str, network: str, recorded_noise: list[Tensor], tmp_path: Path
) -> None:
    algorithm, plain = make_pair(method, network)
    before = feedback_of(algorithm)
    train_both(algorithm, plain, recorded_noise, tmp_path)
    assert_same_weights(algorithm, plain)
    # the optimizers did move what is compared
    assert all(
        (old[0] - new[0]).norm() > 1e-3 * old[0].norm() for old, new in zip(before, feedback_of(algorithm), strict=True)
    )


class FlippedTargets(PlainReconstruction):
    def target(self, n: int, output: Tensor, states: list[Tensor], switches: Any) -> Tensor:
        return 2 * states[n] - super().target(n, output, states, switches)


class UncorrectedTargets(PlainReconstruction):
    def target(self, n: int, output: Tensor, states: list[Tensor], switches: Any) -> Tensor:
        return super().target(n, output, states, switches) + 1e-3 * self.direct(n, states[-1], states[n])


class AllDecodersLearn(PlainReconstruction):
    """The loss of a stage trains every feedback operator on its way."""

    def decode(self, n: int, value: Tensor, like: Tensor, switches: Any, frozen: bool) -> Tensor:
        return super().decode(n, value, like, switches, frozen=False)


MUTATIONS = [
    ("drl", FlippedTargets, {}),
    ("drl", AllDecodersLearn, {}),
    ("linear", FlippedTargets, {}),
    ("linear", UncorrectedTargets, {}),
    ("rhl", FlippedTargets, {}),
    ("linear", PlainReconstruction, {"method": "control"}),
    ("linear", PlainReconstruction, {"decay": [0.1, 0.02, 0.31]}),
    ("rhl", PlainReconstruction, {"sigma": [0.3, 0.2, 0.11]}),
    ("control", PlainReconstruction, {"beta": 0.41}),
    ("control", PlainReconstruction, {"feedback_lr": [1e-2, 2e-2, 6e-3]}),
]


@pytest.mark.parametrize(("method", "mutated", "other"), MUTATIONS)
def test_another_method_is_noticed(
    method: str,
    mutated: type[PlainReconstruction],
    other: dict[str, Any],
    recorded_noise: list[Tensor],
    tmp_path: Path,
) -> None:
    algorithm, plain = make_pair(method, "mlp")
    settings = SETTINGS._replace(**{name: value for name, value in other.items() if name != "method"})
    parts = (plain.forward_weights, plain.feedback, plain.hidden)
    plain = mutated(other.get("method", method), *parts, settings)
    train_both(algorithm, plain, recorded_noise, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_weights(algorithm, plain)


@on_every_method
def test_forward_gradients_are_those_of_the_local_losses_over_beta(method: str) -> None:
    algorithm, plain = make_pair(method, "lenet")
    images, labels = next(double_batches())
    plain.local_loss(images, labels).backward()
    expected = [tensor.grad / SETTINGS.beta for stage in plain.forward_weights for tensor in stage]
    for found, wanted in zip(algorithm.forward_gradients(images, labels).values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_each_stage_has_its_own_eps_on_both_sides(recorded_noise: list[Tensor], tmp_path: Path) -> None:
    """Adam's first step by hand, ``lr g / (|g| + eps)``: a larger eps for each stage, as the published runs have."""
    eps, feedback_eps = (0.3, 0.02, 1e-3, 4.0), (2.0, 0.1, 0.01)
    network = MLP(SHAPE, CLASSES, hidden=(8, 7, 6), activation="tanh")
    algorithm = DDTPLinear(network, forward_eps=eps, feedback_eps=feedback_eps, feedback_lr=0.03, feedback_decay=0.2)
    algorithm.double()
    forward = [copies(stage.weight, stage.bias) for _, stage in network.stages()]
    feedback = feedback_of(algorithm)
    make_trainer(tmp_path, max_epochs=1, precision="64-true").fit(algorithm, make_loader(1))

    settings = Settings(beta=0.06, sigma=[0.1] * 3, decay=[0.2] * 3, feedback_lr=[1.0] * 3, lr=1.0, iterations=1)
    plain = PlainReconstruction(
        "linear", [copies(*each) for each in forward], [copies(*each) for each in feedback], [], settings
    )
    plain.feedback_optimizers = [torch.optim.SGD(each, lr=1.0) for each in plain.feedback]
    images, labels = next(iter(make_loader(1)))
    images = images.double()
    plain.feedback_iteration(images, iter(recorded_noise))
    stepped, plain.feedback = plain.feedback, feedback_of(algorithm)  # targets are made after the feedback's step
    for leaf in (tensor for each in plain.forward_weights for tensor in each):
        leaf.grad = None  # what the feedback's loss left there
    plain.local_loss(images, labels).backward()
    for stage, before, leaves, own in zip(network.stages(), forward, plain.forward_weights, eps, strict=True):
        for now, weight, leaf in zip((stage[1].weight, stage[1].bias), before, leaves, strict=True):
            gradient = leaf.grad / settings.beta
            torch.testing.assert_close(
                now.detach(), weight - 1e-3 * gradient / (gradient.abs() + own), rtol=1e-8, atol=1e-12
            )
    for (now,), (weight,), (after,), own in zip(feedback_of(algorithm), feedback, stepped, feedback_eps, strict=True):
        gradient = weight - after.detach()  # of SGD with rate 1
        torch.testing.assert_close(now, weight - 0.03 * gradient / (gradient.abs() + own), rtol=1e-8, atol=1e-12)


def test_an_eps_that_nothing_would_use_is_refused(tmp_path: Path) -> None:
    network = MLP(SHAPE, CLASSES, hidden=(8, 7), activation="tanh")
    with refused("feedback_eps is for an optimizer with an eps, such as Adam, and SGD has none"):
        DDTPLinear(network, feedback_eps=1e-3, feedback_optimizer=torch.optim.SGD)
    with refused("forward_eps is for an optimizer with an eps"):
        make_trainer(tmp_path, max_epochs=1).fit(
            DDTPLinear(network, forward_eps=1e-3, optimizer=partial(torch.optim.SGD, lr=0.1)), make_loader(1)
        )
    with refused("forward_eps is 0.0, but it must be above 0"):
        DDTPLinear(network, forward_eps=0.0)
    with refused("feedback_eps has 3 values"):
        DDTPLinear(network, feedback_eps=(1e-3, 1e-3, 1e-3))
