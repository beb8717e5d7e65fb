"""The one definition of an angle between updates or weights."""

from collections.abc import Iterable

import torch
from torch import Tensor


def flatten_all(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate tensors of any shapes into one float64 vector (float32 sums of millions of terms are 2e-4 off)."""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def angle_degrees(first: Tensor, second: Tensor) -> Tensor:
    """Angle ``acos(<a, b> / (|a| |b|))`` between two flattened tensors, in degrees, as a float64 scalar.

    Computed as ``2 atan2(|u - v|, |u + v|)`` with the unit vectors ``u, v`` (Kahan, 2006), which keeps its digits
    for nearly parallel vectors, where the arc cosine loses half of them. NaN if either tensor is all zeros.
    """
    a, b = first.detach().flatten().double(), second.detach().flatten().double()
    unit_a, unit_b = a / a.norm(), b / b.norm()
    return torch.rad2deg(2.0 * torch.atan2((unit_a - unit_b).norm(), (unit_a + unit_b).norm()))


def norm_ratio(first: Tensor, second: Tensor) -> Tensor:
    """``|a| / |b|`` of two flattened tensors, as a float64 scalar."""
    ratio: Tensor = first.detach().double().norm() / second.detach().double().norm()
    return ratio
