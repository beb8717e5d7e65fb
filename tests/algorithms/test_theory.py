"""What the theory promises of L-DRL and its targets, and that no check of it passes by accident."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import DTP, LDRL, TargetAlgorithm
from bioprop.feedback.losses import FeedbackGradient, FeedbackObjective
from bioprop.functional.angles import angle_degrees, flatten_all
from bioprop.functional.gradients import backprop_gradients
from bioprop.networks import MLP, LeNet, Network, SimpleVGG, StagePass
from bioprop.testing.helpers import Batch, small_lenet
from bioprop.testing.target_propagation import assert_not_aliased

SMALL, CLASSES = (1, 16, 16), 10
NETWORKS: dict[str, Callable[..., Network]] = {
    "mlp": lambda **settings: MLP(SMALL, CLASSES, hidden=(30, 20), **settings),
    "lenet": lambda **settings: LeNet(SMALL, CLASSES, channels=(5, 6), hidden=20, **settings),
    "vgg": lambda **settings: SimpleVGG(SMALL, CLASSES, channels=(5, 6, 7), **settings),
}
on_every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
Make = Callable[..., TargetAlgorithm]


class FlippedDifference(LDRL):
    """Mutation: every hidden target lies on the other side of the activation."""

    def target_differences(self, passes: Sequence[StagePass], output: Tensor) -> list[Tensor]:
        *hidden, last = super().target_differences(passes, output)
        return [*(-difference for difference in hidden), last]


class FlippedFeedback(LDRL):
    """Mutation: the sign is flipped on every way back, so every second stage's target is right again."""

    def target_differences(self, passes: Sequence[StagePass], output: Tensor) -> list[Tensor]:
        differences = super().target_differences(passes, output)
        return [(-1) ** number * difference for number, difference in enumerate(differences[::-1])][::-1]


class DroppedTargets(LDRL):
    """Mutation: hidden stages have no target but their own activation."""

    def target_differences(self, passes: Sequence[StagePass], output: Tensor) -> list[Tensor]:
        *hidden, last = super().target_differences(passes, output)
        return [*(torch.zeros_like(difference) for difference in hidden), last]


class UncorrectedTargets(LDRL):
    """Mutation: plain target propagation, ``t^{n-1} = G(t^n)``, without the difference correction."""

    def target_differences(self, passes: Sequence[StagePass], output: Tensor) -> list[Tensor]:
        differences = [output]
        with torch.no_grad():
            for (_, _, mirror), below, above in zip(
                self.mirrored_stages()[::-1], passes[-2::-1], passes[:0:-1], strict=True
            ):
                differences.append(mirror(above.output + differences[-1], above.switches) - below.output)
        return differences[::-1]


class AliasedFeedback(LDRL):
    """Mutation: symmetric feedback that is the forward weight itself."""

    def symmetrize_feedback(self) -> None:
        for _, stage, mirror in self.mirrored_stages():
            mirror.weight = stage.weight


class FlippedLearning(LDRL):
    """Mutation: feedback weights climb their loss."""

    def __init__(self, network: Network, **settings: object) -> None:
        super().__init__(network, **settings)
        self.feedback_training.objective = climbing(self.feedback_training.objective)


def climbing(objective: Callable[..., FeedbackObjective]) -> Callable[..., FeedbackObjective]:
    def prepare(*args: object) -> FeedbackObjective:
        gradient_at = objective(*args)

        def gradient_uphill_at(draw: int) -> FeedbackGradient:
            gradient = gradient_at(draw)
            return gradient._replace(parameters={name: -value for name, value in gradient.parameters.items()})

        return gradient_uphill_at

    return prepare


def with_other_weights(network: Network, **settings: object) -> LDRL:
    """Mutation: feedback weights as they were drawn, called symmetric."""
    algorithm = LDRL(network, **settings)
    algorithm.symmetrize_feedback = lambda: None
    return algorithm


TARGET_MUTATIONS = [FlippedDifference, FlippedFeedback, DroppedTargets, UncorrectedTargets, with_other_weights]


def angles_to_backprop(algorithm: TargetAlgorithm, batch: Batch) -> dict[str, float]:
    """Degrees between update and BP gradient for each weight, by name of stage."""
    gradients = algorithm.forward_gradients(*batch)
    expected, _ = backprop_gradients(algorithm.network, *batch)
    names = [name for name in gradients if name.endswith("weight")]
    return {name.split(".")[0]: angle_degrees(gradients[name], expected[name]).item() for name in names}


def median_below_output(angles: dict[str, float]) -> float:
    *below, _ = angles.values()
    return float(torch.tensor(below).median())


# -- (a) the minimiser of the L-DRL loss is the transposed weight -----------------------------------------------------


def feedback_angle_after(make: Make, iterations: int, **settings: object) -> float:
    """Degrees between V and W of a linear stage, 20 units to 10, after so many iterations on one batch of 512."""
    torch.manual_seed(0)
    algorithm = make(MLP((1, 5, 5), 10, hidden=(20,)), iterations=iterations, **settings)
    algorithm.train_feedback(torch.randn(512, 1, 5, 5))
    return algorithm.feedback_angles()["fc2"]


def assert_learns_the_transpose(make: Make, iterations: int, **settings: object) -> None:
    assert feedback_angle_after(make, 0, **settings) > 60
    assert feedback_angle_after(make, iterations, **settings) < 2


INDEPENDENT = {"second_noise": "independent"}
LEARNING = {
    "sgd": (800, {"feedback_step": "sgd", "noise": 0.2, "feedback_lr": 0.01} | INDEPENDENT),
    "echo": (40, {}),
    "echo with numbers": (200, {"noise": 0.2, "feedback_lr": 0.05}),
    "expected": (1200, {"second_noise": "expected", "noise": 0.2, "feedback_lr": 0.005}),
    "normalized": (800, {"noise": 0.2, "feedback_lr": 0.01} | INDEPENDENT),
}


@pytest.mark.parametrize(("iterations", "settings"), LEARNING.values(), ids=LEARNING)
def test_ldrl_learns_the_transposed_weight_of_a_linear_stage(iterations: int, settings: dict[str, object]) -> None:
    assert_learns_the_transpose(LDRL, iterations, **settings)


@pytest.mark.parametrize(("iterations", "settings"), LEARNING.values(), ids=LEARNING)
def test_climbing_the_ldrl_loss_does_not(iterations: int, settings: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        assert_learns_the_transpose(FlippedLearning, iterations, **settings)


def test_dtp_does_not_learn_the_transpose() -> None:
    """It learns an inverse: the reconstruction error falls, the angle stays large."""
    torch.manual_seed(0)
    algorithm = DTP(MLP((1, 5, 5), 10, hidden=(8,), activation="tanh"), iterations=500, feedback_lr=0.02, noise=0.3)
    images, losses = torch.randn(128, 1, 5, 5), []
    with algorithm.observe_feedback(lambda event: losses.append(event.loss.item())):
        algorithm.train_feedback(images)
    assert losses[-1] < 0.2 * losses[0]
    assert algorithm.feedback_angles()["fc2"] > 20


# -- (b) with symmetric feedback, the update tends to the gradient ----------------------------------------------------


def error_to_backprop(make: Make, build: Callable[..., Network], beta: float, batch: Batch, activation: str) -> float:
    """``|g - g_BP| / |g_BP|`` over all parameters, with symmetric feedback, in float64."""
    torch.manual_seed(1)
    algorithm = make(build(activation=activation), beta=beta).double()
    algorithm.symmetrize_feedback()
    gradients = algorithm.forward_gradients(*batch)
    expected, _ = backprop_gradients(algorithm.network, *batch)
    reference = flatten_all(expected.values())
    return float((flatten_all(gradients[name] for name in expected) - reference).norm() / reference.norm())


def assert_matches_gradients(make: Make, build: Callable[..., Network], batch: Batch, activation: str) -> None:
    beta = 1e-7 if activation == "leaky_relu" else 1e-4  # the kink: no unit may step over it
    assert error_to_backprop(make, build, beta, batch, activation) < 1e-4


@pytest.fixture
def batch(make_batch: Callable[..., Batch]) -> Batch:
    return make_batch(16, SMALL, CLASSES, torch.float64)


@on_every_network
@pytest.mark.parametrize("activation", ["elu", "tanh", "leaky_relu"])
@pytest.mark.parametrize("make", [LDRL, DTP])
def test_symmetric_updates_match_the_gradient(
    make: Make, build: Callable[..., Network], activation: str, batch: Batch
) -> None:
    assert_matches_gradients(make, build, batch, activation)


@on_every_network
@pytest.mark.parametrize("activation", ["elu", "tanh"])
def test_what_is_missing_shrinks_linearly_in_beta(build: Callable[..., Network], activation: str, batch: Batch) -> None:
    errors = [error_to_backprop(LDRL, build, beta, batch, activation) for beta in (1e-3, 1e-4, 1e-5)]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("mutated", TARGET_MUTATIONS)
@pytest.mark.parametrize("activation", ["elu", "tanh", "leaky_relu"])
def test_mutated_targets_do_not_match_the_gradient(mutated: Make, activation: str, batch: Batch) -> None:
    with pytest.raises(AssertionError):
        assert_matches_gradients(mutated, NETWORKS["lenet"], batch, activation)


def test_the_papers_mirror_does_not_match_the_gradient(batch: Batch) -> None:
    with pytest.raises(AssertionError):
        assert_matches_gradients(
            lambda network, beta: LDRL(network, beta=beta, mirror="paper"), NETWORKS["lenet"], batch, "elu"
        )


def test_aliased_weights_are_noticed() -> None:
    algorithm = AliasedFeedback(small_lenet())
    algorithm.symmetrize_feedback()
    with pytest.raises(AssertionError):
        assert_not_aliased(algorithm)


# -- (c) the angles of the published LeNet, in kind -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mirror", "conv1", "conv2", "above"),
    [("paper", (18, 38), (0.4, 1.6), 1e-3), ("exact", (0, 0.01), (0, 0.01), 1e-3)],
)
def test_angles_of_the_symmetric_lenet(
    mirror: str,
    conv1: tuple[float, float],
    conv2: tuple[float, float],
    above: float,
    make_smooth_batch: Callable[..., Batch],
) -> None:
    """On CIFAR-10, ``paper`` has 19 to 22 degrees at conv1 and 0.6 at conv2; on these images a little more."""
    algorithm = LDRL(LeNet((3, 32, 32), 10, bias=False), beta=1e-3, mirror=mirror).double()
    algorithm.symmetrize_feedback()
    angles = angles_to_backprop(algorithm, make_smooth_batch(32, dtype=torch.float64))
    assert conv1[0] <= angles["conv1"] < conv1[1]
    assert conv2[0] <= angles["conv2"] < conv2[1]
    assert angles["fc1"] < above
    assert angles["fc2"] < above


def assert_training_turns_updates_towards_the_gradient(
    make: Make, images: Batch, falls: tuple[float, float], **settings: object
) -> None:
    """The median angle below the output: near 90 degrees at random, less after k1 iterations, less after k2."""
    torch.manual_seed(0)
    algorithm = make(LeNet(SMALL, CLASSES, channels=(12, 24), hidden=64, bias=False), beta=0.1, **settings)
    course = [angles_to_backprop(algorithm, images)]
    for batches in (3, 4):
        for _ in range(batches):
            algorithm.train_feedback(images[0])
        course.append(angles_to_backprop(algorithm, images))
    random, early, late = map(median_below_output, course)
    assert 80 < random < 100
    assert early < random - falls[0]
    assert late < early - falls[1]
    assert all(angles["fc2"] < 1e-3 for angles in course)  # the output's update needs no feedback


PUBLISHED = {"feedback_step": "sgd", "mirror": "paper", "switches": "noisy", "feedback_lr": (2e-3, 1e-2, 2e-2)}
TRAINING = {
    "echo": ((60, 8), {"iterations": 8}),
    "expected": ((60, 1), {"second_noise": "expected", "iterations": 40}),
    "normalized, exact": ((20, 8), {"iterations": 8, "noise": 0.2, "feedback_lr": 0.05} | INDEPENDENT),
    "sgd, paper": ((8, 8), {"iterations": 40, "noise": 0.2} | PUBLISHED | INDEPENDENT),
}


@pytest.mark.parametrize(("falls", "settings"), TRAINING.values(), ids=TRAINING)
def test_trained_feedback_turns_updates_towards_the_gradient(
    falls: tuple[float, float], settings: dict[str, object], make_smooth_batch: Callable[..., Batch]
) -> None:
    assert_training_turns_updates_towards_the_gradient(LDRL, make_smooth_batch(64, SMALL), falls, **settings)


@pytest.mark.parametrize("mutated", [FlippedLearning, FlippedDifference, DroppedTargets])
def test_mutations_do_not_turn_updates_towards_the_gradient(
    mutated: Make, make_smooth_batch: Callable[..., Batch]
) -> None:
    falls, settings = TRAINING["normalized, exact"]
    with pytest.raises(AssertionError):
        assert_training_turns_updates_towards_the_gradient(mutated, make_smooth_batch(64, SMALL), falls, **settings)
