"""Losses that train feedback weights, and their gradients by autograd, for stages of any kind.

The closed forms of `bioprop.feedback.ldrl` are held against these.

**The second noise of L-DRL.** Its loss (Ernoult et al., 2022) has one noise ``eps`` at the stage's input and another,
``eta``, at its output. Only the first term needs to see ``F``; the second is there to give the feedback weights the
decay that balances it, and ``eta`` is ours to choose:

- ``independent``, as published: a draw of its own (`ldrl_gradient`);
- ``expected``: integrated out (`expected_gradient`). What is left is local, Hebb's product and a decay by a quantity
  of the unit itself;
- ``echo``: what ``G`` itself answers to ``eps`` (`echo_gradient`). Not local, but without noise at the solution.

The mean gradient of all three, to first order in the noise, is that of ``sigma^2 |J_G - J_F^T|^2``. None of them reads
a forward weight: ``F`` is a black box that answers to ``s + eps``.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioprop.networks.layers import unit_square_sums
from bioprop.networks.mirrors import LayerMirror, Mirror
from bioprop.networks.stages import Stage


class FeedbackGradient(NamedTuple):
    """Gradient of a feedback loss with respect to the parameters of ``G^n``, the loss, and a scale for the step.

    Attributes:
        parameters: gradient by name of the parameter, in its shape; those whose gradient is exactly zero are left out.
        loss: the loss, a scalar.
        curvature: ``D_o >= 0`` by name of the weight, one value for each unit or channel that the weight leaves
            (``[units]``) or for each of its taps: the curvature of the loss along it. None where the loss offers no
            cheap estimate.
    """

    parameters: dict[str, Tensor]
    loss: Tensor
    curvature: Mapping[str, Tensor] | None


#: From the number of an iteration to the gradient of a stage's feedback loss on fresh noise.
FeedbackObjective = Callable[[int], FeedbackGradient]


def ldrl_gradient(
    stage: Stage,
    mirror: Mirror,
    inputs: Tensor,
    output: Tensor,
    switches: Any,
    input_noise: Tensor,
    output_noise: Tensor,
    clean_switches: bool = False,
) -> FeedbackGradient:
    """Gradient of the layer-wise difference reconstruction loss (Ernoult et al., 2022), for any stage.

    ``L = mean_batch[ -2 <eps, G(F(s + eps)) - G(F(s))> + |G(F(s) + eta) - G(F(s))|^2 ]``, through every ``G`` in it.
    To first order in the noise this is ``sigma^2 (|J_G - J_F^T|^2 - |J_F|^2)``: its minimiser is ``J_G = J_F^T``.
    The bias cancels in both differences, so its gradient is exactly zero.

    Args:
        stage: ``F^n``; its weights get no gradient.
        mirror: ``G^n``.
        inputs: ``s^{n-1}``, ``[batch, *input_shape]``.
        output: ``s^n = F^n(s^{n-1})``, ``[batch, *output_shape]``.
        switches: what the pass that made ``output`` handed out.
        input_noise: ``eps ~ N(0, sigma^2)``, like ``inputs``.
        output_noise: ``eta ~ N(0, sigma^2)``, like ``output``.
        clean_switches: give the clean pass's to ``G(F(s + eps))`` too, instead of those of the noisy pass.

    Returns:
        The gradient and the loss, without a curvature: of an operator of several layers, one for each weight would not
        add up to that of a step along all of them. For one of a single layer there is `curvature_of_samples`.
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


@torch.no_grad()
def curvature_of_samples(mirror: LayerMirror, output: Tensor, output_noise: Tensor, sigma: float) -> Tensor:
    """``2 mean_batch sum_positions (phi(s^n + eta) - phi(s^n))_o^2``: of the second term, from its noise.

    Args:
        mirror: ``G^n``, of one layer.
        output: ``s^n``, ``[batch, *output_shape]``.
        output_noise: ``eta ~ N(0, sigma^2)``, like ``output``.
        sigma: standard deviation; ``2 sigma^2`` a position is the curvature where ``phi`` is the identity.

    Returns:
        ``[units]``.
    """
    phi = mirror.activation.phi
    if mirror.activation.is_linear:
        return output.new_full((output.shape[1],), 2.0 * sigma**2 * output[0, 0].numel())
    return 2.0 * unit_square_sums(phi(output + output_noise) - phi(output))


def echo_gradient(
    stage: Stage,
    mirror: Mirror,
    inputs: Tensor,
    output: Tensor,
    switches: Any,
    input_noise: Tensor,
) -> FeedbackGradient:
    """Gradient of the L-DRL loss with an echo for its second noise, for any stage (ours).

    Descends ``mean_batch[ -2 <eps, G(F(s + eps)) - G(s^n + echo)> ]`` in the weights of ``G``, where ``echo = J_G^T
    eps`` is the vector-Jacobian product of ``G`` at ``s^n``, held constant.

    Why it is the same rule: to first order in the noise the mean gradient of the published loss is ``sigma^2`` times
    that of ``|J_G|^2 - 2 tr(J_G J_F)``. The second part is the first term's, as published. The first is ``E |J_G
    eta|^2``, whose gradient for a given ``eta`` is that of ``2 <J_G eta, [J_G eta]>`` with the bracket constant. With
    ``eps`` in the place of ``[J_G eta]`` and ``echo`` in that of ``eta`` it becomes ``2 <eps, J_G echo>``, whose mean
    ``2 sigma^2 tr(J_G [J_G^T])`` has the same gradient. Together ``2 <eps, J_G [(J_G^T - J_F) eps]>``: **the error of
    every single sample is proportional to** ``(J_F - J_G^T) eps``, and vanishes where ``J_G = J_F^T``. It is a control
    variate whose mean is known.

    What it is not: a local rule. The noise travels up through the weights of ``G``, which nothing local can do, so
    results with it are those of the published rule with very many samples. All of ``G`` is by the switches of the clean
    pass: one that the noise flips would move a whole activation, which a single sample does not average out.

    Args:
        stage: ``F^n``, a black box.
        mirror: ``G^n``.
        inputs: ``s^{n-1}``, ``[batch, *input_shape]``.
        output: ``s^n = F^n(s^{n-1})``, ``[batch, *output_shape]``.
        switches: what the pass that made ``output`` handed out.
        input_noise: ``eps``, like ``inputs``; of any distribution, see `bioprop.feedback.noise`.

    Returns:
        The gradient and the loss, without a curvature. The loss is an estimate of ``sigma^2 (|J_G|^2 - 2 tr(J_G
        J_F))``, whose least value is ``-sigma^2 |J_F|^2``.
    """
    with torch.no_grad():
        noisy_output, _ = stage.run(inputs + input_noise)
    parameters = mirror.difference_parameters()
    with torch.enable_grad():
        # a view of the leaf, since what counts the operations of modules cannot watch a leaf here
        point = output.detach().requires_grad_().view_as(output)
        (echo,) = torch.autograd.grad(mirror(point, switches), point, input_noise)
        first = mirror.difference(output, noisy_output - output, switches)
        second = mirror.difference(output, echo, switches)
        descended = (2.0 * input_noise * (second - first)).flatten(1).sum(1).mean()
    gradients = torch.autograd.grad(descended, list(parameters.values()))
    with torch.no_grad():
        loss = echo.flatten(1).square().sum(1).mean() - 2.0 * (input_noise * first).flatten(1).sum(1).mean()
    return FeedbackGradient(dict(zip(parameters, gradients, strict=True)), loss, None)


def curvature_by_autograd(
    mirror: LayerMirror, output: Tensor, switches: Tensor | None, variance: float | Tensor, images: int, by_taps: bool
) -> Tensor:
    """Curvature of ``sigma^2 |J_G|^2`` in the feedback weights, as `bioprop.feedback.ldrl.curvature_of_units` has it.

    Args:
        mirror: ``G^n``.
        output: ``s^n``, ``[batch, *output_shape]``.
        switches: those of the pass that made it.
        variance: ``sigma^2``.
        images: of the batch that count, the first ones.
        by_taps: for each weight, which counts where it meets the image, instead of for each unit.

    Returns:
        ``[units]``, or in the shape of the weight.
    """
    with torch.no_grad():
        slope, squares = _squared_slopes(mirror, output, switches)
    if not by_taps:
        return 2.0 * variance * unit_square_sums(slope[:images])
    with torch.enable_grad():
        squared_weight = torch.ones_like(mirror.weight, requires_grad=True)
        jacobian = mirror.project(squares[:images], weight=squared_weight).flatten(1).sum(1).mean()
    (curvature,) = torch.autograd.grad(jacobian, squared_weight)
    return 2.0 * variance * curvature


def _squared_slopes(mirror: LayerMirror, output: Tensor, switches: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``phi'(s^n)``, zero where unpooling drops the value, and its square unpooled."""
    places, slope = mirror.locate(switches), mirror.activation.slope(output)
    if places is not None and places.kept is not None:
        slope = slope * places.kept
    return slope, mirror.unpool(slope.square(), places)


def expected_gradient(
    stage: Stage,
    mirror: LayerMirror,
    inputs: Tensor,
    output: Tensor,
    switches: Tensor | None,
    input_noise: Tensor,
    variance: float | Tensor,
) -> FeedbackGradient:
    """Gradient of the L-DRL loss with its second noise integrated out, for a mirror of one layer (ours).

    Descends ``mean_batch[ -2 <eps, G(F(s + eps)) - G(s^n)> + sigma^2 |J_G|^2 ]``: to first order, the mean of ``|G(s^n
    + eta) - G(s^n)|^2`` over ``eta`` is ``sigma^2 |J_G|^2``. For ``G(y) = V^T U phi(y)`` that is the sum of ``sigma^2
    phi'(y)^2 V^2`` over pool windows and the taps that fall on the input. So its gradient is a decay of every weight by
    the variance of its unit's ``phi(y + eta)``, which the unit knows; the first term's is Hebb's product of noise and
    response. Both are local, and the noise of the first term is all that is left at the minimiser.

    Args:
        stage: ``F^n``, a black box.
        mirror: ``G^n``.
        inputs: ``s^{n-1}``, ``[batch, *input_shape]``.
        output: ``s^n = F^n(s^{n-1})``, ``[batch, *output_shape]``.
        switches: those of the pass that made ``output``.
        input_noise: ``eps``, like ``inputs``.
        variance: ``sigma^2`` of both noises.

    Returns:
        The gradient and the loss, without a curvature.
    """
    with torch.no_grad():
        noisy_output, _ = stage.run(inputs + input_noise)
        _, squares = _squared_slopes(mirror, output, switches)
    with torch.enable_grad():
        first = mirror(noisy_output, switches) - mirror(output, switches)
        second = variance * mirror.project(squares, weight=mirror.weight.square())
        loss = (second - 2.0 * input_noise * first).flatten(1).sum(1).mean()
    (weight,) = torch.autograd.grad(loss, (mirror.weight,))
    return FeedbackGradient({"weight": weight}, loss.detach(), None)


def reconstruction_gradient(stage: Stage, mirror: Mirror, inputs: Tensor, input_noise: Tensor) -> FeedbackGradient:
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
