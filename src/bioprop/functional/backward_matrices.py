"""Backward matrices of the feedback-alignment family, and how two of them learn.

``B`` has the layout of the forward weight ``W``: ``[out, in]``, or ``[out, in / groups, height, width]``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.precision import float32_products


def root_mean_square(values: Tensor) -> Tensor:
    """Size of an entry, as a scalar tensor: what ``drawn like W`` and ``the initialisation's scale`` refer to."""
    return values.detach().square().mean().sqrt()


def draw_like(weight: Tensor, scale: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
    """Draw Gaussian entries of size ``scale`` in the shape of ``weight``."""
    drawn = torch.randn(weight.shape, dtype=weight.dtype, device=weight.device, generator=generator)
    scaled: Tensor = scale * drawn
    return scaled


def sign_concordant(weight: Tensor, magnitude: Tensor) -> Tensor:
    """``|M| o sign(W)`` (Liao et al., 2016; Moskovitz et al., 2018); a scalar ``M`` gives the uniform rule."""
    return magnitude.abs() * weight.sign()


def with_norm_of(matrix: Tensor, norm: Tensor) -> Tensor:
    """Scale a matrix to a given Frobenius norm (Moskovitz et al., 2018); a zero matrix stays zero."""
    scaled: Tensor = matrix * (norm / matrix.norm().clamp_min(torch.finfo(matrix.dtype).tiny))
    return scaled


def mirror_estimate(
    weight: Tensor, samples: int, activation: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Tensor:
    """``mean f(W x) x^T`` over noise ``x ~ N(0, 1)``: the weight mirror's increment (Akrout et al., 2019).

    Its expectation is ``W`` times the mean slope of ``f``, row by row (Stein's lemma). A convolution is mirrored on
    noise of the size of its kernel, on which it is the linear map of its flattened weight.

    Args:
        weight: ``W``, seen through its responses to the noise alone.
        samples: number of noise vectors.
        activation: ``f``.
        generator: where the noise comes from.
    """
    rows = weight.detach().flatten(1)
    noise = torch.randn(samples, rows.shape[1], dtype=rows.dtype, device=rows.device, generator=generator)
    with float32_products(rows.device):  # learned in the weight's own precision
        # `linear` runs through a faster library than `@` on some processors
        responses = activation(F.linear(noise, rows))
        return F.linear(responses.t(), noise.t()).div_(samples).view_as(weight)
