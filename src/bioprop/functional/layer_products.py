"""The three products of a layer without its bias: bilinear in a weight and what flows through it.

A layer computes ``W x``; feedback in the layout of the same weight computes ``V^T d``; and the gradient of
``<d, W x>`` with respect to ``W`` is the weight gradient. Everything that closed forms of feedback training cost is one
of the three.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from bioprop.functional.precision import products_are_reduced


class LayerProducts(ABC):
    """``W x``, ``V^T d`` and the weight gradient of one layer.

    Args:
        reduced: do the arithmetic in bfloat16, out of float32 weights and into float32 weight gradients. So it is, too,
            where all products of layers are (`bioprop.functional.precision`).
    """

    def __init__(self, reduced: bool = False) -> None:
        self.reduced = reduced or products_are_reduced()

    def prepare(self, weight: Tensor) -> Tensor:
        """Bring a weight into the form that `forward` and `backward` take."""
        return self._cast(weight)

    def shape_inputs(self, inputs: Tensor) -> Tensor:
        """Bring ``[batch, *input_shape]`` into the form that the products take."""
        return inputs

    @abstractmethod
    def forward(self, inputs: Tensor, prepared: Tensor) -> Tensor:
        """Compute ``W x``, in the shape of the layer's output."""

    @abstractmethod
    def backward(self, outputs: Tensor, prepared: Tensor) -> Tensor:
        """Compute ``V^T d`` out of a tensor in the shape of the layer's output."""

    @abstractmethod
    def weight_gradient(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Gradient of ``<d, W x>`` with respect to ``W``, summed over the batch, in the shape of the weight."""

    @abstractmethod
    def tap_sums(self, outputs: Tensor) -> Tensor:
        """Sum over the batch and the positions from which a tap of the kernel falls on the input, for each tap.

        Args:
            outputs: in the shape of the layer's output.

        Returns:
            In the shape of the weight, with a single input channel.
        """

    def _cast(self, values: Tensor) -> Tensor:
        return values.to(torch.bfloat16) if self.reduced else values

    def _uncast(self, gradient: Tensor) -> Tensor:
        return gradient.float() if self.reduced else gradient


class LinearProducts(LayerProducts):
    """Of a linear layer on flattened inputs: ``[batch, in]``, ``[batch, out]``, weight ``[out, in]``."""

    def shape_inputs(self, inputs: Tensor) -> Tensor:
        """Flatten every sample."""
        return inputs.flatten(1)

    def forward(self, inputs: Tensor, prepared: Tensor) -> Tensor:
        """Compute ``W x``."""
        return matrix_product(self._cast(inputs), prepared)

    def backward(self, outputs: Tensor, prepared: Tensor) -> Tensor:
        """Compute ``V^T d``."""
        return matrix_product(self._cast(outputs), prepared.t())

    def weight_gradient(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Gradient with respect to the weight."""
        return self._uncast(matrix_product(self._cast(outputs).t(), self._cast(inputs).t()))

    def tap_sums(self, outputs: Tensor) -> Tensor:
        """Sum over the batch: ``[out, 1]``."""
        return outputs.sum(0)[:, None]


class ConvProducts(LayerProducts):
    """Of a convolution: ``[batch, channels, height, width]``, weight ``[out, in, kernel, kernel]``.

    Args:
        weight_shape: of the weight.
        stride: of the convolution, in pixels.
        padding: zeros on every side, in pixels.
        output_padding: rows and columns at the far border that a strided convolution never reads.
        reduced: see `LayerProducts`.
    """

    def __init__(
        self,
        weight_shape: torch.Size,
        stride: int,
        padding: int,
        output_padding: tuple[int, int],
        reduced: bool = False,
    ) -> None:
        super().__init__(reduced)
        self.weight_shape, self.stride, self.padding = weight_shape, stride, padding
        self.output_padding = output_padding

    def forward(self, inputs: Tensor, prepared: Tensor) -> Tensor:
        """Compute ``W x``."""
        return F.conv2d(self._cast(inputs), prepared, None, self.stride, self.padding)

    def backward(self, outputs: Tensor, prepared: Tensor) -> Tensor:
        """Compute ``V^T d``."""
        return F.conv_transpose2d(self._cast(outputs), prepared, None, self.stride, self.padding, self.output_padding)

    def weight_gradient(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Gradient with respect to the weight."""
        if self.reduced and outputs.shape[2] * outputs.shape[3] >= 64:
            inputs, outputs = self._cast(inputs), self._cast(outputs)
        elif self.reduced:  # torch's bfloat16 weight gradient is slower than the float32 one on smaller maps
            inputs, outputs = inputs.float(), outputs.float()
        gradient: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            inputs, list(self.weight_shape), outputs, self.stride, self.padding
        )
        return self._uncast(gradient)

    def tap_sums(self, outputs: Tensor) -> Tensor:
        """Sum over the batch and the positions from which a tap falls on the image: ``[out, 1, kernel, kernel]``."""
        kernel = self.weight_shape[2:]
        sides = [
            (out - 1) * self.stride - 2 * self.padding + taps + unread
            for out, taps, unread in zip(outputs.shape[2:], kernel, self.output_padding, strict=True)
        ]
        sums: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            outputs.new_ones(1, 1, *sides),
            [outputs.shape[1], 1, *kernel],
            outputs.sum(0, keepdim=True),
            self.stride,
            self.padding,
        )
        return sums


def matrix_product(inputs: Tensor, matrix: Tensor) -> Tensor:
    """``inputs matrix^T``, ``[rows, inner]`` by ``[columns, inner]``.

    By oneDNN where it can be reached: torch's own float32 product on CPUs is MKL's, which runs at half the speed on
    AMD processors.
    """
    if inputs.device.type == "cpu" and inputs.dtype is torch.float32 and _ONEDNN is not None:
        return _ONEDNN(inputs, matrix, None, "none", [], "")
    return F.linear(inputs, matrix)


def _find_onednn() -> Callable[..., Tensor] | None:
    try:
        product: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
        row = torch.ones(2, 2)
        return product if torch.equal(product(row, row, None, "none", [], ""), 2 * row) else None
    except (AttributeError, RuntimeError, TypeError):
        return None


_ONEDNN = _find_onednn()
