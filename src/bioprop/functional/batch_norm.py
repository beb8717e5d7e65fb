"""Batch norm as values: what its pass multiplied by, and its Jacobian transposed.

With ``n`` positions of a channel in the batch, ``y = scale x^ + shift`` and ``x^ = (x - mean) / sqrt(var + eps)``,

- in evaluation mode mean and variance are constants: ``J = scale / sqrt(var + eps)``, channel by channel;
- in training mode they are functions of the batch, so that ``J`` maps the whole batch to the whole batch:
  ``J = scale / sqrt(var + eps) (I - 1 1^T/n - x^ x^^T/n)`` (Ioffe & Szegedy, ICML 2015, section 3).

Both are symmetric: the transpose is the same map.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

POSITIONS = (0, 2, 3)


class NormPass(NamedTuple):
    """One pass through a batch norm, without a graph.

    Attributes:
        scale: what each channel was multiplied by, ``[channels]``.
        normalized: ``x^``, ``[batch, channels, height, width]``, where the batch itself gave the statistics; else None.
    """

    scale: Tensor
    normalized: Tensor | None


@torch.no_grad()
def norm_pass(norm: nn.BatchNorm2d, maps: Tensor) -> NormPass:
    """Describe what ``norm`` does to ``maps``; moves no running statistics.

    Args:
        norm: in training or evaluation mode.
        maps: ``x``, ``[batch, channels, height, width]``.
    """
    if norm.training or norm.running_mean is None or norm.running_var is None:
        variance, mean = torch.var_mean(maps, POSITIONS, correction=0)
        inverse = (variance + norm.eps).rsqrt()
        return NormPass(norm.weight * inverse, (maps - per_channel(mean)) * per_channel(inverse))
    return NormPass(norm.weight * (norm.running_var + norm.eps).rsqrt(), None)


def transposed_norm(step: Tensor, each: NormPass | None) -> Tensor:
    """``J^T step`` of one pass, ``[batch, channels, height, width]``; the step itself where there was no batch norm."""
    if each is None:
        return step
    if each.normalized is not None:
        along = (step * each.normalized).mean(POSITIONS, keepdim=True)
        step = step - step.mean(POSITIONS, keepdim=True) - each.normalized * along
    return step * per_channel(each.scale)


def per_channel(values: Tensor) -> Tensor:
    """View ``[channels]`` so that it multiplies ``[batch, channels, height, width]``."""
    return values.view(1, -1, 1, 1)
