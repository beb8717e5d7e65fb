"""L-DRL where feedback runs through several layers: layer by layer, or as a whole.

A residual block's feedback ``G(y) = S^T phi(y) + V1^T (slope o V2^T phi(y))`` is not linear in its weights, and its
Jacobian determines ``V1`` and ``V2`` only up to factors that cancel between them. Trained as a whole it can match
``J_F^T`` with weights that are nothing like the forward ones, and the norms of the two may drift apart. Trained layer
by layer, every loss is quadratic with the one minimiser ``V = W``, and has the closed form of a stage of one layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bioprop.functional.closed_forms import CleanPass, LayerPair, ldrl_closed_form
from bioprop.functional.feedback_losses import FeedbackGradient


class FeedbackLayer(NamedTuple):
    """One layer of a feedback operator, with the forward layer that it is the counterpart of.

    Attributes:
        name: of its weight among the operator's parameters.
        pair: forward layer and feedback layer, in effective weights.
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
    prepared: Tensor
    clean: CleanPass
    feedback: Tensor
    scale: Tensor | None
    share: float
    input_noise: int
    output_noise: int


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
        units = layer.feedback.new_ones(len(layer.feedback)) if layer.scale is None else layer.scale
        scale = units.view(-1, *[1] * (layer.feedback.dim() - 1))
        eps, eta = noise[layer.input_noise], noise[layer.output_noise]
        effective = scale * layer.feedback
        found = ldrl_closed_form(layer.pair, layer.prepared, layer.clean, effective, eps, eta, sigma, True)
        gradients[layer.name] = layer.share * scale * found.weight
        if isinstance(found.curvature, Tensor):
            curvatures[layer.name] = layer.share * units.square() * found.curvature
        losses.append(layer.share * found.loss)
    return FeedbackGradient(gradients, torch.stack(losses).sum(), curvatures)


class RunsBlock(Protocol):
    """A forward stage of several layers."""

    def run(self, inputs: Tensor) -> tuple[Tensor, Any]:
        """Return the output and what else the pass hands to the feedback operator."""


class MapsDifferenceBack(Protocol):
    """Its feedback operator."""

    def difference_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that differences of ``G`` depend on, by name."""

    def difference(self, outputs: Tensor, step: Tensor, switches: Any) -> Tensor:
        """Compute ``G(outputs + step) - G(outputs)``."""

    def __call__(self, outputs: Tensor, switches: Any) -> Tensor:
        """Compute ``G``."""


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
