"""The second noise of L-DRL: three estimators of one mean, what is left of their noise, and their closed forms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from bioprop.feedback import ldrl
from bioprop.feedback.ldrl import curvature_of_taps, curvature_of_units, ldrl_objective
from bioprop.feedback.losses import (
    FeedbackGradient,
    curvature_by_autograd,
    echo_gradient,
    expected_gradient,
    ldrl_gradient,
)
from bioprop.functional.pooling import Pool
from bioprop.networks import BasicBlockStage, ConvStage, LinearStage, Mirror, Stage, StagePass, build_mirror
from bioprop.networks.layers import FeedbackLayer
from tests.feedback.given_noise import GivenNoise, rule_of
from tests.geometries import few, stages

SIGMA = 1e-3
IMAGES, COPIES, CALLS = 2, 200, 60
SECOND_NOISES = ["independent", "expected", "echo"]
every_second_noise = pytest.mark.parametrize("second_noise", SECOND_NOISES)


def conv(activation: str, pool: Pool | None = None, stride: int = 1) -> Callable[[], Stage]:
    return lambda: ConvStage((2, 5, 4), 3, 3, stride=stride, padding=1, activation=activation, pool=pool)


STAGES: dict[str, Callable[[], Stage]] = {
    "linear": lambda: LinearStage((5,), 4, "identity"),
    "linear elu": lambda: LinearStage((5,), 4, "elu"),
    "linear tanh": lambda: LinearStage((5,), 4, "tanh"),
    "conv elu, pooled": conv("elu", Pool(2, 2)),
    "conv elu, overlapping windows": conv("elu", Pool(3, 2, 1)),
    "strided conv leaky relu": conv("leaky_relu", stride=2),  # below 0 the output noise must not reach the kink
    "conv tanh": conv("tanh"),
}
every_stage = pytest.mark.parametrize("build", STAGES.values(), ids=STAGES)


class Case(NamedTuple):
    """A stage and its mirror in float64, and the clean pass of a batch."""

    stage: Stage
    mirror: Mirror
    inputs: Tensor
    output: Tensor
    switches: Tensor | None


def make_case(stage: Stage, form: str = "exact", batch: int = IMAGES) -> Case:
    stage = stage.double()
    inputs = torch.randn(batch, *stage.input_shape, dtype=torch.float64)
    with torch.no_grad():
        output, switches = stage.run(inputs)
    return Case(stage, build_mirror(stage, form).double(), inputs, output, switches)


def copied(case: Case, times: int) -> Case:
    """Every image several times: as many draws of the noise for it."""
    inputs = case.inputs.repeat(times, *[1] * (case.inputs.dim() - 1))
    with torch.no_grad():
        return Case(case.stage, case.mirror, inputs, *case.stage.run(inputs))


def draw_like(values: Tensor, sigma: float = SIGMA) -> Tensor:
    return sigma * torch.randn_like(values)


def gradient(case: Case, second_noise: str, eps: Tensor, sigma: float = SIGMA) -> FeedbackGradient:
    """By autograd, on noise that is given."""
    if second_noise == "independent":
        return ldrl_gradient(*case, eps, draw_like(case.output, sigma), clean_switches=True)
    if second_noise == "expected":
        return expected_gradient(*case, eps, sigma**2)
    return echo_gradient(*case, eps)


# -- the mean gradient is that of the distance to the transposed Jacobian ---------------------------------------------


def gradient_of_the_distance(case: Case) -> Tensor:
    """``sigma^2 grad_V mean_batch |J_G - J_F^T|^2``, from Jacobians entry by entry."""
    distance = torch.zeros((), dtype=torch.float64)
    for image in range(len(case.inputs)):
        switches = None if case.switches is None else case.switches[image : image + 1]
        inputs, output = case.inputs[image : image + 1], case.output[image : image + 1]
        size = inputs.numel(), output.numel()
        forward = jacobian(case.stage, inputs).reshape(size[1], size[0])
        back = jacobian(lambda y, taken=switches: case.mirror(y, taken), output, create_graph=True).reshape(size)
        distance = distance + (back - forward.t()).square().sum() / len(case.inputs)
    (found,) = torch.autograd.grad(SIGMA**2 * distance, case.mirror.weight)
    return found


def assert_mean_is(samples: Tensor, expected: Tensor) -> None:
    """Along random directions within four standard errors; as a whole within what their number leaves to chance."""
    samples, expected = samples.flatten(1), expected.flatten()
    missing, error = samples.mean(0) - expected, samples.std(0) / len(samples) ** 0.5
    assert error.norm() < 0.1 * expected.norm()  # so that a mean of zero would be noticed
    assert missing.norm() < (1 + 3 / len(expected) ** 0.5) * error.norm()
    directions = torch.randn(len(expected), 5, dtype=torch.float64)
    along, spread = missing @ directions, (samples @ directions).std(0) / len(samples) ** 0.5
    assert (along.abs() < 4 * spread).all()


def samples_of(case: Case, second_noise: str, sigma: float) -> Tensor:
    """In units of those with `SIGMA`."""
    many = copied(case, COPIES)
    drawn = [
        gradient(many, second_noise, draw_like(many.inputs, sigma), sigma).parameters["weight"] for _ in range(CALLS)
    ]
    return torch.stack(drawn) * (SIGMA / sigma) ** 2


@every_second_noise
@every_stage
def test_the_mean_gradient_is_that_of_the_distance(build: Callable[[], Stage], second_noise: str) -> None:
    case = make_case(build())
    sigma = 1e-6 if case.stage.activation == "leaky_relu" else SIGMA
    assert_mean_is(samples_of(case, second_noise, sigma), gradient_of_the_distance(case))


def without_slope(case: Case, eps: Tensor) -> Tensor:
    maps = case.output.clone().requires_grad_()
    return torch.autograd.grad(case.mirror.project(maps), maps, eps)[0]


def echo_of(case: Case, eps: Tensor, keep_graph: bool = False) -> Tensor:
    output = case.output.clone().requires_grad_()
    with torch.enable_grad():
        back = case.mirror(output, case.switches)
    return torch.autograd.grad(back, output, eps, create_graph=keep_graph)[0]


ECHOES: dict[str, Callable[[Case, Tensor], Tensor]] = {
    "right": echo_of,
    "sign flipped": lambda case, eps: -echo_of(case, eps),
    "not constant": lambda case, eps: echo_of(case, eps, keep_graph=True),
    "without slope": without_slope,
    "independent": lambda case, eps: draw_like(case.output),
}


@pytest.mark.parametrize("kind", ECHOES)
def test_the_mean_of_another_echo_is_noticed(kind: str) -> None:
    """The noise of the check leaves room for none of these; each is the gradient written out."""
    case = make_case(STAGES["conv tanh"]())
    many, samples = copied(case, COPIES), []
    for _ in range(CALLS):
        eps = draw_like(many.inputs)
        echo = ECHOES[kind](many, eps)
        noisy = many.stage(many.inputs + eps).detach()
        change = many.mirror(many.output + echo, many.switches) - many.mirror(noisy, many.switches)
        loss = 2 * (eps * change).sum() / len(eps)
        samples.append(torch.autograd.grad(loss, many.mirror.weight)[0])
    if kind == "right":
        assert_mean_is(torch.stack(samples), gradient_of_the_distance(case))
    else:
        with pytest.raises(AssertionError):
            assert_mean_is(torch.stack(samples), gradient_of_the_distance(case))


# -- the layers of a residual block -----------------------------------------------------------------------------------


def make_block(batch_norm: bool) -> tuple[BasicBlockStage, Mirror, StagePass]:
    block = BasicBlockStage((2, 5, 4), 3, 2, "elu", batch_norm).double()
    inputs = torch.randn(IMAGES, *block.input_shape, dtype=torch.float64)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        block(inputs)  # statistics of its own
    return block.eval(), build_mirror(block, "exact").double(), inputs


def explicit_layers(
    block: BasicBlockStage, mirror: Mirror, inputs: Tensor
) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor, Tensor]]:
    """Each layer as a function, its way back, and where both are looked at; batch norm is a factor in evaluation."""

    def phi(values: Tensor) -> Tensor:
        low = values.clamp(-1, 0)
        return torch.where(values > 0, values, low + low**2 / 2)

    def factor(norm: nn.Module) -> Tensor | float:
        if isinstance(norm, nn.Identity):
            return 1.0
        return (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().view(-1, 1, 1)

    def first(values: Tensor) -> Tensor:
        return nn.functional.elu(block.norm1(block.conv1(values)))

    across, norm = block.shortcut
    back = nn.functional.conv_transpose2d
    hidden = first(inputs).detach()
    state = block.norm2(block.conv2(hidden)).detach()
    return {
        "conv1_weight": (
            first,
            lambda y: back(factor(block.norm1) * phi(y), mirror.conv1_weight, None, 2, 1, (0, 1)),
            inputs,
            hidden,
        ),
        "conv2_weight": (
            lambda values: block.norm2(block.conv2(values)),
            lambda y: back(factor(block.norm2) * y, mirror.conv2_weight, padding=1),
            hidden,
            state,
        ),
        "shortcut_weight": (
            lambda values: norm(across(values)),
            lambda y: back(factor(norm) * y, mirror.shortcut_weight, None, 2, 0, (0, 1)),
            inputs,
            norm(across(inputs)).detach(),
        ),
    }


def distances_of_the_layers(block: BasicBlockStage, mirror: Mirror, inputs: Tensor) -> dict[str, Tensor]:
    found = {}
    for name, (forward, back, at, above) in explicit_layers(block, mirror, inputs).items():
        distance = torch.zeros((), dtype=torch.float64)
        for image in range(len(inputs)):
            x, y = at[image : image + 1], above[image : image + 1]
            J_F = jacobian(forward, x).reshape(y.numel(), x.numel())
            J_G = jacobian(back, y, create_graph=True).reshape(x.numel(), y.numel())
            distance = distance + (J_G - J_F.t()).square().sum() / len(inputs)
        (found[name],) = torch.autograd.grad(SIGMA**2 * distance, getattr(mirror, name))
    return found


def normals_of(layers: list[FeedbackLayer], shapes: list[Any], second_noise: str) -> list[Tensor]:
    """One for each shared noise of the published rule; else one for each layer."""
    shapes = shapes if second_noise == "independent" else [layer.inputs.shape for layer in layers]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@every_second_noise
@pytest.mark.parametrize("batch_norm", [True, False])
def test_so_it_is_for_each_layer_of_a_block(batch_norm: bool, second_noise: str) -> None:
    block, mirror, inputs = make_block(batch_norm)
    many = inputs.repeat(COPIES, 1, 1, 1)
    with torch.no_grad():
        clean = StagePass(many, None, *block.run(many))
        parts = mirror.layers(block, clean)
    noise = GivenNoise(normal for _ in range(CALLS) for normal in normals_of(*parts, second_noise))
    gradient_at = ldrl_objective(rule_of(second_noise, SIGMA), block, mirror, clean, noise)
    samples = [gradient_at(draw).parameters for draw in range(CALLS)]
    expected = distances_of_the_layers(block, mirror, inputs)
    assert list(expected) == list(samples[0])
    for name, wanted in expected.items():
        assert_mean_is(torch.stack([sample[name] for sample in samples]), wanted)


@pytest.mark.parametrize("second_noise", ["echo", "expected"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_on_given_noise_a_layers_gradient_is_autograds(batch_norm: bool, second_noise: str) -> None:
    """The damping of each unit is scaled as its curvature is: by the square of what batch norm multiplies it by."""
    block, mirror, inputs = make_block(batch_norm)
    rule, curvature_of = (
        rule_of(second_noise, SIGMA),
        curvature_of_units if second_noise == "echo" else curvature_of_taps,
    )
    with torch.no_grad():
        clean = StagePass(inputs, None, *block.run(inputs))
        parts = mirror.layers(block, clean)
    normals = normals_of(*parts, second_noise)
    found = ldrl_objective(rule, block, mirror, clean, GivenNoise(normals))(0)
    explicit = explicit_layers(block, mirror, inputs)
    for (name, (forward, back, at, above)), normal, layer in zip(explicit.items(), normals, parts.layers, strict=True):
        eps = SIGMA * normal
        noisy = back(forward(at + eps).detach())
        if second_noise == "echo":
            point = above.clone().requires_grad_()
            (echo,) = torch.autograd.grad(back(point), point, eps)
            loss = 2 * (eps * (back(above + echo) - noisy)).sum() / len(eps)
        else:
            pairs = [
                jacobian(back, above[image : image + 1], create_graph=True).square().sum() for image in range(len(eps))
            ]
            loss = (SIGMA**2 * sum(pairs) - 2 * (eps * (noisy - back(above))).sum()) / len(eps)
        (wanted,) = torch.autograd.grad(loss, getattr(mirror, name))
        assert (found.parameters[name] - wanted).norm() < 1e-9 * wanted.norm()
        probing = rule.probing(layer.inputs, layer.weight, layer.output, layer.output[0, 0].numel(), None)
        damped = curvature_of(layer, SIGMA**2) + probing.damping(0)
        units = 1.0 if layer.scale is None else layer.scale.square().view(-1, *[1] * (damped.dim() - 1))
        torch.testing.assert_close(found.curvature[name], units * damped)


# -- what is left of the noise where the Jacobians match ---------------------------------------------------------------


def layer_of(case: Case) -> FeedbackLayer:
    clean = case.stage.clean_pass(case.inputs)
    return case.mirror.layers(case.stage, clean).layers[0]._replace(output=case.output)


def closed_form(case: Case, second_noise: str, eps: Tensor, sigma: float) -> FeedbackGradient:
    layer, eps = layer_of(case), eps.reshape(case.stage.noise_shape(eps))
    if second_noise == "echo":
        weight, loss = ldrl.echo_gradient(layer.blocks(), eps)
    else:
        weight, loss = ldrl.expected_gradient(layer.blocks(), eps, curvature_of_taps(layer, sigma**2))
    return FeedbackGradient({"weight": weight}, loss, None)


def symmetric(case: Case) -> Case:
    with torch.no_grad():
        case.mirror.weight.copy_(case.stage.weight)
    return case


@pytest.mark.parametrize(
    "build",
    [STAGES["linear"], lambda: ConvStage((2, 5, 4), 3, 3, padding=1, activation="identity", pool=Pool(3, 2, 1))],
    ids=["linear", "conv"],
)
def test_with_the_transpose_an_echo_has_no_noise_on_a_linear_stage(build: Callable[[], Stage]) -> None:
    random = make_case(build(), batch=4)
    size = gradient(random, "echo", draw_like(random.inputs)).parameters["weight"].norm()
    case = symmetric(random)
    for _ in range(20):
        eps = draw_like(case.inputs)
        found = gradient(case, "echo", eps).parameters["weight"]
        if case.switches is None:
            assert torch.equal(closed_form(case, "echo", eps, SIGMA).parameters["weight"], torch.zeros_like(found))
            assert found.norm() < 1e-12 * size  # two whole passes are subtracted
        assert (
            closed_form(case, "echo", eps, SIGMA).parameters["weight"].norm()
            < (1e-12 if case.switches is None else 1e-2) * size
        )
        assert gradient(case, "independent", eps).parameters["weight"].norm() > 0.1 * size


@every_stage
def test_with_the_transpose_next_to_none_elsewhere(build: Callable[[], Stage]) -> None:
    random = make_case(build(), batch=4)
    size = gradient(random, "echo", draw_like(random.inputs)).parameters["weight"].norm()
    case = symmetric(random)
    sizes: dict[str, list[Tensor]] = {name: [] for name in SECOND_NOISES}
    for _ in range(20):
        for name, found in sizes.items():
            found.append(gradient(case, name, draw_like(case.inputs)).parameters["weight"].norm())
    assert max(sizes["echo"]) < 1e-2 * size
    assert min(sizes["independent"]) > 0.1 * size
    assert min(sizes["expected"]) > 0.1 * size


# -- the closed forms are autograd's -----------------------------------------------------------------------------------

forms = st.sampled_from(["exact", "paper"])


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    """As a whole; terms of size 1 may cancel."""
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= tolerance * (wanted.norm() + 1e-2)


@few(150)
@given(stage=stages(), form=forms, second_noise=st.sampled_from(["echo", "expected"]))
def test_closed_forms_equal_autograd(stage: Stage, form: str, second_noise: str) -> None:
    torch.manual_seed(1)
    case = make_case(stage, form, batch=5)
    eps = draw_like(case.inputs, 0.3)
    found, wanted = closed_form(case, second_noise, eps, 0.3), gradient(case, second_noise, eps, 0.3)
    assert_close(found.parameters["weight"], wanted.parameters["weight"])
    assert_close(found.loss, wanted.loss)
    assert set(found.parameters) == set(wanted.parameters) == {"weight"}


@few(100)
@given(stage=stages(), form=forms, images=st.integers(1, 5))
def test_curvatures_equal_autograds(stage: Stage, form: str, images: int) -> None:
    """Of the first images: those that there is noise on."""
    torch.manual_seed(1)
    case = make_case(stage, form, batch=5)
    layer = layer_of(case).block(slice(0, images))
    given = case.mirror, case.output, case.switches, 0.09, images
    assert_close(curvature_of_units(layer, 0.09), curvature_by_autograd(*given, by_taps=False))
    taps = curvature_of_taps(layer, 0.09)
    assert_close(taps.expand_as(case.mirror.weight), curvature_by_autograd(*given, by_taps=True))


@few(40)
@given(stage=stages(), form=forms)
def test_the_decay_of_a_tap_is_half_the_second_derivative_of_the_jacobian(stage: Stage, form: str) -> None:
    """``sigma^2 |J_G|^2 = sum_taps decay V^2 / 2``, with ``J_G`` entry by entry."""
    torch.manual_seed(1)
    case = make_case(stage, form, batch=2)
    total = torch.zeros((), dtype=torch.float64)
    for image in range(2):
        switches = None if case.switches is None else case.switches[image : image + 1]
        back = jacobian(lambda y, taken=switches: case.mirror(y, taken), case.output[image : image + 1])
        total = total + 0.09 * back.square().sum() / 2
    decay = curvature_by_autograd(case.mirror, case.output, case.switches, 0.09, 2, by_taps=True)
    assert_close(0.5 * (decay * case.mirror.weight.detach() ** 2).sum(), total)


@every_second_noise
def test_forming_a_gradient_leaves_no_trace(second_noise: str) -> None:
    case = make_case(STAGES["conv elu, overlapping windows"]())
    parts = (case.stage, case.mirror)
    before = [value.clone() for part in parts for value in part.state_dict().values()]
    found = gradient(case, second_noise, draw_like(case.inputs))
    after = [value for part in parts for value in part.state_dict().values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert all(parameter.grad is None for part in parts for parameter in part.parameters())
    assert not found.parameters["weight"].requires_grad
    assert not found.loss.requires_grad
    assert not case.output.requires_grad
