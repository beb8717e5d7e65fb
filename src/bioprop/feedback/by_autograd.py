"""The L-DRL loss of one stage on one batch by autograd, for stages of any kind; closed forms are held against it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from bioprop.feedback import losses
from bioprop.feedback.losses import FeedbackGradient, FeedbackObjective, curvature_by_autograd, curvature_of_samples
from bioprop.feedback.noise import NOISE_SHARE, NoiseStream, Rule, scale_of
from bioprop.functional.gradients import preserve_buffers
from bioprop.functional.precision import float32_products, products_are_reduced
from bioprop.networks.mirrors import LayerMirror, Mirror
from bioprop.networks.stages import Stage, StagePass


def objective_by_autograd(
    rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
) -> FeedbackObjective:
    """Prepare the loss, see `bioprop.feedback.ldrl.ldrl_objective`."""
    if rule.second_noise == "independent":
        return _independent(rule, stage, mirror, clean, noise)
    if isinstance(mirror, LayerMirror):
        return _probed(rule, stage, mirror, clean, noise)
    return _composed_echo(rule, stage, mirror, clean, noise)


def _independent(rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream) -> FeedbackObjective:
    """The published rule for any kind of stage."""
    exact, values = _exact_pass(stage, clean)
    shapes = stage.noise_shape(clean.inputs), clean.output.shape

    def gradient_at(draw: int) -> FeedbackGradient:
        eps, eta = noise.draw(rule.sigma, *shapes)
        with exact():
            noises = eps.view(clean.inputs.shape), eta
            found = losses.ldrl_gradient(stage, mirror, *values, *noises, rule.clean_switches)
            if isinstance(mirror, LayerMirror):
                curvature = curvature_of_samples(mirror, values[1], eta, rule.sigma)
                return found._replace(curvature={"weight": curvature})
            return found

    return gradient_at


def _probed(rule: Rule, stage: Stage, mirror: LayerMirror, clean: StagePass, noise: NoiseStream) -> FeedbackObjective:
    """An echo, or the second noise integrated out, for any kind of stage whose mirror has one layer.

    The whole batch goes through the stage, which may look at it as one; images without noise add nothing.
    """
    exact, values = _exact_pass(stage, clean)
    inputs, output, switches = values
    rows = inputs.reshape(stage.noise_shape(inputs))
    probing = rule.probing(rows, mirror.weight, output, mirror.overlap, mirror.area)
    by_taps, variance, images = rule.second_noise == "expected", probing.sigma**2, probing.images
    curvature = curvature_by_autograd(mirror, output, switches, variance, images, by_taps)

    def gradient_at(draw: int) -> FeedbackGradient:
        eps = torch.zeros_like(rows)
        eps[:images] = probing.draw(noise, draw)
        eps = eps.view(inputs.shape)
        with exact():
            if by_taps:
                found = losses.expected_gradient(stage, mirror, *values, eps, variance)
            else:
                found = losses.echo_gradient(stage, mirror, *values, eps)
        share = len(inputs) / images
        gradients = {name: share * gradient for name, gradient in found.parameters.items()}
        return FeedbackGradient(gradients, share * found.loss, {"weight": probing.damped(curvature, draw)})

    return gradient_at


def _composed_echo(rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream) -> FeedbackObjective:
    """An echo of white noise for a stage of several layers as a whole: no curvature for each of its weights."""
    exact, values = _exact_pass(stage, clean)
    sigma = NOISE_SHARE * scale_of(clean.inputs, rule.peers) if rule.noise is None else rule.noise

    def gradient_at(draw: int) -> FeedbackGradient:
        (eps,) = noise.draw(1.0, clean.inputs.shape)
        with exact():
            return losses.echo_gradient(stage, mirror, *values, eps.mul_(sigma))

    return gradient_at


def _exact_pass(
    stage: Stage, clean: StagePass
) -> tuple[Callable[[], AbstractContextManager[None]], tuple[Tensor, Tensor, Any]]:
    """Return the context that autograd's gradients are formed in, with the clean pass's input, output and switches.

    They subtract whole passes, clean from noisy, where closed forms send only the noise through the products: both are
    in float32 whatever the precision, or most of a small difference would be rounding. Noisy passes move no statistics.
    """

    @contextmanager
    def exact() -> Iterator[None]:
        with float32_products(clean.inputs.device), preserve_buffers(stage):
            yield

    output, switches = clean.output, clean.switches
    if products_are_reduced():
        with exact():
            output, switches = stage.run(clean.inputs)
    return exact, (clean.inputs, output.detach(), switches)
