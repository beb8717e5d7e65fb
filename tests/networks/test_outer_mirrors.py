"""Feedback operators with their activation outside."""

import pytest
import torch
import torch.nn.functional as F

from bioprop.errors import UserError
from bioprop.functional.pooling import Pool
from bioprop.networks import ConvStage, LinearStage, build_outer_mirror
from bioprop.networks.resnet import StemStage
from tests.algorithms.plain import unpool

DOUBLE = {"dtype": torch.float64}


def test_the_linear_form_is_the_formula() -> None:
    stage = LinearStage((2, 3), 4, "elu").double()
    mirror = build_outer_mirror(stage, "tanh").double()
    outputs = torch.randn(5, 4, **DOUBLE)
    expected = torch.tanh(outputs @ mirror.weight + mirror.bias).view(5, 2, 3)
    torch.testing.assert_close(mirror(outputs, None), expected)
    assert {name for name, _ in mirror.named_parameters()} == {"weight", "bias"}
    assert mirror.weight.shape == stage.weight.shape


def test_the_conv_form_unpools_by_the_switches_it_is_given() -> None:
    stage = ConvStage((2, 8, 8), 3, 5, padding=2, activation="elu", pool=Pool(3, 2, 1)).double()
    mirror = build_outer_mirror(stage, "leaky_relu").double()
    clean = stage.run(torch.randn(4, 2, 8, 8, **DOUBLE))
    maps = unpool(clean.output.detach(), clean.switches, (8, 8), adding=True)
    expected = F.leaky_relu(F.conv_transpose2d(maps, mirror.weight, mirror.bias, padding=2))
    torch.testing.assert_close(mirror(clean.output.detach(), clean.switches), expected)


@pytest.mark.parametrize("activation", ["tanh", "elu", "identity"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_difference_is_that_of_two_targets(kind: str, activation: str) -> None:
    stage = (
        LinearStage((6,), 4, "elu") if kind == "linear" else ConvStage((2, 8, 8), 3, 3, padding=1, pool=Pool(2, 2))
    ).double()
    mirror = build_outer_mirror(stage, activation).double()
    clean = stage.run(torch.randn(4, *stage.input_shape, **DOUBLE))
    outputs, step = clean.output.detach(), torch.randn(4, *stage.output_shape, **DOUBLE)
    expected = mirror(outputs + step, clean.switches) - mirror(outputs, clean.switches)
    found = mirror.difference(outputs, step, clean.switches)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(-found, expected)


def test_small_differences_keep_their_digits_in_float32() -> None:
    mirror = build_outer_mirror(LinearStage((6,), 4, "tanh"), "tanh")
    outputs, step = torch.randn(5, 4), 1e-9 * torch.randn(5, 4)
    found = mirror.difference(outputs, step, None)
    expected = mirror.double().difference(outputs.double(), step.double(), None)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_stage_of_another_kind_is_refused() -> None:
    with pytest.raises(
        UserError, match="a StemStage has no outer mirror: it needs stages among ConvStage, LinearStage"
    ):
        build_outer_mirror(StemStage((3, 8, 8), 4, "relu", batch_norm=False), "tanh")
