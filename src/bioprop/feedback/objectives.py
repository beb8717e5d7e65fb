"""The L-DRL loss of one stage on one batch: which gradient, on which noise, for which kind of stage."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bioprop.feedback import losses
from bioprop.feedback.closed_forms import (
    LayerGradient,
    curvature_of_taps,
    curvature_of_units,
    echo_gradient,
    expected_gradient,
    independent_gradient,
)
from bioprop.feedback.losses import FeedbackGradient, FeedbackObjective, curvature_by_autograd, curvature_of_samples
from bioprop.feedback.noise import NoiseStream
from bioprop.feedback.probing import NOISE_SHARE, Peers, Probing, scale_of
from bioprop.functional.gradients import preserve_buffers
from bioprop.functional.precision import float32_products, products_are_reduced
from bioprop.networks.mirrors import FeedbackLayer, LayerMirror, Mirror
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
    """

    second_noise: SecondNoise
    clean_switches: bool
    noise: float | None
    whole: bool
    by_layers: bool
    samples: int
    peers: Peers

    @property
    def sigma(self) -> float:
        """The standard deviation of noise that cannot be left to ``auto``."""
        assert self.noise is not None  # `LDRL` refuses independent noise without it
        return self.noise

    def probing(
        self, inputs: Tensor, weight: Tensor, output: Tensor, overlap: float = 1.0, area: float = 1.0
    ) -> Probing:
        """Return the noise of one layer on one batch.

        Args:
            inputs: of the layer, ``[batch, ...]``.
            weight: its feedback weight, ``[units, ...]``.
            output: of the layer after pooling, ``[batch, units, ...]``.
            overlap: the mean number of pool windows that a position lies in.
            area: the number of positions before pooling for each window.
        """
        echo, fan_in, positions = self.second_noise == "echo", weight[0].numel(), output[0, 0].numel()
        settings = echo, self.noise, self.whole, self.samples, self.peers
        return Probing(inputs, fan_in, positions, overlap, area, *settings)


def has_curvature(mirror: Mirror, by_layers: bool) -> bool:
    """Whether a mirror's loss has a curvature for each of its weights, which the normalized step divides by."""
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
        by_autograd = _independent_by_autograd
        if rule.second_noise != "independent":
            by_autograd = _probed_by_autograd if isinstance(mirror, LayerMirror) else _composed_echo
        return by_autograd(rule, stage, mirror, clean, noise)
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
        shapes = [probing.shape(draw) for _, probing, _ in probes]
        normals = iter(noise.draw(1.0, *(shape for shape in shapes if shape is not None)))
        found = []
        for (part, probing, curvature), shape in zip(probes, shapes, strict=True):
            eps = probing.noise(None if shape is None else next(normals))
            gradient, loss = echo_gradient(part, eps) if echo else expected_gradient(part, eps, curvature)
            found.append(LayerGradient(gradient, loss, probing.damped(curvature, draw)))
        return _summed(layers, found)

    return gradient_at


def _summed(layers: Sequence[FeedbackLayer], gradients: Sequence[LayerGradient]) -> FeedbackGradient:
    """The gradient of the sum of the layers' losses, out of those in effective weights."""
    return FeedbackGradient(
        {layer.name: layer.scaled(layer.share * found.weight) for layer, found in zip(layers, gradients, strict=True)},
        torch.stack([layer.share * found.loss for layer, found in zip(layers, gradients, strict=True)]).sum(),
        {
            layer.name: layer.scaled(layer.scaled(layer.share * found.curvature))
            for layer, found in zip(layers, gradients, strict=True)
        },
    )


def _independent_by_autograd(
    rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
) -> FeedbackObjective:
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


def _probed_by_autograd(
    rule: Rule, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
) -> FeedbackObjective:
    """An echo, or the second noise integrated out, for any kind of stage whose mirror has one layer.

    The whole batch goes through the stage, which may look at it as one; images without noise add nothing.
    """
    assert isinstance(mirror, LayerMirror)
    exact, values = _exact_pass(stage, clean)
    inputs, output, switches = values
    rows = inputs.reshape(stage.noise_shape(inputs))
    probing = rule.probing(rows, mirror.weight, output, mirror.overlap, mirror.area)
    by_taps, variance, images = rule.second_noise == "expected", probing.sigma**2, probing.images
    curvature = curvature_by_autograd(mirror, output, switches, variance, images, by_taps)

    def gradient_at(draw: int) -> FeedbackGradient:
        shape = probing.shape(draw)
        eps = torch.zeros_like(rows)
        eps[:images] = probing.noise(None if shape is None else noise.draw(1.0, shape)[0])
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
