"""Losses that train feedback weights, and their gradients with respect to one stage's feedback weights.

Each function is the one place where its gradient is formed: what replaces the plain autograd below by a closed form
replaces it here.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class RunsStage(Protocol):
    """A forward stage ``F^n``."""

    def run(self, inputs: Tensor) -> tuple[Tensor, Any]:
        """Return the output and the switches of this pass."""


class MapsBack(Protocol):
    """A feedback operator ``G^n``, linear in ``weight`` and ``bias`` after the activation ``phi``."""

    @property
    def weight(self) -> Tensor:
        """The feedback weight ``V``."""

    @property
    def bias(self) -> Tensor | None:
        """The feedback bias, if there is one."""

    @property
    def is_linear(self) -> bool:
        """Whether ``phi`` is the identity."""

    @property
    def phi(self) -> Callable[[Tensor], Tensor]:
        """The activation of the feedback path."""

    def __call__(self, outputs: Tensor, switches: Tensor | None) -> Tensor:
        """Compute ``G^n``."""


class Reconstructs(Protocol):
    """A feedback operator ``G^n`` of any kind."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Return its parameters by name."""

    def __call__(self, outputs: Tensor, switches: Any) -> Tensor:
        """Compute ``G^n``."""


#: One value for each output unit of the only weight, or of each weight by its name.
Curvature = Tensor | Mapping[str, Tensor]


class FeedbackGradient(NamedTuple):
    """Gradient of a feedback loss with respect to the parameters of ``G^n``, the loss, and a scale for the step.

    Attributes:
        parameters: gradient by name of the parameter, in its shape; those whose gradient is exactly zero are left out.
        loss: the loss, a scalar.
        curvature: ``D_o >= 0``, one value for each unit or channel of the stage's output (``[units]``): the
            curvature of the loss along the weights that leave it. By name of the parameter where a mirror has several
            weights. None where the loss offers no cheap estimate.
    """

    parameters: dict[str, Tensor]
    loss: Tensor
    curvature: Curvature | None

    @property
    def weight(self) -> Tensor:
        """Gradient of the feedback weight ``V`` of a mirror that has one."""
        return self.parameters["weight"]

    @property
    def bias(self) -> Tensor | None:
        """Gradient of its bias; None where it is exactly zero."""
        return self.parameters.get("bias")


#: From the number of an iteration to the gradient of a stage's feedback loss on fresh noise.
FeedbackObjective = Callable[[int], FeedbackGradient]


def unit_square_sums(values: Tensor) -> Tensor:
    """Mean over the batch of the sum over positions of the squares: ``[batch, units, ...] -> [units]``."""
    return values.flatten(2).square().sum(2).mean(0) if values.dim() > 2 else values.square().mean(0)


def ldrl_gradient(
    stage: RunsStage,
    mirror: MapsBack,
    inputs: Tensor,
    output: Tensor,
    switches: Tensor | None,
    input_noise: Tensor,
    output_noise: Tensor,
    sigma: float,
    clean_switches: bool = False,
) -> FeedbackGradient:
    """Gradient of the layer-wise difference reconstruction loss (Ernoult et al., 2022).

    ``L = mean_batch[ -2 <eps, G(F(s + eps)) - G(F(s))> + |G(F(s) + eta) - G(F(s))|^2 ]``, through every ``G`` in it.
    To first order in the noise this is ``sigma^2 (|J_G - J_F^T|^2 - |J_F|^2)``: its minimiser is ``J_G = J_F^T``.
    The bias cancels in both differences, so its gradient is exactly zero.

    Args:
        stage: ``F^n``; its weights get no gradient.
        mirror: ``G^n``.
        inputs: ``s^{n-1}``, ``[batch, *input_shape]``.
        output: ``s^n = F^n(s^{n-1})``, ``[batch, *output_shape]``.
        switches: those of the pass that made ``output``.
        input_noise: ``eps ~ N(0, sigma^2)``, like ``inputs``.
        output_noise: ``eta ~ N(0, sigma^2)``, like ``output``.
        sigma: standard deviation of both.
        clean_switches: unpool the noisy output by ``switches`` too, instead of by those of the noisy pass.

    Returns:
        The gradient; its curvature is that of the second term, ``2 mean_batch sum_positions
        (phi(s^n + eta) - phi(s^n))_o^2``, read off the same samples (``2 sigma^2`` a position where ``phi`` is the
        identity).
    """
    with torch.no_grad():
        noisy_output, noisy_switches = stage.run(inputs + input_noise)
        if mirror.is_linear:
            curvature = output.new_full((output.shape[1],), 2.0 * sigma**2 * output[0, 0].numel())
        else:
            curvature = 2.0 * unit_square_sums(mirror.phi(output + output_noise) - mirror.phi(output))
    with torch.enable_grad():
        clean = mirror(output, switches)
        first = input_noise * (mirror(noisy_output, switches if clean_switches else noisy_switches) - clean)
        second = (mirror(output + output_noise, switches) - clean).square()
        loss = (second - 2.0 * first).flatten(1).sum(1).mean()
    (weight,) = torch.autograd.grad(loss, (mirror.weight,))
    return FeedbackGradient({"weight": weight}, loss.detach(), curvature)


def reconstruction_gradient(
    stage: RunsStage, mirror: Reconstructs, inputs: Tensor, input_noise: Tensor
) -> FeedbackGradient:
    """Gradient of the reconstruction loss of difference target propagation (Lee et al., 2015).

    ``L = mean_batch |s + eps - G(F(s + eps))|^2``, with the switches of the noisy pass.

    Args:
        stage: ``F^n``; its weights get no gradient.
        mirror: ``G^n``.
        inputs: ``s^{n-1}``, ``[batch, *input_shape]``.
        input_noise: ``eps``, like ``inputs``.

    Returns:
        The gradient, without a curvature: the units' outputs are correlated, unlike noise, and a step that looks at
        each unit alone would overshoot.
    """
    noisy = inputs + input_noise
    with torch.no_grad():
        output, switches = stage.run(noisy)
    parameters = dict(mirror.named_parameters())
    with torch.enable_grad():
        loss = (noisy - mirror(output, switches)).flatten(1).square().sum(1).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return FeedbackGradient(dict(zip(parameters, gradients, strict=True)), loss.detach(), None)
