"""Closed forms of the feedback gradients, for stages of one layer and mirrors that are linear in their weights.

With ``G(y) = V^T features(y) + bias`` every difference of two ``G`` is ``V^T`` of a difference of features, and
``<x, V^T d> = <V, weight_gradient(x, d)>``: weight gradients are all that is needed, no pass through ``G`` for the
loss, no graph. For L-DRL as published that is four products of the layer's size an iteration, where autograd takes
seven; for its other two second noises (`bioprop.functional.feedback_losses` derives them) three and two.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bioprop.functional.feedback_losses import FeedbackGradient, unit_square_sums
from bioprop.functional.layer_products import LayerProducts
from bioprop.functional.pooling import Places

#: Bytes of one map that a block of samples may have: several maps of that size fit into a processor's last cache.
BLOCK_BYTES = 6 * 2**20


class LayerPair(NamedTuple):
    """A stage ``F`` of one layer and its mirror ``G``, as what the closed forms are made of.

    Attributes:
        weight: ``W``.
        products: of the layer: ``W x``, ``V^T d``, weight gradient.
        activate: activation and pooling of ``F``, from ``W x + b`` to output and switches.
        phi: activation of ``G``.
        slope: its derivative, never above 1.
        locate: from switches to the places that ``unpool`` takes.
        unpool: from pooled values and places to the map before pooling.
        pick: its transpose, from the map before pooling and places to pooled values.
        phi_is_identity: whether ``phi`` is.
        overlap: how many pool windows a position lies in on average; 1 without pooling.
    """

    weight: Tensor
    products: LayerProducts
    activate: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    phi: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    locate: Callable[[Tensor | None], Places | None]
    unpool: Callable[[Tensor, Places | None], Tensor]
    pick: Callable[[Tensor, Places | None], Tensor]
    phi_is_identity: bool
    overlap: float

    def features(self, affine: Tensor) -> tuple[Tensor, Places | None]:
        """``phi(F)`` before unpooling and where it is unpooled to, out of what ``F`` is activated from."""
        output, switches = self.activate(affine)
        return self.phi(output), self.locate(switches)


class CleanPass(NamedTuple):
    """What a batch leaves unchanged: ``W x + b``, ``y``, places of its switches, ``phi(y)`` and that unpooled.

    The last is None where the noisy output is unpooled by the clean pass's switches, too.
    """

    affine: Tensor
    output: Tensor
    places: Places | None
    phi: Tensor
    features: Tensor | None

    def block(self, samples: slice) -> "CleanPass":
        """Return the part that belongs to some samples of the batch."""
        places = None if self.places is None else self.places.block(samples)
        features = None if self.features is None else self.features[samples]
        return CleanPass(self.affine[samples], self.output[samples], places, self.phi[samples], features)


@torch.no_grad()
def clean_pass(
    pair: LayerPair, affine: Tensor, output: Tensor, switches: Tensor | None, clean_switches: bool
) -> CleanPass:
    """Prepare the closed forms for one batch.

    Args:
        pair: stage and mirror.
        affine: ``W x + b``.
        output: ``y``.
        switches: of the same pass.
        clean_switches: whether the noisy output is unpooled by these, instead of by those of the noisy pass.
    """
    phi, places = pair.phi(output), pair.locate(switches)
    return CleanPass(affine, output, places, phi, None if clean_switches else pair.unpool(phi, places))


def blocks(affine: Tensor, fewest: int = 32) -> list[slice]:
    """Cut a batch on a CPU into blocks whose maps stay in its cache: 15 percent faster on LeNet's second stage.

    Args:
        affine: maps of the batch.
        fewest: samples that a block is not cut to less than.
    """
    batch, size = len(affine), affine[0].numel() * affine.element_size()
    samples = batch
    while affine.device.type == "cpu" and samples * size > BLOCK_BYTES and samples > fewest:
        samples = (samples + 1) // 2
    return [slice(start, min(start + samples, batch)) for start in range(0, batch, samples)]


@torch.no_grad()
def ldrl_closed_form(
    pair: LayerPair,
    prepared: Tensor,
    clean: CleanPass,
    feedback: Tensor,
    input_noise: Tensor,
    output_noise: Tensor,
    sigma: float,
) -> FeedbackGradient:
    """Gradient of the L-DRL loss (Ernoult et al., 2022), as `feedback_losses.ldrl_gradient` defines it.

    ``D1 = U_n phi(y_n) - U_c phi(y)`` and ``D2 = U_c (phi(y + eta) - phi(y))`` with the unpoolings ``U`` of the noisy
    and the clean pass; gradient ``2/batch (wgrad(V^T D2, D2) - wgrad(eps, D1))``.

    Args:
        pair: stage and mirror.
        prepared: ``W``, prepared by the products.
        clean: by `clean_pass`.
        feedback: ``V``.
        input_noise: ``eps``, in the form the products take.
        output_noise: ``eta``, like the stage's output.
        sigma: standard deviation of both.

    Returns:
        Gradient, loss and curvature.
    """
    products, batch = pair.products, len(input_noise)
    back_weight = products.prepare(feedback)
    sums: list[Tensor] = []  # over the blocks: gradient, second term of the loss, curvature
    for samples in blocks(clean.affine):
        part, noise = clean.block(samples), input_noise[samples]
        change = products.forward(noise, prepared)
        first = features_change(pair, part, change)
        del change
        step = pair.phi(part.output + output_noise[samples]).sub_(part.phi)
        second = pair.unpool(step, part.places)
        back = products.backward(second, back_weight)
        gradient = products.weight_gradient(back, second).sub_(products.weight_gradient(noise, first))
        found = [gradient, square_sum(back)]
        if not pair.phi_is_identity:
            found.append(unit_square_sums(step).mul_(len(step)))
        sums = found if not sums else [total.add_(term) for total, term in zip(sums, found, strict=True)]
    gradient, second_term, *squares = sums
    # <V, wgrad(V^T D2, D2)> = |V^T D2|^2 is the second term of the loss, -2 <V, wgrad(eps, D1)> the first
    loss = (2.0 * inner(feedback, gradient) - second_term) / batch
    known = feedback.new_full((len(feedback),), 2.0 * sigma**2 * clean.output[0, 0].numel())
    curvature = squares[0].mul_(2.0 / batch) if squares else known
    return FeedbackGradient({"weight": gradient.mul_(2.0 / batch)}, loss, curvature)


@torch.no_grad()
def echo_closed_form(
    pair: LayerPair, prepared: Tensor, clean: CleanPass, feedback: Tensor, input_noise: Tensor, curvature: Tensor
) -> FeedbackGradient:
    """Gradient of the L-DRL loss with the second noise an echo of the first: `feedback_losses.echo_gradient`.

    With ``echo = phi'(y) o U^T conv(eps; V)`` and ``D2 = U (phi(y + echo) - phi(y))``: ``2/batch wgrad(eps, D2 - D1)``,
    ``D2 - D1 = U (phi(y + echo) - phi(y_n))``, since both are unpooled by the clean pass's switches.

    Args:
        pair: stage and mirror.
        prepared: ``W``, prepared by the products.
        clean: by `clean_pass`, of the samples that the noise is for.
        feedback: ``V``.
        input_noise: ``eps``, in the form the products take.
        curvature: of the loss, by `curvature_of_units`.

    Returns:
        Gradient, loss and the curvature.
    """
    products, batch = pair.products, len(input_noise)
    forward_again = products.prepare(feedback)
    sums: list[Tensor] = []  # over the blocks: gradient, half the first and the second term of the loss
    for samples in blocks(clean.affine):
        part, noise = clean.block(samples), input_noise[samples]
        back = products.forward(noise, forward_again)
        picked = pair.pick(back, part.places)
        echo = pair.slope(part.output) * picked
        output, _ = pair.activate(part.affine + products.forward(noise, prepared))
        noisy, after = pair.phi(output), pair.phi(part.output + echo)
        difference = pair.unpool(after - noisy, part.places)
        first = inner(picked.to(noisy.dtype), noisy - part.phi)
        found = [products.weight_gradient(noise, difference), first, square_sum(echo)]
        sums = found if not sums else [total.add_(term) for total, term in zip(sums, found, strict=True)]
    gradient, first, second = sums
    return FeedbackGradient({"weight": gradient.mul_(2.0 / batch)}, (second - 2.0 * first) / batch, curvature)


@torch.no_grad()
def expected_closed_form(
    pair: LayerPair,
    prepared: Tensor,
    clean: CleanPass,
    feedback: Tensor,
    input_noise: Tensor,
    decay: Tensor,
    curvature: Tensor,
) -> FeedbackGradient:
    """Gradient of the L-DRL loss with its second noise integrated out: `feedback_losses.expected_gradient`.

    ``V o decay - 2/batch wgrad(eps, D1)``: Hebb's product of noise and response, and a decay by what the unit knows.

    Args:
        pair: stage and mirror.
        prepared: ``W``, prepared by the products.
        clean: by `clean_pass`, of the samples that the noise is for.
        feedback: ``V``.
        input_noise: ``eps``, in the form the products take.
        decay: by `curvature_of_taps`.
        curvature: of the loss, that or larger.

    Returns:
        Gradient, loss and the curvature.
    """
    products, batch = pair.products, len(input_noise)
    hebb: Tensor | None = None
    for samples in blocks(clean.affine):
        part, noise = clean.block(samples), input_noise[samples]
        found = products.weight_gradient(noise, features_change(pair, part, products.forward(noise, prepared)))
        hebb = found if hebb is None else hebb.add_(found)
    assert hebb is not None
    decayed, hebb = feedback * decay, hebb.mul_(2.0 / batch)
    loss = inner(feedback, 0.5 * decayed - hebb)
    return FeedbackGradient({"weight": decayed - hebb}, loss, curvature)


def curvature_of_units(pair: LayerPair, clean: CleanPass, variance: float | Tensor) -> Tensor:
    """``D_o = 2 sigma^2 mean_batch sum_windows phi'(y)^2``: curvature of ``sigma^2 |J_G|^2`` along a unit's weights.

    Args:
        pair: stage and mirror.
        clean: by `clean_pass`.
        variance: ``sigma^2`` of the noise.

    Returns:
        ``[units]``.
    """
    return 2.0 * variance * unit_square_sums(_kept_slope(pair, clean))


def curvature_of_taps(pair: LayerPair, clean: CleanPass, variance: float | Tensor) -> Tensor:
    """`curvature_of_units` for each tap of the kernel, which counts where it meets the image: ``V o`` it is a gradient.

    ``|J_G|^2`` is a sum over windows and taps of ``phi'(y)^2 V^2``, where the tap falls on a position of the input.

    Returns:
        ``[units, 1, kernel, kernel]`` or ``[units, 1]``.
    """
    squares = pair.unpool(_kept_slope(pair, clean).square_(), clean.places)
    return pair.products.tap_sums(squares).mul_(2.0 * variance / len(clean.output))


def _kept_slope(pair: LayerPair, clean: CleanPass) -> Tensor:
    """``phi'(y)``, zero where unpooling drops the value."""
    slope = pair.slope(clean.output)
    return slope if clean.places is None or clean.places.kept is None else slope * clean.places.kept


def square_sum(values: Tensor) -> Tensor:
    """``sum x^2``, in float32 at least."""
    flat = values.movedim(1, -1).reshape(-1)
    return torch.dot(flat, flat) if flat.dtype is not torch.bfloat16 else flat.float().square().sum()


def features_change(pair: LayerPair, clean: CleanPass, change: Tensor) -> Tensor:
    """``U_n phi(y_n) - U_c phi(y)`` out of the change of what the stage is activated from."""
    phi, places = pair.features(clean.affine + change)
    if clean.features is None:
        return pair.unpool(phi.sub_(clean.phi), clean.places)
    return pair.unpool(phi, places).sub_(clean.features)


def inner(first: Tensor, second: Tensor) -> Tensor:
    """``<a, b>`` of two weights, without a copy where they share the layout of convolutions."""
    flat = [each.movedim(1, -1).reshape(-1) for each in (first, second)]
    return torch.dot(*flat)


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
    features = pair.unpool(*pair.features(affine + products.forward(input_noise, weight)))
    missing = inputs + input_noise - products.backward(features, products.prepare(feedback))
    gradients: dict[str, Tensor] = {}
    if feedback_bias is not None:
        missing -= feedback_bias.view(-1, *[1] * (missing.dim() - 2))
        gradients["bias"] = missing.sum([axis for axis in range(missing.dim()) if axis != 1]).mul_(-2.0 / batch)
    gradients["weight"] = products.weight_gradient(missing, features).mul_(-2.0 / batch)
    return FeedbackGradient(gradients, missing.square().sum() / batch, None)
