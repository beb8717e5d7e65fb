"""The gradients of the feedback losses against the losses themselves, written once more from their formulas."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.feedback.losses import (
    FeedbackGradient,
    curvature_of_samples,
    ldrl_gradient,
    reconstruction_gradient,
)
from bioprop.functional.activations import find_activation
from bioprop.functional.pooling import Pool
from bioprop.networks import ConvStage, LinearStage, Mirror, Stage, StageOutput, build_mirror
from bioprop.networks.layers import unit_square_sums

SIGMA, BATCH = 0.3, 4
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
OVERLAPPING = Pool(3, 2, 1)
Noise = tuple[Tensor, Tensor]


class Case(NamedTuple):
    """A stage, its mirror, a batch of inputs, and the noise of one iteration."""

    stage: Stage
    mirror: Mirror
    inputs: Tensor
    noise: Noise


def make_case(stage: Stage, form: str) -> Case:
    stage = stage.double()
    inputs = torch.randn(BATCH, *stage.input_shape, dtype=torch.float64)
    output = torch.randn(BATCH, *stage.output_shape, dtype=torch.float64)
    noise = SIGMA * torch.randn_like(inputs), SIGMA * torch.randn_like(output)
    return Case(stage, build_mirror(stage, form).double(), inputs, noise)


def make_linear_case(form: str, activation: str = "elu") -> Case:
    return make_case(LinearStage((2, 3, 1), 4, activation), form)


def make_conv_case(form: str, pool: Pool | None = OVERLAPPING) -> Case:
    return make_case(ConvStage((2, 5, 4), 3, 3, padding=1, activation="elu", pool=pool), form)


def gradient_of_quadratic(loss: Callable[[Any], float], weight: Any) -> Any:
    """Gradient of a loss that is quadratic in ``weight``, where central differences of any step are exact."""
    gradient = weight * 0
    for index in product(*map(range, weight.shape)):
        step = weight * 0
        step[index] = 1.0
        gradient[index] = (loss(weight + step) - loss(weight - step)) / 2
    return gradient


# -- linear stages, in numpy, one sample at a time --------------------------------------------------------------------


def plain_elu(a: np.ndarray) -> np.ndarray:
    return np.where(a > 0, a, np.exp(np.minimum(a, 0)) - 1)


def plain_elu_feedback(y: np.ndarray) -> np.ndarray:
    return np.where(y > 0, y, np.where(y < -1, -0.5, y + y**2 / 2))


PLAIN_FEEDBACK = {"paper": plain_elu, "exact": plain_elu_feedback}


def linear_arrays(case: Case) -> tuple[np.ndarray, ...]:
    tensors = (case.stage.weight, case.stage.bias, case.mirror.weight, case.mirror.bias, case.inputs, *case.noise)
    weight, bias, feedback, feedback_bias, inputs, eps, eta = (tensor.detach().numpy() for tensor in tensors)
    return weight, bias, feedback, feedback_bias, inputs.reshape(BATCH, -1), eps.reshape(BATCH, -1), eta


def plain_linear_ldrl(case: Case, form: str) -> Callable[[np.ndarray], float]:
    weight, bias, _, feedback_bias, inputs, eps, eta = linear_arrays(case)
    phi = PLAIN_FEEDBACK[form]

    def loss(V: np.ndarray) -> float:
        total = 0.0
        for sample in range(BATCH):
            s = plain_elu(weight @ inputs[sample] + bias)
            noisy = plain_elu(weight @ (inputs[sample] + eps[sample]) + bias)
            back, back_noisy, back_eta = (V.T @ phi(y) + feedback_bias for y in (s, noisy, s + eta[sample]))
            total += -2 * eps[sample] @ (back_noisy - back) + (back_eta - back) @ (back_eta - back)
        return total / BATCH

    return loss


def plain_linear_reconstruction(case: Case, form: str) -> Callable[[np.ndarray, np.ndarray], float]:
    weight, bias, _, _, inputs, eps, _ = linear_arrays(case)

    def loss(V: np.ndarray, c: np.ndarray) -> float:
        total = 0.0
        for sample in range(BATCH):
            noisy = inputs[sample] + eps[sample]
            missing = noisy - (V.T @ PLAIN_FEEDBACK[form](plain_elu(weight @ noisy + bias)) + c)
            total += missing @ missing
        return total / BATCH

    return loss


@pytest.mark.parametrize("form", ["paper", "exact"])
def test_ldrl_gradient_of_a_linear_stage(form: str) -> None:
    case = make_linear_case(form)
    found = ldrl_of(case)
    loss, feedback = plain_linear_ldrl(case, form), case.mirror.weight.detach().numpy()
    np.testing.assert_allclose(found.loss.item(), loss(feedback), rtol=1e-10)
    np.testing.assert_allclose(found.parameters["weight"].numpy(), gradient_of_quadratic(loss, feedback), **TOLERANCE)
    assert "bias" not in found.parameters  # it cancels in both differences


@pytest.mark.parametrize("form", ["paper", "exact"])
def test_reconstruction_gradient_of_a_linear_stage(form: str) -> None:
    case = make_linear_case(form)
    found = reconstruction_gradient(case.stage, case.mirror, case.inputs, case.noise[0])
    loss = plain_linear_reconstruction(case, form)
    feedback, bias = case.mirror.weight.detach().numpy(), case.mirror.bias.detach().numpy()
    np.testing.assert_allclose(found.loss.item(), loss(feedback, bias), rtol=1e-10)
    np.testing.assert_allclose(
        found.parameters["weight"].numpy(), gradient_of_quadratic(lambda V: loss(V, bias), feedback), **TOLERANCE
    )
    np.testing.assert_allclose(
        found.parameters["bias"].numpy(), gradient_of_quadratic(lambda c: loss(feedback, c), bias), **TOLERANCE
    )
    assert found.curvature is None


class Halves:
    """Passes four of six units on, halved; its switches say whose pass it was."""

    def run(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * inputs[:, :4], torch.ones(1)


class Outer(nn.Module):
    """``G(y) = tanh(V^T y + c)``, which is not linear in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(6, dtype=torch.float64))

    def forward(self, outputs: Tensor, switches: Tensor | None) -> Tensor:
        assert switches is not None
        return torch.tanh(outputs @ self.weight + self.bias)


def test_reconstruction_gradient_of_an_operator_that_is_not_linear() -> None:
    """Written out: ``dL/da = 2/batch (G - x) (1 - G^2)`` with ``G = tanh(a)``."""
    back, inputs, noise = Outer(), torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    found = reconstruction_gradient(Halves(), back, inputs, noise)
    noisy = inputs + noise
    outputs = 0.5 * noisy[:, :4]
    guess = torch.tanh(outputs @ back.weight + back.bias).detach()
    slope = 2 / 5 * (guess - noisy) * (1 - guess**2)
    torch.testing.assert_close(found.parameters["weight"], outputs.T @ slope)
    torch.testing.assert_close(found.parameters["bias"], slope.sum(0))
    assert found.loss.item() == pytest.approx(((guess - noisy) ** 2).sum().item() / 5)
    assert found.curvature is None
    assert all(parameter.grad is None for parameter in back.parameters())


# -- conv stages, with torch's own layers, or loops where they have none ----------------------------------------------


def unpool_one_by_one(values: Tensor, switches: Tensor, size: tuple[int, int], adding: bool) -> Tensor:
    """Visit the windows in order: where they overlap, values add up, or the last one stays."""
    maps = torch.zeros(*values.shape[:2], *size, dtype=values.dtype)
    for index in product(*map(range, values.shape)):
        row, column = divmod(int(switches[index]), size[1])
        place = index[0], index[1], row, column
        maps[place] = values[index] + (maps[place] if adding else 0.0)
    return maps


def plain_conv_feedback(case: Case, form: str, y: Tensor, switches: Tensor | None) -> Callable[[Tensor], Tensor]:
    """``G(y)`` as a function of the weight ``V``, with the mirror's bias and the switches given."""
    layer = nn.ConvTranspose2d(3, 2, 3, stride=1, padding=1, dtype=torch.float64)
    size = (case.inputs.shape[2], case.inputs.shape[3])
    if form == "exact":
        y = torch.from_numpy(plain_elu_feedback(y.detach().numpy()))
    maps = y if switches is None else unpool_one_by_one(y, switches, size, adding=form == "exact")
    maps = F.elu(maps) if form == "paper" else maps

    @torch.no_grad()
    def feedback(V: Tensor) -> Tensor:
        layer.weight.copy_(V)
        layer.bias.copy_(case.mirror.bias)
        return layer(maps)

    return feedback


@torch.no_grad()
def plain_conv_pass(case: Case, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    maps = F.elu(F.conv2d(inputs, case.stage.weight, case.stage.bias, padding=1))
    return (maps, None) if case.stage.pool is None else F.max_pool2d(maps, 3, 2, 1, return_indices=True)


def plain_conv_ldrl(case: Case, form: str, clean_switches: bool = False) -> Callable[[Tensor], float]:
    eps, eta = case.noise
    (s, switches), (noisy, noisy_switches) = (plain_conv_pass(case, x) for x in (case.inputs, case.inputs + eps))
    noisy_switches = switches if clean_switches else noisy_switches
    back = plain_conv_feedback(case, form, s, switches)
    back_noisy = plain_conv_feedback(case, form, noisy, noisy_switches)
    back_eta = plain_conv_feedback(case, form, s + eta, switches)

    def loss(V: Tensor) -> float:
        first, second = eps * (back_noisy(V) - back(V)), (back_eta(V) - back(V)) ** 2
        return float((-2 * first.sum() + second.sum()) / BATCH)

    return loss


def plain_conv_reconstruction(case: Case, form: str) -> Callable[[Tensor], float]:
    noisy = case.inputs + case.noise[0]
    back = plain_conv_feedback(case, form, *plain_conv_pass(case, noisy))
    return lambda V: float(((noisy - back(V)) ** 2).sum() / BATCH)


LdrlRule = Callable[[Stage, Mirror, Tensor, Tensor, Tensor | None, Tensor, Tensor, float], FeedbackGradient]


def ldrl_of(case: Case, rule: LdrlRule = ldrl_gradient) -> FeedbackGradient:
    with torch.no_grad():
        output, switches = case.stage.run(case.inputs)
    return rule(case.stage, case.mirror, case.inputs, output, switches, *case.noise)


def assert_is_ldrl_gradient(rule: LdrlRule, case: Case, form: str, clean_switches: bool = False) -> None:
    found, loss = ldrl_of(case, rule), plain_conv_ldrl(case, form, clean_switches)
    feedback = case.mirror.weight.detach()
    np.testing.assert_allclose(found.loss.item(), loss(feedback), rtol=1e-10)
    torch.testing.assert_close(found.parameters["weight"], gradient_of_quadratic(loss, feedback), **TOLERANCE)


@pytest.mark.parametrize("form", ["paper", "exact"])
@pytest.mark.parametrize("pool", [OVERLAPPING, None], ids=["pooled", "not pooled"])
def test_ldrl_gradient_of_a_conv_stage(form: str, pool: Pool | None) -> None:
    assert_is_ldrl_gradient(ldrl_gradient, make_conv_case(form, pool), form)


@pytest.mark.parametrize("form", ["paper", "exact"])
def test_ldrl_gradient_by_the_clean_switches(form: str) -> None:
    case, rule = make_conv_case(form), partial(ldrl_gradient, clean_switches=True)
    assert_is_ldrl_gradient(rule, case, form, clean_switches=True)
    with pytest.raises(AssertionError):
        assert_is_ldrl_gradient(rule, case, form, clean_switches=False)


@pytest.mark.parametrize("form", ["paper", "exact"])
def test_reconstruction_gradient_of_a_conv_stage(form: str) -> None:
    case = make_conv_case(form)
    found = reconstruction_gradient(case.stage, case.mirror, case.inputs, case.noise[0])
    loss, feedback = plain_conv_reconstruction(case, form), case.mirror.weight.detach()
    np.testing.assert_allclose(found.loss.item(), loss(feedback), rtol=1e-10)
    torch.testing.assert_close(found.parameters["weight"], gradient_of_quadratic(loss, feedback), **TOLERANCE)


class CleanSwitches(nn.Module):
    """A stage whose every pass reports the switches of the clean pass, as hidden shared state would."""

    def __init__(self, stage: Stage, switches: Tensor | None) -> None:
        super().__init__()
        self.stage, self.switches = stage, switches

    def run(self, inputs: Tensor) -> StageOutput:
        return StageOutput(self.stage.run(inputs).output, self.switches)


def with_clean_switches(stage, mirror, inputs, output, switches, eps, eta):  # type: ignore[no-untyped-def]
    return ldrl_gradient(CleanSwitches(stage, switches), mirror, inputs, output, switches, eps, eta)


def with_flipped_noise(stage, mirror, inputs, output, switches, eps, eta):  # type: ignore[no-untyped-def]
    """Flip the sign of the first term alone: the gradient of the second is twice what both signs average to."""
    right = ldrl_gradient(stage, mirror, inputs, output, switches, eps, eta)
    second = ldrl_gradient(stage, mirror, inputs, output, switches, 0 * eps, eta)
    return right._replace(
        parameters={"weight": 2 * second.parameters["weight"] - right.parameters["weight"]},
        loss=2 * second.loss - right.loss,
    )


def without_output_noise(stage, mirror, inputs, output, switches, eps, eta):  # type: ignore[no-untyped-def]
    return ldrl_gradient(stage, mirror, inputs, output, switches, eps, 0 * eta)


def with_detached_clean_pass(stage, mirror, inputs, output, switches, eps, eta):  # type: ignore[no-untyped-def]
    """Drop the gradient through ``G(s^n)``, which the loss is to be differentiated through as well."""
    with torch.no_grad():
        noisy, noisy_switches = stage.run(inputs + eps)
        clean = mirror(output, switches)
    second = (mirror(output + eta, switches) - clean).square()
    loss = (second - 2 * eps * (mirror(noisy, noisy_switches) - clean)).flatten(1).sum(1).mean()
    (weight,) = torch.autograd.grad(loss, mirror.weight)
    return FeedbackGradient({"weight": weight}, loss.detach(), None)


@pytest.mark.parametrize(
    "mutated", [with_clean_switches, with_flipped_noise, without_output_noise, with_detached_clean_pass]
)
@pytest.mark.parametrize("form", ["paper", "exact"])
def test_a_mutated_ldrl_gradient_is_noticed(mutated: LdrlRule, form: str) -> None:
    with pytest.raises(AssertionError):
        assert_is_ldrl_gradient(mutated, make_conv_case(form), form)


def test_reconstruction_uses_the_switches_of_the_noisy_pass() -> None:
    case = make_conv_case("exact")
    _, switches = case.stage.run(case.inputs)
    right = reconstruction_gradient(case.stage, case.mirror, case.inputs, case.noise[0])
    wrong = reconstruction_gradient(CleanSwitches(case.stage, switches), case.mirror, case.inputs, case.noise[0])
    assert not torch.allclose(right.parameters["weight"], wrong.parameters["weight"], rtol=1e-3)


# -- curvature, theory, side effects ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_linear_case, make_conv_case])
def test_curvature_is_the_mean_square_of_the_noisy_activations(make: Callable[[str], Case]) -> None:
    case = make("exact")
    output, eta = case.stage.run(case.inputs).output.detach(), case.noise[1]
    phi = find_activation("elu").phi
    expected = torch.zeros(output.shape[1], dtype=torch.float64)
    for sample, unit in product(range(BATCH), range(output.shape[1])):
        change = phi(output[sample, unit] + eta[sample, unit]) - phi(output[sample, unit])
        expected[unit] += 2 * change.square().sum() / BATCH
    torch.testing.assert_close(curvature_of_samples(case.mirror, output, eta, SIGMA), expected, **TOLERANCE)


def test_curvature_of_a_linear_mirror_is_known_beforehand() -> None:
    case = make_linear_case("exact", "identity")
    curvature = curvature_of_samples(case.mirror, case.stage.run(case.inputs).output, case.noise[1], SIGMA)
    torch.testing.assert_close(curvature, torch.full((4,), 2 * SIGMA**2, dtype=torch.float64), rtol=1e-14, atol=0)


def test_unit_square_sums_add_positions_and_average_samples() -> None:
    maps = torch.tensor([[[[1.0, 2.0]], [[0.0, 3.0]]], [[[1.0, 0.0]], [[1.0, 0.0]]]])
    assert unit_square_sums(maps).tolist() == [3.0, 5.0]
    assert unit_square_sums(torch.tensor([[1.0, 2.0], [3.0, 0.0]])).tolist() == [5.0, 2.0]


def test_the_ldrl_loss_measures_the_distance_from_the_transposed_weight() -> None:
    """``E L = sigma^2 (|V - W|^2 - |W|^2)`` on a linear stage; the mean over many samples comes within 2 percent."""
    stage = LinearStage((6,), 4, "identity").double()
    mirror = build_mirror(stage, "exact").double()
    with torch.no_grad():
        mirror.weight.mul_(2)
    inputs = torch.zeros(200_000, 6, dtype=torch.float64)
    output = stage(inputs).detach()
    noise = SIGMA * torch.randn_like(inputs), SIGMA * torch.randn_like(output)
    found = ldrl_gradient(stage, mirror, inputs, output, None, *noise)
    V, W = mirror.weight.detach(), stage.weight.detach()
    expected = SIGMA**2 * ((V - W).square().sum() - W.square().sum())
    assert found.loss.item() == pytest.approx(expected.item(), abs=0.02 * SIGMA**2 * W.square().sum().item())
    torch.testing.assert_close(found.parameters["weight"], 2 * SIGMA**2 * (V - W), rtol=0.02, atol=0.02 * SIGMA**2)


@pytest.mark.parametrize("rule", ["ldrl", "reconstruction"])
def test_forming_a_gradient_leaves_no_trace(rule: str) -> None:
    case = make_conv_case("exact")
    before = {key: value.clone() for part in (case.stage, case.mirror) for key, value in part.state_dict().items()}
    if rule == "ldrl":
        ldrl_of(case)
    else:
        reconstruction_gradient(case.stage, case.mirror, case.inputs, case.noise[0])
    after = {key: value for part in (case.stage, case.mirror) for key, value in part.state_dict().items()}
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(p.grad is None for part in (case.stage, case.mirror) for p in part.parameters())


def test_the_curvature_of_a_linear_convolution_counts_its_positions() -> None:
    """The expectation of what is read off the samples elsewhere."""
    stage = ConvStage((2, 6, 5), 3, 3, padding=1, activation="identity").double()
    mirror, inputs = build_mirror(stage, "exact").double(), torch.randn(4, 2, 6, 5, dtype=torch.float64)
    output, _ = stage.run(inputs)
    eta = 0.5 * torch.randn(4000, 3, 6, 5, dtype=torch.float64)
    curvature = curvature_of_samples(mirror, output.detach(), eta[:4], 0.5)
    expected = 2.0 * eta.square().sum((2, 3)).mean(0)
    torch.testing.assert_close(curvature, expected, rtol=0.03, atol=0)
