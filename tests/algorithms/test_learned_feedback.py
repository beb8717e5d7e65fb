"""Kolen-Pollack and the weight mirror: backward matrices that learn, each by its own rule and settings."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bioprop.algorithms import FeedbackAlignment
from bioprop.functional.backward_matrices import mirror_estimate
from bioprop.networks import Network
from bioprop.testing.helpers import (
    Weights,
    changed,
    copy_state,
    cosine,
    draw_batch,
    make_loader,
    make_trainer,
    refused,
    sgd,
    small_lenet,
)
from tests.algorithms.plain_models import PLAIN, RESNETS

OPTIMIZERS = {
    "sgd with momentum": sgd(lr=0.05, weight_decay=0.0),
    "adam": partial(torch.optim.Adam, lr=0.01),
}
with_every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def kolen_pollack(network: nn.Module, **settings: Any) -> FeedbackAlignment:
    return FeedbackAlignment(network, rule="kolen_pollack", **settings).double()


def differences(algorithm: FeedbackAlignment) -> Weights:
    """``W - B`` of every layer."""
    return {
        name: (layer.weight - algorithm.backward_weights[name.replace(".", "/")]).detach()
        for name, layer in algorithm.layers()
    }


def fit_double(algorithm: FeedbackAlignment, folder: Path, epochs: int = 1, batches: int = 3, **settings: Any) -> Any:
    trainer = make_trainer(folder, max_epochs=epochs, precision="64-true")
    trainer.fit(algorithm, make_loader(batches), **settings)
    return trainer


# -- Kolen-Pollack ---------------------------------------------------------------------------------------------------


@with_every_optimizer
@pytest.mark.parametrize("decay", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize(
    "build", [small_lenet, RESNETS["resnet"], PLAIN["plain residual"]], ids=["lenet", "resnet", "plain"]
)
def test_the_difference_shrinks_at_the_rate_of_the_decay(
    build: Callable[[], nn.Module], decay: float, optimizer: Any, tmp_path: Path
) -> None:
    algorithm = kolen_pollack(build(), decay=decay, optimizer=optimizer)
    before, weights = differences(algorithm), copy_state(algorithm.network)
    fit_double(algorithm, tmp_path, epochs=2)
    for name, found in differences(algorithm).items():
        torch.testing.assert_close(found, (1 - decay) ** 6 * before[name], rtol=1e-9, atol=1e-12)
    assert all((copy_state(algorithm.network)[f"{name}.weight"] != weights[f"{name}.weight"]).any() for name in before)


@with_every_optimizer
def test_the_rate_holds_under_a_schedule_of_the_learning_rate(optimizer: Any, tmp_path: Path) -> None:
    """The optimizer of ``B`` follows the schedule of the optimizer of ``W``."""
    algorithm = kolen_pollack(small_lenet(), decay=0.05, optimizer=optimizer, scheduler=cosine(3))
    before = differences(algorithm)
    fit_double(algorithm, tmp_path, epochs=3)
    for name, found in differences(algorithm).items():
        torch.testing.assert_close(found, 0.95**9 * before[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("remedy", ["batch_manhattan", "normalize_feedback"])
def test_the_rate_holds_with_remedies(remedy: str, tmp_path: Path) -> None:
    algorithm = kolen_pollack(small_lenet(), decay=0.05, optimizer=sgd(lr=1e-3, weight_decay=0.0), **{remedy: True})
    before = differences(algorithm)
    fit_double(algorithm, tmp_path)
    for name, found in differences(algorithm).items():
        torch.testing.assert_close(found, 0.95**3 * before[name], rtol=1e-9, atol=1e-12)


def test_both_sides_get_the_same_increment_and_the_same_decay(tmp_path: Path) -> None:
    algorithm = kolen_pollack(small_lenet(), decay=0.1, optimizer=sgd(lr=0.5, momentum=0.0, weight_decay=0.0))
    before = copy_state(algorithm)
    images, labels = draw_batch(8)
    gradients = algorithm.forward_gradients(images.double(), labels)
    fit_double(algorithm, tmp_path, batches=1)
    for name, _ in algorithm.layers():
        gradient, key = gradients[f"{name}.weight"], f"backward_weights.{name.replace('.', '/')}"
        for tensor in (f"network.{name}.weight", key):
            expected = 0.9 * before[tensor] - 0.5 * gradient  # the increment itself does not decay
            torch.testing.assert_close(algorithm.state_dict()[tensor], expected, rtol=1e-10, atol=1e-12)
        bias = before[f"network.{name}.bias"] - 0.5 * gradients[f"{name}.bias"]  # the decay is the matrices' alone
        torch.testing.assert_close(algorithm.state_dict()[f"network.{name}.bias"], bias, rtol=1e-10, atol=1e-12)


def test_the_feedback_optimizer_has_settings_of_its_own(tmp_path: Path) -> None:
    plain = {"momentum": 0.0, "weight_decay": 0.0}
    algorithm = kolen_pollack(
        small_lenet(), decay=0.0, optimizer=sgd(lr=0.5, **plain), feedback_optimizer=sgd(lr=0.2, **plain)
    )
    before = copy_state(algorithm)
    images, labels = draw_batch(8)
    gradients = algorithm.forward_gradients(images.double(), labels)
    fit_double(algorithm, tmp_path, batches=1)
    for name, _ in algorithm.layers():
        for tensor, lr in ((f"network.{name}.weight", 0.5), (f"backward_weights.{name.replace('.', '/')}", 0.2)):
            expected = before[tensor] - lr * gradients[f"{name}.weight"]
            torch.testing.assert_close(algorithm.state_dict()[tensor], expected, rtol=1e-10, atol=1e-12)


def test_the_angle_falls_while_the_weights_learn(tmp_path: Path) -> None:
    algorithm = kolen_pollack(small_lenet(), decay=0.05, optimizer=sgd(lr=0.05))
    assert all(angle > 60 for angle in algorithm.feedback_angles().values())
    fit_double(algorithm, tmp_path, epochs=60)
    assert all(angle < 5 for angle in algorithm.feedback_angles().values())


def test_matrices_and_optimizer_stay_the_same_tensors(tmp_path: Path) -> None:
    algorithm = kolen_pollack(small_lenet())
    before = {name: (id(value), value.data_ptr()) for name, value in algorithm.named_parameters()}
    trainer = fit_double(algorithm, tmp_path)
    assert {name: (id(value), value.data_ptr()) for name, value in algorithm.named_parameters()} == before
    stepped = [id(value) for group in trainer.optimizers[1].param_groups for value in group["params"]]
    assert stepped == [id(value) for value in algorithm.backward_weights.values()]


def test_the_feedback_optimizers_state_is_saved_and_resumed(tmp_path: Path) -> None:
    """With Adam and a schedule, in two halves as in one."""
    settings: dict[str, Any] = {
        "optimizer": sgd(),
        "feedback_optimizer": partial(torch.optim.Adam, lr=0.01),
        "scheduler": cosine(2),
    }
    runs = []
    for seed in (1, 1, 7):
        torch.manual_seed(seed)
        runs.append(kolen_pollack(small_lenet(), **settings))
    whole, half, resumed = runs
    path = tmp_path / "half.ckpt"
    fit_double(whole, tmp_path, epochs=2)
    fit_double(half, tmp_path).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["optimizer_states"]
    assert len(saved) == 2
    assert all(state["exp_avg"].abs().max() > 0 for state in saved[1]["state"].values())
    assert len(saved[1]["state"]) == len(half.backward_weights)
    fit_double(resumed, tmp_path, epochs=2, ckpt_path=path, weights_only=True)
    assert changed(copy_state(whole), copy_state(resumed)) == set()
    assert changed(copy_state(half.backward_weights), copy_state(resumed.backward_weights)) == set(
        copy_state(half.backward_weights)
    )


@pytest.mark.parametrize(
    ("feedback_optimizer", "named"),
    [
        (sgd(lr=0.04), ".lr was 0.05 and is now 0.04"),
        (torch.optim.Adam, ".class was SGD and is now Adam"),
        (sgd(lr=0.05, momentum=0.5), ".momentum was 0.9 and is now 0.5"),
    ],
    ids=["lr", "class", "momentum"],
)
def test_resuming_with_another_feedback_optimizer_is_refused(
    feedback_optimizer: Any, named: str, tmp_path: Path
) -> None:
    first = kolen_pollack(small_lenet(), feedback_optimizer=sgd())
    fit_double(first, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    other = kolen_pollack(small_lenet(), feedback_optimizer=feedback_optimizer)
    with refused("feedback_optimizer.", named):
        fit_double(other, tmp_path, epochs=2, ckpt_path=tmp_path / "half.ckpt", weights_only=True)


# -- weight mirror ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build", [small_lenet, RESNETS["resnet"], PLAIN["plain sequential"]], ids=["lenet", "resnet", "plain"]
)
def test_the_mirror_finds_frozen_weights_and_keeps_its_norm(build: Callable[[], nn.Module]) -> None:
    algorithm = FeedbackAlignment(build(), rule="weight_mirror")
    network, start = copy_state(algorithm.network), copy_state(algorithm.backward_weights)
    images, labels = draw_batch()
    first = algorithm.feedback_angles()
    for _ in range(100):
        algorithm.train_feedback(images, labels)
    found = algorithm.feedback_angles()
    assert max(first.values()) > 60
    assert max(found.values()) < 20
    assert changed(network, copy_state(algorithm.network)) == set()
    for name, matrix in algorithm.backward_weights.items():
        torch.testing.assert_close(matrix.norm(), start[name].norm(), rtol=1e-4, atol=0.0)


def test_the_mirror_follows_weights_that_learn(tmp_path: Path) -> None:
    algorithm = FeedbackAlignment(small_lenet(), rule="weight_mirror", optimizer=sgd(lr=0.02))
    before = copy_state(algorithm.network)
    make_trainer(tmp_path, max_epochs=40).fit(algorithm, make_loader())
    assert max(algorithm.feedback_angles().values()) < 20
    assert changed(before, copy_state(algorithm.network)) == set(before)


def test_a_mirror_step_moves_by_its_rate_to_the_estimate_and_back_to_its_norm() -> None:
    network = small_lenet().double()
    algorithm = FeedbackAlignment(network, rule="weight_mirror", mirror_rate=0.25, mirror_samples=7)
    before = copy_state(algorithm.backward_weights)
    estimates = {}
    for place, (name, layer) in enumerate(algorithm.layers()):
        generator = algorithm.streams.generator(place, torch.device("cpu"))
        estimates[name.replace(".", "/")] = mirror_estimate(layer.weight.detach(), 7, torch.relu, generator)
    algorithm.train_feedback(draw_batch()[0])
    for name, matrix in algorithm.backward_weights.items():
        norm, estimate = before[name].norm(), estimates[name]
        expected = 0.75 * before[name] + 0.25 * norm * estimate / estimate.norm()
        torch.testing.assert_close(matrix.detach(), norm * expected / expected.norm(), rtol=1e-10, atol=1e-12)


def make_mirrors(**settings: Any) -> tuple[FeedbackAlignment, Network]:
    torch.manual_seed(4)
    network = small_lenet()
    return FeedbackAlignment(network, rule="weight_mirror", **settings), network


def test_the_mirror_learns_from_noise_and_not_from_the_data() -> None:
    (first, _), (second, _) = make_mirrors(), make_mirrors()
    first.train_feedback(*draw_batch(seed=1))
    second.train_feedback(*draw_batch(seed=2))
    assert changed(copy_state(first), copy_state(second)) == set()


def test_the_mirror_draws_new_noise_in_every_batch_and_layer() -> None:
    algorithm, _ = make_mirrors(mirror_rate=1.0, mirror_samples=1)  # B is then the direction of the estimate alone
    course = []
    for _ in range(3):
        algorithm.train_feedback(draw_batch()[0])
        course.append(copy_state(algorithm.backward_weights))
    for before, after in pairwise(course):
        assert changed(before, after) == set(before)


def test_more_samples_and_a_slower_rate_give_a_better_mirror() -> None:
    angles = []
    for samples, rate in ((4, 0.5), (256, 0.5), (256, 0.05)):
        algorithm, _ = make_mirrors(mirror_samples=samples, mirror_rate=rate)
        for _ in range(120):
            algorithm.train_feedback(draw_batch()[0])
        angles.append(sum(algorithm.feedback_angles().values()) / 3)
    assert angles[0] > 1.5 * angles[1]
    assert angles[1] > 1.5 * angles[2]
