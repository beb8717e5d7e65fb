"""The L-DRL loss of one stage on one batch by autograd, for stages of any kind; closed forms are held against it."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bioprop.feedback import losses
from bioprop.feedback.losses import FeedbackGradient, FeedbackObjective, curvature_by_autograd, curvature_of_samples
from bioprop.feedback.noise import NOISE_SHARE, NoiseStream, Rule, scale_of
from bioprop.functional.precision import float32_products, products
from bioprop.networks.mirrors import LayerMirror, Mirror
from bioprop.networks.stages import Stage, StagePass

#: Input, output and switches of a clean pass.
Values = tuple[Tensor, Tensor, Any]


def objective_by_autograd(
    rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
) -> FeedbackObjective:
    """Prepare the loss, see `bioprop.feedback.ldrl.ldrl_objective`. The whole batch goes through the stage.

    Autograd subtracts whole passes, clean from noisy, where closed forms send only the noise through the products: both
    are in float32 whatever the precision, or most of a small difference would be rounding.
    """
    inputs, output, switches = clean.inputs, clean.output, clean.switches
    exact: Callable[[], Any] = nullcontext
    if products.reduced:
        exact = partial(float32_products, inputs.device)
        with exact():
            output, switches = stage.run(inputs)
    values = inputs, output.detach(), switches
    if rule.second_noise == "independent":
        gradient_at = _independent(rule, stage, mirror, values, noise)
    elif isinstance(mirror, LayerMirror):
        gradient_at = _probed(rule, stage, mirror, values, noise)
    else:
        gradient_at = _composed_echo(rule, stage, mirror, values, noise)

    def exact_gradient_at(draw: int) -> FeedbackGradient:
        with exact():
            return gradient_at(draw)

    return exact_gradient_at


def _independent(rule: Rule, stage: Stage, mirror: Mirror, values: Values, noise: NoiseStream) -> FeedbackObjective:
    inputs, output, _ = values
    shapes = stage.noise_shape(inputs), output.shape

    def gradient_at(draw: int) -> FeedbackGradient:
        eps, eta = noise.draw(rule.sigma, *shapes)
        found = losses.ldrl_gradient(stage, mirror, *values, eps.view(inputs.shape), eta, rule.clean_switches)
        if isinstance(mirror, LayerMirror):
            found = found._replace(curvature={"weight": curvature_of_samples(mirror, output, eta, rule.sigma)})
        return found

    return gradient_at


def _probed(rule: Rule, stage: Stage, mirror: LayerMirror, values: Values, noise: NoiseStream) -> FeedbackObjective:
    """A stage whose mirror has one layer. Images without noise add nothing."""
    inputs, output, switches = values
    rows = inputs.reshape(stage.noise_shape(inputs))
    probing = rule.probing(rows, mirror.weight, output, math.prod(mirror.map_size), mirror.pool)
    by_taps, variance, images = rule.second_noise == "expected", probing.sigma**2, probing.images
    curvature, share = curvature_by_autograd(mirror, output, switches, variance, images, by_taps), len(inputs) / images

    def gradient_at(draw: int) -> FeedbackGradient:
        eps = torch.zeros_like(rows)
        eps[:images], divisor = probing.step(noise, draw, curvature)
        eps = eps.view(inputs.shape)
        if by_taps:
            found = losses.expected_gradient(stage, mirror, *values, eps, variance)
        else:
            found = losses.echo_gradient(stage, mirror, *values, eps)
        gradients = {name: share * gradient for name, gradient in found.parameters.items()}
        return FeedbackGradient(gradients, share * found.loss, {"weight": divisor})

    return gradient_at


def _composed_echo(rule: Rule, stage: Stage, mirror: Mirror, values: Values, noise: NoiseStream) -> FeedbackObjective:
    """White noise, for a stage of several layers as a whole: no curvature for each of its weights."""
    sigma = NOISE_SHARE * scale_of(values[0], rule.peers) if rule.noise is None else rule.noise

    def gradient_at(draw: int) -> FeedbackGradient:
        (eps,) = noise.draw(1.0, values[0].shape)
        return losses.echo_gradient(stage, mirror, *values, eps.mul_(sigma))

    return gradient_at
