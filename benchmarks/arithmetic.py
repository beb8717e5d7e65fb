"""The arithmetic of a computation, and the rate that the machine can reach.

Only products (convolutions, matrix products) are counted, two operations for a multiplication and an addition; what a
convolution multiplies by its padding is counted too, as is usual.
"""

from collections.abc import Callable, Sequence
from math import prod
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import interleaved
from bioprop.networks import ConvStage, Network

#: Images in the batch that is counted: products are proportional to them.
COUNTED_BATCH = 2


def count_gigaflop(run: Callable[[], object]) -> float:
    """Count the arithmetic of a call, in 1e9 operations."""
    with FlopCounterMode(display=False, custom_mapping=_onednn_products()) as counter:
        run()
    return counter.get_total_flops() / 1e9


def _onednn_products() -> dict[Any, Callable[..., int]]:
    """Return a counter for oneDNN's own matrix product, which torch's counter does not know."""
    try:
        product = torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return {}

    def count(inputs: Sequence[int], weight: Sequence[int], *rest: object, **more: object) -> int:
        return 2 * prod(inputs) * weight[0]

    return {product: count}


def convolution_rate(network: Network, batch: int, rounds: int) -> tuple[str, float] | None:
    """Measure the best rate, in 1e9 operations a second, that torch reaches on the network's own convolutions.

    Forward, transposed and weight gradient of every conv stage, in float32 and channels-last.

    Returns:
        Name of the product and its rate; None for a network without convolutions.
    """
    runs: dict[str, Callable[[], object]] = {}
    gigaflop: dict[str, float] = {}
    for name, stage in network.stages():
        if not isinstance(stage, ConvStage):
            continue
        weight, rules = stage.weight.detach(), (stage.conv.stride, stage.conv.padding)
        inputs = _noise(batch, stage.input_shape)
        maps = _noise(batch, (len(weight), *stage.map_size))
        runs |= {
            f"{name} forward": lambda i=inputs, w=weight, r=rules: F.conv2d(i, w, None, *r),
            f"{name} transposed": lambda m=maps, w=weight, r=rules: F.conv_transpose2d(m, w, None, *r),
            f"{name} weight gradient": lambda i=inputs, w=weight, m=maps, r=rules: conv2d_weight(i, w.shape, m, *r),
        }
        for kind in ("forward", "transposed", "weight gradient"):
            gigaflop[f"{name} {kind}"] = 2 * batch * weight.numel() * prod(stage.map_size) / 1e9
    if not runs:
        return None
    seconds = interleaved(runs, rounds)
    rates = {name: gigaflop[name] / median(times) for name, times in seconds.items()}
    best = max(rates, key=rates.__getitem__)
    return best, rates[best]


def _noise(batch: int, shape: Sequence[int]) -> torch.Tensor:
    return torch.randn(batch, *shape).contiguous(memory_format=torch.channels_last)
