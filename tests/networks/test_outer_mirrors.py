"""Feedback operators with their activation outside."""

import pytest
import torch
import torch.nn.functional as F

from bioprop.errors import UserError
from bioprop.functional.pooling import Pool
from bioprop.networks import ConvStage, LinearStage, Stage, build_outer_mirror
from bioprop.networks.outer_mirrors import activation_of
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
    refusal = r"a StemStage has no .* choose a network of stages among .*ConvStage.*LinearStage"
    with pytest.raises(UserError, match=refusal):
        build_outer_mirror(StemStage((3, 8, 8), 4, "relu", batch_norm=False), "tanh")


def test_it_is_drawn_by_xaviers_rule() -> None:
    mirror = build_outer_mirror(LinearStage((300,), 500, "tanh"), "tanh")
    mirror.draw_by_xavier()
    assert float(mirror.weight.detach().std()) == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert mirror.bias.abs().max() == 0


def test_the_activation_is_that_of_the_stage_below() -> None:
    assert activation_of(LinearStage((3,), 7, "tanh")) == "tanh"
    assert activation_of(ConvStage((1, 8, 8), 3, 1, activation="relu")) == "relu"
    assert activation_of(StemStage((3, 8, 8), 4, "relu", batch_norm=False)) == "identity"


STAGES: dict[str, Stage] = {
    "linear": LinearStage((7,), 4, "identity"),
    "conv": ConvStage((3, 6, 6), 4, 3, padding=1, activation="tanh", pool=Pool(3, 2, 1)),
    "strided conv": ConvStage((3, 8, 8), 4, 3, stride=2, activation="elu"),
    "without bias": LinearStage((7,), 4, "tanh", bias=False),
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_before_its_activation_it_is_the_transposed_layer(stage: Stage) -> None:
    """``psi^{-1}(G(y)) - c`` is the adjoint of the stage's layer and pooling, for ``V = W``."""
    mirror, stage = build_outer_mirror(stage, "identity").double(), stage.double()
    with torch.no_grad():
        mirror.weight.copy_(stage.weight)
    states = torch.randn(2, *stage.input_shape, **DOUBLE).requires_grad_()
    _, switches = stage.run(states)
    y = torch.randn(2, *stage.output_shape, **DOUBLE)
    affine = stage.affine(states)
    if switches is not None:
        affine = affine.flatten(2).gather(2, switches.flatten(2)).view(2, *stage.output_shape)
    (adjoint,) = torch.autograd.grad(affine, states, y)
    torch.testing.assert_close(mirror(y, switches) - mirror(torch.zeros_like(y), switches), adjoint)
