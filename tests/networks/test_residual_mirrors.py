"""The feedback operators of residual stages: transposed Jacobians, and what each form computes."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from bioprop.errors import UserError
from bioprop.networks import BasicBlockStage, Mirror, PooledLinearStage, Stage, StageOutput, StemStage, build_mirror
from bioprop.networks.resnet import BlockPass

Build = Callable[[str, bool], Stage]
BLOCKS: dict[str, Build] = {
    "identity": lambda activation, norm: BasicBlockStage((2, 4, 3), 2, 1, activation, norm),
    "wider": lambda activation, norm: BasicBlockStage((2, 4, 3), 3, 1, activation, norm),
    "stride 2": lambda activation, norm: BasicBlockStage((2, 5, 4), 3, 2, activation, norm),
    "stride 2, as wide": lambda activation, norm: BasicBlockStage((2, 4, 4), 2, 2, activation, norm),
}
OTHERS: dict[str, Build] = {
    "stem": lambda activation, norm: StemStage((2, 4, 3), 3, activation, norm),
    "pooled output": lambda activation, norm: PooledLinearStage((3, 4, 3), 5),
}
STAGES = BLOCKS | OTHERS
NORMS = {"no norm": (False, True), "norm in training": (True, True), "norm in evaluation": (True, False)}
all_blocks = pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS)
all_stages = pytest.mark.parametrize("build", STAGES.values(), ids=STAGES)
all_norms = pytest.mark.parametrize(("batch_norm", "training"), NORMS.values(), ids=NORMS)


class Pair(NamedTuple):
    """A stage and its mirror with the same weights, in float64, and a batch with the stage's pass of it."""

    stage: Stage
    mirror: Mirror
    inputs: Tensor
    clean: StageOutput


def make_pair(
    build: Build, activation: str = "elu", batch_norm: bool = False, training: bool = True, form: str = "exact"
) -> Pair:
    stage = build(activation, batch_norm).double()
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.3, 3.0)
    mirror = build_mirror(stage, form)
    inputs = torch.randn(3, *stage.input_shape, dtype=torch.float64)
    stage.train(training)
    with torch.no_grad():
        for forward, feedback in mirror.pairs(stage):
            feedback.copy_(forward)
        clean = stage.run(inputs)
    return Pair(stage, mirror, inputs, clean)


def jacobians(pair: Pair, feedback: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """``J_G`` and ``J_F`` of the whole batch, as matrices."""
    back = jacobian(feedback, pair.clean.output).reshape(pair.inputs.numel(), pair.clean.output.numel())
    forth = jacobian(pair.stage, pair.inputs).reshape(pair.clean.output.numel(), pair.inputs.numel())
    return back, forth


def assert_transposed_jacobians(pair: Pair, feedback: Callable[[Tensor], Tensor] | None = None) -> None:
    back, forth = jacobians(pair, feedback or (lambda y: pair.mirror(y, pair.clean.switches)))
    assert forth.abs().max() > 1e-2
    torch.testing.assert_close(back, forth.t(), rtol=1e-9, atol=1e-11)


@all_stages
@all_norms
@pytest.mark.parametrize("activation", ["elu", "tanh", "relu", "leaky_relu"])
def test_the_exact_mirror_with_copied_weights_is_the_transposed_jacobian(
    build: Build, batch_norm: bool, training: bool, activation: str
) -> None:
    assert_transposed_jacobians(make_pair(build, activation, batch_norm, training))


@all_blocks
@all_norms
def test_samples_are_apart_but_for_batch_norm_in_training(build: Build, batch_norm: bool, training: bool) -> None:
    pair = make_pair(build, "elu", batch_norm, training)
    for matrix in jacobians(pair, lambda y: pair.mirror(y, pair.clean.switches)):
        between = matrix.view(3, matrix.shape[0] // 3, 3, -1)[0, :, 1].abs().max()
        assert (between > 1e-6) == (batch_norm and training)


def without_shortcut(pair: Pair, y: Tensor) -> Tensor:
    if pair.mirror.shortcut_weight is None:
        return pair.mirror(y, pair.clean.switches) - pair.mirror.activation.phi(y)
    with torch.no_grad():
        pair.mirror.shortcut_weight.zero_()
    return pair.mirror(y, pair.clean.switches)


def with_values(**other: Callable[[BlockPass], object]) -> Callable[[Pair, Tensor], Tensor]:
    def feedback(pair: Pair, y: Tensor) -> Tensor:
        values = pair.clean.switches
        return pair.mirror(y, values._replace(**{name: make(values) for name, make in other.items()}))

    return feedback


def without_phi(pair: Pair, y: Tensor) -> Tensor:
    pair.mirror.activation = pair.mirror.activation._replace(phi=lambda values: values)
    return pair.mirror(y, pair.clean.switches)


MUTATIONS: dict[str, Callable[[Pair, Tensor], Tensor]] = {
    "shortcut dropped": without_shortcut,
    "inner slope forgotten": with_values(slope=lambda values: torch.ones_like(values.slope)),
    "sign flipped": lambda pair, y: -pair.mirror(y, pair.clean.switches),
    "outer activation dropped": without_phi,
}
NORM_MUTATIONS = {
    "first norm forgotten": with_values(norm1=lambda values: None),
    "second norm forgotten": with_values(norm2=lambda values: None),
    "norms in each other's places": with_values(norm1=lambda values: values.norm2, norm2=lambda values: values.norm1),
}
STATISTICS_HELD = with_values(norm1=lambda values: values.norm1._replace(normalized=None))


@all_blocks
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_mutated_mirror_is_noticed(build: Build, mutation: Callable[[Pair, Tensor], Tensor]) -> None:
    pair = make_pair(build)
    with pytest.raises(AssertionError):
        assert_transposed_jacobians(pair, lambda y: mutation(pair, y))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mutation", NORM_MUTATIONS.values(), ids=NORM_MUTATIONS)
def test_a_mutated_batch_norm_is_noticed(mutation: Callable[[Pair, Tensor], Tensor], training: bool) -> None:
    pair = make_pair(BLOCKS["stride 2"], "elu", batch_norm=True, training=training)
    with pytest.raises(AssertionError):
        assert_transposed_jacobians(pair, lambda y: mutation(pair, y))


def test_held_statistics_are_another_map_in_training_and_the_same_in_evaluation() -> None:
    training, evaluation = (make_pair(BLOCKS["stride 2"], "elu", True, mode) for mode in (True, False))
    with pytest.raises(AssertionError):
        assert_transposed_jacobians(training, lambda y: STATISTICS_HELD(training, y))
    assert_transposed_jacobians(evaluation, lambda y: STATISTICS_HELD(evaluation, y))


@all_blocks
def test_the_papers_mirror_is_not_the_transposed_jacobian(build: Build) -> None:
    with pytest.raises(AssertionError):
        assert_transposed_jacobians(make_pair(build, form="paper"))


@pytest.mark.parametrize("name", ["identity", "stride 2"])
def test_the_papers_mirror_follows_the_residual_path_back(name: str) -> None:
    """Activation, then transposed convolutions in reverse order around an activation, plus transposed shortcut."""
    pair = make_pair(BLOCKS[name], form="paper")
    block, mirror, output = pair.stage, pair.mirror, pair.clean.output
    size = {"identity": 0, "stride 2": (0, 1)}[name]
    features = F.elu(output)
    inner = F.elu(F.conv_transpose2d(features, block.conv2.weight, padding=1))
    expected = F.conv_transpose2d(inner, block.conv1.weight, mirror.bias, block.conv1.stride, 1, size)
    if name == "stride 2":
        expected = expected + F.conv_transpose2d(features, block.shortcut[0].weight, None, 2, 0, size)
    else:
        expected = expected + features
    torch.testing.assert_close(mirror(output, pair.clean.switches), expected, rtol=1e-12, atol=1e-12)


@all_stages
@pytest.mark.parametrize("form", ["paper", "exact"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_difference_is_the_difference_of_two_feedback_passes(build: Build, form: str, batch_norm: bool) -> None:
    _, mirror, _, (output, switches) = make_pair(build, "elu", batch_norm, form=form)
    step = torch.randn_like(output)
    expected = mirror(output + step, switches) - mirror(output, switches)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(mirror.difference(output, step, switches), expected, rtol=1e-10, atol=1e-12)


@all_stages
def test_feedback_weights_are_registered_and_drawn_on_their_own(build: Build) -> None:
    torch.manual_seed(0)
    stage = build("elu", True)
    mirror = build_mirror(stage, "exact")
    names = [name for name, _ in mirror.named_parameters()]
    assert list(mirror.state_dict()) == names
    assert set(mirror.difference_parameters()) == set(names) - {"bias"}
    pairs = mirror.pairs(stage)
    assert [id(feedback) for _, feedback in pairs] == [id(value) for value in mirror.difference_parameters().values()]
    for forward, feedback in pairs:
        bound = forward[0].numel() ** -0.5
        assert feedback.shape == forward.shape
        assert (feedback - forward).abs().min() > 0
        assert 0 < feedback.abs().max() <= bound


def test_every_weight_of_a_block_but_norms_has_a_counterpart() -> None:
    for name, count in (("identity", 2), ("stride 2", 3)):
        pair = make_pair(BLOCKS[name], batch_norm=True)
        found = {id(forward) for forward, _ in pair.mirror.pairs(pair.stage)}
        assert found == {id(module.weight) for module in pair.stage.modules() if isinstance(module, nn.Conv2d)}
        assert len(found) == count


@all_stages
def test_an_unknown_form_is_refused(build: Build) -> None:
    with pytest.raises(UserError, match="'mine' is not known: choose one of paper, exact"):
        build_mirror(build("elu", True), "mine")


@all_stages
@pytest.mark.parametrize("training", [True, False])
def test_a_pass_computes_what_the_plain_module_does_and_hands_out_values_without_a_graph(
    build: Build, training: bool
) -> None:
    stage, _, inputs, clean = make_pair(build, "elu", batch_norm=True, training=training)
    assert torch.equal(clean.output, stage(inputs))
    recorded = stage.run(inputs)
    assert recorded.output.requires_grad
    for value in recorded.switches or ():
        for tensor in value if isinstance(value, tuple) else (value,):
            assert tensor is None or not tensor.requires_grad


def test_a_pass_moves_statistics_as_the_plain_module_does() -> None:
    passes, calls = (make_pair(BLOCKS["stride 2"], batch_norm=True).stage for _ in range(2))
    calls.load_state_dict(passes.state_dict())
    inputs = torch.randn(3, *passes.input_shape, dtype=torch.float64)
    passes.run(inputs)
    calls(inputs)
    for (name, found), expected in zip(passes.named_buffers(), calls.buffers(), strict=True):
        assert torch.equal(found, expected), name
