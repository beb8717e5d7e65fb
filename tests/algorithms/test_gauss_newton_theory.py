"""What the theory says of the DRL family: its targets are Gauss-Newton's, where L-DRL's are the gradient's."""

import pytest
import torch
from torch import Tensor, nn

from bioprop.algorithms import DDTPRHL, DTP, DTPDRL, LDRL, Algorithm, DDTPControl, DDTPLinear
from bioprop.callbacks.alignment import alignment_to_backprop, alignment_to_gauss_newton
from bioprop.functional.angles import angle_degrees
from bioprop.networks import MLP

DECAY = 0.5
SINGULAR_VALUES = (0.4, 0.8, 1.2, 1.6, 2.0)


def degrees(first: Tensor, second: Tensor) -> float:
    return angle_degrees(first, second).item()


def linear_network() -> MLP:
    """16 -> 8 -> 7 -> 5 units without activation; both Jacobians of the output have known singular values."""
    network = MLP((1, 4, 4), 5, hidden=(8, 7), activation="identity").double()
    for _, stage in network.stages():
        nn.init.orthogonal_(stage.weight)
    with torch.no_grad():
        network[-1].weight.mul_(torch.tensor(SINGULAR_VALUES, dtype=torch.float64)[:, None])
    return network


def jacobians(network: MLP) -> list[Tensor]:
    """``ds^N/ds^n`` of both hidden stages."""
    _, middle, last = (stage.weight.detach() for _, stage in network.stages())
    return [last @ middle, last]


def damped_pseudo_inverse(J: Tensor, damping: float) -> Tensor:
    """``J^T (J J^T + lambda I)^-1`` by its singular values."""
    U, singular, V = torch.linalg.svd(J, full_matrices=False)
    return V.t() @ torch.diag(singular / (singular**2 + damping)) @ U.t()


@pytest.mark.parametrize(("second_noise", "iterations"), [("independent", 400), ("expected", 400), ("echo", 200)])
def test_on_a_linear_network_drl_learns_the_damped_pseudo_inverse_and_ldrl_the_transpose(
    second_noise: str, iterations: int
) -> None:
    network, images = linear_network(), torch.randn(256, 1, 4, 4, dtype=torch.float64)
    drl = DDTPLinear(network, noise=0.1, feedback_decay=DECAY, iterations=500, feedback_lr=0.01).double()
    ldrl = LDRL(network, second_noise=second_noise, noise=0.1, iterations=iterations, feedback_lr=0.02).double()
    drl.train_feedback(images)
    ldrl.train_feedback(images)
    lower, upper = (ldrl.feedback[name].weight.t() for name in ("fc2", "fc3"))
    composed = [lower @ upper, upper]  # L-DRL's feedback from the output to each hidden stage
    for direct, layerwise, J in zip(drl.feedback.values(), composed, jacobians(network), strict=True):
        damped = damped_pseudo_inverse(J, DECAY)
        assert degrees(direct.weight, damped) < 5
        assert degrees(layerwise, J.t()) < 5
        assert degrees(direct.weight, J.t()) > 20
        assert degrees(layerwise, damped) > 20
        assert degrees(direct.weight, torch.linalg.pinv(J)) > 10  # the damping is part of it


def test_its_targets_are_the_smallest_steps_that_move_the_output_as_wanted() -> None:
    """Little decay: the first-order change of the output by a hidden target is the output's own."""
    network, images = linear_network(), torch.randn(256, 1, 4, 4, dtype=torch.float64)
    drl = DDTPLinear(network, noise=0.1, feedback_decay=1e-6, iterations=800, feedback_lr=0.01).double()
    drl.train_feedback(images)
    step = torch.randn(1, 5, dtype=torch.float64)
    for direct, J in zip(drl.feedback.values(), jacobians(network), strict=True):
        reached = step @ direct.weight.t() @ J.t()
        assert degrees(reached, step) < 10
        assert abs(float(reached.detach().norm() / step.norm()) - 1) < 0.1


# -- a network that cannot be inverted --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def angles() -> dict[str, dict[str, tuple[float, float]]]:
    """Degrees to Gauss-Newton and to BP, by method and stage, after feedback training on 8 -> 16 -> 16 -> 4 tanh."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MLP((1, 2, 4), 4, hidden=(16, 16), activation="tanh").double()
        for _, stage in network.stages():
            nn.init.xavier_normal_(stage.weight)
        batch = torch.randn(128, 1, 2, 4, dtype=torch.float64), torch.randint(4, (128,))
        shared = {"beta": 1e-3, "noise": 0.1, "iterations": 400, "feedback_lr": 0.01}
        drl = shared | {"feedback_decay": 0.1}
        methods: dict[str, Algorithm] = {
            "linear": DDTPLinear(network, **drl),
            "control": DDTPControl(network, **drl),
            "rhl": DDTPRHL(network, hidden_units=128, **(drl | {"feedback_lr": 1e-3})),
            "drl": DTPDRL(network, **drl),
            "dtp": DTP(network, **(shared | {"feedback_lr": 0.02})),
        }
        measured = {}
        for name, algorithm in methods.items():
            algorithm.double().train_feedback(batch[0])
            to_newton = alignment_to_gauss_newton(algorithm, *batch, damping=0.1)
            to_gradient = alignment_to_backprop(algorithm, *batch)
            measured[name] = {
                stage: (to_newton[stage].angle.item(), to_gradient[stage].angle.item()) for stage in to_newton
            }
        return measured


Angles = dict[str, dict[str, tuple[float, float]]]


@pytest.mark.parametrize("method", ["linear", "rhl", "drl"])
def test_the_difference_reconstruction_loss_leads_to_gauss_newton(method: str, angles: Angles) -> None:
    for stage in ("fc1", "fc2"):
        to_newton, to_gradient = angles[method][stage]
        assert to_newton < 25
        assert to_newton < to_gradient - 10


@pytest.mark.parametrize("method", ["control", "dtp"])
def test_plain_reconstruction_does_not(method: str, angles: Angles) -> None:
    """Without the difference correction, layer by layer or direct, a network of this shape is not inverted."""
    for stage in ("fc1", "fc2"):
        assert angles[method][stage][0] > 40
        assert angles[method][stage][0] > angles["linear"][stage][0] + 25


def test_the_outputs_update_is_everybodys(angles: Angles) -> None:
    assert all(max(stages["fc3"]) < 1e-6 for stages in angles.values())
