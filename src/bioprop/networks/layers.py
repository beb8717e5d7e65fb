"""Linear and convolutional layers that know their products.

A layer computes ``W x``; feedback in the layout of the same weight computes ``V^T d``; and the gradient of ``<d, W x>``
with respect to ``W`` is the weight gradient. All three are bilinear in a weight and what flows through the layer, and
everything that a closed form of feedback training costs is one of them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from bioprop.functional.precision import products_are_reduced

#: Bytes of one map that a block of samples may have: several maps of that size fit into a processor's last cache.
BLOCK_BYTES = 6 * 2**20
#: Positions of a map from which on torch forms the weight gradient of a convolution faster in bfloat16 than in float32.
REDUCED_POSITIONS = 64


class LinearLayer(nn.Linear):
    """``nn.Linear`` on samples of any shape, with its products; weights are ``[out, in]``."""

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Compute ``W x`` without the bias, ``[batch, ...]`` to ``[batch, out]``."""
        return F.linear(inputs.flatten(1), weight)

    def transposed_product(self, outputs: Tensor, weight: Tensor, size: Sequence[int] = ()) -> Tensor:
        """Compute ``V^T d``, ``[batch, out]`` to ``[batch, in]``."""
        return F.linear(outputs, weight.t())

    def weight_gradient(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Gradient of ``<d, W x>`` with respect to ``W``, summed over the batch."""
        return F.linear(outputs.t(), inputs.flatten(1).t())

    def tap_sums(self, outputs: Tensor, size: Sequence[int] = ()) -> Tensor:
        """Sum over the batch, ``[out, 1]``."""
        return outputs.sum(0)[:, None]


class ConvLayer(nn.Conv2d):
    """``nn.Conv2d`` with its products; weights are ``[out, in, kernel, kernel]``."""

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Compute ``W x`` without the bias, ``[batch, in, height, width]`` to ``[batch, out, height, width]``."""
        return F.conv2d(inputs, weight, None, self.stride, self.padding)

    def transposed_product(self, outputs: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
        """Compute ``V^T d``.

        Args:
            outputs: ``d``, in the shape of the layer's output.
            weight: ``V``.
            size: height and width of the layer's input.
        """
        unread = unread_border(self, size, outputs.shape[2:])
        return F.conv_transpose2d(outputs, weight, None, self.stride, self.padding, unread)  # type: ignore[arg-type]

    def weight_gradient(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Gradient of ``<d, W x>`` with respect to ``W``, summed over the batch."""
        if reduced := products_are_reduced() and outputs.shape[2] * outputs.shape[3] >= REDUCED_POSITIONS:
            inputs, outputs = inputs.to(torch.bfloat16), outputs.to(torch.bfloat16)
        gradient: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            inputs, list(self.weight.shape), outputs, self.stride, self.padding
        )
        return gradient.float() if reduced else gradient

    def tap_sums(self, outputs: Tensor, size: Sequence[int]) -> Tensor:
        """Sum over the batch and the positions from which a tap of the kernel falls on the image, for each tap.

        Args:
            outputs: in the shape of the layer's output.
            size: height and width of the layer's input.

        Returns:
            ``[out, 1, kernel, kernel]``.
        """
        sums: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            outputs.new_ones(1, 1, *size),
            [outputs.shape[1], 1, *self.weight.shape[2:]],
            outputs.sum(0, keepdim=True),
            self.stride,
            self.padding,
        )
        return sums


def unit_square_sums(values: Tensor) -> Tensor:
    """Mean over the batch of the sum over positions of the squares: ``[batch, units, ...] -> [units]``."""
    return values.flatten(2).square().sum(2).mean(0) if values.dim() > 2 else values.square().mean(0)


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is as its stage built it: not replaced, without hooks, its weight its own parameter."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return type(layer) in (LinearLayer, ConvLayer) and not any(hooks)


def unread_border(conv: nn.Conv2d, input_size: Sequence[int], output_size: Sequence[int]) -> tuple[int, int]:
    """Return how many rows and columns at the far border a strided convolution never reads."""
    (stride, _), (padding, _) = conv.stride, (int(side) for side in conv.padding)
    rows, columns = (
        side - ((out - 1) * stride - 2 * padding + kernel)
        for side, out, kernel in zip(input_size, output_size, conv.weight.shape[2:], strict=True)
    )
    return rows, columns


def blocks(maps: Tensor, fewest: int = 32) -> list[slice]:
    """Cut a batch on a CPU into blocks of samples whose maps stay in its cache.

    Args:
        maps: of the batch, the largest that are formed.
        fewest: samples that a block is not cut to less than.
    """
    batch, size = len(maps), maps[0].numel() * maps.element_size()
    samples = batch
    while maps.device.type == "cpu" and samples * size > BLOCK_BYTES and samples > fewest:
        samples = (samples + 1) // 2
    return [slice(start, min(start + samples, batch)) for start in range(0, batch, samples)]
