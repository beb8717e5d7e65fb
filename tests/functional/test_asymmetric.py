"""Layers that carry the error through another matrix than the forward weight."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bioprop.functional import asymmetric
from bioprop.functional.asymmetric import asymmetric_backward
from tests.functional.plain_layers import conv_gradients, linear_gradients
from tests.functional.substituted import with_backward_matrices

# torch's own remark on the reference: its "same" padding of an even kernel makes a copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

Padding = tuple[tuple[int, int], tuple[int, int]]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def draw_leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [draw(*shape).requires_grad_() for shape in shapes]


def assert_equals(found: Tensor | None, expected: np.ndarray | Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-11, atol=1e-11)


class Geometry(NamedTuple):
    """Arguments of a convolution of 4 channels into 6, side of its kernel, and its padding spelled out."""

    settings: dict[str, Any]
    kernel: tuple[int, int] = (3, 3)
    padding: Padding = ((0, 0), (0, 0))

    @property
    def shape(self) -> tuple[int, ...]:
        return (6, 4 // self.settings.get("groups", 1), *self.kernel)

    @property
    def plain_settings(self) -> dict[str, Any]:
        pairs = {name: self.settings.get(name, 1) for name in ("stride", "dilation")}
        pairs = {name: (value, value) if isinstance(value, int) else value for name, value in pairs.items()}
        return {**pairs, "padding": self.padding, "groups": self.settings.get("groups", 1)}


GEOMETRIES = {
    "nothing": Geometry({}),
    "stride": Geometry({"stride": 2}),
    "stride that skips the last row": Geometry({"stride": 3}, kernel=(2, 2)),
    "stride by axis": Geometry({"stride": (2, 1)}),
    "padding": Geometry({"padding": 1}, padding=((1, 1), (1, 1))),
    "padding by axis": Geometry({"padding": (2, 1)}, padding=((2, 2), (1, 1))),
    "valid": Geometry({"padding": "valid"}),
    "same, odd kernel": Geometry({"padding": "same"}, padding=((1, 1), (1, 1))),
    "same, even kernel": Geometry({"padding": "same"}, kernel=(4, 2), padding=((1, 2), (0, 1))),
    "same, dilated": Geometry({"padding": "same", "dilation": (1, 3)}, kernel=(2, 2), padding=((0, 1), (1, 2))),
    "dilation": Geometry({"dilation": 2}),
    "dilation by axis": Geometry({"dilation": (1, 3)}, kernel=(3, 2)),
    "groups": Geometry({"groups": 2}),
    "everything": Geometry(
        {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1), "groups": 2}, (3, 2), ((1, 1), (2, 2))
    ),
}
on_every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
with_and_without_bias = pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])


@with_and_without_bias
@pytest.mark.parametrize("leading", [(5,), (5, 3), (5, 3, 2)], ids=["2-D", "3-D", "4-D"])
def test_linear_gradients_are_those_by_hand(leading: tuple[int, ...], has_bias: bool) -> None:
    inputs, weight, bias = draw_leaves((*leading, 4), (6, 4), (6,))
    backward, error = draw(6, 4), draw(*leading, 6)
    output = asymmetric.linear(inputs, weight, backward, bias if has_bias else None)
    assert torch.equal(output, F.linear(inputs, weight, bias if has_bias else None))
    output.backward(error)
    expected = linear_gradients(inputs.detach().numpy(), backward.numpy(), error.numpy())
    assert_equals(inputs.grad, expected.below)
    assert_equals(weight.grad, expected.weight)
    if has_bias:
        assert_equals(bias.grad, expected.bias)
    else:
        assert bias.grad is None


@with_and_without_bias
@on_every_geometry
def test_convolution_gradients_are_those_by_hand(geometry: Geometry, has_bias: bool) -> None:
    inputs, weight, bias = draw_leaves((2, 4, 9, 8), geometry.shape, (6,))
    backward, given = draw(*geometry.shape), bias if has_bias else None
    output = asymmetric.convolution(inputs, weight, backward, given, **geometry.settings)
    assert_equals(output, F.conv2d(inputs, weight, given, **geometry.settings))
    error = draw(*output.shape)
    output.backward(error)
    expected = conv_gradients(inputs.detach().numpy(), backward.numpy(), error.numpy(), **geometry.plain_settings)
    assert_equals(inputs.grad, expected.below)
    assert_equals(weight.grad, expected.weight)
    if has_bias:
        assert_equals(bias.grad, expected.bias)
    else:
        assert bias.grad is None


@on_every_geometry
def test_convolution_gradients_are_autograds_of_two_convolutions(geometry: Geometry) -> None:
    """The input's is that of a convolution by B, the weight's that of one by W."""
    inputs, weight = draw_leaves((2, 4, 9, 8), geometry.shape)
    backward = draw(*geometry.shape)
    output = asymmetric.convolution(inputs, weight, backward, **geometry.settings)
    error = draw(*output.shape)
    below, above = torch.autograd.grad(output, [inputs, weight], error)
    (by_backward,) = torch.autograd.grad(F.conv2d(inputs, backward, **geometry.settings), inputs, error)
    (by_weight,) = torch.autograd.grad(F.conv2d(inputs, weight, **geometry.settings), weight, error)
    assert_equals(below, by_backward)
    assert_equals(above, by_weight)
    (symmetric,) = torch.autograd.grad(F.conv2d(inputs, weight, **geometry.settings), inputs, error)
    assert (below - symmetric).abs().max() > 0.1


@on_every_geometry
def test_in_float32_the_output_is_torchs_own_bit_for_bit(geometry: Geometry) -> None:
    inputs, weight, bias = draw(2, 4, 9, 8).float(), draw(*geometry.shape).float(), draw(6).float()
    output = asymmetric.convolution(inputs, weight, -weight, bias, **geometry.settings)
    assert torch.equal(output, F.conv2d(inputs, weight, bias, **geometry.settings))


@pytest.mark.parametrize(
    ("run", "inputs", "weight"),
    [(asymmetric.linear, (5, 4), (6, 4)), (asymmetric.convolution, (2, 4, 6, 6), (6, 4, 3, 3))],
    ids=["linear", "conv"],
)
def test_the_backward_matrix_gets_no_gradient(
    run: Callable[..., Tensor], inputs: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    x, W, B = draw_leaves(inputs, weight, weight)
    run(x, W, B).sum().backward()
    assert B.grad is None
    assert W.grad is not None


# -- the context -----------------------------------------------------------------------------------------------------


def test_only_listed_weights_are_replaced_and_only_inside() -> None:
    first, second, third = nn.Linear(4, 5).double(), nn.Linear(5, 6).double(), nn.Linear(6, 3).double()
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)
    images, backward = draw(7, 4).requires_grad_(), draw(6, 5)
    parameters = [images, *model.parameters()]
    symmetric = torch.autograd.grad(model(images).square().sum(), parameters)
    with asymmetric_backward({second.weight: backward}):
        found = torch.autograd.grad(model(images).square().sum(), parameters)
    twin = with_backward_matrices(model, {"2": backward})
    expected = torch.autograd.grad(twin(images).square().sum(), [images, *twin.parameters()])
    for one, other in zip(found, expected, strict=True):
        assert_equals(one, other)
    for part in (0, 1, 2):
        assert (found[part] - symmetric[part]).abs().max() > 1e-3
    for part in (3, 4, 5, 6):
        assert_equals(found[part], symmetric[part])  # the listed layer's own gradients, and those above
    again = torch.autograd.grad(model(images).square().sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(again, symmetric, strict=True))


def test_an_error_inside_leaves_the_context() -> None:
    weight, backward, inputs = draw(3, 4), draw(3, 4), draw(2, 4).requires_grad_()
    with pytest.raises(ZeroDivisionError), asymmetric_backward({weight: backward}):
        raise ZeroDivisionError
    F.linear(inputs, weight).sum().backward()
    assert_equals(inputs.grad, weight.sum(0).expand(2, 4))


def test_every_way_of_passing_arguments_is_understood() -> None:
    weight, bias = draw(6, 4, 3, 3), draw(6)
    backward = draw(6, 4, 3, 3)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.conv2d(x, weight, bias, 2, 1),
        lambda x: F.conv2d(x, weight, bias, stride=2, padding=1),
        lambda x: F.conv2d(x, weight=weight, bias=bias, stride=(2, 2), padding=(1, 1)),
        lambda x: F.conv2d(input=x, weight=weight, bias=bias, stride=[2, 2], padding=[1, 1]),
    ]
    inputs = draw(2, 4, 8, 8).requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(inputs, backward, None, 2, 1).sum(), inputs)
    for call in calls:
        with asymmetric_backward({weight: backward}):
            (found,) = torch.autograd.grad(call(inputs).sum(), inputs)
        assert_equals(found, expected)
    rows, matrix, other = draw(5, 4).requires_grad_(), draw(3, 4), draw(3, 4)
    for linear in (lambda x: F.linear(x, weight=matrix), lambda x: F.linear(input=x, weight=matrix, bias=None)):
        with asymmetric_backward({matrix: other}):
            (found,) = torch.autograd.grad(linear(rows).sum(), rows)
        assert_equals(found, other.sum(0).expand(5, 4))


class Residual(nn.Module):
    """A block that adds its input to batch norm, ReLU and max-pool of two convolutions, one grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, (3, 2), padding=(1, 1), groups=2, dilation=(1, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + F.max_pool2d(self.second(F.relu(self.norm(self.first(inputs)))), 3, 1, 1)


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding_mode="reflect", padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Residual(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return model.to(dtype)


def draw_matrices(model: nn.Module) -> dict[str, Tensor]:
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return {name: torch.randn_like(layer.weight) for name, layer in layers}


def run_asymmetrically(model: nn.Module, matrices: dict[str, Tensor], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    with asymmetric_backward({model.get_parameter(f"{name}.weight"): B for name, B in matrices.items()}):
        output = model(images)
        return output, list(torch.autograd.grad(output.square().sum(), list(model.parameters())))


def test_batch_norm_pooling_and_residual_connections_are_left_to_autograd() -> None:
    """In training mode, where batch norm's own backward pass couples the samples."""
    model, images = make_model(), draw(6, 2, 8, 8)
    matrices = draw_matrices(model)
    twin = with_backward_matrices(model, matrices)
    symmetric = torch.autograd.grad(with_backward_matrices(model, {})(images).square().sum(), []) if False else None
    assert symmetric is None
    output, found = run_asymmetrically(model, matrices, images)
    wanted = twin(images)
    expected = torch.autograd.grad(wanted.square().sum(), list(twin.parameters()))
    assert_equals(output, wanted)
    for one, other in zip(found, expected, strict=True):
        assert_equals(one, other)
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)
    assert model[1].num_batches_tracked == 1


def test_a_sign_flipped_in_any_matrix_changes_what_lies_below() -> None:
    model, images = make_model().eval(), draw(6, 2, 8, 8)
    matrices = draw_matrices(model)
    _, reference = run_asymmetrically(model, matrices, images)
    names = [name for name, _ in model.named_parameters()]
    lowest = {"3.first": "0.weight", "3.second": "3.first.weight", "6": "3.second.weight"}
    for flipped, below in lowest.items():
        _, found = run_asymmetrically(model, matrices | {flipped: -matrices[flipped]}, images)
        with pytest.raises(AssertionError):
            assert_equals(found[names.index(below)], reference[names.index(below)])


def count_flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_it_multiplies_no_more_than_backpropagation() -> None:
    """In particular no error is carried to the images, which need none."""
    model, images = make_model(), draw(6, 2, 8, 8)
    matrices = draw_matrices(model)
    spent = count_flops(lambda: run_asymmetrically(model, matrices, images))
    assert spent == count_flops(lambda: run_asymmetrically(model, {}, images))
    assert spent < count_flops(lambda: run_asymmetrically(model, matrices, images.clone().requires_grad_()))


def test_frozen_weights_cost_and_get_nothing() -> None:
    first, second = nn.Conv2d(2, 3, 3).double(), nn.Conv2d(3, 4, 3).double()
    second.requires_grad_(False)
    images, backward = draw(2, 2, 8, 8), draw(4, 3, 3, 3)

    def run() -> None:
        with asymmetric_backward({second.weight: backward}):
            second(first(images)).sum().backward()

    frozen = count_flops(run)
    assert second.weight.grad is None
    assert second.bias.grad is None
    assert_equals(first.weight.grad, _first_gradient(first, backward, images))
    second.requires_grad_(True)
    assert frozen < count_flops(run)


def _first_gradient(first: nn.Conv2d, backward: Tensor, images: Tensor) -> Tensor:
    return torch.autograd.grad(F.conv2d(first(images), backward).sum(), first.weight)[0]


# -- mixed precision, memory formats ---------------------------------------------------------------------------------


def test_under_bfloat16_autocast_gradients_are_float32_and_autograds() -> None:
    model, images = make_model(torch.float32), draw(6, 2, 8, 8).float()
    matrices = draw_matrices(model)
    twin = with_backward_matrices(model, matrices)
    with torch.autocast("cpu", torch.bfloat16):
        output, found = run_asymmetrically(model, matrices, images)
        wanted = twin(images)
        expected = torch.autograd.grad(wanted.square().sum(), list(twin.parameters()))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, wanted)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.02 * other.norm()


def test_autocast_backward_outside_of_the_autocast_region() -> None:
    """The usual way of a torch loop: the loss under autocast, ``backward`` after it."""
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    matrices = draw_matrices(layers)
    images = torch.randn(3, 2, 8, 8)
    _, expected = run_asymmetrically(layers, matrices, images)
    with (
        torch.autocast("cpu", torch.bfloat16),
        asymmetric_backward({layers.get_parameter(f"{name}.weight"): B for name, B in matrices.items()}),
    ):
        loss = layers(images).float().square().sum()
    loss.backward()
    for parameter, other in zip(layers.parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - other).norm() < 0.05 * other.norm()


def test_channels_last_gives_the_same_gradients_in_its_own_layout() -> None:
    model, images = make_model(), draw(6, 2, 8, 8)
    matrices = draw_matrices(model)
    output, expected = run_asymmetrically(model, matrices, images)
    model = model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    last, found = run_asymmetrically(model, matrices, images)
    assert_equals(last, output)
    for one, other in zip(found, expected, strict=True):
        assert_equals(one, other)
    with asymmetric_backward({model[0].weight: matrices["0"]}):
        assert model[0](images).is_contiguous(memory_format=torch.channels_last)
