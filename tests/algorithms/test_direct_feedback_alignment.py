"""Direct feedback alignment: the output error straight to every stage."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.algorithms import Backprop, DirectFeedbackAlignment
from bioprop.callbacks.alignment import alignment_to_backprop
from bioprop.networks import MLP, LeNet, Network
from bioprop.testing import AlgorithmContract
from bioprop.testing.helpers import (
    CLASSES,
    NETWORKS,
    SHAPE,
    Weights,
    changed,
    copy_state,
    draw_batch,
    make_loader,
    make_trainer,
    refused,
    small_lenet,
)
from tests.algorithms.plain_models import PLAIN, RESNETS
from tests.functional.plain_layers import Array, conv_gradients, linear_gradients

EVERY = {**NETWORKS, **RESNETS}
on_every_chain = pytest.mark.parametrize("build", EVERY.values(), ids=EVERY)


class TestDirectFeedbackAlignment(AlgorithmContract):
    """On one batch it takes more and smaller steps than the suite of all, since the first go to aligning."""

    one_batch_epochs = 90
    one_batch_settings: ClassVar = {"optimizer": partial(torch.optim.Adam, lr=0.002)}

    def make(self, network: Network, **settings: Any) -> DirectFeedbackAlignment:
        return DirectFeedbackAlignment(network, **settings)


def double_batch() -> tuple[Tensor, Tensor]:
    images, labels = draw_batch()
    return images.double(), labels


def output_error(logits: Array, labels: Tensor) -> Array:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True) - np.eye(logits.shape[1])[labels.numpy()]) / len(logits)


# -- by hand ---------------------------------------------------------------------------------------------------------


def mlp_by_hand(parameters: list[Array], B: list[Array], images: Tensor, labels: Tensor) -> list[Array]:
    W1, b1, W2, b2, W3, b3 = parameters
    x = images.flatten(1).numpy()
    h1 = np.tanh(x @ W1.T + b1)
    h2 = np.tanh(h1 @ W2.T + b2)
    error = output_error(h2 @ W3.T + b3, labels)
    layers = [
        linear_gradients(x, W1, (error @ B[0]) * (1 - h1**2)),
        linear_gradients(h1, W2, (error @ B[1]) * (1 - h2**2)),
        linear_gradients(h2, W3, error),
    ]
    return [part for layer in layers for part in (layer.weight, layer.bias)]


def strided_by_hand(parameters: list[Array], B: list[Array], images: Tensor, labels: Tensor) -> list[Array]:
    """Strided conv + tanh, conv + leaky ReLU + max-pool 2, linear; the pool sends an error to the largest of four."""
    W1, b1, W2, b2, W3, b3 = (torch.from_numpy(value) for value in parameters)
    h1 = torch.tanh(F.conv2d(images, W1, b1, 2, 1))
    maps = F.conv2d(h1, W2, b2, 1, 1)
    rho = torch.where(maps > 0, maps, 0.01 * maps).numpy()
    tiles = rho.reshape(*rho.shape[:2], 4, 2, 4, 2)
    pooled = tiles.max((3, 5))
    error = output_error(pooled.reshape(len(pooled), -1) @ W3.numpy().T + b3.numpy(), labels)
    largest = tiles == pooled[:, :, :, None, :, None]
    spread = (largest * (error @ B[1]).reshape(pooled.shape)[:, :, :, None, :, None]).reshape(rho.shape)
    slope = np.where(maps.numpy() > 0, 1.0, 0.01)
    first = (error @ B[0]).reshape(h1.shape) * (1 - h1.numpy() ** 2)
    layers = [
        conv_gradients(images.numpy(), W1.numpy(), first, (2, 2), ((1, 1), (1, 1))),
        conv_gradients(h1.numpy(), W2.numpy(), spread * slope, (1, 1), ((1, 1), (1, 1))),
        linear_gradients(pooled.reshape(len(pooled), -1), W3.numpy(), error),
    ]
    return [part for layer in layers for part in (layer.weight, layer.bias)]


Case = tuple[Callable[[], Network], Callable[..., list[Array]]]
CASES: dict[str, Case] = {
    "linear": (lambda: MLP(SHAPE, CLASSES, hidden=(12, 9), activation="tanh"), mlp_by_hand),
    "conv": (NETWORKS["strided"], strided_by_hand),
}
by_hand = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def assert_gradients_by_hand(
    algorithm: DirectFeedbackAlignment, matrices: list[Array], compute: Callable[..., list[Array]]
) -> None:
    parameters = {name: value.detach().numpy() for name, value in algorithm.network.named_parameters()}
    expected = compute(list(parameters.values()), matrices, *double_batch())
    found = algorithm.forward_gradients(*double_batch())
    for name, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], torch.from_numpy(value), rtol=1e-10, atol=1e-12)


@by_hand
def test_gradients_are_those_by_hand_before_and_after_training(case: Case, tmp_path: Path) -> None:
    build, compute = case
    algorithm = DirectFeedbackAlignment(build()).double()
    matrices = [matrix.detach().clone().numpy() for matrix in algorithm.backward_weights.values()]
    assert_gradients_by_hand(algorithm, matrices, compute)
    make_trainer(tmp_path, max_epochs=1, precision="64-true").fit(algorithm, make_loader())
    assert_gradients_by_hand(algorithm, matrices, compute)


@by_hand
@pytest.mark.parametrize("flipped", [0, 1])
def test_a_sign_flipped_in_any_matrix_is_noticed(flipped: int, case: Case) -> None:
    build, compute = case
    algorithm = DirectFeedbackAlignment(build()).double()
    matrices = [matrix.detach().clone().numpy() for matrix in algorithm.backward_weights.values()]
    assert len(matrices) == 2
    list(algorithm.backward_weights.values())[flipped].neg_()
    with pytest.raises(AssertionError):
        assert_gradients_by_hand(algorithm, matrices, compute)


@on_every_chain
def test_a_stages_gradient_is_that_of_its_own_output_against_the_projected_error(
    build: Callable[[], Network],
) -> None:
    """Stage by stage in plain autograd, batch norm's coupling of the samples within the stage included."""
    algorithm = DirectFeedbackAlignment(build()).double()
    images, labels = double_batch()
    found = algorithm.forward_gradients(images, labels)
    error = torch.from_numpy(output_error(algorithm.network(images).detach().numpy(), labels))
    state = images
    for name, stage in algorithm.network.stages():
        output = stage(state)
        B = algorithm.backward_weights[name] if name in algorithm.backward_weights else torch.eye(CLASSES).double()
        gradients = torch.autograd.grad((output.flatten(1) * (error @ B)).sum(), list(stage.parameters()))
        for (parameter, _), expected in zip(stage.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(found[f"{name}.{parameter}"], expected, rtol=1e-10, atol=1e-12)
        state = output.detach()


@on_every_chain
def test_the_last_stage_gets_backpropagations_gradient(build: Callable[[], Network]) -> None:
    algorithm = DirectFeedbackAlignment(build()).double()
    found = algorithm.forward_gradients(*double_batch())
    expected = Backprop(algorithm.network).forward_gradients(*double_batch())
    last = algorithm.network.stages()[-1][0]
    names = [name for name in expected if name.startswith(f"{last}.")]
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-14)
    assert all((found[name] - expected[name]).norm() > 0.01 * expected[name].norm() for name in expected.keys() - names)


def test_the_network_of_one_stage_is_backpropagation() -> None:
    algorithm = DirectFeedbackAlignment(NETWORKS["mlp of one stage"]())
    assert len(algorithm.backward_weights) == 0
    aligned = alignment_to_backprop(algorithm.double(), *double_batch())
    assert float(aligned["overall"].angle) < 1e-6


# -- no error between stages -----------------------------------------------------------------------------------------


def reached_parameters(tensor: Tensor) -> set[int]:
    """Ids of the leaves that the graph behind a tensor leads to."""
    seen, leaves, open_nodes = set(), set(), [tensor.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        open_nodes.extend(above for above, _ in node.next_functions)
    return leaves


@on_every_chain
def test_no_gradient_flows_between_stages(build: Callable[[], Network], tmp_path: Path) -> None:
    """The input of each stage has no graph, and its output's leads to the stage's own parameters alone."""
    algorithm, seen = DirectFeedbackAlignment(build()), []

    def look(stage: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        own = {id(parameter) for parameter in stage.parameters()}
        seen.append((inputs[0].requires_grad, inputs[0].grad_fn, reached_parameters(output) == own))

    for _, stage in algorithm.network.stages():
        stage.register_forward_hook(look)
    make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader(1))
    assert seen == [(False, None, True)] * len(algorithm.network.stages())


def test_in_backpropagation_gradients_do_flow_between_stages() -> None:
    """What the test above looks at tells the two apart."""
    network = small_lenet()
    assert reached_parameters(network(draw_batch()[0])) == {id(parameter) for parameter in network.parameters()}


def test_hidden_gradients_take_no_part_of_the_weights_above() -> None:
    """Weights above change the output error only: with that held, hidden gradients stay as they are."""
    network = MLP(SHAPE, CLASSES, hidden=(12, 9, 10), activation="tanh")
    with torch.no_grad():
        network[-1].linear.weight.zero_()  # the logits are the bias, whatever lies below
    algorithm = DirectFeedbackAlignment(network)
    before = algorithm.forward_gradients(*draw_batch())
    with torch.no_grad():
        network[2].linear.weight.neg_()
    after = algorithm.forward_gradients(*draw_batch())
    assert changed(before, after) <= {"fc3.linear.weight", "fc3.linear.bias", "fc4.linear.weight"}
    assert before["fc1.linear.weight"].abs().max() > 0
    assert "fc4.linear.weight" in changed(before, after)


# -- the matrices ----------------------------------------------------------------------------------------------------


def test_every_hidden_stage_has_a_dense_matrix_from_the_classes_to_its_units() -> None:
    algorithm = DirectFeedbackAlignment(LeNet((3, 32, 32), 10))
    shapes = {name: tuple(matrix.shape) for name, matrix in algorithm.backward_weights.items()}
    assert shapes == {"conv1": (10, 32 * 16 * 16), "conv2": (10, 64 * 8 * 8), "fc1": (10, 512)}
    for matrix in algorithm.backward_weights.values():
        assert float(matrix.square().sum(1).mean()) == pytest.approx(1.0, abs=0.1)  # e B is as long as e
        assert abs(float(matrix.mean())) < 4 / matrix.shape[1] ** 0.5 / matrix.numel() ** 0.5


def test_matrices_stay_as_drawn_are_saved_and_move(tmp_path: Path) -> None:
    algorithm = DirectFeedbackAlignment(small_lenet())
    before = copy_state(algorithm.backward_weights)
    make_trainer(tmp_path, max_epochs=2).fit(algorithm, make_loader())
    assert changed(before, copy_state(algorithm.backward_weights)) == set()
    assert {f"backward_weights.{name}" for name in ("conv1", "conv2", "fc1")} <= set(algorithm.state_dict())
    moved = algorithm.to(device="meta", dtype=torch.float64)
    assert all(value.device.type == "meta" for value in moved.backward_weights.values())
    assert all(value.dtype == torch.float64 for value in moved.backward_weights.values())
    assert not any(value.requires_grad for value in moved.backward_weights.values())


def test_frozen_stages_are_left_alone() -> None:
    network = small_lenet()
    algorithm = DirectFeedbackAlignment(network)
    whole = algorithm.forward_gradients(*draw_batch())
    network[1].requires_grad_(False)
    network[2].linear.bias.requires_grad_(False)
    part = algorithm.forward_gradients(*draw_batch())
    assert whole.keys() - part.keys() == {"conv2.conv.weight", "conv2.conv.bias", "fc1.linear.bias"}
    assert all(torch.equal(value, whole[name]) for name, value in part.items())


def test_a_model_that_is_no_chain_is_refused() -> None:
    with refused("direct feedback alignment sends errors to stages, and ResidualModel has none", "Network"):
        DirectFeedbackAlignment(PLAIN["plain residual"]())


# -- precision, layout -----------------------------------------------------------------------------------------------


def test_bf16_mixed_gradients_are_float32_and_close() -> None:
    algorithm = DirectFeedbackAlignment(MLP(SHAPE, CLASSES, hidden=(12, 9), activation="tanh"))
    expected = algorithm.forward_gradients(*draw_batch())
    with torch.autocast("cpu", torch.bfloat16):
        found = algorithm.forward_gradients(*draw_batch())
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() < 0.03 * value.norm()


def seeded_run(folder: Path, **trainer: Any) -> Weights:
    torch.manual_seed(3)
    algorithm = DirectFeedbackAlignment(RESNETS["resnet"]()).to(memory_format=torch.channels_last)
    make_trainer(folder, max_epochs=2, **trainer).fit(algorithm, make_loader(2))
    return copy_state(algorithm)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_second_run_of_the_seed_is_bit_identical_in_channels_last(precision: str, tmp_path: Path) -> None:
    first, second = (seeded_run(tmp_path, precision=precision) for _ in range(2))
    assert changed(first, second) == set()
    assert all(value.isfinite().all() for value in first.values())


def test_channels_last_gives_the_same_gradients() -> None:
    algorithm = DirectFeedbackAlignment(RESNETS["resnet"]()).double()
    images, labels = double_batch()
    expected = algorithm.forward_gradients(images, labels)
    algorithm = algorithm.to(memory_format=torch.channels_last)
    found = algorithm.forward_gradients(images.to(memory_format=torch.channels_last), labels)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
