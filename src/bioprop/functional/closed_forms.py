"""Closed forms of the feedback gradients, for stages of one layer and mirrors that are linear in their weights.

With ``G(y) = V^T features(y) + bias`` every difference of two ``G`` is ``V^T`` of a difference of features, and
``<x, V^T d> = <V, weight_gradient(x, d)>``: weight gradients are all that is needed, no pass through ``G`` for the
loss, no graph. For L-DRL that is four products of the layer's size an iteration, where autograd takes eight.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bioprop.functional.feedback_losses import FeedbackGradient, unit_square_sums
from bioprop.functional.layer_products import LayerProducts

Activated = tuple[Tensor, Tensor | None]


class LayerPair(NamedTuple):
    """A stage ``F`` of one layer and its mirror ``G``, as what the closed forms are made of.

    Attributes:
        weight: ``W``.
        products: of the layer: ``W x``, ``V^T d``, weight gradient.
        activate: activation and pooling of ``F``, from ``W x + b`` to output and switches.
        phi: activation of ``G``.
        unpool: from pooled values and switches to the map before pooling.
        phi_is_identity: whether ``phi`` is.
    """

    weight: Tensor
    products: LayerProducts
    activate: Callable[[Tensor], Activated]
    phi: Callable[[Tensor], Tensor]
    unpool: Callable[[Tensor, Tensor | None], Tensor]
    phi_is_identity: bool

    def noisy_features(self, affine: Tensor) -> Activated:
        """``phi(F)`` before unpooling, and the switches, out of what ``F`` is activated from."""
        output, switches = self.activate(affine)
        return self.phi(output), switches


class CleanPass(NamedTuple):
    """What a batch leaves unchanged: ``W`` prepared, ``W x + b``, ``y``, its switches, ``phi(y)`` and that unpooled."""

    prepared: Tensor
    affine: Tensor
    output: Tensor
    switches: Tensor | None
    phi: Tensor
    features: Tensor


@torch.no_grad()
def clean_pass(pair: LayerPair, affine: Tensor, output: Tensor, switches: Tensor | None) -> CleanPass:
    """Prepare the closed forms for one batch.

    Args:
        pair: stage and mirror.
        affine: ``W x + b``.
        output: ``y``.
        switches: of the same pass.
    """
    phi = pair.phi(output)
    return CleanPass(pair.products.prepare(pair.weight), affine, output, switches, phi, pair.unpool(phi, switches))


@torch.no_grad()
def ldrl_closed_form(
    pair: LayerPair,
    clean: CleanPass,
    feedback: Tensor,
    input_noise: Tensor,
    output_noise: Tensor,
    sigma: float,
    clean_switches: bool = False,
    antithetic: bool = False,
) -> FeedbackGradient:
    """Gradient of the L-DRL loss (Ernoult et al., 2022), as `feedback_losses.ldrl_gradient` defines it.

    ``D1 = U_n phi(y_n) - U_c phi(y)`` and ``D2 = U_c (phi(y + eta) - phi(y))`` with the unpoolings ``U`` of the noisy
    and the clean pass; gradient ``2/batch (wgrad(V^T D2, D2) - wgrad(eps, D1))``.

    Args:
        pair: stage and mirror.
        clean: by `clean_pass`.
        feedback: ``V``.
        input_noise: ``eps``, in the form the products take.
        output_noise: ``eta``, like the stage's output.
        sigma: standard deviation of both.
        clean_switches: unpool the noisy output by the clean pass's switches.
        antithetic: average the first term over ``eps`` and ``-eps``, which share the product ``W eps``.

    Returns:
        Gradient, loss and curvature.
    """
    products, batch = pair.products, len(input_noise)
    change = products.forward(input_noise, clean.prepared)
    first = _features_change(pair, clean, change, clean_switches)
    if antithetic:
        first = (first - _features_change(pair, clean, -change, clean_switches)).mul_(0.5)
    step = pair.phi(clean.output + output_noise).sub_(clean.phi)
    second = pair.unpool(step, clean.switches)
    back = products.backward(second, products.prepare(feedback))
    toward = products.weight_gradient(input_noise, first)
    gradient = products.weight_gradient(back, second)
    # <V, wgrad(eps, D1)> and <V, wgrad(V^T D2, D2)> are the two terms of the loss
    loss = (torch.sum(feedback * gradient) - 2.0 * torch.sum(feedback * toward)) / batch
    if pair.phi_is_identity:
        curvature = step.new_full((step.shape[1],), 2.0 * sigma**2 * step[0, 0].numel())
    else:
        curvature = 2.0 * unit_square_sums(step)
    return FeedbackGradient({"weight": gradient.sub_(toward).mul_(2.0 / batch)}, loss, curvature)


def _features_change(pair: LayerPair, clean: CleanPass, change: Tensor, clean_switches: bool) -> Tensor:
    """``U_n phi(y_n) - U_c phi(y)`` out of the change of what the stage is activated from."""
    phi, switches = pair.noisy_features(clean.affine + change)
    if clean_switches:
        return pair.unpool(phi.sub_(clean.phi), clean.switches)
    return pair.unpool(phi, switches).sub_(clean.features)


@torch.no_grad()
def reconstruction_closed_form(
    pair: LayerPair,
    weight: Tensor,
    affine: Tensor,
    feedback: Tensor,
    feedback_bias: Tensor | None,
    inputs: Tensor,
    input_noise: Tensor,
) -> FeedbackGradient:
    """Gradient of the reconstruction loss (Lee et al., 2015), as `feedback_losses.reconstruction_gradient` defines it.

    With the residual ``r = s + eps - G(F(s + eps))`` and ``D = features(F(s + eps))``: ``-2/batch wgrad(r, D)``.

    Args:
        pair: stage and mirror.
        weight: ``W`` prepared by the products.
        affine: ``W s + b``.
        feedback: ``V``.
        feedback_bias: bias of the mirror, one value a channel or input unit.
        inputs: ``s``, in the form the products take.
        input_noise: ``eps``, likewise.
    """
    products, batch = pair.products, len(inputs)
    features = pair.unpool(*pair.noisy_features(affine + products.forward(input_noise, weight)))
    missing = inputs + input_noise - products.backward(features, products.prepare(feedback))
    gradients: dict[str, Tensor] = {}
    if feedback_bias is not None:
        missing -= feedback_bias.view(-1, *[1] * (missing.dim() - 2))
        gradients["bias"] = missing.sum([axis for axis in range(missing.dim()) if axis != 1]).mul_(-2.0 / batch)
    gradients["weight"] = products.weight_gradient(missing, features).mul_(-2.0 / batch)
    return FeedbackGradient(gradients, missing.square().sum() / batch, None)
