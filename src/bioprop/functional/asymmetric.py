"""Layers whose backward pass carries the error through another matrix than the forward weight.

One mechanism for every rule of feedback alignment and every network: within `asymmetric_backward`, each call of
``linear`` or of a convolution with a listed weight ``W`` is replaced by one that computes the same output, the same
gradient of ``W`` given the error above, and the error below with ``B`` in place of ``W``. Everything else
(normalisation, pooling, residual connections) is left to autograd, and the modules are not touched.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bioprop.functional.precision import products, round_operands

Sides = tuple[int, ...]


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


class _AsymmetricConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        backward: Tensor,
        bias: Tensor | None,
        stride: Sides,
        padding: Sides,
        dilation: Sides,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(inputs, backward)
        ctx.types, ctx.geometry = (inputs.dtype, weight.dtype), (stride, padding, dilation, groups)
        return CONVOLUTIONS[weight.dim()](inputs, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor | None, ...]:
        (error,) = errors
        inputs, backward = (tensor.to(error.dtype) for tensor in ctx.saved_tensors)
        stride, padding, dilation, groups = ctx.geometry
        geometry = stride, padding, dilation, False, [0] * len(stride), groups
        gradients = partial(_convolution_gradient, error, geometry)
        below = above = bias = None
        if ctx.needs_input_grad[0]:
            below = gradients(inputs.new_empty(1).expand(inputs.shape), backward, 0).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            above = gradients(inputs, inputs.new_empty(1).expand(backward.shape), 1).to(ctx.types[1])
        if ctx.needs_input_grad[3]:
            bias = error.sum((0, *range(2, error.dim()))).to(ctx.types[1])
        return below, above, None, bias, None, None, None, None


def _convolution_gradient(
    error: Tensor, geometry: tuple[Any, ...], inputs: Tensor, weight: Tensor, which: int
) -> Tensor:
    """The gradient of a convolution's inputs (0) or weight (1), which only needs the other one's values."""
    wanted = [index == which for index in range(3)]
    found: Tensor = torch.ops.aten.convolution_backward(error, inputs, weight, None, *geometry, wanted)[which]
    return found


def linear(inputs: Tensor, weight: Tensor, backward: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, with the error below ``delta B`` (BP: ``delta W``).

    Args:
        inputs: ``x``, ``[..., in_features]``.
        weight: ``W``, ``[out_features, in_features]``.
        backward: ``B``, the same shape.
        bias: ``[out_features]`` or None.
    """
    if inputs.dim() == 1:
        return linear(inputs.unsqueeze(0), weight, backward, bias).squeeze(0)
    if products.reduced:
        # as without a matrix of its own, the error below is formed by rounded operands too
        return round_operands(lambda x, W, B: _AsymmetricLinear.apply(x, W, B, None), (inputs, weight, backward), bias)
    output: Tensor = _AsymmetricLinear.apply(inputs, weight, backward, bias)
    return output


def convolution(
    inputs: Tensor,
    weight: Tensor,
    backward: Tensor,
    bias: Tensor | None = None,
    stride: int | Sides = 1,
    padding: int | Sides | str = 0,
    dilation: int | Sides = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution by ``W`` whose error below is the transposed convolution by ``B``.

    Args:
        inputs: ``[batch, channels, *sides]``, of one to three sides; or without the batch.
        weight: ``W``, ``[out_channels, channels / groups, *sides]``.
        backward: ``B``, the same shape.
        bias: ``[out_channels]`` or None.
        stride: as in `torch.nn.functional.conv2d`; likewise the next three.
        padding: pixels, ``valid`` or ``same``.
        dilation: pixels from one element of the kernel to the next.
        groups: number of groups of channels.
    """
    if inputs.dim() < weight.dim():
        arguments = bias, stride, padding, dilation, groups
        return convolution(inputs.unsqueeze(0), weight, backward, *arguments).squeeze(0)
    sides = weight.dim() - 2
    strides, dilations = _each_side(stride, sides), _each_side(dilation, sides)
    if padding == "same":
        spread = [d * (side - 1) for d, side in zip(dilations, weight.shape[2:], strict=True)]
        # the odd pixel goes to the far side, as torch has it; the last side comes first
        inputs = F.pad(inputs, [pixels for width in reversed(spread) for pixels in (0, width % 2)])
        padding = tuple(width // 2 for width in spread)
    paddings = _each_side(0 if isinstance(padding, str) else padding, sides)
    geometry = strides, paddings, dilations, groups
    if products.reduced:
        operands = inputs, weight, backward
        return round_operands(lambda x, W, B: _AsymmetricConvolution.apply(x, W, B, None, *geometry), operands, bias)
    output: Tensor = _AsymmetricConvolution.apply(inputs, weight, backward, bias, *geometry)
    return output


def _each_side(value: int | Sequence[int], sides: int) -> Sides:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * sides if len(values) == 1 else values


def weight_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the weight among the arguments of `torch.nn.functional.linear` or of a convolution."""
    weight: Tensor = args[1] if len(args) > 1 else kwargs["weight"]
    return weight


class asymmetric_backward(TorchFunctionMode):  # noqa: N801 - used as a context, like torch.no_grad
    """Context in which forward weights have other matrices in their backward passes.

    Args:
        matrices: ``B`` for each forward weight tensor ``W``, in its shape.
    """

    def __init__(self, matrices: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self._matrices = {id(weight): matrix for weight, matrix in matrices.items()}

    def matrix_for(self, weight: Tensor) -> Tensor | None:
        """Return the ``B`` of what a layer is about to multiply by; None for the tensor itself."""
        return self._matrices.get(id(weight))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        arguments = dict(kwargs or {})
        replacement = REPLACEMENTS.get(func)
        if replacement is not None:
            weight = weight_in(args, arguments)
            matrix = self.matrix_for(weight)
            if matrix is not None:
                names = ("input", "weight")
                inputs = args[0] if args else arguments["input"]
                rest = {key: value for key, value in arguments.items() if key not in names}
                return replacement(inputs, weight, matrix, *args[2:], **rest)
        return func(*args, **arguments)


#: Names of the nodes that products with another matrix leave in autograd's graph.
NODES = tuple(f"{function.__name__}Backward" for function in (_AsymmetricLinear, _AsymmetricConvolution))
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: linear,
    **dict.fromkeys(CONVOLUTIONS.values(), convolution),
}
