"""Which stages and mirrors the closed forms cover, and what they consist of."""

from collections.abc import Callable
from functools import cache
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.closed_forms import LayerPair
from bioprop.functional.compiled import compiled
from bioprop.functional.layer_products import ConvProducts, LayerProducts, LinearProducts, SmallMapProducts
from bioprop.functional.pooling import Places, Pool, Size, unpool_less
from bioprop.functional.speed import Speed
from bioprop.networks.mirrors import ConvMirror, LinearMirror, Mirror
from bioprop.networks.stages import ConvStage, LinearStage, Stage

UnpoolLess = Callable[[Tensor, Places | None, Tensor], Tensor]


def layer_products(stage: Stage, reduced: bool = False) -> LayerProducts | None:
    """Return the products of a stage's layer; None for other kinds of stages, subclasses included.

    A subclass may compute something else than its parent, so the kind must be the very one.

    Args:
        stage: any stage.
        reduced: whether the products are computed in bfloat16.
    """
    if type(stage) is LinearStage and _is_plain(stage.linear):
        return LinearProducts(reduced)
    if type(stage) is not ConvStage or not _is_plain(stage.conv):
        return None
    (stride, _), (padding, _) = stage.conv.stride, (int(side) for side in stage.conv.padding)
    shape, size = stage.weight.shape, (stage.input_shape[1], stage.input_shape[2])
    if prod(size) <= prod(shape[2:]):
        return SmallMapProducts(shape, stride, padding, size, stage.map_size, reduced)
    unread = [
        side - ((out - 1) * stride - 2 * padding + kernel)
        for side, out, kernel in zip(size, stage.map_size, shape[2:], strict=True)
    ]
    return ConvProducts(shape, stride, padding, (unread[0], unread[1]), reduced)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is what its stage built: not replaced, without hooks, its weight a parameter of its own."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if type(layer) is nn.Linear:
        return True
    return (
        type(layer) is nn.Conv2d
        and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
        and len({*layer.stride}) == len({*layer.padding}) == len({*layer.kernel_size}) == 1
        and not isinstance(layer.padding, str)
    )


def noise_shape(stage: Stage, inputs: Tensor) -> tuple[int, ...]:
    """Shape in which noise at a stage's input is drawn; the same numbers whichever way the gradient is computed."""
    return (len(inputs), inputs[0].numel()) if isinstance(stage, LinearStage) else tuple(inputs.shape)


def layer_pair(stage: Stage, mirror: Mirror, speed: Speed) -> LayerPair | None:
    """Return what the closed forms need of a stage and its mirror; None where they do not apply.

    Args:
        stage: any stage.
        mirror: its feedback operator.
        speed: how they are computed.

    Raises:
        UserError: if bfloat16 is asked for and the weights are not float32.
    """
    products = layer_products(stage, speed.bfloat16)
    if products is None or not isinstance(stage, LinearStage | ConvStage):
        return None
    if type(mirror) is not LinearMirror and type(mirror) is not ConvMirror:
        return None
    if speed.bfloat16 and stage.weight.dtype is not torch.float32:
        raise UserError(
            f"speed.bfloat16 computes with float32 weights, and these are {stage.weight.dtype}: leave it out, or train "
            "with --trainer.precision=32-true"
        )
    pooled = isinstance(mirror, ConvMirror) and mirror.pool is not None
    less = _fused_unpool_less(mirror.pool, mirror.map_size) if speed.compile and pooled else None
    return LayerPair(
        stage.weight,
        products,
        stage.activate,
        mirror.phi,
        mirror.locate,
        mirror.unpool,
        less or (lambda pooled, places, less: mirror.unpool(pooled, places).sub_(less)),
        mirror.is_linear,
    )


@cache
def _fused_unpool_less(pool: Pool, size: Size) -> UnpoolLess:
    """Compile `unpool_less` for one geometry."""
    fused = compiled(unpool_less)
    return lambda pooled, places, less: fused(pooled, cast(Places, places), less, pool, size)
