"""The L-DRL loss of one stage on one batch: which gradient, on which noise, for which kind of stage."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bioprop.algorithms.random_streams import NoiseStream
from bioprop.functional.closed_forms import clean_pass, ldrl_closed_form
from bioprop.functional.feedback_losses import (
    FeedbackGradient,
    FeedbackObjective,
    curvature_by_autograd,
    echo_gradient,
    expected_gradient,
    ldrl_gradient,
)
from bioprop.functional.layered_feedback import (
    FeedbackLayer,
    FeedbackLayers,
    composed_ldrl_gradient,
    layered_ldrl_gradient,
    probe_layer,
    probed_gradient,
)
from bioprop.functional.precision import float32_products, products_are_reduced
from bioprop.functional.probing import NOISE_SHARE, Peers, Probing, scale_of
from bioprop.functional.speed import Speed
from bioprop.networks.layer_pairs import layer_pair, noise_shape
from bioprop.networks.mirrors import LayerMirror, Mirror
from bioprop.networks.residual_mirrors import LayeredMirror
from bioprop.networks.stages import Stage, StagePass

SecondNoise = Literal["independent", "expected", "echo"]


class Rule(NamedTuple):
    """How the feedback of one stage is trained; the settings of `LDRL`, with None for ``auto``.

    Attributes:
        second_noise: ``echo``, ``expected`` or ``independent``.
        clean_switches: unpool the noisy output by the clean pass's switches, instead of by its own.
        noise: standard deviation.
        whole: whether an echo's noise is on the whole batch.
        by_layers: whether stages of several layers are trained layer by layer.
        samples: draws of the noise that the gradient of an iteration is the mean of.
        peers: processes that average their gradients.
        speed: how gradients are computed.
    """

    second_noise: SecondNoise
    clean_switches: bool
    noise: float | None
    whole: bool
    by_layers: bool
    samples: int
    peers: Peers
    speed: Speed

    def probing(
        self, inputs: Tensor, weight: Tensor, output: Tensor, overlap: float = 1.0, area: float = 1.0
    ) -> Probing:
        """Return the noise of one layer on one batch.

        Args:
            inputs: of the layer, ``[batch, ...]``.
            weight: its feedback weight, ``[units, ...]``.
            output: of the layer after pooling, ``[batch, units, ...]``.
            overlap: how many pool windows a position lies in on average.
            area: how many positions before pooling there are for each window.
        """
        echo, fan_in, positions = self.second_noise == "echo", weight[0].numel(), output[0, 0].numel()
        settings = echo, self.noise, self.whole, self.samples, self.peers
        return Probing(inputs, fan_in, positions, overlap, area, *settings)


def has_curvature(mirror: Mirror, by_layers: bool) -> bool:
    """Whether a mirror's loss has a curvature for each of its weights, which the normalized step divides by."""
    return isinstance(mirror, LayerMirror) or (isinstance(mirror, LayeredMirror) and _by_layers(mirror, by_layers))


def _by_layers(mirror: LayeredMirror, by_layers: bool) -> bool:
    return by_layers or not mirror.is_composed


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
    layers = _layers(rule, stage, mirror, clean)
    if layers is None:
        by_autograd = _independent_by_autograd
        if rule.second_noise != "independent":
            by_autograd = _probed_by_autograd if isinstance(mirror, LayerMirror) else _composed_echo
        return by_autograd(rule, stage, mirror, clean, noise)
    if rule.second_noise == "independent":
        return _independent(rule, mirror, noise, layers)
    probed = []
    for layer in layers.layers:
        output, area = layer.clean.output, layer.clean.affine[0].numel() / layer.clean.output[0].numel()
        probing = rule.probing(layer.inputs, layer.feedback, output, layer.pair.overlap, area)
        probed.append(probe_layer(layer, probing, rule.second_noise == "echo"))

    def gradient_at(draw: int) -> FeedbackGradient:
        shapes = [each.probing.shape(draw) for each in probed]
        normals = noise.draw(draw, 1.0, *(shape for shape in shapes if shape is not None))
        return probed_gradient(probed, draw, normals)

    return gradient_at


def _layers(rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass) -> FeedbackLayers | None:
    """Return the layers of a stage and its mirror where they have closed forms."""
    if isinstance(mirror, LayeredMirror) and _by_layers(mirror, rule.by_layers):
        return mirror.layers(stage, clean, rule.speed.bfloat16)
    pair = layer_pair(stage, mirror, rule.speed)
    if pair is None or clean.affine is None or not isinstance(mirror, LayerMirror):
        return None
    kept = clean_pass(pair, clean.affine, clean.output, clean.switches, rule.clean_switches)
    inputs, prepared = pair.products.shape_inputs(clean.inputs), pair.products.prepare(pair.weight)
    layer = FeedbackLayer("weight", pair, inputs, prepared, kept, mirror.weight, None, 1.0, 0, 1)
    return FeedbackLayers([layer], [noise_shape(stage, clean.inputs), tuple(clean.output.shape)])


def _independent(rule: Rule, mirror: Mirror, noise: NoiseStream, layers: FeedbackLayers) -> FeedbackObjective:
    """The published rule in closed form."""
    sigma = _number(rule.noise)

    def gradient_at(draw: int) -> FeedbackGradient:
        drawn = noise.draw(draw, sigma, *layers.noise_shapes)
        if isinstance(mirror, LayeredMirror):
            return layered_ldrl_gradient(layers.layers, drawn, sigma)
        (layer,), (eps, eta) = layers.layers, drawn
        return ldrl_closed_form(layer.pair, layer.prepared, layer.clean, layer.feedback, eps, eta, sigma)

    return gradient_at


def _independent_by_autograd(
    rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
) -> FeedbackObjective:
    """The published rule for any kind of stage."""
    exact, values = _exact_pass(stage, clean)
    sigma, shapes = _number(rule.noise), (noise_shape(stage, clean.inputs), clean.output.shape)

    def gradient_at(draw: int) -> FeedbackGradient:
        eps, eta = noise.draw(draw, sigma, *shapes)
        noises = eps.view(clean.inputs.shape), eta
        with exact():
            if isinstance(mirror, LayerMirror):
                return ldrl_gradient(stage, mirror, *values, *noises, sigma, rule.clean_switches)
            return composed_ldrl_gradient(stage, mirror, *values, *noises, rule.clean_switches)

    return gradient_at


def _probed_by_autograd(
    rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
) -> FeedbackObjective:
    """An echo, or the second noise integrated out, for any kind of stage whose mirror has one layer.

    The whole batch goes through the stage, which may look at it as one; images without noise add nothing.
    """
    assert isinstance(mirror, LayerMirror)
    exact, values = _exact_pass(stage, clean)
    inputs, output, switches = values
    rows = inputs.reshape(noise_shape(stage, inputs))
    probing = rule.probing(rows, mirror.weight, output, mirror.overlap, mirror.area)
    by_taps, variance, images = rule.second_noise == "expected", probing.sigma**2, probing.images
    curvature = curvature_by_autograd(mirror, output, switches, variance, images, by_taps)

    def gradient_at(draw: int) -> FeedbackGradient:
        shape = probing.shape(draw)
        eps = torch.zeros_like(rows)
        eps[:images] = probing.noise(None if shape is None else noise.draw(draw, 1.0, shape)[0])
        eps = eps.view(inputs.shape)
        with exact():
            if by_taps:
                found = expected_gradient(stage, mirror, *values, eps, variance)
            else:
                found = echo_gradient(stage, mirror, *values, eps)
        share = len(inputs) / images
        gradients = {name: share * gradient for name, gradient in found.parameters.items()}
        return FeedbackGradient(gradients, share * found.loss, probing.damped(curvature, draw))

    return gradient_at


def _composed_echo(rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream) -> FeedbackObjective:
    """An echo of white noise for a stage of several layers as a whole: no curvature for each of its weights."""
    exact, values = _exact_pass(stage, clean)
    sigma = NOISE_SHARE * scale_of(clean.inputs, rule.peers) if rule.noise is None else rule.noise

    def gradient_at(draw: int) -> FeedbackGradient:
        (eps,) = noise.draw(draw, 1.0, clean.inputs.shape)
        with exact():
            return echo_gradient(stage, mirror, *values, eps.mul_(sigma))

    return gradient_at


def _exact_pass(
    stage: Stage, clean: StagePass
) -> tuple[Callable[[], AbstractContextManager[None]], tuple[Tensor, Tensor, Any]]:
    """Return the context that autograd's gradients are formed in, with the clean pass's input, output and switches.

    They subtract whole passes, clean from noisy, where closed forms send only the noise through the products: both are
    in float32 whatever the precision, or most of a small difference would be rounding.
    """
    exact = partial(float32_products, clean.inputs.device)
    output, switches = clean.output, clean.switches
    if products_are_reduced():
        with exact():
            output, switches = stage.run(clean.inputs)
    return exact, (clean.inputs, output.detach(), switches)


def _number(noise: float | None) -> float:
    assert noise is not None  # `LDRL` refuses independent noise without it
    return noise
