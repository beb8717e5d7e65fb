"""Products of layers in bfloat16, and everything between them in float32.

torch's autocast lets bfloat16 flow on: activations, and whatever is computed from them, keep 8 bits. Target propagation
subtracts such tensors from each other where they differ by a few percent, and learns from what is left: with 8 bits
that is mostly rounding. Here a convolution or matrix product of a layer rounds its operands and its result, adds the
bias in float32, and hands out float32. A difference that is formed before a linear map and sent through it as one
tensor therefore keeps its relative precision of 2^-9, however small it is; gradients go back through the same rounding.
No weight is kept in bfloat16 from one product to the next, so that none can go stale when a weight is stepped in place
(torch's autocast keeps copies until its context ends).
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bioprop.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)

#: What is rounded: functions of (input, weight, bias, ...).
PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
)


class _Products(threading.local):
    reduced = False  # modes of torch functions belong to a thread, too


#: Its ``reduced`` says whether the products of layers are computed in bfloat16 here.
products = _Products()


def round_operands(product: Callable[..., Tensor], operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """``product(operands) + bias`` in float32, of operands rounded to bfloat16.

    Args:
        product: bilinear; a linear layer, a convolution or its transpose without bias.
        operands: float32; first the input, then the weight, then what else there is to round.
        bias: float32, ``[units]``, or None.
    """
    rounded = product(*(operand.to(torch.bfloat16) for operand in operands))
    if bias is None:
        return rounded.to(torch.float32)
    return rounded + bias.view(-1, *[1] * (operands[1].dim() - 2))  # the sum of the two types is float32


class _ReducedProducts(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func not in PRODUCTS or not products.reduced:
            return func(*args, **given)
        given |= dict(zip(("input", "weight", "bias"), args, strict=False))
        inputs, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        if inputs.dtype is not torch.float32 or weight.dtype is not torch.float32:
            return func(inputs, weight, bias, *args[3:], **given)
        return round_operands(lambda x, W: func(x, W, None, *args[3:], **given), (inputs, weight), bias)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Compute the products of layers, by modules or functions of torch, in bfloat16 out of and into float32."""
    before, products.reduced = products.reduced, True
    try:
        with _ReducedProducts():
            yield
    finally:
        products.reduced = before


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Compute everything in its operands' own type, whatever was asked for around this context.

    Args:
        device: where it is computed; torch's autocast is turned off there.
    """
    before, products.reduced = products.reduced, False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        products.reduced = before


@contextmanager
def products_of_autocast(weight: Tensor) -> Iterator[None]:
    """Put `bfloat16_products` in the place of torch's autocast where that is on; else change nothing.

    Args:
        weight: one of the weights that are multiplied by.

    Raises:
        UserError: if autocast is to float16, or the weights are not float32.
    """
    device = weight.device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    if dtype is not torch.bfloat16:
        raise UserError(
            f"autocast to {dtype} is not supported, since small differences and gradients vanish below its range: use "
            "torch.autocast(..., dtype=torch.bfloat16)"
        )
    if weight.dtype is not torch.float32:
        raise UserError(
            f"autocast computes with float32 weights, and these are {weight.dtype}: leave it out, or call .float()"
        )
    with torch.autocast(device, enabled=False), bfloat16_products():
        yield


def products_in_autocast_type(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Let a method of a module, where torch's autocast is on, compute the products of layers in that type, no more.

    Lightning turns autocast on around a step for ``bf16-mixed``; see the head of this file.
    """

    @wraps(method)
    def run(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        with products_of_autocast(next(self.parameters())):
            return method(self, *args, **kwargs)

    return cast(Callable[Concatenate[M, P], R], run)
