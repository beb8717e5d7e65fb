"""Which stages and mirrors the closed forms cover, and what they consist of."""

from collections.abc import Callable
from functools import cache
from math import prod

import torch
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.activations import FLAT, forward_activation
from bioprop.functional.closed_forms import LayerPair
from bioprop.functional.compiled import compiled
from bioprop.functional.layer_products import ConvProducts, LayerProducts, LinearProducts, SmallMapProducts
from bioprop.functional.pool_windows import NO_POOL, ConvGeometry
from bioprop.functional.pooling import Places, Pool, Size, gather_less, last_windows_as_numbers
from bioprop.functional.precision import products_are_reduced
from bioprop.functional.speed import Speed
from bioprop.functional.stage_maps import StageMaps
from bioprop.functional.tiled_feedback import TiledLayer
from bioprop.functional.winograd import MOST_TAPS, winograd
from bioprop.networks.mirrors import ConvMirror, LinearMirror, Mirror, unread_border
from bioprop.networks.stages import ConvStage, LinearStage, Stage

#: Pixels of a map from which on products in bfloat16 are faster than tiles in float32.
REDUCED_PIXELS = 64
#: Channels, in and out, from which on tiles pay for their transforms.
TILED_CHANNELS = 64

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
    return conv_products(stage.conv, (stage.input_shape[1], stage.input_shape[2]), stage.map_size, reduced)


def conv_products(
    conv: nn.Conv2d, input_size: tuple[int, int], output_size: tuple[int, int], reduced: bool = False
) -> LayerProducts:
    """Return the products of a convolution.

    Args:
        conv: with a square kernel, the same in both directions.
        input_size: height and width of its input.
        output_size: height and width of its output.
        reduced: whether the products are computed in bfloat16.
    """
    (stride, _), (padding, _) = conv.stride, (int(side) for side in conv.padding)
    # on a GPU the many copies between kernel and matrix cost more than they save
    if conv.weight.device.type == "cpu" and prod(input_size) <= prod(conv.weight.shape[2:]):
        return SmallMapProducts(conv.weight.shape, stride, padding, input_size, output_size, reduced)
    unread = unread_border(conv, input_size, output_size)
    return ConvProducts(conv.weight.shape, stride, padding, unread, reduced)


def expected_geometry(name: str, stage: Stage) -> ConvGeometry:
    """Return the sizes that the expected feedback loss needs of a stage.

    Raises:
        UserError: if it is not known for this kind of stage, naming the stage.
    """
    if type(stage) is LinearStage:
        return ConvGeometry((1, 1), 1)
    if type(stage) is not ConvStage:
        raise UserError(
            f"stage {name} is a {type(stage).__name__}, for which the expected feedback loss is not known: use "
            "sampling 'independent' or 'antithetic'"
        )
    (stride, _), (padding, _) = stage.conv.stride, (int(side) for side in stage.conv.padding)
    size = stage.input_shape[1], stage.input_shape[2]
    return ConvGeometry(size, stage.weight.shape[-1], stride, padding, stage.pool or NO_POOL)


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
    locate = _fused_locate(mirror.pool, mirror.map_size) if less and mirror.form == "paper" else None
    return LayerPair(
        stage.weight,
        products,
        stage.activate,
        mirror.phi,
        locate or mirror.locate,
        mirror.unpool,
        less or (lambda pooled, places, less: mirror.unpool(pooled, places).sub_(less)),
        mirror.is_linear,
    )


def tiled_where_it_pays(stage: Stage, mirror: Mirror, speed: Speed) -> TiledLayer | None:
    """Return what the closed form by tiles needs of a stage that `layer_pair` holds for; None where it does not pay.

    It has to be compiled, on a CPU: on a GPU the library of convolutions chooses such ways by itself.

    Args:
        stage: any stage.
        mirror: its feedback operator.
        speed: how gradients are computed.
    """
    if not isinstance(stage, ConvStage) or not isinstance(mirror, ConvMirror) or not speed.compile:
        return None
    taps, (padding, _) = stage.weight.shape[-1], (int(side) for side in stage.conv.padding)
    known = stage.conv.stride == (1, 1) and taps <= MOST_TAPS and padding < taps
    narrow = min(stage.weight.shape[:2]) < TILED_CHANNELS or isinstance(layer_products(stage), SmallMapProducts)
    reduced = (speed.bfloat16 or products_are_reduced()) and prod(stage.map_size) >= REDUCED_PIXELS
    if not known or narrow or reduced or stage.weight.device.type != "cpu":
        return None
    return tiled_layer(stage, mirror)


def tiled_layer(stage: ConvStage, mirror: ConvMirror) -> TiledLayer:
    """Return what the closed form by tiles needs of a convolution of stride 1."""
    (padding, _), size = (int(side) for side in stage.conv.padding), (stage.input_shape[1], stage.input_shape[2])
    rho, pool_last = forward_activation(stage.activation), stage.activation in FLAT
    maps = StageMaps(stage.map_size, rho, mirror.phi, mirror.pool, pool_last, mirror.form == "paper")
    return TiledLayer(winograd(stage.weight.shape[-1]), padding, size, maps)


@cache
def _fused_unpool_less(pool: Pool, size: Size) -> UnpoolLess:
    """Compile unpooling and subtraction for one geometry."""
    fused = compiled(gather_less)

    def run(pooled: Tensor, places: Places | None, less: Tensor) -> Tensor:
        assert places is not None
        # compiled code reads boolean masks ten times slower than numbers
        kept = pooled if places.kept is None else pooled * places.kept
        return fused(kept, places.switches, less, pool, size)

    return run


@cache
def _fused_locate(pool: Pool, size: Size) -> Callable[[Tensor | None], Places | None]:
    """Compile the search for the windows whose value stays, for one geometry; where none overlap there is no search."""
    last = compiled(last_windows_as_numbers) if pool.overlaps else None

    def run(switches: Tensor | None) -> Places | None:
        assert switches is not None
        return Places(switches, None if last is None else last(switches, pool))

    return run
