"""Products of layers in bfloat16: what is rounded, what is not, and that no copy of a weight goes stale."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.asymmetric import asymmetric_backward
from bioprop.functional.backward_matrices import mirror_estimate
from bioprop.functional.precision import (
    bfloat16_products,
    float32_products,
    products,
    products_of_autocast,
)

Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]
CASES: dict[str, tuple[Layer, tuple[int, ...], tuple[int, ...], int]] = {
    "linear": (F.linear, (5, 40), (7, 40), 7),
    "linear, many dimensions": (F.linear, (2, 5, 40), (7, 40), 7),
    "conv1d": (F.conv1d, (4, 6, 20), (7, 6, 3), 7),
    "conv2d": (F.conv2d, (4, 6, 9, 9), (7, 6, 3, 3), 7),
    "strided": (lambda x, W, b: F.conv2d(x, W, b, 2, padding=1), (4, 6, 9, 9), (7, 6, 3, 3), 7),
    "by keyword": (lambda x, W, b: F.conv2d(x, weight=W, bias=b, stride=2), (4, 6, 9, 9), (7, 6, 3, 3), 7),
    "one image": (F.conv2d, (6, 9, 9), (7, 6, 3, 3), 7),
    "conv3d": (F.conv3d, (2, 3, 5, 5, 5), (4, 3, 3, 3, 3), 4),
    "transposed": (lambda x, W, b: F.conv_transpose2d(x, W, b, 2, 1, 1), (4, 7, 5, 5), (7, 6, 3, 3), 6),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Layer, Tensor, Tensor, Tensor]:
    layer, inputs, weight, units = request.param
    return layer, torch.randn(inputs), torch.randn(weight), torch.randn(units)


def rounded(values: Tensor) -> Tensor:
    return values.bfloat16().double()


@pytest.mark.parametrize("with_bias", [True, False])
def test_operands_and_results_are_rounded_and_the_bias_is_not(
    case: tuple[Layer, Tensor, Tensor, Tensor], with_bias: bool
) -> None:
    layer, x, W, b = case
    with bfloat16_products():
        found = layer(x, W, b if with_bias else None)
    zero = torch.zeros_like(b)
    exact = layer(rounded(x), rounded(W), zero.double())
    bias = (layer(x, W, b) - layer(x, W, zero)) if with_bias else 0.0  # as torch lays it over the result
    assert found.dtype == torch.float32
    error = (found.double() - bias - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 1e-5).all()
    assert error.max() > 1e-5  # or nothing was rounded
    product = found - bias
    torch.testing.assert_close(product, product.bfloat16().float(), rtol=0, atol=2e-6 if with_bias else 0)


def test_a_bias_that_bfloat16_would_swallow_is_added() -> None:
    with bfloat16_products():
        found = F.linear(torch.tensor([[256.0]]), torch.tensor([[1.0]]), torch.tensor([0.25]))
    assert found.item() == 256.25


def test_gradients_are_float32_and_close(case: tuple[Layer, Tensor, Tensor, Tensor]) -> None:
    layer, *values = case
    leaves = [value.requires_grad_() for value in values]
    error = torch.randn_like(layer(*leaves))
    exact = torch.autograd.grad(layer(*leaves), leaves, error)
    with bfloat16_products():
        found = torch.autograd.grad(layer(*leaves), leaves, error)
    for one, other in zip(found[:2], exact[:2], strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).norm() < 0.01 * other.norm()
    torch.testing.assert_close(found[2], exact[2])  # summed over the batch in float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_alone(dtype: torch.dtype) -> None:
    x, W, b = torch.randn(5, 40, dtype=dtype), torch.randn(7, 40, dtype=dtype), torch.randn(7, dtype=dtype)
    expected = F.linear(x, W, b)
    with bfloat16_products():
        assert torch.equal(F.linear(x, W, b), expected)


def test_everything_else_is_left_alone() -> None:
    x, W = torch.randn(8, 6, 5, 5), torch.randn(6, 6)
    norm = nn.BatchNorm2d(6)
    functions: list[Callable[[], Tensor]] = [
        lambda: x.flatten(1).t() @ x.flatten(1),
        lambda: torch.linalg.solve(W, W + 1.0),
        lambda: norm(x),
        lambda: torch.softmax(x, 1),
        lambda: F.max_pool2d(x, 2),
    ]
    expected = [function() for function in functions]
    with bfloat16_products():
        assert all(torch.equal(function(), one) for function, one in zip(functions, expected, strict=True))


def test_contexts_nest_and_end() -> None:
    x, W = torch.randn(5, 40), torch.randn(7, 40)
    exact = F.linear(x, W)
    with bfloat16_products():
        reduced = F.linear(x, W)
        with float32_products(x.device):
            assert not products.reduced
            assert torch.equal(F.linear(x, W), exact)
            with bfloat16_products():
                assert torch.equal(F.linear(x, W), reduced)
        assert products.reduced
        assert torch.equal(F.linear(x, W), reduced)
        seen: list[bool] = []
        other = threading.Thread(target=lambda: seen.append(products.reduced))
        other.start()
        other.join()
        assert seen == [False]
    with pytest.raises(ZeroDivisionError), bfloat16_products():
        _ = 1 / 0
    assert not products.reduced
    assert torch.equal(F.linear(x, W), exact)
    assert not torch.equal(reduced, exact)


def test_what_is_learned_in_float32_stays_there() -> None:
    W = torch.randn(7, 40)
    expected = mirror_estimate(W, 16, F.relu, torch.Generator().manual_seed(1))
    with bfloat16_products():
        assert torch.equal(mirror_estimate(W, 16, F.relu, torch.Generator().manual_seed(1)), expected)


# -- in the place of autocast ----------------------------------------------------------------------------------------


def test_it_takes_the_place_of_autocast() -> None:
    x, W, b = torch.randn(5, 40), torch.randn(7, 40), torch.randn(7)
    with products_of_autocast(W):
        assert torch.equal(F.linear(x, W, b), torch.nn.functional.linear(x, W, b))
        assert not products.reduced
    with bfloat16_products():
        expected = F.linear(x, W, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, W, b).dtype == torch.bfloat16
        with products_of_autocast(W):
            assert torch.equal(F.linear(x, W, b), expected)
            assert (x.t() @ x).dtype == torch.float32
            with products_of_autocast(W):  # autocast is off by now: nothing more to do
                assert torch.equal(F.linear(x, W, b), expected)
        assert F.linear(x, W, b).dtype == torch.bfloat16


def test_what_cannot_take_its_place_is_refused() -> None:
    W = torch.randn(7, 40)
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(UserError, match=r"float16 is not supported.*bfloat16"),
        products_of_autocast(W),
    ):
        pass
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UserError, match=r"float32 weights, and these are torch.float64"),
        products_of_autocast(W.double()),
    ):
        pass


def test_no_copy_of_a_weight_goes_stale() -> None:
    """Autocast keeps a bfloat16 copy of a weight until its context ends, whatever happens to the weight meanwhile."""
    x, W = torch.randn(5, 40), nn.Parameter(torch.randn(7, 40))

    def change() -> float:
        before = F.linear(x, W).detach().clone()
        with torch.no_grad():
            W.mul_(2.0)
        return float((F.linear(x, W).detach() - before).abs().max())

    with torch.autocast("cpu", torch.bfloat16):
        assert change() == 0.0  # the trap
        with products_of_autocast(W):
            assert change() > 1.0


# -- backward matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_backward_matrices_are_used_and_rounded_like_weights(kind: str) -> None:
    layers = (nn.Linear(20, 15), nn.Linear(15, 10)) if kind == "linear" else (nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    x = torch.randn(6, 20) if kind == "linear" else torch.randn(6, 3, 9, 9)
    above = layers[1]
    error = torch.randn_like(above(layers[0](x)))

    def gradients(matrices: dict[Tensor, Tensor]) -> tuple[Tensor, ...]:
        with bfloat16_products(), asymmetric_backward(matrices):
            return torch.autograd.grad(above(layers[0](x)), [*layers[0].parameters(), *above.parameters()], error)

    own, same = gradients({}), gradients({above.weight: above.weight})
    for found, expected in zip(same, own, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 1e-4 * expected.norm()  # by bfloat16 operands, or it would be 1e-3
    matrix = torch.randn_like(above.weight)
    other = gradients({above.weight: matrix})
    assert torch.equal(other[2], same[2])
    assert torch.equal(other[3], same[3])
    with torch.no_grad():
        above.weight.copy_(matrix)  # the error below is formed by B as if it were W
    for found, expected in zip(other[:2], gradients({})[:2], strict=True):
        assert (found - expected).norm() < 1e-4 * expected.norm()
