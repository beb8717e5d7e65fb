"""Layers whose backward pass carries the error through another matrix than the forward weight.

One mechanism for every rule of feedback alignment and every network: within `asymmetric_backward`, each call of
``linear`` or ``conv2d`` with a listed weight ``W`` is replaced by one that computes the same output, the same gradient
of ``W`` given the error above, and the error below with ``B`` in place of ``W``. Everything else (normalisation,
pooling, residual connections) is left to autograd, and the modules are not touched.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.overrides import TorchFunctionMode

from bioprop.functional.precision import products_are_reduced, round_operands

Pair = tuple[int, int]


class _AsymmetricLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, backward: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, backward)
        ctx.types = inputs.dtype, weight.dtype
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor | None, ...]:
        (error,) = errors
        inputs, backward = (tensor.to(error.dtype) for tensor in ctx.saved_tensors)  # bf16 under autocast
        below = above = bias = None
        flat = error.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            below = (error @ backward).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            above = (flat.t() @ inputs.flatten(0, -2)).to(ctx.types[1])
        if ctx.needs_input_grad[3]:
            bias = flat.sum(0).to(ctx.types[1])
        return below, above, None, bias


class _AsymmetricConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        backward: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(inputs, backward)
        ctx.types, ctx.geometry = (inputs.dtype, weight.dtype), (stride, padding, dilation, groups)
        return F.conv2d(inputs, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor | None, ...]:
        (error,) = errors
        inputs, backward = (tensor.to(error.dtype) for tensor in ctx.saved_tensors)
        below = above = bias = None
        if ctx.needs_input_grad[0]:
            below = conv2d_input(inputs.shape, backward, error, *ctx.geometry).to(ctx.types[0])  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[1]:
            above = conv2d_weight(inputs, backward.shape, error, *ctx.geometry).to(ctx.types[1])  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[3]:
            bias = error.sum((0, 2, 3)).to(ctx.types[1])
        return below, above, None, bias, None, None, None, None


def linear(inputs: Tensor, weight: Tensor, backward: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, with the error below ``delta B`` (BP: ``delta W``).

    Args:
        inputs: ``x``, ``[..., in_features]``.
        weight: ``W``, ``[out_features, in_features]``.
        backward: ``B``, the same shape.
        bias: ``[out_features]`` or None.
    """
    if products_are_reduced():
        # as without a matrix of its own, the error below is formed by rounded operands too
        return round_operands(lambda x, W, B: _AsymmetricLinear.apply(x, W, B, None), (inputs, weight, backward), bias)
    output: Tensor = _AsymmetricLinear.apply(inputs, weight, backward, bias)
    return output


def conv2d(
    inputs: Tensor,
    weight: Tensor,
    backward: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution by ``W`` whose error below is the transposed convolution by ``B``.

    Args:
        inputs: ``[batch, channels, height, width]``.
        weight: ``W``, ``[out_channels, channels / groups, height, width]``.
        backward: ``B``, the same shape.
        bias: ``[out_channels]`` or None.
        stride: as in `torch.nn.functional.conv2d`; likewise the next three.
        padding: pixels, ``valid`` or ``same``.
        dilation: pixels from one element of the kernel to the next.
        groups: number of groups of channels.
    """
    strides, dilations = _pair(stride), _pair(dilation)
    if padding == "same":
        spread = [d * (side - 1) for d, side in zip(dilations, weight.shape[2:], strict=True)]
        # the odd pixel goes to the far side, as torch has it
        inputs = F.pad(inputs, [0, spread[1] % 2, 0, spread[0] % 2])
        padding = (spread[0] // 2, spread[1] // 2)
    paddings = (0, 0) if isinstance(padding, str) else _pair(padding)
    geometry = strides, paddings, dilations, groups
    if products_are_reduced():
        operands = inputs, weight, backward
        return round_operands(lambda x, W, B: _AsymmetricConv2d.apply(x, W, B, None, *geometry), operands, bias)
    output: Tensor = _AsymmetricConv2d.apply(inputs, weight, backward, bias, *geometry)
    return output


def _pair(value: Any) -> Pair:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


class asymmetric_backward(TorchFunctionMode):  # noqa: N801 - used as a context, like torch.no_grad
    """Context in which the listed forward weights have other matrices in their backward passes.

    Args:
        matrices: ``B`` for each forward weight tensor ``W``, in its shape.
    """

    def __init__(self, matrices: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self._matrices = {id(weight): matrix for weight, matrix in matrices.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        arguments = dict(kwargs or {})
        replacement = REPLACEMENTS.get(func)
        if replacement is not None:
            weight = args[1] if len(args) > 1 else arguments["weight"]
            if id(weight) in self._matrices:
                names = ("input", "weight")
                inputs = args[0] if args else arguments["input"]
                rest = {key: value for key, value in arguments.items() if key not in names}
                return replacement(inputs, weight, self._matrices[id(weight)], *args[2:], **rest)
        return func(*args, **arguments)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor]] = {F.linear: linear, F.conv2d: conv2d}
