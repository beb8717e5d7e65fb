"""Targets of difference target propagation, as differences ``d^n = t^n - s^n`` from the activations.

The output's is here; the hidden ones, ``d^{n-1} = G^n(s^n + d^n) - G^n(s^n)`` (Lee et al., 2015), are the mirrors'
``difference``.

Working with ``d`` instead of ``t`` keeps the digits that subtracting two nearly equal tensors would lose when the
step ``beta`` is small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def output_difference(logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """``d^N = t^N - s^N = -beta dL/ds^N`` per sample: ``-beta (softmax(s^N) - onehot(y))``.

    Ernoult et al. (2022); not divided by the batch. Shapes ``[batch, classes]``, ``[batch]`` -> ``[batch, classes]``.
    """
    onehot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return -beta * (torch.softmax(logits, dim=1) - onehot)
