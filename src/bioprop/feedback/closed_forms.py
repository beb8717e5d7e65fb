"""Closed forms of the feedback gradients, for layers whose feedback is linear in its weights.

With ``G(y) = V^T features(y) + bias`` every difference of two ``G`` is ``V^T`` of a difference of features, and
``<x, V^T d> = <V, weight_gradient(x, d)>``: weight gradients are all that is needed, no pass through ``G`` for the
loss, no graph. For L-DRL as published that is four products of the layer's size an iteration, where autograd takes
seven; for its other two second noises (`bioprop.feedback.losses` derives them) three and two.

Gradients, losses and curvatures here are those of one layer in effective weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bioprop.networks.layers import blocks
from bioprop.networks.mirrors import FeedbackLayer


class LayerGradient(NamedTuple):
    """Gradient of one layer's feedback loss.

    Attributes:
        weight: in the shape of ``V``.
        loss: a scalar.
        curvature: see `bioprop.feedback.losses.FeedbackGradient`, ``[units]``.
    """

    weight: Tensor
    loss: Tensor
    curvature: Tensor


@torch.no_grad()
def independent_gradient(
    layer: FeedbackLayer, input_noise: Tensor, output_noise: Tensor, sigma: float, clean_switches: bool
) -> LayerGradient:
    """Gradient of the L-DRL loss (Ernoult et al., 2022), as `losses.ldrl_gradient` defines it.

    ``D1 = U_n phi(y_n) - U_c phi(y)`` and ``D2 = U_c (phi(y + eta) - phi(y))`` with the unpoolings ``U`` of the noisy
    and the clean pass; gradient ``2/batch (wgrad(V^T D2, D2) - wgrad(eps, D1))``.

    Args:
        layer: on a batch.
        input_noise: ``eps``, like the layer's inputs.
        output_noise: ``eta``, like its output.
        sigma: standard deviation of both.
        clean_switches: whether the noisy output is unpooled by the clean pass's switches, instead of by its own.
    """
    products, feedback, batch = layer.layer, layer.effective, len(input_noise)
    sums: list[Tensor] = []  # over the blocks: gradient, second term of the loss, curvature
    for samples in blocks(layer.affine):
        part, noise = layer.block(samples), input_noise[samples]
        first = _features_change(part, products.product(noise, part.forward_weight), clean_switches)
        step = part.mirror.phi(part.output + output_noise[samples]).sub_(part.phi)
        second = part.mirror.unpool(step, part.places)
        back = products.transposed_product(second, feedback, layer.size)
        gradient = products.weight_gradient(back, second).sub_(products.weight_gradient(noise, first))
        found = [gradient, _square_sum(back)]
        if not part.mirror.is_linear:
            found.append(unit_square_sums(step).mul_(len(step)))
        sums = found if not sums else [total.add_(term) for total, term in zip(sums, found, strict=True)]
    gradient, second_term, *squares = sums
    # <V, wgrad(V^T D2, D2)> = |V^T D2|^2 is the second term of the loss, -2 <V, wgrad(eps, D1)> the first
    loss = (2.0 * _inner(feedback, gradient) - second_term) / batch
    known = feedback.new_full((len(feedback),), 2.0 * sigma**2 * layer.output[0, 0].numel())
    curvature = squares[0].mul_(2.0 / batch) if squares else known
    return LayerGradient(gradient.mul_(2.0 / batch), loss, curvature)


@torch.no_grad()
def echo_gradient(layer: FeedbackLayer, input_noise: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the L-DRL loss with the second noise an echo of the first: `losses.echo_gradient`.

    With ``echo = phi'(y) o U^T conv(eps; V)`` and ``D2 = U (phi(y + echo) - phi(y))``: ``2/batch wgrad(eps, D2 - D1)``,
    ``D2 - D1 = U (phi(y + echo) - phi(y_n))``, since both are unpooled by the clean pass's switches.

    Args:
        layer: on the samples that the noise is for.
        input_noise: ``eps``, like the layer's inputs.

    Returns:
        Gradient in the shape of ``V``, and loss.
    """
    products, feedback, batch = layer.layer, layer.effective, len(input_noise)
    sums: list[Tensor] = []  # over the blocks: gradient, half the first and the second term of the loss
    for samples in blocks(layer.affine):
        part, noise = layer.block(samples), input_noise[samples]
        mirror = part.mirror
        picked = mirror.pick(products.product(noise, feedback), part.places)
        echo = mirror.slope(part.output) * picked
        output, _ = part.stage.activate(part.affine + products.product(noise, part.forward_weight))
        noisy, after = mirror.phi(output), mirror.phi(part.output + echo)
        difference = mirror.unpool(after - noisy, part.places)
        first = _inner(picked, noisy - part.phi)
        found = [products.weight_gradient(noise, difference), first, _square_sum(echo)]
        sums = found if not sums else [total.add_(term) for total, term in zip(sums, found, strict=True)]
    gradient, first, second = sums
    return gradient.mul_(2.0 / batch), (second - 2.0 * first) / batch


@torch.no_grad()
def expected_gradient(layer: FeedbackLayer, input_noise: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the L-DRL loss with its second noise integrated out: `losses.expected_gradient`.

    ``V o decay - 2/batch wgrad(eps, D1)``: Hebb's product of noise and response, and a decay by what the unit knows.

    Args:
        layer: on the samples that the noise is for.
        input_noise: ``eps``, like the layer's inputs.
        decay: by `curvature_of_taps`.

    Returns:
        Gradient in the shape of ``V``, and loss.
    """
    products, feedback, batch = layer.layer, layer.effective, len(input_noise)
    hebb: Tensor | None = None
    for samples in blocks(layer.affine):
        part, noise = layer.block(samples), input_noise[samples]
        change = _features_change(part, products.product(noise, part.forward_weight), clean_switches=True)
        found = products.weight_gradient(noise, change)
        hebb = found if hebb is None else hebb.add_(found)
    assert hebb is not None
    decayed, hebb = feedback * decay, hebb.mul_(2.0 / batch)
    return decayed - hebb, _inner(feedback, 0.5 * decayed - hebb)


@torch.no_grad()
def reconstruction_gradient(
    layer: FeedbackLayer, bias: Tensor | None, input_noise: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of the reconstruction loss (Lee et al., 2015), as `losses.reconstruction_gradient` defines it.

    With the residual ``r = s + eps - G(F(s + eps))`` and ``D = features(F(s + eps))``: ``-2/batch wgrad(r, D)``.

    Args:
        layer: on a batch.
        bias: of the mirror, one value a channel or input unit.
        input_noise: ``eps``, like the layer's inputs.

    Returns:
        Gradients of ``weight`` and ``bias`` by name, and loss.
    """
    products, batch = layer.layer, len(input_noise)
    output, switches = layer.stage.activate(layer.affine + products.product(input_noise, layer.forward_weight))
    features = layer.mirror.unpool(layer.mirror.phi(output), layer.mirror.locate(switches))
    back = products.transposed_product(features, layer.effective, layer.size)
    missing = layer.inputs.reshape(input_noise.shape) + input_noise - back
    gradients: dict[str, Tensor] = {}
    if bias is not None:
        missing -= bias.view(-1, *[1] * (missing.dim() - 2))
        gradients["bias"] = missing.sum([axis for axis in range(missing.dim()) if axis != 1]).mul_(-2.0 / batch)
    gradients["weight"] = products.weight_gradient(missing, features).mul_(-2.0 / batch)
    return gradients, missing.square().sum() / batch


def curvature_of_units(layer: FeedbackLayer, variance: float | Tensor) -> Tensor:
    """``D_o = 2 sigma^2 mean_batch sum_windows phi'(y)^2``: curvature of ``sigma^2 |J_G|^2`` along a unit's weights.

    Args:
        layer: on the samples that the noise is for.
        variance: ``sigma^2`` of the noise.

    Returns:
        ``[units]``.
    """
    return 2.0 * variance * unit_square_sums(_kept_slope(layer))


def curvature_of_taps(layer: FeedbackLayer, variance: float | Tensor) -> Tensor:
    """`curvature_of_units` for each tap of the kernel, which counts where it meets the image: ``V o`` it is a gradient.

    ``|J_G|^2`` is a sum over windows and taps of ``phi'(y)^2 V^2``, where the tap falls on a position of the input.

    Returns:
        ``[units, 1, kernel, kernel]`` or ``[units, 1]``.
    """
    squares = layer.mirror.unpool(_kept_slope(layer).square_(), layer.places)
    return layer.layer.tap_sums(squares, layer.size).mul_(2.0 * variance / len(layer.output))


def unit_square_sums(values: Tensor) -> Tensor:
    """Mean over the batch of the sum over positions of the squares: ``[batch, units, ...] -> [units]``."""
    return values.flatten(2).square().sum(2).mean(0) if values.dim() > 2 else values.square().mean(0)


def _kept_slope(layer: FeedbackLayer) -> Tensor:
    """``phi'(y)``, zero where unpooling drops the value."""
    slope = layer.mirror.slope(layer.output)
    return slope if layer.places is None or layer.places.kept is None else slope * layer.places.kept


def _features_change(layer: FeedbackLayer, change: Tensor, clean_switches: bool) -> Tensor:
    """``U_n phi(y_n) - U_c phi(y)`` out of the change of what the stage is activated from."""
    output, switches = layer.stage.activate(layer.affine + change)
    phi = layer.mirror.phi(output)
    if clean_switches:
        return layer.mirror.unpool(phi.sub_(layer.phi), layer.places)
    noisy = layer.mirror.unpool(phi, layer.mirror.locate(switches))
    return noisy.sub_(layer.mirror.unpool(layer.phi, layer.places))


def _square_sum(values: Tensor) -> Tensor:
    """``sum x^2``."""
    flat = values.movedim(1, -1).reshape(-1)
    return torch.dot(flat, flat)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """``<a, b>``, without a copy where the two share the layout of convolutions."""
    flat = [each.movedim(1, -1).reshape(-1) for each in (first, second)]
    return torch.dot(*flat)
