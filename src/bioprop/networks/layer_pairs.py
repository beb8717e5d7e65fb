"""Which stages and mirrors the closed forms cover, and what they consist of."""

import torch
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.closed_forms import LayerPair
from bioprop.functional.layer_products import ConvProducts, LayerProducts, LinearProducts
from bioprop.functional.speed import Speed
from bioprop.networks.mirrors import ConvMirror, LinearMirror, Mirror, unread_border
from bioprop.networks.stages import ConvStage, LinearStage, Stage


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
    unread = unread_border(conv, input_size, output_size)
    return ConvProducts(conv.weight.shape, stride, padding, unread, reduced)


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
    return LayerPair(
        stage.weight,
        products,
        stage.activate,
        mirror.phi,
        mirror.slope,
        mirror.locate,
        mirror.unpool,
        mirror.pick,
        mirror.is_linear,
        mirror.overlap,
    )
