"""Target propagation on residual networks: the theory, feedback training, batch norm's statistics, the contract."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import DTP, LDRL, TargetAlgorithm
from bioprop.callbacks.alignment import alignment_to_backprop
from bioprop.functional.angles import flatten_all
from bioprop.functional.gradients import backprop_gradients
from bioprop.networks import BasicBlockStage, Network, PooledLinearStage, ResNet, StagePass, StemStage
from bioprop.testing import TargetPropagationContract
from bioprop.testing.helpers import (
    CLASSES,
    SHAPE,
    Batch,
    changed,
    copy_state,
    draw_batch,
    make_loader,
    make_trainer,
    refused,
    sgd,
)
from tests.algorithms.test_theory import (
    DroppedTargets,
    FlippedDifference,
    FlippedFeedback,
    climbing,
    with_other_weights,
)

Make = Callable[..., TargetAlgorithm]
AS_PUBLISHED = {"feedback_step": "sgd", "feedback_lr": (3e-4, 1e-3, 1e-3, 10.0), "noise": 0.2}
INDEPENDENT = {"second_noise": "independent", "noise": 0.1, "feedback_lr": 0.1}


def small_resnet(batch_norm: bool, activation: str = "elu") -> Network:
    return ResNet(SHAPE, CLASSES, blocks=(1, 2), widths=(4, 6), activation=activation, batch_norm=batch_norm)


# -- the update is the gradient ----------------------------------------------------------------------------------------


@pytest.fixture
def batch(make_batch: Callable[..., Batch]) -> Batch:
    return make_batch(16, SHAPE, CLASSES, torch.float64)


NORMS = {"no norm": (False, True), "norm in training": (True, True), "norm in evaluation": (True, False)}
all_norms = pytest.mark.parametrize(("batch_norm", "training"), NORMS.values(), ids=NORMS)


def error_to_backprop(
    make: Make, beta: float, batch: Batch, activation: str = "elu", batch_norm: bool = True, training: bool = True
) -> float:
    """``|g - g_BP| / |g_BP|`` over all parameters, with symmetric feedback, in float64."""
    torch.manual_seed(1)
    network = small_resnet(batch_norm, activation).double()
    network(batch[0])  # statistics that are not those of initialisation
    algorithm = make(network, beta=beta).double()
    network.train(training)
    algorithm.symmetrize_feedback()
    gradients = algorithm.forward_gradients(*batch)
    expected, _ = backprop_gradients(network, *batch)
    reference = flatten_all(expected.values())
    return float((flatten_all(gradients[name] for name in expected) - reference).norm() / reference.norm())


def assert_tends_to_the_gradient(make: Make, batch: Batch, *settings: Any) -> None:
    errors = [error_to_backprop(make, beta, batch, *settings) for beta in (1e-2, 1e-3, 1e-4)]
    assert errors[-1] < 1e-5
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


@all_norms
@pytest.mark.parametrize("activation", ["elu", "tanh"])
@pytest.mark.parametrize("make", [LDRL, DTP])
def test_the_symmetric_update_tends_to_the_gradient_linearly_in_beta(
    make: Make, activation: str, batch_norm: bool, training: bool, batch: Batch
) -> None:
    assert_tends_to_the_gradient(make, batch, activation, batch_norm, training)


@pytest.mark.parametrize("mutated", [DroppedTargets, FlippedDifference, FlippedFeedback, with_other_weights])
def test_mutated_targets_do_not(mutated: Make, batch: Batch) -> None:
    with pytest.raises(AssertionError):
        assert_tends_to_the_gradient(mutated, batch)


def test_the_papers_mirror_does_not(batch: Batch) -> None:
    with pytest.raises(AssertionError):
        assert_tends_to_the_gradient(lambda network, beta: LDRL(network, beta=beta, mirror="paper"), batch)


class HeldStatistics(LDRL):
    """Mutation: in feedback, batch norm's statistics are constants of the batch, as they are in evaluation mode."""

    def target_differences(self, passes: Sequence[StagePass], output: Tensor) -> list[Tensor]:
        held = []
        for each in passes:
            values = each.switches
            if isinstance(values, tuple):
                norms = {name: getattr(values, name) for name in values._fields if name.startswith("norm")}
                held_norms = {name: norm and norm._replace(normalized=None) for name, norm in norms.items()}
                each = each._replace(switches=values._replace(**held_norms))
            held.append(each)
        return super().target_differences(held, output)


def test_with_statistics_held_in_feedback_alone_it_does_in_evaluation_mode_only(batch: Batch) -> None:
    assert_tends_to_the_gradient(HeldStatistics, batch, "elu", True, False)
    with pytest.raises(AssertionError):
        assert_tends_to_the_gradient(HeldStatistics, batch, "elu", True, True)


# -- feedback training -------------------------------------------------------------------------------------------------


class Climbing(LDRL):
    """Mutation: feedback weights climb their loss."""

    def __init__(self, network: Network, **settings: Any) -> None:
        super().__init__(network, **settings)
        self.feedback_training.objective = climbing(self.feedback_training.objective)


def assert_feedback_learns(make: Make, batch_norm: bool, images: Batch, **settings: Any) -> None:
    torch.manual_seed(0)
    algorithm = make(small_resnet(batch_norm), beta=0.01, **settings)
    before, angle = algorithm.feedback_angles(), alignment_to_backprop(algorithm, *images)["overall"].angle
    algorithm.train_feedback(images[0])
    after = algorithm.feedback_angles()
    assert all(45 < value < 135 for value in before.values())
    assert all(value < 10 for value in after.values()), after
    assert angle > 40
    assert alignment_to_backprop(algorithm, *images)["overall"].angle < 12


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 16},
        {"iterations": 60, "feedback_lr": 0.1},
        {"iterations": 60} | INDEPENDENT,
        {"iterations": 60} | INDEPENDENT | AS_PUBLISHED,
        {"iterations": 60} | AS_PUBLISHED,
        {"iterations": 60, "second_noise": "expected", "feedback_lr": 0.2},
    ],
    ids=["echo", "echo with a rate", "independent", "independent with sgd", "echo with sgd", "expected"],
)
def test_ldrl_turns_feedback_and_update(
    settings: dict[str, Any], batch_norm: bool, make_smooth_batch: Callable[..., Batch]
) -> None:
    assert_feedback_learns(LDRL, batch_norm, make_smooth_batch(48, SHAPE), **settings)


def test_climbing_does_not(make_smooth_batch: Callable[..., Batch]) -> None:
    with pytest.raises(AssertionError):
        assert_feedback_learns(Climbing, True, make_smooth_batch(48, SHAPE), iterations=16)


@pytest.mark.parametrize("second_noise", ["independent", "echo"])
@pytest.mark.parametrize("mirror", ["exact", "paper"])
def test_noise_around_the_whole_stage_turns_the_update_too(
    mirror: str, second_noise: str, make_smooth_batch: Callable[..., Batch]
) -> None:
    """As published; weights are free up to factors that cancel, so the update is what to look at."""
    torch.manual_seed(0)
    images = make_smooth_batch(48, SHAPE)
    settings = {"second_noise": second_noise, "mirror": mirror, "iterations": 60} | AS_PUBLISHED
    algorithm = LDRL(small_resnet(False), noise_at="stage", beta=0.01, **settings)
    before = alignment_to_backprop(algorithm, *images)["overall"].angle
    algorithm.train_feedback(images[0])
    after = alignment_to_backprop(algorithm, *images)["overall"].angle
    assert after < before - 15


def test_dtp_learns_to_reconstruct() -> None:
    algorithm, course = DTP(small_resnet(True), iterations=40, feedback_lr=1e-4), []
    with algorithm.observe_feedback(course.append):
        algorithm.train_feedback(draw_batch(16)[0])
    for name in algorithm.feedback:
        losses = [event.loss.item() for event in course if event.stage == name]
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_the_normalized_step_is_refused_around_a_whole_block() -> None:
    with refused("noise_at stage", "block1_1", "feedback_step: sgd", "noise_at: layer"):
        LDRL(small_resnet(True), noise_at="stage")
    LDRL(small_resnet(True), noise_at="stage", feedback_step="sgd", feedback_lr=0.1)


def test_an_unknown_place_of_noise_is_refused() -> None:
    with refused("noise_at 'mine' is not known", "layer", "stage"):
        LDRL(small_resnet(True), noise_at="mine")


# -- batch norm's statistics are those of clean passes -----------------------------------------------------------------

METHODS: dict[str, Make] = {
    "layers": LDRL,
    "layers, expected": lambda network, **settings: LDRL(network, second_noise="expected", **settings),
    "layers, independent": lambda network, **settings: LDRL(network, iterations=2, **INDEPENDENT, **settings),
    "whole, echo": lambda network, **settings: LDRL(
        network, iterations=2, noise_at="stage", feedback_step="sgd", feedback_lr=1.0, **settings
    ),
    "whole": lambda network, **settings: LDRL(
        network,
        iterations=2,
        noise_at="stage",
        feedback_step="sgd",
        **(INDEPENDENT | {"feedback_lr": 1e-4}),
        **settings,
    ),
    "dtp": lambda network, **settings: DTP(network, iterations=2, feedback_lr=1e-4, **settings),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@every_method
def test_a_step_moves_running_statistics_by_one_clean_pass(make: Make, tmp_path: Path) -> None:
    network = small_resnet(True)
    expected = small_resnet(True)
    expected.load_state_dict(network.state_dict())
    make_trainer(tmp_path, max_epochs=1).fit(make(network, optimizer=sgd(lr=0.0)), make_loader(1))
    expected(draw_batch(8)[0])
    for (name, found), wanted in zip(network.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=name)


@every_method
def test_phase_1_alone_leaves_the_network_as_it_is(make: Make) -> None:
    algorithm = make(small_resnet(True))
    network, feedback = copy_state(algorithm.network), copy_state(algorithm.feedback)
    algorithm.train_feedback(draw_batch()[0])
    assert changed(network, copy_state(algorithm.network)) == set()
    assert {name for name in feedback if "weight" in name} <= changed(feedback, copy_state(algorithm.feedback))


# -- the contract ------------------------------------------------------------------------------------------------------


class Residual(Network):
    """Residual stages under the names of LeNet's, which the suite knows."""

    def __init__(self, batch_norm: bool = False, width: int = 4) -> None:
        stem = StemStage(SHAPE, 3, "elu", batch_norm)
        strided = BasicBlockStage(stem.output_shape, width, 2, "elu", batch_norm)
        identity = BasicBlockStage(strided.output_shape, width, 1, "elu", batch_norm)
        output = PooledLinearStage(identity.output_shape, CLASSES)
        stages = {"conv1": stem, "conv2": strided, "fc1": identity, "fc2": output}
        super().__init__(stages, {"batch_norm": batch_norm, "width": width})


RESIDUAL: dict[str, Callable[[], Network]] = {
    "no norm": Residual,
    "batch norm": lambda: Residual(batch_norm=True),
    "resnet": lambda: ResNet(SHAPE, CLASSES, (1, 1), (3, 4)),
}
on_residual_networks = pytest.mark.parametrize("build", RESIDUAL.values(), ids=RESIDUAL)


class ResidualContract(TargetPropagationContract):
    """The suite on residual networks."""

    def small_network(self) -> Network:
        return Residual()

    @on_residual_networks
    def test_it_runs_on_every_network(self, build: Callable[[], Network], tmp_path: Path) -> None:
        super().test_it_runs_on_every_network(build, tmp_path)

    @on_residual_networks
    def test_forward_gradients_cover_every_parameter_and_change_nothing(self, build: Callable[[], Network]) -> None:
        super().test_forward_gradients_cover_every_parameter_and_change_nothing(build)

    @on_residual_networks
    def test_a_checkpoint_brings_everything_back(self, build: Callable[[], Network], tmp_path: Path) -> None:
        super().test_a_checkpoint_brings_everything_back(build, tmp_path)

    @on_residual_networks
    def test_symmetric_feedback_is_a_copy(self, build: Callable[[], Network], tmp_path: Path) -> None:
        super().test_symmetric_feedback_is_a_copy(build, tmp_path)

    def test_resuming_with_another_network_is_refused(self, tmp_path: Path) -> None:
        self.fit(self.make(Residual()), tmp_path).save_checkpoint(tmp_path / "half.ckpt")
        with refused("network.init_args.width was 4 and is now 5"):
            self.fit(self.make(Residual(width=5)), tmp_path, epochs=2, ckpt_path=tmp_path / "half.ckpt")


class TestLDRL(ResidualContract):
    def make(self, network: Network, **settings: Any) -> LDRL:
        return LDRL(network, **settings)


@pytest.mark.slow
class TestLDRLAroundWholeBlocks(ResidualContract):
    loss_falls_to = 0.95

    def make(self, network: Network, **settings: Any) -> LDRL:
        whole = {"noise_at": "stage", "mirror": "paper", "switches": "noisy", "feedback_step": "sgd"}
        numbers = INDEPENDENT | {"iterations": 2, "feedback_lr": (1e-3, 1e-3, 10.0)}
        return LDRL(network, **(numbers | whole | settings))


@pytest.mark.slow
class TestDTP(ResidualContract):
    loss_falls_to = 0.98

    def make(self, network: Network, **settings: Any) -> DTP:
        return DTP(network, **({"iterations": 2, "feedback_lr": (1e-5, 3e-5, 1e-2)} | settings))
