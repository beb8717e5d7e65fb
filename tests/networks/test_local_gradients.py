"""Local gradients in closed form against autograd, and which stages step aside."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bioprop.algorithms import DTP, DTPDRL, LDRL, Algorithm, TargetAlgorithm
from bioprop.errors import UserError
from bioprop.feedback.speed import Speed
from bioprop.functional.pooling import Pool
from bioprop.networks import ConvStage, LinearStage, Network, Stage, StageOutput, layers
from bioprop.networks.layers import blocks
from bioprop.networks.mirrors import ConvMirror, LinearMirror, build_mirror
from tests.geometries import few, networks

CLOSED = Speed()


def gradients_of(network: Network, images: Tensor, closed_form: bool) -> dict[str, Tensor]:
    generator, inputs, gradients = torch.Generator().manual_seed(1), images, dict[str, Tensor]()
    for name, stage in network.stages():
        clean = stage.clean_pass(inputs, closed_form)
        error = torch.randn(clean.output.shape, generator=generator, dtype=torch.float64)
        gradients |= {f"{name}.{each}": value for each, value in stage.local_gradients(clean, error).items()}
        inputs = clean.output.detach()
    return gradients


def assert_same_gradients(network: Network, images: Tensor) -> None:
    found, expected = (gradients_of(network, images, closed_form) for closed_form in (True, False))
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert list(found) == list(expected) == trained
    for name, wanted in expected.items():
        assert found[name].shape == network.get_parameter(name).shape
        assert not found[name].requires_grad
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-13)


@few(80)
@given(network=networks(), frozen=st.sets(st.integers(0, 5)))
def test_closed_form_is_autograd_and_leaves_frozen_parameters_out(network: Network, frozen: set[int]) -> None:
    for number, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(number not in frozen or number == 5)
    for _, stage in network.stages():  # a stage without anything to train has nothing to compare
        if not any(parameter.requires_grad for parameter in stage.parameters()):
            next(stage.parameters()).requires_grad_(True)
    assert_same_gradients(network.double(), torch.randn(4, *network.stages()[0][1].input_shape, dtype=torch.float64))


@pytest.mark.parametrize("cut", ["middle.conv.weight", "middle.conv.bias", None])
def test_blocks_of_samples_add_up(cut: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    network = with_middle(ConvStage((4, 6, 6), 4, 3, padding=1, pool=Pool(3, 2, 1))).double()
    if cut is not None:
        network.get_parameter(cut).requires_grad_(False)
    monkeypatch.setattr(layers, "BLOCK_BYTES", 1)
    assert [each.stop - each.start for each in blocks(torch.empty(27, 4, 6, 6), fewest=8)] == [7, 7, 7, 6]
    assert_same_gradients(network, torch.randn(27, 1, 6, 6, dtype=torch.float64))


def test_a_frozen_stage_has_no_gradient() -> None:
    network = with_middle(LinearStage((4, 6, 6), 5, "elu")).double()
    network.middle.requires_grad_(False)
    found = gradients_of(network, torch.randn(3, 1, 6, 6, dtype=torch.float64), True)
    assert {name.split(".")[0] for name in found} == {"below", "top"}


class DoubledConv(ConvStage):
    """A user's stage: computes something else in `run` than its parent."""

    def run(self, inputs: Tensor) -> StageOutput:
        output, switches = super().run(inputs)
        return StageOutput(2.0 * output, switches)


class ScaledConv(ConvStage):
    """The same in `activate`, with a parameter of its own."""

    def __init__(self, *given: int, **named: int) -> None:
        super().__init__(*given, **named)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def activate(self, affine: Tensor) -> StageOutput:
        output, switches = super().activate(affine)
        return StageOutput(self.scale * output, switches)


class DoubledLinear(LinearStage):
    def affine(self, inputs: Tensor) -> Tensor:
        return 2.0 * super().affine(inputs)


class HalvedConvMirror(ConvMirror):
    """A user's mirror."""

    def features(self, outputs: Tensor, switches: Tensor | None) -> Tensor:
        return 0.5 * super().features(outputs, switches)


class HalvedLinearMirror(LinearMirror):
    def project(self, features: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().project(0.5 * features, bias)


def hooked(stage: Stage) -> Stage:
    stage.conv.register_forward_hook(lambda module, given, output: 2.0 * output)
    return stage


def parametrized(stage: Stage) -> Stage:
    nn.utils.parametrizations.weight_norm(stage.conv)
    return stage


def replaced(stage: Stage, **settings: object) -> Stage:
    stage.conv = nn.Conv2d(4, 4, 3, padding=1, **settings)
    return stage


def plain_conv() -> ConvStage:
    return ConvStage((4, 6, 6), 4, 3, padding=1, pool=Pool(2, 2))


STRANGERS: dict[str, Callable[[], Stage]] = {
    "run overridden": lambda: DoubledConv((4, 6, 6), 4, 3, padding=1, pool=Pool(2, 2)),
    "activate overridden": lambda: ScaledConv((4, 6, 6), 4, 3, padding=1, pool=Pool(3, 2, 1)),
    "affine overridden": lambda: DoubledLinear((4, 6, 6), 5, "elu"),
    "hook": lambda: hooked(plain_conv()),
    "parametrized weight": lambda: parametrized(plain_conv()),
    "other padding": lambda: replaced(plain_conv(), padding_mode="circular"),
    "groups": lambda: replaced(plain_conv(), groups=2),
}
strangers = pytest.mark.parametrize("build", STRANGERS.values(), ids=STRANGERS)


def with_middle(middle: Stage) -> Network:
    below = ConvStage((1, 6, 6), 4, 1, activation="tanh")
    return Network({"below": below, "middle": middle, "top": LinearStage(middle.output_shape, 3, "identity")}, {})


def gradients_by_hand(network: Network, images: Tensor) -> dict[str, Tensor]:
    """Each stage run as a module, on detached inputs, its own parameters differentiated."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    for name, stage in network.stages():
        output = stage(images)
        error = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        names, parameters = zip(*stage.named_parameters(), strict=True)
        gradients = torch.autograd.grad(output, parameters, error)
        found |= {f"{name}.{parameter}": each for parameter, each in zip(names, gradients, strict=True)}
        images = output.detach()
    return found


@strangers
def test_stages_of_another_kind_take_autograd_and_are_right(build: Callable[[], Stage]) -> None:
    network = with_middle(build()).double()
    images = torch.randn(3, 1, 6, 6, dtype=torch.float64)
    assert network.middle.products is None
    found, expected = gradients_of(network, images, True), gradients_by_hand(network, images)
    assert list(found) == list(expected)
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-13)


def feedback_after(algorithm: type[TargetAlgorithm], network: Network, closed: bool, mirror: object = None) -> list:
    torch.manual_seed(4)
    made = algorithm(deepcopy(network), iterations=2, noise=0.2, feedback_lr=0.01, speed=Speed(closed_form=closed))
    if mirror is not None:
        made.feedback["middle"].__class__ = mirror
    made = made.double()
    losses = made.train_feedback(torch.randn(5, 1, 6, 6, dtype=torch.float64))
    return [*made.feedback.parameters(), *losses.values()]


@pytest.mark.parametrize("build", [build for name, build in STRANGERS.items() if name != "groups"])
@pytest.mark.parametrize("algorithm", [LDRL, DTP])
def test_feedback_of_stages_of_another_kind_takes_autograd(
    build: Callable[[], Stage], algorithm: type[TargetAlgorithm]
) -> None:
    stage = build()
    network = with_middle(stage)
    assert stage.products is None
    clean = stage.clean_pass(torch.randn(2, *stage.input_shape))
    assert build_mirror(stage, "exact").layers(stage, clean) is None
    for found, wanted in zip(*(feedback_after(algorithm, network, closed) for closed in (True, False)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("algorithm", [LDRL, DTP, DTPDRL])
@pytest.mark.parametrize(("name", "value"), [("groups", 2), ("dilation", 2)])
def test_what_a_mirror_does_not_carry_is_refused(algorithm: type[Algorithm], name: str, value: int) -> None:
    network = with_middle(replaced(plain_conv(), **{name: value}))
    with pytest.raises(
        UserError, match=f"{name} of a conv stage is 2, which its feedback mirror does not carry: use 1"
    ):
        algorithm(network)


@pytest.mark.parametrize("algorithm", [LDRL, DTP])
@pytest.mark.parametrize("mirror", [HalvedConvMirror, HalvedLinearMirror])
def test_users_mirrors_take_autograd(mirror: type, algorithm: type[TargetAlgorithm]) -> None:
    network = with_middle(plain_conv() if mirror is HalvedConvMirror else LinearStage((4, 6, 6), 5, "elu"))
    theirs, reference = (feedback_after(algorithm, network, closed, mirror) for closed in (True, False))
    ours = feedback_after(algorithm, network, True)
    for found, wanted in zip(theirs, reference, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(theirs[0], ours[0], rtol=1e-6)


def test_bfloat16_of_double_weights_is_refused() -> None:
    algorithm = LDRL(with_middle(plain_conv()), speed=Speed(bfloat16=True)).double()
    with pytest.raises(UserError, match=r"speed\.bfloat16 .* torch\.float64: leave it out"):
        algorithm.train_feedback(torch.randn(2, 1, 6, 6, dtype=torch.float64))
