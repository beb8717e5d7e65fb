"""The feedback operators of the stages."""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.errors import UserError
from bioprop.functional.pooling import Pool, unpool_adding
from bioprop.networks import ConvStage, LinearStage, Mirror, Stage, StageOutput, build_mirror
from bioprop.networks.mirrors import ConvMirror

# torch's own forward-mode differentiation compiles its rules in a way that it deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

FORMS = ["paper", "exact"]
OVERLAPPING, DISJOINT = Pool(3, 2, 1), Pool(2, 2)
Build = Callable[[str], Stage]
STAGES: dict[str, Build] = {
    "conv 3x3": lambda activation: ConvStage((2, 8, 8), 3, 3, padding=1, activation=activation),
    "conv 5x5, odd map": lambda activation: ConvStage((2, 9, 7), 3, 5, padding=2, activation=activation),
    "conv 3x3, unpadded": lambda activation: ConvStage((2, 8, 7), 3, 3, activation=activation),
    "conv 3x3, stride 2": lambda activation: ConvStage((2, 8, 8), 3, 3, 2, 1, activation),
    "conv 5x5, stride 2, odd map": lambda activation: ConvStage((2, 11, 9), 3, 5, 2, 2, activation),
    "conv 3x3, stride 3, unread border": lambda activation: ConvStage((2, 11, 10), 3, 3, 3, 0, activation),
    "conv, disjoint pool": lambda activation: ConvStage((2, 8, 8), 3, 3, 1, 1, activation, DISJOINT),
    "conv, disjoint pool, odd map": lambda activation: ConvStage((2, 9, 7), 3, 3, 1, 1, activation, DISJOINT),
    "conv, overlapping pool": lambda activation: ConvStage((2, 8, 8), 3, 5, 1, 2, activation, OVERLAPPING),
    "conv, overlapping pool, odd map": lambda activation: ConvStage((2, 9, 7), 3, 5, 1, 2, activation, OVERLAPPING),
    "conv, stride 2, overlapping pool": lambda activation: ConvStage((2, 15, 14), 3, 3, 2, 1, activation, OVERLAPPING),
    "conv without bias": lambda activation: ConvStage((2, 8, 8), 3, 3, 1, 1, activation, DISJOINT, bias=False),
    "linear": lambda activation: LinearStage((6,), 4, activation),
    "linear after conv": lambda activation: LinearStage((2, 3, 4), 5, activation),
    "linear without bias": lambda activation: LinearStage((2, 3, 4), 5, activation, bias=False),
}
all_stages = pytest.mark.parametrize("build", STAGES.values(), ids=STAGES)


class Pair(NamedTuple):
    """A stage and its mirror in float64, and a batch with the stage's outputs for it."""

    stage: Stage
    mirror: Mirror
    inputs: Tensor
    clean: StageOutput


def make_pair(build: Build, form: str, activation: str = "elu", symmetric: bool = False) -> Pair:
    stage = build(activation).double()
    mirror = build_mirror(stage, form).double()
    inputs = torch.randn(3, *stage.input_shape, dtype=torch.float64)
    with torch.no_grad():
        if symmetric:
            mirror.weight.copy_(stage.weight)
        clean = stage.run(inputs)
    return Pair(stage, mirror, inputs, clean)


def assert_transposed_jacobians(pair: Pair, feedback: Callable[[Tensor], Tensor]) -> None:
    """``<J_F u, v> = <u, J_G v>`` for random ``u`` and ``v``: the Jacobian Matching Condition.

    Forward mode for both: the backward of torch's max_unpool2d is not its transpose where windows overlap.
    """
    for _ in range(3):
        u, v = torch.randn_like(pair.inputs), torch.randn_like(pair.clean.output)
        _, forward_change = torch.func.jvp(pair.stage, (pair.inputs,), (u,))
        _, feedback_change = torch.func.jvp(feedback, (pair.clean.output,), (v,))
        torch.testing.assert_close((forward_change * v).sum(), (u * feedback_change).sum(), rtol=1e-10, atol=1e-11)


@all_stages
@pytest.mark.parametrize("form", FORMS)
def test_feedback_has_the_shape_of_the_input(build: Build, form: str) -> None:
    stage, mirror, inputs, clean = make_pair(build, form)
    assert mirror(clean.output, clean.switches).shape == inputs.shape
    assert mirror.difference(clean.output, torch.ones_like(clean.output), clean.switches).shape == inputs.shape
    assert mirror.weight.shape == stage.weight.shape
    assert (mirror.bias is None) == (stage.bias is None)


@all_stages
@pytest.mark.parametrize("activation", ["elu", "tanh", "leaky_relu", "relu", "identity"])
def test_the_exact_mirror_with_copied_weights_is_the_transposed_jacobian(build: Build, activation: str) -> None:
    pair = make_pair(build, "exact", activation, symmetric=True)
    if activation == "relu":  # a dead unit sits on the kink, where the property holds from one side only
        pair.clean.output.add_((pair.clean.output == 0) * -1e-3)
    assert_transposed_jacobians(pair, lambda y: pair.mirror(y, pair.clean.switches))


@pytest.mark.parametrize(
    ("name", "activation"), [("conv, overlapping pool", "identity"), ("conv 3x3", "elu"), ("linear", "tanh")]
)
def test_the_papers_mirror_is_not_the_transposed_jacobian(name: str, activation: str) -> None:
    pair = make_pair(STAGES[name], "paper", activation, symmetric=True)
    with pytest.raises(AssertionError):
        assert_transposed_jacobians(pair, lambda y: pair.mirror(y, pair.clean.switches))


@pytest.mark.parametrize("name", ["conv, disjoint pool", "conv, disjoint pool, odd map", "linear", "conv 3x3"])
def test_both_mirrors_agree_without_overlap_and_curvature(name: str) -> None:
    """With leaky ReLU, its own ``phi``, and windows apart there is nothing left in which the two forms differ."""
    pair = make_pair(STAGES[name], "paper", "leaky_relu", symmetric=True)
    assert_transposed_jacobians(pair, lambda y: pair.mirror(y, pair.clean.switches))


@pytest.mark.parametrize("name", ["conv, disjoint pool", "linear after conv"])
@pytest.mark.parametrize("mutation", ["sign flipped", "random weights", "activation dropped"])
def test_a_mutated_mirror_is_noticed(name: str, mutation: str) -> None:
    pair = make_pair(STAGES[name], "exact", symmetric=mutation != "random weights")
    mirror, switches = pair.mirror, pair.clean.switches
    if mutation == "activation dropped":
        mirror.activation = mirror.activation._replace(phi=lambda y: y)
    sign = -1.0 if mutation == "sign flipped" else 1.0
    with pytest.raises(AssertionError):
        assert_transposed_jacobians(pair, lambda y: sign * mirror(y, switches))


@all_stages
@pytest.mark.parametrize("form", FORMS)
def test_difference_is_the_difference_of_two_feedback_passes(build: Build, form: str) -> None:
    _, mirror, _, (output, switches) = make_pair(build, form)
    step = torch.randn_like(output)
    expected = mirror(output + step, switches) - mirror(output, switches)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(mirror.difference(output, step, switches), expected, rtol=1e-10, atol=1e-13)


class SquaringMirror(ConvMirror):
    """A user's mirror with features of its own."""

    def features(self, outputs: Tensor, switches: Tensor | None) -> Tensor:
        return super().features(outputs, switches).square()


def test_a_mirror_with_features_of_its_own_has_their_difference() -> None:
    _, mirror, _, (output, switches) = make_pair(STAGES["conv, overlapping pool"], "exact")
    mirror.__class__ = SquaringMirror
    step = torch.randn_like(output)
    expected = mirror(output + step, switches) - mirror(output, switches)
    torch.testing.assert_close(mirror.difference(output, step, switches), expected, rtol=1e-10, atol=1e-13)


def test_the_papers_mirror_is_unpool_then_activation_then_transposed_convolution() -> None:
    _, mirror, inputs, (output, switches) = make_pair(STAGES["conv, overlapping pool"], "paper")
    maps = torch.zeros_like(inputs[:, :1]).expand(-1, 3, -1, -1).flatten(2).clone()
    for window in product(*map(range, output.shape)):  # in order, so that the last of the overlapping windows stays
        maps[window[0], window[1], switches[window]] = output[window]
    maps = maps.unflatten(2, inputs.shape[2:])
    expected = F.conv_transpose2d(F.elu(maps), mirror.weight, mirror.bias, padding=2)
    torch.testing.assert_close(mirror(output, switches), expected, rtol=1e-12, atol=1e-12)


def test_the_exact_mirror_is_activation_then_transposed_pool_then_transposed_convolution() -> None:
    _, mirror, inputs, (output, switches) = make_pair(STAGES["conv, overlapping pool"], "exact")
    phi = torch.where(output > 0, output, output + output**2 / 2)
    maps = unpool_adding(phi, switches, Pool(3, 2, 1), tuple(inputs.shape[2:]))
    expected = F.conv_transpose2d(maps, mirror.weight, mirror.bias, padding=2)
    torch.testing.assert_close(mirror(output, switches), expected, rtol=1e-12, atol=1e-12)


@all_stages
def test_feedback_weights_are_registered_and_drawn_on_their_own(build: Build) -> None:
    stage, mirror, *_ = make_pair(build, "exact")
    names = ["weight"] if stage.bias is None else ["weight", "bias"]
    assert list(mirror.state_dict()) == [name for name, _ in mirror.named_parameters()] == names
    assert all(parameter.abs().max() > 0 for parameter in mirror.parameters())
    assert (mirror.weight - stage.weight).abs().min() > 0


@pytest.mark.parametrize(
    ("name", "form", "fan_in"),
    [("conv 3x3", "paper", 18), ("conv 3x3", "exact", 18), ("linear", "paper", 4), ("linear", "exact", 6)],
)
def test_feedback_weights_start_uniform_by_their_fan_in(name: str, form: str, fan_in: int) -> None:
    """``paper`` counts inputs as torch's own transposed layers do, ``exact`` as the forward weight does."""
    bound = fan_in**-0.5
    draws = torch.cat([build_mirror(STAGES[name]("elu"), form).weight.detach().flatten() for _ in range(100)])
    assert 0.97 * bound < draws.abs().max() < bound
    assert draws.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_pooled_stages_mirror_insists_on_switches() -> None:
    _, mirror, _, clean = make_pair(STAGES["conv, disjoint pool"], "exact")
    with pytest.raises(ValueError, match="switches"):
        mirror(clean.output, None)


def test_a_kind_of_stage_without_mirror_is_refused_with_the_kinds_that_have_one() -> None:
    class Recurrent(Stage):
        weight = bias = None

        def run(self, inputs: Tensor) -> StageOutput:
            return StageOutput(inputs, None)

    with pytest.raises(UserError, match=r"Recurrent has no feedback mirror.*ConvStage.*LinearStage"):
        build_mirror(Recurrent(), "exact")


@pytest.mark.parametrize("name", ["conv 3x3", "linear"])
def test_an_unknown_form_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="'mine' is not known: choose one of paper, exact"):
        build_mirror(STAGES[name]("elu"), "mine")
