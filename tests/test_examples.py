"""Every page of `examples/` trains, and is the same rule as the package: same weights after some steps in float64."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.twins import recorded_noise
from bioprop.algorithms import (
    DTP,
    LDRL,
    Algorithm,
    DDTPLinear,
    DirectFeedbackAlignment,
    DirectRandomTargetProjection,
    FeedbackAlignment,
    FixedWeightDTP,
    GAITProp,
    TargetPropagation,
)
from bioprop.algorithms.feedback_alignment import Rule
from bioprop.networks import MLP, InvertibleMLP, Network, SimpleVGG
from examples import ddtp, dfa, dtp, feedback_alignment, fwdtp, gait, ldrl, trainer
from examples.common import Method, Result

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

WIDTHS, BATCHES = (64, 12, 11, 9, 10), 3
ADAM, MOMENTUM = partial(torch.optim.Adam, lr=1e-3), partial(torch.optim.SGD, lr=0.02, momentum=0.9)

#: Epochs of a page, least test accuracy in percent, and largest angle in degrees at any hidden stage.
COURSES: dict[str, tuple[int, float, float]] = {
    "ldrl": (5, 90.0, 10.0),
    "ldrl_published": (1, 40.0, 30.0),
    "dtp": (5, 80.0, 60.0),
    "fwdtp": (5, 70.0, 85.0),
    "ddtp": (5, 75.0, 75.0),
    "dfa": (5, 80.0, 80.0),
    "gait": (5, 85.0, 8.0),
}
#: Largest angle by rule of feedback alignment.
RULES = {"fa": 85.0, "usf": 40.0, "frsf": 50.0, "brsf": 60.0, "kolen_pollack": 50.0, "weight_mirror": 20.0}


def pages() -> set[str]:
    folder = Path(__file__).parents[1] / "examples"
    return {page.stem for page in folder.glob("*.py")} - {"__init__", "common"}


def test_every_page_is_tried() -> None:
    assert pages() == {*COURSES, "feedback_alignment", "trainer"}


@pytest.mark.parametrize("page", COURSES)
def test_page_trains_at_an_angle_to_the_gradient(page: str) -> None:
    epochs, accuracy, angle = COURSES[page]
    result: Result = importlib.import_module(f"examples.{page}").main(epochs=epochs)

    assert result.accuracy > accuracy
    assert max(result.angles) < angle


def test_feedback_alignment_trains_by_every_rule() -> None:
    results = feedback_alignment.main(epochs=5)

    assert set(results) == set(RULES)
    for rule, (accuracy, angles) in results.items():
        assert accuracy > 75.0, rule
        assert max(angles) < RULES[rule], rule


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_the_package_trains_on_a_users_loaders() -> None:
    measured = trainer.main(epochs=3)

    assert measured["val/accuracy"] > 0.7
    assert measured["angle/fc2"] < 0.01
    assert measured["angle/overall"] < 10.0


def batches(rows: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCHES, rows, 1, 8, 8, generator=generator, dtype=torch.float64)
    return list(zip(images, torch.randint(10, (BATCHES, rows), generator=generator), strict=True))


@pytest.fixture
def draws() -> Iterator[list[Tensor]]:
    """All noise that the package draws while the test runs, in order."""
    with recorded_noise() as kept:
        yield kept


def replay(draws: list[Tensor], sigma: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return what a page draws standard normals with: the package's noise, of a standard deviation, in its order."""
    return lambda like: draws.pop(0).reshape(like.shape) / sigma


def same_weights(method: Method, forward: Iterable[Tensor], feedback: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give a page copies of the package's weights, in float64: forward weights, and pairs of page's and package's."""
    for mine, theirs in [*zip(method.weights, forward, strict=True), *feedback]:
        mine.data = theirs.detach().double().clone().reshape(mine.shape)


def train_both(algorithm: Algorithm, method: Method, rows: int) -> None:
    """Train the package through a Trainer, then the page by its own step."""
    Trainer(
        accelerator="cpu",
        precision="64-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(algorithm, DataLoader(batches(rows), batch_size=None))
    for images, labels in batches(rows):
        method.step(images, labels)


def assert_same(pairs: Sequence[tuple[Tensor, Tensor]], starts: Sequence[Tensor]) -> None:
    """Check that weights differ by less than 1e-10 of what they moved by."""
    for (mine, theirs), start in zip(pairs, starts, strict=True):
        way = (mine - start).norm()
        assert way > 1e-6
        assert (mine - theirs.reshape(mine.shape)).norm() < 1e-10 * way


def compare(
    algorithm: Algorithm, method: Method, feedback: Iterable[tuple[Tensor, Tensor]], rows: int = 8, learns: bool = True
) -> None:
    """Train page and package from the same weights, and compare what has moved.

    Args:
        algorithm: of the package.
        method: of the page.
        feedback: feedback weights of the page, each with that of the package.
        rows: images in a batch.
        learns: whether the feedback weights move.
    """
    algorithm, feedback = algorithm.double(), list(feedback)
    forward = list(algorithm.network.parameters())
    same_weights(method, forward, feedback)
    pairs = [*zip(method.weights, forward, strict=True), *(feedback if learns else [])]
    starts = [mine.detach().clone() for mine, _ in pairs]
    train_both(algorithm, method, rows)
    assert_same(pairs, starts)


def perceptron() -> Network:
    return MLP((1, 8, 8), 10, hidden=WIDTHS[1:-1], activation="tanh", bias=False)


def weights_of(feedback: nn.ModuleDict) -> list[Tensor]:
    return [operator.get_parameter("weight") for operator in feedback.values()]


def compare_ldrl(draws: list[Tensor], beta: float) -> None:
    network = SimpleVGG((1, 8, 8), 10, channels=(3, 4), bias=False)
    algorithm = LDRL(network, iterations=2, optimizer=MOMENTUM)
    method = ldrl.LDRL(channels=(3, 4), beta=beta, normals=replay(draws))

    # fc1 has 16 inputs: with 40 images all of the package's noise is white, as the page's
    compare(algorithm, method, zip(method.feedback[1:], weights_of(algorithm.feedback), strict=True), rows=40)
    assert not draws


def test_ldrl_is_the_packages(draws: list[Tensor]) -> None:
    compare_ldrl(draws, beta=0.05)


def test_another_beta_is_noticed(draws: list[Tensor]) -> None:
    with pytest.raises(AssertionError):
        compare_ldrl(draws, beta=0.05 + 1e-6)


@pytest.mark.parametrize(("difference", "kind"), [(True, DTP), (False, TargetPropagation)], ids=["dtp", "tp"])
def test_dtp_is_the_packages(difference: bool, kind: type[DTP], draws: list[Tensor]) -> None:
    shared: dict[str, Any] = {"beta": 0.5, "noise": 0.2, "iterations": 2, "feedback_lr": 1e-2}
    algorithm = kind(perceptron(), mirror="outer", penultimate_target="gradient", optimizer=ADAM, **shared)
    method = dtp.DTP(WIDTHS, difference=difference, normals=replay(draws, 0.2), **shared)

    compare(algorithm, method, zip(method.feedback.values(), weights_of(algorithm.feedback), strict=True))
    assert not draws


def test_ddtp_linear_is_the_packages(draws: list[Tensor]) -> None:
    algorithm = DDTPLinear(perceptron(), noise=0.2, feedback_optimizer=torch.optim.Adam, optimizer=ADAM)
    method = ddtp.DDTPLinear(WIDTHS, noise=0.2, normals=replay(draws, 0.2))

    compare(algorithm, method, zip(method.feedback, weights_of(algorithm.feedback), strict=True))
    assert not draws


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "kolen_pollack"])
def test_feedback_alignment_is_the_packages(rule: Rule) -> None:
    algorithm = FeedbackAlignment(perceptron(), rule=rule, optimizer=MOMENTUM)
    method = feedback_alignment.FeedbackAlignment(rule, WIDTHS)

    feedback = zip(method.stored, algorithm.backward_weights.values(), strict=True)
    compare(algorithm, method, feedback, learns=rule == "kolen_pollack")


@pytest.mark.parametrize("rule", ["brsf", "weight_mirror"])
def test_gradients_of_rules_that_draw_are_the_packages(rule: Rule) -> None:
    algorithm = FeedbackAlignment(perceptron(), rule=rule).double()
    method = feedback_alignment.FeedbackAlignment(rule, WIDTHS)
    images, labels = batches(8)[0]
    algorithm.train_feedback(images)
    feedback = zip(method.stored, algorithm.backward_weights.values(), strict=True)
    same_weights(method, algorithm.network.parameters(), feedback)

    expected = algorithm.forward_gradients(images, labels).values()
    for mine, theirs in zip(method.gradients(images, labels), expected, strict=True):
        assert (mine - theirs).norm() < 1e-10 * theirs.norm()


@pytest.mark.parametrize("kind", [DirectFeedbackAlignment, DirectRandomTargetProjection])
def test_direct_feedback_is_the_packages(kind: type[DirectFeedbackAlignment]) -> None:
    algorithm = kind(perceptron(), optimizer=MOMENTUM)
    method = dfa.DFA(WIDTHS, projects_labels=kind is DirectRandomTargetProjection)

    feedback = zip(method.feedback, algorithm.backward_weights.values(), strict=True)
    compare(algorithm, method, feedback, learns=False)


def test_fixed_weight_dtp_is_the_packages() -> None:
    algorithm = FixedWeightDTP(perceptron(), feedback_init="orthogonal", optimizer=ADAM)
    method = fwdtp.FWDTP(WIDTHS)

    compare(algorithm, method, zip(method.feedback.values(), weights_of(algorithm.feedback), strict=True), learns=False)


def test_gait_prop_is_the_packages() -> None:
    network = InvertibleMLP((1, 8, 8), 10, widths=4, bias=False)
    optimizer = partial(torch.optim.Adam, lr=1e-3, betas=(0.9, 0.99))

    # the paper's form loses nine digits at gamma 1e-3 and four stages; the package's loses none
    compare(GAITProp(network, gamma=0.5, optimizer=optimizer), gait.GAITProp(gamma=0.5), [])
