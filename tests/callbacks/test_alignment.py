import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from bioprop.algorithms import DTP, LDRL, Backprop, DDTPLinear
from bioprop.callbacks import AlignmentToBackprop
from bioprop.callbacks.alignment import alignment_to_backprop, alignment_to_gauss_newton, hidden_stages
from bioprop.errors import UserError
from bioprop.functional.gauss_newton import gauss_newton_gradients
from bioprop.networks import LeNet, ResNet
from tests.algorithms.plain_models import PLAIN


class Rotated(Backprop):
    """BP whose update of one stage is turned by 60 degrees and made twice as long."""

    def _gradients(self, images: Tensor, labels: Tensor):  # type: ignore[no-untyped-def]
        gradients = super()._gradients(images, labels)
        for name in ("conv2.conv.weight", "conv2.conv.bias"):
            gradients.forward[name] = gradients.forward[name].clone()
        weight = gradients.forward["conv2.conv.weight"]
        whole = math.hypot(float(weight.norm()), float(gradients.forward["conv2.conv.bias"].norm()))
        across = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
        across -= (across * weight).sum() / weight.square().sum() * weight
        for name in ("conv2.conv.weight", "conv2.conv.bias"):
            gradients.forward[name] *= 2 * math.cos(math.pi / 3)
        gradients.forward["conv2.conv.weight"] += 2 * math.sin(math.pi / 3) * whole * across / across.norm()
        return gradients


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 1, 16, 16, dtype=torch.float64), torch.arange(16) % 10


def network() -> LeNet:
    return LeNet((1, 16, 16), 10, channels=(4, 4), hidden=8)


def test_backprop_is_aligned_with_itself(batch: tuple[Tensor, Tensor]) -> None:
    aligned = alignment_to_backprop(Backprop(network()).double(), *batch)

    assert list(aligned) == ["conv1", "conv2", "fc1", "fc2", "overall"]
    for value in aligned.values():
        assert float(value.angle) < 1e-9
        assert float(value.norm_ratio) == pytest.approx(1.0, abs=1e-12)


def test_an_algorithm_is_compared_with_bp_on_its_own_loss(batch: tuple[Tensor, Tensor]) -> None:
    algorithm = Backprop(network(), loss="squared_error").double()
    assert max(float(value.angle) for value in alignment_to_backprop(algorithm, *batch).values()) < 1e-9

    algorithm.output_loss = Backprop.output_loss
    assert float(alignment_to_backprop(algorithm, *batch)["overall"].angle) < 1e-9
    crossed = Backprop(algorithm.network, loss="squared_error")
    crossed._gradients = algorithm._gradients  # of cross-entropy, compared on the squared error
    assert float(alignment_to_backprop(crossed, *batch)["overall"].angle) > 10


def test_a_rotated_stage_shows_its_angle_and_norm_alone(batch: tuple[Tensor, Tensor]) -> None:
    aligned = alignment_to_backprop(Rotated(network()).double(), *batch)

    assert float(aligned["conv2"].angle) == pytest.approx(60.0, abs=1e-6)
    assert float(aligned["conv2"].norm_ratio) == pytest.approx(2.0, abs=1e-9)
    assert float(aligned["conv1"].angle) < 1e-9
    assert 0.0 < float(aligned["overall"].angle) < 60.0


@pytest.mark.parametrize("cls", [Backprop, DTP, LDRL])
def test_measuring_changes_nothing(cls: type, batch: tuple[Tensor, Tensor]) -> None:
    algorithm = cls(network()).double()
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    random_state = torch.get_rng_state()

    alignment_to_backprop(algorithm, *batch)

    assert torch.equal(random_state, torch.get_rng_state())
    for name, value in algorithm.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in algorithm.parameters())


class GaussNewton(Backprop):
    """Updates by the reference itself, the stage conv2 turned round."""

    def _gradients(self, images: Tensor, labels: Tensor):  # type: ignore[no-untyped-def]
        stages = [stage for _, stage in self.network.stages()]
        gradients = gauss_newton_gradients(self.network, stages, images, labels, damping=0.2)
        gradients["conv2.conv.weight"], gradients["conv2.conv.bias"] = (
            -3 * gradients[f"conv2.conv.{part}"] for part in ("weight", "bias")
        )
        return super()._gradients(images, labels)._replace(forward=gradients)


def test_the_angle_to_gauss_newton_is_that_to_its_update(batch: tuple[Tensor, Tensor]) -> None:
    aligned = alignment_to_gauss_newton(GaussNewton(network()).double(), *batch, damping=0.2)

    assert list(aligned) == ["conv1", "conv2", "fc1", "fc2", "overall"]
    assert float(aligned["conv2"].angle) == pytest.approx(180.0, abs=1e-6)
    assert float(aligned["conv2"].norm_ratio) == pytest.approx(3.0, abs=1e-9)
    assert all(float(aligned[stage].angle) < 1e-6 for stage in ("conv1", "fc1", "fc2"))
    assert 0.0 < float(aligned["overall"].angle) < 180.0


def test_backprop_is_not_gauss_newton_below_the_output(batch: tuple[Tensor, Tensor]) -> None:
    aligned = alignment_to_gauss_newton(Backprop(network()).double(), *batch, damping=0.01)

    assert all(float(aligned[stage].angle) > 5.0 for stage in ("conv1", "conv2", "fc1"))
    assert float(aligned["fc2"].angle) < 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_measuring_gauss_newton_changes_nothing(training: bool, batch: tuple[Tensor, Tensor]) -> None:
    """Batch norm is looked at as in evaluation, and left as it was."""
    algorithm = DDTPLinear(ResNet((1, 16, 16), 10, blocks=(1,), widths=(4,))).double().train(training)
    algorithm.network[0].eval()
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    modes = [module.training for module in algorithm.modules()]
    random_state = torch.get_rng_state()

    aligned = alignment_to_gauss_newton(algorithm, *batch, damping=0.1)

    assert all(bool(value.angle.isfinite()) for value in aligned.values())
    assert torch.equal(random_state, torch.get_rng_state())
    assert [module.training for module in algorithm.modules()] == modes
    for name, value in algorithm.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in algorithm.parameters())


def test_gauss_newton_needs_a_chain_of_stages(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(UserError, match="ResidualModel has none"):
        alignment_to_gauss_newton(Backprop(PLAIN["plain residual"]()).double(), *batch, damping=0.1)


def test_frozen_stages_have_no_angle_to_gauss_newton(batch: tuple[Tensor, Tensor]) -> None:
    algorithm = Backprop(network()).double()
    algorithm.network[1].requires_grad_(False)
    assert list(alignment_to_gauss_newton(algorithm, *batch, damping=0.1)) == ["conv1", "fc1", "fc2", "overall"]


def test_hidden_stages_are_all_but_the_one_that_has_its_error_from_the_loss() -> None:
    linear = nn.Linear(4, 4)
    assert hidden_stages(network()) == ["conv1", "conv2", "fc1"]
    assert hidden_stages(nn.Sequential(linear, nn.ReLU(), nn.Linear(4, 2))) == ["0"]
    assert hidden_stages(linear) == []
    head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert hidden_stages(nn.Sequential(OrderedDict(body=linear, head=head))) == ["body", "head"]


def test_out_of_range_arguments_are_named() -> None:
    for damping in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="gauss_newton_damping is"):
            AlignmentToBackprop(gauss_newton_damping=damping)
    with pytest.raises(UserError, match="max_images is 0"):
        AlignmentToBackprop(max_images=0)
    with pytest.raises(UserError, match="every_n_epochs is -1"):
        AlignmentToBackprop(every_n_epochs=-1)
