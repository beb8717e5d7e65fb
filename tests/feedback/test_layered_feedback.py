"""L-DRL of mirrors of several layers, against autograd of the formulas written out here."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.feedback.ldrl import ldrl_objective
from bioprop.feedback.losses import FeedbackGradient, ldrl_gradient
from bioprop.networks import BasicBlockStage, BlockMirror, PooledLinearStage, Stage, StagePass, StemStage, build_mirror
from tests.feedback.given_noise import GivenNoise, rule_of

SIGMA = 0.3


class Case(NamedTuple):
    """A stage with its mirror in float64, one batch, and the noise of one iteration."""

    stage: Stage
    mirror: nn.Module
    clean: StagePass
    noise: list[Tensor]


def make_case(stage: Stage, form: str = "exact") -> Case:
    stage = stage.double()
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    mirror = build_mirror(stage, form)
    inputs = torch.randn(4, *stage.input_shape, dtype=torch.float64)
    clean = StagePass(inputs, None, *stage.run(inputs))
    shapes = mirror.layers(stage, clean).noise_shapes
    return Case(stage, mirror, clean, [SIGMA * torch.randn(shape, dtype=torch.float64) for shape in shapes])


def layered(case: Case) -> FeedbackGradient:
    noise = GivenNoise(each / SIGMA for each in case.noise)
    return ldrl_objective(rule_of("independent", SIGMA), case.stage, case.mirror, case.clean, noise)(0)


def assert_gradient(found: FeedbackGradient, loss: Tensor, parameters: dict[str, Tensor]) -> None:
    assert list(found.parameters) == list(parameters)
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    for name, expected in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        torch.testing.assert_close(found.parameters[name], expected, rtol=1e-9, atol=1e-11)


def held(norm: nn.Module, maps: Tensor) -> Tensor | float:
    """What the batch norm after some maps multiplies each channel by, its statistics held."""
    if isinstance(norm, nn.Identity):
        return 1.0
    return (norm.weight / (maps.var((0, 2, 3), correction=0) + 1e-5).sqrt()).view(-1, 1, 1)


def per_sample(values: Tensor) -> Tensor:
    return values.sum() / len(values)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", ["exact", "paper"])
def test_the_layers_of_a_block(form: str, stride: int, batch_norm: bool) -> None:
    case = make_case(BasicBlockStage((3, 7, 6), 3 * stride, stride, "elu", batch_norm), form)
    block, mirror, clean, (eps, inner, eta) = case
    with torch.no_grad():
        first = block.conv1(clean.inputs)
        scale1, hidden = held(block.norm1, first), block.norm1(first)
        scale2 = held(block.norm2, block.conv2(F.elu(hidden)))
    feed = [len(hidden), *hidden.shape[1:]]

    def phi(values: Tensor) -> Tensor:
        low = values.clamp(-1, 0)
        return torch.where(values > 0, values, low + low**2 / 2) if form == "exact" else F.elu(values)

    def back1(values: Tensor) -> Tensor:
        size = (1 - eps.shape[2] % 2, 1 - eps.shape[3] % 2) if stride == 2 else (0, 0)
        return F.conv_transpose2d(scale1 * values, mirror.conv1_weight, None, stride, 1, size)

    def back2(values: Tensor) -> Tensor:
        return F.conv_transpose2d(scale2 * values, mirror.conv2_weight, padding=1)

    def forward1(values: Tensor) -> Tensor:
        return F.elu(hidden + scale1 * F.conv2d(values, block.conv1.weight, None, stride, 1))

    def forward2(values: Tensor) -> Tensor:
        return scale2 * F.conv2d(values, block.conv2.weight, padding=1)

    state = F.elu(hidden)
    loss = per_sample(back1(phi(state + inner) - phi(state)) ** 2) + per_sample(back2(eta) ** 2)
    change = back1(phi(forward1(eps)) - phi(state))
    loss = loss - 2 * (per_sample(eps * change) + per_sample(inner * back2(forward2(inner))))
    parameters = {"conv1_weight": mirror.conv1_weight, "conv2_weight": mirror.conv2_weight}
    if stride == 2:
        conv, norm = block.shortcut
        scale = held(norm, conv(clean.inputs).detach())
        size = (1 - eps.shape[2] % 2, 1 - eps.shape[3] % 2)
        parameters["shortcut_weight"] = mirror.shortcut_weight
        change, shaken = (
            F.conv_transpose2d(scale * values, mirror.shortcut_weight, None, 2, 0, size)
            for values in (scale * F.conv2d(eps, conv.weight, None, 2), eta)
        )
        loss = loss - 2 * per_sample(eps * change) + per_sample(shaken**2)
    assert_gradient(layered(case), loss, parameters)
    assert list(inner.shape) == feed


def test_the_curvatures_are_second_derivatives_summed_over_the_positions_a_tap_sees() -> None:
    """Of the losses' second terms, averaged over noise; exact for a 1x1 kernel, whose tap sees every position."""
    case = make_case(BasicBlockStage((3, 8, 8), 4, 2, "tanh", batch_norm=True))
    scale = case.clean.switches.norm_shortcut.scale
    found = layered(case).curvature
    assert list(found) == ["conv1_weight", "conv2_weight", "shortcut_weight"]
    torch.testing.assert_close(found["shortcut_weight"], scale**2 * 2 * SIGMA**2 * 16)
    torch.testing.assert_close(found["conv2_weight"], case.clean.switches.norm2.scale**2 * 2 * SIGMA**2 * 16)
    before, scale = torch.tanh(case.clean.switches.affine), case.clean.switches.norm1.scale
    below, above = (values.clamp(-1, 1) for values in (before, before + case.noise[1]))
    step = above - above**3 / 3 - (below - below**3 / 3)
    expected = scale**2 * 2 * (step**2).sum((0, 2, 3)) / 4
    torch.testing.assert_close(found["conv1_weight"], expected)


def test_the_pooled_output_stage() -> None:
    """Noise at every position whose mean is the drawn noise over the root of the number of positions."""
    case = make_case(PooledLinearStage((5, 3, 2), 4))
    stage, mirror, clean, (mean, eta) = case
    eps = (mean / 6**0.5)[:, :, None, None].expand(-1, -1, 3, 2)
    before = mirror(clean.output.detach(), None)
    change = mirror(stage(clean.inputs + eps).detach(), None) - before
    shaken = mirror(clean.output.detach() + eta, None) - before
    loss = per_sample(shaken**2) - 2 * per_sample(eps * change)
    found = layered(case)
    assert_gradient(found, loss, {"weight": mirror.weight})
    torch.testing.assert_close(found.curvature["weight"], torch.full((4,), 2 * SIGMA**2 / 6, dtype=torch.float64))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_stem(batch_norm: bool) -> None:
    case = make_case(StemStage((2, 5, 4), 3, "tanh", batch_norm))
    stage, mirror, clean, (eps, eta) = case
    with torch.no_grad():
        maps = stage.conv(clean.inputs)
        scale, affine, output = held(stage.norm, maps), stage.norm(maps), clean.output.detach()
        noisy = torch.tanh(affine + scale * F.conv2d(eps, stage.conv.weight, padding=1))

    def back(values: Tensor) -> Tensor:
        inside = values.clamp(-1, 1)
        return F.conv_transpose2d(scale * (inside - inside**3 / 3), mirror.weight, padding=1)

    loss = per_sample((back(output + eta) - back(output)) ** 2)
    loss = loss - 2 * per_sample(eps * (back(noisy) - back(output)))
    assert_gradient(layered(case), loss, {"weight": mirror.weight})


@pytest.mark.parametrize("form", ["exact", "paper"])
@pytest.mark.parametrize("clean_switches", [True, False])
def test_the_block_as_a_whole(clean_switches: bool, form: str) -> None:
    case = make_case(BasicBlockStage((2, 6, 5), 3, 2, "tanh", batch_norm=True), form)
    stage, mirror, clean, (eps, _, eta) = case
    output = clean.output.detach()
    before = mirror(output, clean.switches)
    loss = per_sample((mirror(output + eta, clean.switches) - before) ** 2)
    noisy, switches = stage.run(clean.inputs + eps)
    back = mirror(noisy.detach(), clean.switches if clean_switches else switches)
    loss = loss - 2 * per_sample(eps * (back - before))
    found = ldrl_gradient(stage, mirror, clean.inputs, output, clean.switches, eps, eta, clean_switches)
    names = ("conv1_weight", "conv2_weight", "shortcut_weight")
    assert_gradient(found, loss, {name: getattr(mirror, name) for name in names})
    assert found.curvature is None
    assert isinstance(mirror, BlockMirror)
