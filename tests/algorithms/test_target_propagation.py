"""Plain target propagation."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import DTP, TargetPropagation
from bioprop.functional.output_losses import cross_entropy_gradient
from bioprop.networks import MLP, Network
from bioprop.testing import TargetPropagationContract
from bioprop.testing.helpers import CLASSES
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
LEAK = 0.01


class TestTargetPropagation(TargetPropagationContract):
    loss_falls_to = 0.95

    def make(self, network: Network, **settings: Any) -> TargetPropagation:
        return TargetPropagation(network, **({"iterations": 2, "noise": 0.1, "feedback_lr": 3e-4} | settings))


@pytest.mark.parametrize("mirror", ["exact", "paper"])
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_training_equals_the_plain_implementation(
    build: Callable[[], Network], mirror: str, recorded_noise: list[Tensor], tmp_path: Path
) -> None:
    algorithm, plain = make_pair(METHODS["dtp"]._replace(make=TargetPropagation, mirror=mirror), build)
    plain.target_rule = lambda state, back_target, back_state: back_target
    train_both(algorithm, plain, recorded_noise, tmp_path)
    assert_same_weights(algorithm, plain)


def test_the_difference_correction_is_noticed(recorded_noise: list[Tensor], tmp_path: Path) -> None:
    algorithm, plain = make_pair(METHODS["dtp"]._replace(make=TargetPropagation), NETWORKS["mlp"])
    train_both(algorithm, plain, recorded_noise, tmp_path)  # the plain one has difference targets
    with pytest.raises(AssertionError):
        assert_same_weights(algorithm, plain)


# -- exact inverses ---------------------------------------------------------------------------------------------------


def invertible(make: type[DTP], exact: bool = True) -> DTP:
    """Square leaky-ReLU stages; feedback ``G(y) = W^{-1} (f^{-1}(y) - b)``, or a little off."""
    network = MLP((1, 4, 4), 16, hidden=(16, 16, 16), activation="leaky_relu")
    algorithm = make(network, beta=0.5).double()
    with torch.no_grad():
        for _, stage, mirror in algorithm.mirrored_stages():
            inverse = torch.linalg.inv(stage.weight)
            mirror.weight.copy_(inverse.T if exact else 1.1 * inverse.T)
            mirror.bias.copy_(-inverse @ stage.bias)
            if stage.activation == "leaky_relu":
                mirror.activation = mirror.activation._replace(
                    phi=lambda values: torch.where(values > 0, values, values / LEAK)
                )
    return algorithm


def targets_of(algorithm: DTP) -> list[Tensor]:
    images, labels = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.randint(16, (5,))
    passes = algorithm.clean_passes(images)
    logits = passes[-1].output.detach()
    with torch.no_grad():
        differences = algorithm.target_differences(passes, -algorithm.beta * cross_entropy_gradient(logits, labels))
        return [clean.output.detach() + step for clean, step in zip(passes, differences, strict=True)]


def assert_stages_map_targets_to_targets(algorithm: DTP, targets: Sequence[Tensor]) -> None:
    """``F^n(t^{n-1}) = t^n`` for every stage that has feedback."""
    for (_, stage), (below, above) in zip(algorithm.network.stages()[1:], pairwise(targets), strict=True):
        torch.testing.assert_close(stage(below), above, rtol=1e-9, atol=1e-10)


def test_with_exact_inverses_targets_are_mapped_exactly() -> None:
    algorithm = invertible(TargetPropagation)
    assert_stages_map_targets_to_targets(algorithm, targets_of(algorithm))


def test_with_other_feedback_they_are_not() -> None:
    algorithm = invertible(TargetPropagation, exact=False)
    with pytest.raises(AssertionError):
        assert_stages_map_targets_to_targets(algorithm, targets_of(algorithm))


def test_with_exact_inverses_the_difference_correction_changes_nothing() -> None:
    plain, corrected = invertible(TargetPropagation), invertible(DTP)
    corrected.load_state_dict(plain.state_dict())
    batch = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.randint(16, (5,))
    found, expected = plain.forward_gradients(*batch), corrected.forward_gradients(*batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)


def test_an_error_of_reconstruction_is_not_scaled_by_beta() -> None:
    """As the documentation says: updates below the output, in units of BP's, grow as ``1 / beta``."""
    batch = next(double_batches())
    norms = []
    for beta in (1e-3, 1e-4):
        torch.manual_seed(0)
        algorithm = TargetPropagation(MLP((1, 16, 16), CLASSES, hidden=(9,)), beta=beta).double()
        norms.append(algorithm.forward_gradients(*batch)["fc1.linear.weight"].norm().item())
    assert norms[1] / norms[0] == pytest.approx(10, rel=0.01)
