"""The three products of a layer without its bias: bilinear in a weight and what flows through it.

A layer computes ``W x``; feedback in the layout of the same weight computes ``V^T d``; and the gradient of
``<d, W x>`` with respect to ``W`` is the weight gradient. Everything that closed forms of feedback training cost is one
of the three.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import prod

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

    def weight_gradient_difference(
        self, inputs: Tensor, outputs: Tensor, less_inputs: Tensor, less_outputs: Tensor
    ) -> Tensor:
        """Weight gradient of one pair of inputs and outputs, less that of another."""
        return self.weight_gradient(inputs, outputs).sub_(self.weight_gradient(less_inputs, less_outputs))

    def weight_gradients(self, inputs: Tensor, outputs: Tensor, parts: int) -> Sequence[Tensor]:
        """Weight gradient of each of several equal parts that are stacked along the batch."""
        pairs = zip(inputs.chunk(parts), outputs.chunk(parts), strict=True)
        return [self.weight_gradient(*pair) for pair in pairs]

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

    def weight_gradients(self, inputs: Tensor, outputs: Tensor, parts: int) -> Sequence[Tensor]:
        """Weight gradient of each part, all in one batched product."""
        columns, rows = (self._cast(each).reshape(parts, -1, each.shape[1]) for each in (inputs, outputs))
        return self._uncast(torch.bmm(rows.mT, columns)).unbind()


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


class SmallMapProducts(LayerProducts):
    """Of a convolution on a map so small that one dense matrix does less arithmetic than sliding the kernel.

    A 3x3 kernel on a 2x2 map multiplies 16 pairs of positions, where padding makes a convolution compute 36. The
    matrix ``[positions out * channels out, positions in * channels in]`` repeats the kernel's taps; maps are flattened
    with the channels innermost, which costs nothing in ``channels_last``.

    Args:
        weight_shape: ``[out, in, kernel, kernel]``.
        stride: of the convolution, in pixels.
        padding: zeros on every side, in pixels.
        input_size: height and width of the input map.
        output_size: height and width of the output map, before pooling.
        reduced: see `LayerProducts`.
    """

    def __init__(
        self,
        weight_shape: torch.Size,
        stride: int,
        padding: int,
        input_size: tuple[int, int],
        output_size: tuple[int, int],
        reduced: bool = False,
    ) -> None:
        super().__init__(reduced)
        self.weight_shape, self.input_size, self.output_size = weight_shape, input_size, output_size
        kernel = weight_shape[2:]
        taps = torch.full((prod(output_size), prod(input_size)), -1)
        for place in range(taps.numel()):
            out, in_ = divmod(place, prod(input_size))
            row, column = (
                divmod(in_, input_size[1])[axis] - divmod(out, output_size[1])[axis] * stride + padding
                for axis in (0, 1)
            )
            if 0 <= row < kernel[0] and 0 <= column < kernel[1]:
                taps[out, in_] = row * kernel[1] + column
        self._taps = taps  # number of the tap that joins two positions, -1 where none does

    def prepare(self, weight: Tensor) -> Tensor:
        """Spread the taps over the dense matrix."""
        out_channels, in_channels = self.weight_shape[:2]
        taps = self._cast(weight).permute(2, 3, 0, 1).flatten(0, 1)
        matrix = taps.new_zeros(self._taps.shape[0], out_channels, self._taps.shape[1], in_channels)
        for out, row in enumerate(self._taps.tolist()):
            for in_, tap in enumerate(row):
                if tap >= 0:
                    matrix[out, :, in_] = taps[tap]
        return matrix.flatten(2).flatten(0, 1)

    def forward(self, inputs: Tensor, prepared: Tensor) -> Tensor:
        """Compute ``W x``."""
        product = matrix_product(self._cast(_channels_inside(inputs)), prepared)
        return product.view(-1, *self.output_size, self.weight_shape[0]).permute(0, 3, 1, 2)

    def backward(self, outputs: Tensor, prepared: Tensor) -> Tensor:
        """Compute ``V^T d``."""
        product = matrix_product(self._cast(_channels_inside(outputs)), prepared.t())
        return product.view(-1, *self.input_size, self.weight_shape[1]).permute(0, 3, 1, 2)

    def weight_gradient(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Gradient with respect to the weight."""
        return self._fold(matrix_product(self._flat(outputs).t(), self._flat(inputs).t()))

    def weight_gradient_difference(
        self, inputs: Tensor, outputs: Tensor, less_inputs: Tensor, less_outputs: Tensor
    ) -> Tensor:
        """Both in one product: here the dense matrices, not the samples, are what fills the memory."""
        columns = torch.cat([self._flat(inputs), self._flat(less_inputs)])
        rows = torch.cat([self._flat(outputs), self._flat(less_outputs).neg()])
        return self._fold(matrix_product(rows.t(), columns.t()))

    def _flat(self, maps: Tensor) -> Tensor:
        return self._cast(_channels_inside(maps))

    def _fold(self, matrix: Tensor) -> Tensor:
        """Sum the blocks of a dense matrix that belong to the same tap."""
        out_channels, in_channels, *kernel = self.weight_shape
        blocks = matrix.view(self._taps.shape[0], out_channels, self._taps.shape[1], in_channels)
        gradient = torch.zeros(
            out_channels,
            *kernel,
            in_channels,
            dtype=torch.promote_types(matrix.dtype, torch.float32),
            device=matrix.device,
        )
        taps = gradient.flatten(1, 2)
        for out, row in enumerate(self._taps.tolist()):
            for in_, tap in enumerate(row):
                if tap >= 0:
                    taps[:, tap] += blocks[out, :, in_]
        return gradient.permute(0, 3, 1, 2)


def _channels_inside(maps: Tensor) -> Tensor:
    """Flatten ``[batch, channels, height, width]`` to ``[batch, height * width * channels]``."""
    return maps.permute(0, 2, 3, 1).flatten(1)


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
