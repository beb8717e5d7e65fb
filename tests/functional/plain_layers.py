"""Gradients of layers whose error below is carried by ``B``, in numpy and without any differentiation."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class LayerGradients(NamedTuple):
    """Error below, and the gradients of weight and bias."""

    below: Array
    weight: Array
    bias: Array


def linear_gradients(inputs: Array, backward: Array, error: Array) -> LayerGradients:
    """``delta B``, ``delta^T x`` and the sum of ``delta``, for inputs ``[..., in_features]``."""
    rows, errors = inputs.reshape(-1, inputs.shape[-1]), error.reshape(-1, error.shape[-1])
    return LayerGradients(error @ backward, errors.T @ rows, errors.sum(0))


def conv_gradients(
    inputs: Array,
    backward: Array,
    error: Array,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> LayerGradients:
    """The same for a convolution: one place of the kernel at a time, of which each is a linear layer.

    ``padding`` is ((top, bottom), (left, right)).
    """
    padded = np.pad(inputs, ((0, 0), (0, 0), *padding))
    below, weight = np.zeros_like(padded), np.zeros_like(backward)
    outs, ins = len(backward) // groups, backward.shape[1]
    height, width = error.shape[2:]
    for row, column in np.ndindex(*backward.shape[2:]):
        top, left = row * dilation[0], column * dilation[1]
        rows = slice(top, top + (height - 1) * stride[0] + 1, stride[0])
        columns = slice(left, left + (width - 1) * stride[1] + 1, stride[1])
        for group in range(groups):
            o, i = slice(group * outs, (group + 1) * outs), slice(group * ins, (group + 1) * ins)
            place = backward[o, :, row, column]
            weight[o, :, row, column] = np.einsum("nohw,nihw->oi", error[:, o], padded[:, i, rows, columns])
            below[:, i, rows, columns] += np.einsum("nohw,oi->nihw", error[:, o], place)
    (top, bottom), (left, right) = padding
    kept = below[:, :, top : below.shape[2] - bottom, left : below.shape[3] - right]
    return LayerGradients(kept, weight, error.sum((0, 2, 3)))
