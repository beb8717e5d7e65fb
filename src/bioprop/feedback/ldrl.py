"""The L-DRL loss of one stage on one batch, by closed forms where there are any.

With ``G(y) = V^T features(y) + bias`` every difference of two ``G`` is ``V^T`` of a difference of features, and
``<x, V^T d> = <V, weight_gradient(x, d)>``: weight gradients are all that is needed, no pass through ``G`` for the
loss, no graph. For L-DRL as published that is four products of the layer's size an iteration, where autograd takes
seven; for its other two second noises (`bioprop.feedback.losses` derives them) three and two.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bioprop.feedback.by_autograd import objective_by_autograd
from bioprop.feedback.losses import FeedbackGradient, FeedbackObjective
from bioprop.feedback.noise import NoiseStream, Rule
from bioprop.networks.feedback_layers import FeedbackLayer
from bioprop.networks.layers import blocks, unit_square_sums
from bioprop.networks.mirrors import Mirror
from bioprop.networks.stages import Stage, StagePass


class LayerGradient(NamedTuple):
    """Gradient of one layer's feedback loss, in effective weights.

    Attributes:
        weight: in the shape of ``V``.
        loss: a scalar.
        curvature: see `bioprop.feedback.losses.FeedbackGradient`, ``[units]``.
    """

    weight: Tensor
    loss: Tensor
    curvature: Tensor


def has_curvature(mirror: Mirror, by_layers: bool) -> bool:
    """Return whether a mirror's loss has a curvature for each of its weights, which the normalized step divides by."""
    return type(mirror).layers is not Mirror.layers and (by_layers or not mirror.is_composed)


def ldrl_objective(rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream) -> FeedbackObjective:
    """Prepare the L-DRL loss of one stage and batch, by closed forms where there are any.

    Args:
        rule: how the stage is trained.
        stage: ``F^n``.
        mirror: ``G^n``.
        clean: pass of the batch through the stage.
        noise: where noise is drawn from.

    Returns:
        A function from the number of a draw of noise to the gradient.
    """
    found = mirror.layers(stage, clean) if has_curvature(mirror, rule.by_layers) else None
    if found is None:
        return objective_by_autograd(rule, stage, mirror, clean, noise)
    if rule.second_noise == "independent":
        return _independent(rule, found.layers, found.noise_shapes, noise)
    return _probed(rule, found.layers, noise)


def _independent(
    rule: Rule, layers: Sequence[FeedbackLayer], shapes: Sequence[tuple[int, ...]], noise: NoiseStream
) -> FeedbackObjective:
    """The published rule in closed form."""

    def gradient_at(draw: int) -> FeedbackGradient:
        drawn = noise.draw(rule.sigma, *shapes)
        noises = [(drawn[layer.input_noise], drawn[layer.output_noise]) for layer in layers]
        return _summed(
            layers,
            [
                independent_gradient(layer, *each, rule.sigma, rule.clean_switches)
                for layer, each in zip(layers, noises, strict=True)
            ],
        )

    return gradient_at


def _probed(rule: Rule, layers: Sequence[FeedbackLayer], noise: NoiseStream) -> FeedbackObjective:
    """An echo, or the second noise integrated out, in closed form."""
    echo = rule.second_noise == "echo"
    curvature_of = curvature_of_units if echo else curvature_of_taps
    probes = []
    for layer in layers:
        probing = rule.probing(layer.inputs, layer.weight, layer.output, layer.mirror.overlap, layer.area)
        part = layer.block(slice(0, probing.images))
        probes.append((part, probing, curvature_of(part, probing.sigma**2)))

    def gradient_at(draw: int) -> FeedbackGradient:
        found = []
        for part, probing, curvature in probes:
            eps = probing.draw(noise, draw)
            gradient, loss = echo_gradient(part, eps) if echo else expected_gradient(part, eps, curvature)
            found.append(LayerGradient(gradient, loss, probing.damped(curvature, draw)))
        return _summed(layers, found)

    return gradient_at


def _summed(layers: Sequence[FeedbackLayer], gradients: Sequence[LayerGradient]) -> FeedbackGradient:
    """The gradient of the sum of the layers' losses, out of those in effective weights."""
    weights, curvatures, losses = {}, {}, []
    for layer, found in zip(layers, gradients, strict=True):
        weight, loss, curvature = (layer.share * each for each in found)
        if layer.scale is not None:
            weight, curvature = layer.scaled(weight), layer.scaled(layer.scaled(curvature))
        weights[layer.name], curvatures[layer.name] = weight, curvature
        losses.append(loss)
    return FeedbackGradient(weights, torch.stack(losses).sum(), curvatures)


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
