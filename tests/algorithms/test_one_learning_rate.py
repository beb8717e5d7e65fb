"""The forward optimizer is handed the gradient in BP's units: the published steps, of ``beta`` times it, in float64."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import (
    DTP,
    DTPDRL,
    LDRL,
    DDTPLinear,
    FixedWeightDTP,
    ParallelLDRL,
    TargetAlgorithm,
    TargetPropagation,
)
from bioprop.networks import LeNet, Network
from bioprop.testing.helpers import CLASSES, SHAPE, make_loader, make_trainer
from tests.published_steps import in_units_of_backprop

BATCHES, EPOCHS = 3, 3
AS_PUBLISHED: dict[str, Any] = {
    "second_noise": "independent",
    "noise": 0.1,
    "mirror": "paper",
    "switches": "noisy",
    "feedback_step": "sgd",
    "feedback_lr": 1e-3,
}
METHODS: dict[str, tuple[Callable[..., TargetAlgorithm], float]] = {
    "ldrl": (LDRL, 0.7),
    "ldrl as published": (partial(LDRL, iterations=2, **AS_PUBLISHED), 0.4655),
    "parallel ldrl": (partial(ParallelLDRL, samples=2), 0.5),
    "dtp": (partial(DTP, iterations=2, feedback_lr=3e-4), 0.5),
    "tp": (partial(TargetPropagation, feedback_lr=3e-4), 10.0),
    "fixed-weight dtp": (partial(FixedWeightDTP, feedback_init="orthogonal"), 0.04),
    "dtp-drl": (DTPDRL, 0.06),
    "ddtp-linear": (DDTPLinear, 0.01596),
}
SGD: dict[str, Any] = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-2}
ADAM: dict[str, Any] = {"lr": 2e-3, "weight_decay": 1e-4, "eps": 1e-3}  # of the size of the gradients
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", SGD),
    "nesterov": ("SGD", SGD | {"nesterov": True}),
    "dampening": ("SGD", SGD | {"dampening": 0.3}),
    "adam": ("Adam", ADAM),
    "amsgrad": ("Adam", ADAM | {"amsgrad": True}),
    "adamw": ("AdamW", ADAM | {"weight_decay": 0.1}),
}
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "cosine": ("CosineAnnealingLR", {"T_max": 4, "eta_min": 1e-3}),
    "steps": ("StepLR", {"step_size": 1, "gamma": 0.5}),
}


def make(method: str, **settings: Any) -> TargetAlgorithm:
    """In float64, its weights and noise from the same seed every time."""
    build, beta = METHODS[method]
    torch.manual_seed(5)
    network: Network = LeNet(SHAPE, CLASSES, channels=(3, 4), hidden=8, activation="tanh")
    return build(network, beta=beta, **settings).double()


def maker(name: str, settings: dict[str, Any]) -> Callable[..., Any]:
    return partial(getattr(torch.optim, name, None) or getattr(torch.optim.lr_scheduler, name), **settings)


def weights_of(algorithm: TargetAlgorithm) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in algorithm.named_parameters()}


def train_as_published(algorithm: TargetAlgorithm, optimizer: Any, schedule: Any) -> dict[str, Tensor]:
    """Phase 1 and the gradients are the algorithm's; the loop, the factor, the optimizer and its schedule are plain."""
    algorithm.configure_optimizers()
    stepper = optimizer(algorithm.network.parameters())
    scheduler = schedule(stepper)
    for _ in range(EPOCHS):
        for images, labels in make_loader(BATCHES):
            _, gradients = algorithm._learn(images.double(), labels)
            for name, parameter in algorithm.network.named_parameters():
                parameter.grad = algorithm.beta * gradients.forward[name]
            stepper.step()
        scheduler.step()
    return weights_of(algorithm)


def train(algorithm: TargetAlgorithm, folder: Path) -> dict[str, Tensor]:
    make_trainer(folder, max_epochs=EPOCHS, precision="64-true").fit(algorithm, make_loader(BATCHES))
    return weights_of(algorithm)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of all weights', each as a whole, relative to its norm."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


def converted(method: str, published: str, schedule: str) -> dict[str, dict[str, Any]]:
    (kind, settings), (_, course), beta = PUBLISHED[published], SCHEDULES[schedule], METHODS[method][1]
    if kind == "SGD" and "eta_min" in course:
        course = course | {"eta_min": course["eta_min"] * beta}
    return {"optimizer": in_units_of_backprop(kind, settings, beta), "scheduler": course}


def run_both(method: str, published: str, schedule: str, folder: Path, **changes: dict[str, Any]) -> float:
    """Train as published, and by our step with the converted settings; ``changes`` spoil the conversion."""
    (kind, settings), (shape, course) = PUBLISHED[published], SCHEDULES[schedule]
    ours = {part: values | changes.get(part, {}) for part, values in converted(method, published, schedule).items()}
    wanted = train_as_published(make(method), maker(kind, settings), maker(shape, course))
    makers = {"optimizer": maker(kind, ours["optimizer"]), "scheduler": maker(shape, ours["scheduler"])}
    return distance(train(make(method, **makers), folder), wanted)


@pytest.mark.parametrize("published", PUBLISHED)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_equals_the_published_one_of_other_units(method: str, published: str, tmp_path: Path) -> None:
    assert run_both(method, published, "cosine", tmp_path) < 1e-12


@pytest.mark.parametrize("published", ["sgd", "adam"])
def test_a_schedule_of_factors_stays_as_it_is(published: str, tmp_path: Path) -> None:
    assert run_both("ldrl", published, "steps", tmp_path) < 1e-12


@pytest.mark.parametrize(
    ("published", "forgotten"),
    [
        ("sgd", {"optimizer": {"lr": SGD["lr"]}}),
        ("sgd", {"optimizer": {"weight_decay": SGD["weight_decay"]}}),
        ("sgd", {"scheduler": {"eta_min": SCHEDULES["cosine"][1]["eta_min"]}}),
        ("adam", {"optimizer": {"eps": ADAM["eps"]}}),
        ("adam", {"optimizer": {"weight_decay": ADAM["weight_decay"]}}),
        ("adam", {"optimizer": {"lr": ADAM["lr"] * METHODS["ldrl"][1]}}),
        ("adamw", {"optimizer": {"weight_decay": 0.1 / METHODS["ldrl"][1]}}),
    ],
)
def test_each_part_of_the_conversion_matters(
    published: str, forgotten: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    assert run_both("ldrl", published, "cosine", tmp_path, **forgotten) > 1e-9
