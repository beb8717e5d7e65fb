"""Draws of feedback weights that then stay as they are (Shibuya et al., AAAI 2023)."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bioprop.errors import UserError

FixedWeightName = Literal["uniform", "gaussian", "orthogonal", "sparse"]
#: What `scale` is by default, as published.
SCALES: dict[str, float] = {"uniform": 1e-3, "gaussian": 1e-3, "orthogonal": 1.0, "sparse": 1e-3}


@torch.no_grad()
def draw_fixed_weight(weight: Tensor, kind: FixedWeightName, scale: float, sparsity: float) -> None:
    """Draw a feedback weight in place.

    Args:
        weight: ``V``, ``[units, ...]`` with one row for each unit or channel of the stage's output; ``B_n = V^T``.
        kind: ``uniform`` in +-scale, ``gaussian`` of standard deviation scale, ``orthogonal`` times scale, or
            ``sparse``: uniform, and for each unit of the stage below the same number of weights set to zero.
        scale: see above.
        sparsity: share of the zeros, from 0 to 1, for ``sparse``.

    Raises:
        UserError: if the kind is not known.
    """
    if kind not in get_args(FixedWeightName):
        raise UserError(f"feedback_init {kind!r} is not known: choose one of {', '.join(get_args(FixedWeightName))}")
    drawn = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)  # of rows one after the other in memory
    if kind == "gaussian":
        nn.init.normal_(drawn, std=scale)
    elif kind == "orthogonal":
        nn.init.orthogonal_(drawn, gain=scale)
    else:
        nn.init.uniform_(drawn, -scale, scale)
    if kind == "sparse":
        columns = drawn.flatten(1)
        ranks = torch.rand_like(columns).argsort(0).argsort(0)
        columns[ranks < round(sparsity * len(columns))] = 0.0
    weight.copy_(drawn)
