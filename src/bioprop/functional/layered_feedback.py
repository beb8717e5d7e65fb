"""L-DRL layer by layer: closed forms of feedback operators of one layer or several, and of several as a whole.

A residual block's feedback ``G(y) = S^T phi(y) + V1^T (slope o V2^T phi(y))`` is not linear in its weights, and its
Jacobian determines ``V1`` and ``V2`` only up to factors that cancel between them. Trained as a whole it can match
``J_F^T`` with weights that are nothing like the forward ones, and the norms of the two may drift apart. Trained layer
by layer, every loss is quadratic with the one minimiser ``V = W``, and has the closed form of a stage of one layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bioprop.functional.closed_forms import (
    CleanPass,
    LayerPair,
    curvature_of_taps,
    curvature_of_units,
    echo_closed_form,
    expected_closed_form,
    ldrl_closed_form,
)
from bioprop.functional.feedback_losses import FeedbackGradient, MapsDifferenceBack
from bioprop.functional.probing import Probing


class FeedbackLayer(NamedTuple):
    """One layer of a feedback operator, with the forward layer that it is the counterpart of.

    Attributes:
        name: of its weight among the operator's parameters.
        pair: forward layer and feedback layer, in effective weights.
        inputs: of the forward layer, in the form the products take.
        prepared: the forward layer's effective weight, prepared by the pair's products.
        clean: pass of the batch through the pair.
        feedback: feedback weight ``V``, ``[units, ...]``.
        scale: the effective weights are ``scale_o V_o`` (``[units]``); None for 1.
        share: what the layer's loss is multiplied by.
        input_noise: which of the noise tensors enters the forward layer.
        output_noise: which of them enters the feedback layer.
    """

    name: str
    pair: LayerPair
    inputs: Tensor
    prepared: Tensor
    clean: CleanPass
    feedback: Tensor
    scale: Tensor | None
    share: float
    input_noise: int
    output_noise: int

    @property
    def units(self) -> Tensor:
        """The scale of every unit, ``[units]``."""
        return self.feedback.new_ones(len(self.feedback)) if self.scale is None else self.scale

    def scaled(self, values: Tensor) -> Tensor:
        """Multiply a tensor in the shape of the weight by the scale of its unit."""
        return values if self.scale is None else values * self.scale.view(-1, *[1] * (values.dim() - 1))


class FeedbackLayers(NamedTuple):
    """All layers of a feedback operator, and the shapes of the noise tensors they share, batch first."""

    layers: list[FeedbackLayer]
    noise_shapes: list[tuple[int, ...]]


@torch.no_grad()
def layered_ldrl_gradient(layers: Sequence[FeedbackLayer], noise: Sequence[Tensor], sigma: float) -> FeedbackGradient:
    """Gradient of the sum of the layers' L-DRL losses (Ernoult et al., 2022, with a layer in the place of a stage).

    Args:
        layers: of one feedback operator.
        noise: ``N(0, sigma^2)``, by their numbers in the layers.
        sigma: standard deviation.

    Returns:
        Gradient and curvature by name of parameter, and the sum of the losses.
    """
    gradients: dict[str, Tensor] = {}
    curvatures: dict[str, Tensor] = {}
    losses = []
    for layer in layers:
        eps, eta = noise[layer.input_noise], noise[layer.output_noise]
        effective = layer.scaled(layer.feedback)
        found = ldrl_closed_form(layer.pair, layer.prepared, layer.clean, effective, eps, eta, sigma)
        gradients[layer.name] = layer.scaled(layer.share * found.weight)
        if isinstance(found.curvature, Tensor):
            curvatures[layer.name] = layer.share * layer.units.square() * found.curvature
        losses.append(layer.share * found.loss)
    return FeedbackGradient(gradients, torch.stack(losses).sum(), curvatures)


class ProbedLayer(NamedTuple):
    """A feedback layer on one batch, with an echo for its second noise or with that integrated out.

    Attributes:
        layer: of the feedback operator.
        probing: its noise.
        clean: pass of the images that there is noise on.
        curvature: of the loss, ``[units]``, or of each tap where the second noise is integrated out, undamped.
        echo: whether it is an echo.
    """

    layer: FeedbackLayer
    probing: Probing
    clean: CleanPass
    curvature: Tensor
    echo: bool


@torch.no_grad()
def probe_layer(layer: FeedbackLayer, probing: Probing, echo: bool) -> ProbedLayer:
    """Prepare a layer for the iterations of one batch.

    Args:
        layer: of a feedback operator.
        probing: its noise.
        echo: whether the second noise is an echo; else it is integrated out.
    """
    clean = layer.clean.block(slice(0, probing.images))
    curvature_of = curvature_of_units if echo else curvature_of_taps
    return ProbedLayer(layer, probing, clean, curvature_of(layer.pair, clean, probing.sigma**2), echo)


@torch.no_grad()
def probed_gradient(layers: Sequence[ProbedLayer], draw: int, normals: Sequence[Tensor]) -> FeedbackGradient:
    """Gradient of the sum of the layers' L-DRL losses, by `echo_closed_form` or `expected_closed_form`.

    Args:
        layers: of one feedback operator, by `probe_layer`.
        draw: number of the draw of noise within the batch.
        normals: standard normals, one for each layer whose `Probing.shape` asks for them; overwritten.

    Returns:
        Gradient and curvature, damped by `Probing.damped`, by name of parameter, and the sum of the losses.
    """
    gradients: dict[str, Tensor] = {}
    curvatures: dict[str, Tensor] = {}
    losses = []
    unused = iter(normals)
    for layer, probing, clean, decay, echo in layers:
        noise = probing.noise(None if probing.shape(draw) is None else next(unused))
        effective = layer.scaled(layer.feedback)
        curvature = probing.damped(decay, draw)
        if echo:
            found = echo_closed_form(layer.pair, layer.prepared, clean, effective, noise, curvature)
        else:
            found = expected_closed_form(layer.pair, layer.prepared, clean, effective, noise, decay, curvature)
        gradients[layer.name] = layer.scaled(layer.share * found.weight)
        curvatures[layer.name] = layer.scaled(layer.scaled(layer.share * curvature))
        losses.append(layer.share * found.loss)
    return FeedbackGradient(gradients, torch.stack(losses).sum(), curvatures)


class RunsBlock(Protocol):
    """A forward stage of several layers."""

    def run(self, inputs: Tensor) -> tuple[Tensor, Any]:
        """Return the output and what else the pass hands to the feedback operator."""


def composed_ldrl_gradient(
    stage: RunsBlock,
    mirror: MapsDifferenceBack,
    inputs: Tensor,
    output: Tensor,
    switches: Any,
    input_noise: Tensor,
    output_noise: Tensor,
    clean_switches: bool = False,
) -> FeedbackGradient:
    """Gradient of the L-DRL loss of a stage as a whole, by autograd: see `feedback_losses.ldrl_gradient`.

    Args:
        stage: ``F^n``; its weights get no gradient.
        mirror: ``G^n``.
        inputs: ``s^{n-1}``, ``[batch, *input_shape]``.
        output: ``s^n = F^n(s^{n-1})``, ``[batch, *output_shape]``.
        switches: what the pass that made ``output`` handed out.
        input_noise: ``eps``, like ``inputs``.
        output_noise: ``eta``, like ``output``.
        clean_switches: give the clean pass's to ``G(F(s + eps))`` too, instead of those of the noisy pass.

    Returns:
        The gradient without a curvature: one for each weight would not add up to that of a step along all of them.
    """
    with torch.no_grad():
        noisy_output, noisy_switches = stage.run(inputs + input_noise)
    parameters = mirror.difference_parameters()
    with torch.enable_grad():
        if clean_switches:
            change = mirror.difference(output, noisy_output - output, switches)
        else:
            change = mirror(noisy_output, noisy_switches) - mirror(output, switches)
        first = input_noise * change
        second = mirror.difference(output, output_noise, switches).square()
        loss = (second - 2.0 * first).flatten(1).sum(1).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return FeedbackGradient(dict(zip(parameters, gradients, strict=True)), loss.detach(), None)
