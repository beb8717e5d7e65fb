"""The loss of L-DRL with the noise integrated out: what one stage's feedback weights descend on average.

Over ``eps``, ``eta ~ N(0, sigma^2)``, the difference reconstruction loss (Ernoult et al., ICML 2022; `ldrl_gradient`)
is a quadratic function of the feedback weight ``V``, for ``B`` images

    E L(V) = (1/B) (-2 <V, A> + <V, C V>),    with the gradient (2/B) (C V - A).

**First term.** ``A = E[wgrad(eps, H)]``, ``H`` the change that the noise ``eps`` makes to the features. In one pool
window ``H`` depends on the pre-activations ``c`` of that window alone, and ``c - c0 = sigma L z`` with ``z ~ N(0, 1)``
and ``L L^T`` the autocorrelation of the kernel, taps outside the image left out. As ``(eps, c)`` is Gaussian,
``E[eps_p H_k] = sum_j Cov(eps_p, c_j) T_jk`` with ``T = L^{-T} E[z H^T] / sigma``, hence

    A[tap of k] = sigma^2 sum over windows and places j, k of W[tap of j that meets the same pixel] T_jk.

So much for the switches of the ``noisy`` pass: ``H`` jumps where noise flips them. By ``clean`` switches ``H`` is
``f(max c)``, ``f = phi o rho``, at the clean switch ``k``, and ``T_jk = E[f'(max c); j is the maximum]`` by Stein's
lemma, of which one sample tells far more. Both are estimated from samples of ``z``. Without pooling ``T = E[f'(c)]`` is
known.

**Second term.** Noise at the output changes the features behind ``phi`` independently, with means ``mu`` and variances
``v``: ``C V = wgrad(convT(U mu; V), U mu) + V D``, ``U`` the unpooling, ``D`` the sum of ``v`` over all positions from
which a tap falls on the image.

This reads the forward weight ``W`` and knows the activation: it simulates the mean dynamics of the rule and is no model
of a local one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from bioprop.errors import UserError
from bioprop.functional.activations import MirrorName, feedback_activation, forward_activation
from bioprop.functional.gaussian_moments import feature_moments, mean_slope, through_slope
from bioprop.functional.pool_windows import (
    ConvGeometry,
    WindowClasses,
    by_class,
    choose_places,
    cut_windows,
    join_windows,
    of_windows,
    window_classes,
)
from bioprop.functional.precision import float32_products

Classes = tuple[WindowClasses, WindowClasses]
#: Share of the mean variance that is added to every place's, so that a kernel that sees few pixels can be inverted.
JITTER = 1e-9


class ExpectedLoss(NamedTuple):
    """The expected feedback loss of one stage on one batch, prepared at the feedback weight ``V_0``.

    Attributes:
        A: what pulls ``V``, in its shape.
        D: variances, ``[units, 1, kernel, kernel]`` or ``[units, 1]``.
        mean_term: ``wgrad(convT(U mu; V_0), U mu)``, in the shape of ``V``.
        mean_loss: ``<V_0, mean_term>``, a scalar.
        curvature: ``2 mean_batch sum_positions E[(phi(y + eta) - phi(y))^2]``, ``[units]``, as in `FeedbackGradient`.
        batch: number of images ``B``.
    """

    A: Tensor
    D: Tensor
    mean_term: Tensor
    mean_loss: Tensor
    curvature: Tensor
    batch: int


class _Noise(NamedTuple):
    """Noise of the image as a window of each class sees it: ``[rows, columns, units, places, places]``.

    Attributes:
        factor: ``sigma L``, lower triangular, in double precision. Invertible: a place without noise has a 1 instead.
        spread: the same without that 1.
    """

    factor: Tensor
    spread: Tensor


def check_covered(stage: str, geometry: ConvGeometry, mirror: MirrorName) -> None:
    """Refuse a stage whose expected loss is not known.

    Args:
        stage: what to call it in the error message.
        geometry: its sizes.
        mirror: form of its mirror.

    Raises:
        UserError: if pool windows overlap and unpooling overwrites, so that windows do not contribute separately.
    """
    pool = geometry.pool
    if mirror == "paper" and pool.kernel_size > pool.stride:
        raise UserError(
            f"{stage} pools {pool.kernel_size} pixels every {pool.stride}, and where windows overlap mirror 'paper' "
            "overwrites one with the other, for which the expected feedback loss is not known: use mirror 'exact', "
            "which adds them up, or the sampled loss"
        )


def normals_shape(batch: int, geometry: ConvGeometry, samples: int = 1) -> tuple[int, ...] | None:
    """Shape of the standard normals that `expected_loss` asks for, None for a stage that needs none.

    One vector for each window of each image and sample, ``[samples, batch, places, pooled height, pooled width]``,
    shared by all channels. That makes each channel's rows of ``A`` no less accurate, but lets their errors go together:
    small maps want more samples. One sample has 200 to 500 times (``noisy`` switches) or 1,500 to 12,000 times
    (``clean``) less variance than one of the plain gradient, on the stages of SimpleVGG as drawn and twice as large.
    """
    places = geometry.pool.kernel_size**2
    return (samples, batch, places, *geometry.pooled_size) if places > 1 else None


@torch.no_grad()
def expected_loss(
    weight: Tensor,
    feedback: Tensor,
    affine: Tensor,
    output: Tensor,
    switches: Tensor | None,
    sigma: float,
    activation: str,
    mirror: MirrorName,
    geometry: ConvGeometry,
    clean_switches: bool,
    normals: Tensor | None,
) -> ExpectedLoss:
    """Integrate the noise out of the L-DRL loss of one stage and batch.

    Args:
        weight: forward weight ``W``, ``[units, channels, kernel, kernel]`` or, of a linear stage, ``[units, inputs]``.
        feedback: feedback weight ``V_0`` of the same shape.
        affine: pre-activations of the clean pass, ``[batch, units, *map_size]`` or ``[batch, units]``. Fastest with
            channels last in memory, as ``output`` and ``switches``.
        output: ``y = rho(pool(affine))``, ``[batch, units, *pooled_size]`` or ``[batch, units]``.
        switches: max-pool switches of the clean pass, None without pooling.
        sigma: standard deviation of the noise, above 0.
        activation: name of the forward activation.
        mirror: form of the mirror.
        geometry: sizes; of a linear stage ``ConvGeometry((1, 1), 1)``.
        clean_switches: unpool the noisy output by the clean pass's switches instead of by those of the noisy pass.
        normals: standard normals of `normals_shape`, the one random thing here. ``A`` is unbiased, all else exact up to
            the errors of `gaussian_moments`.

    Raises:
        UserError: if the stage is not covered (`check_covered`), or the activation or form of mirror is not known.
        ValueError: if switches or normals are missing.
    """
    check_covered("a stage that", geometry, mirror)
    batch, units = affine.shape[:2]
    kernel, device, dtype = geometry.kernel_size, weight.device, weight.dtype
    with float32_products(device):
        W = weight.detach().view(units, -1, kernel, kernel)
        affine = affine.detach().to(dtype).view(batch, units, *geometry.map_size)
        output = output.detach().to(dtype).view(batch, units, *geometry.pooled_size)
        classes = window_classes(geometry, 0, dtype, device), window_classes(geometry, 1, dtype, device)
        noise = _noise_of_windows(W, sigma, classes)

        windows = cut_windows(affine, geometry.pool)
        if geometry.pool.kernel_size == 1:
            chosen = torch.ones_like(windows)
            std = of_windows(noise.factor.flatten(3).mT, *classes).to(dtype).unsqueeze(2)
            slopes = mean_slope(activation, mirror, windows, std)
            T = by_class(slopes.sum(2).mT.unsqueeze(-1), *classes)
        elif switches is None or normals is None:
            raise ValueError("the expected loss of a pooled stage needs the switches of the clean pass, and normals")
        else:
            chosen = choose_places(switches, geometry, dtype)
            features = None if clean_switches else feedback_activation(activation, mirror)(output)
            T = _switching_response(windows, features, chosen, normals, noise, activation, mirror, classes)
        A = sigma**2 * _onto_kernel(W, T, classes)

        moments = feature_moments(activation, mirror, output, sigma)
        mean, variance = (each.permute(2, 3, 0, 1).unsqueeze(3) for each in moments)  # [h, w, batch, 1, units]
        D = _sum_over_taps(by_class(_sums_where(variance, chosen).squeeze(2), *classes), classes).unsqueeze(1)
        square = torch.addcmul(moments.variance, moments.mean, moments.mean).sum((0, 2, 3))
        V = feedback.detach()
        if activation == "identity":
            mean_term = torch.zeros_like(V)  # so are the means
        else:
            mean_term = _mean_term(V, join_windows(mean, chosen, geometry), geometry)
        return ExpectedLoss(
            A.view_as(V),
            D if V.dim() > 2 else D.view(units, 1),
            mean_term,
            (V * mean_term).sum(),
            2 / batch * square,
            batch,
        )


def _noise_of_windows(W: Tensor, sigma: float, classes: Classes) -> _Noise:
    """Factorize the covariance of the pre-activations in a window; ``W`` is ``[units, channels, kernel, kernel]``."""
    rows, columns = (each.shared.double() for each in classes)
    (n_rows, k), n_columns, units, kernel = rows.shape[:2], len(columns), len(W), W.shape[-1]
    taps = W.flatten(2).double()
    products = (taps.mT @ taps).view(units, *[kernel] * 4)  # of two taps, summed over channels
    products = products.permute(0, 1, 3, 2, 4).reshape(units, kernel**2, kernel**2)
    covariance = rows.flatten(3).flatten(0, 2) @ products @ columns.flatten(3).flatten(0, 2).mT
    covariance = covariance.view(units, n_rows, k, k, n_columns, k, k).permute(1, 4, 0, 2, 5, 3, 6)
    covariance = sigma**2 * covariance.reshape(n_rows, n_columns, units, k * k, k * k)
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    silent = variances.le(0.0).double()
    extra = JITTER * variances.mean(-1, keepdim=True) + silent
    factor = torch.linalg.cholesky(covariance + extra.diag_embed())
    return _Noise(factor, factor - silent.diag_embed())


def _switching_response(
    windows: Tensor,
    features: Tensor | None,
    chosen: Tensor,
    normals: Tensor,
    noise: _Noise,
    activation: str,
    mirror: MirrorName,
    classes: Classes,
) -> Tensor:
    """Estimate ``T``, summed over the batch and the windows of a class: ``[rows, columns, units, place j, place k]``.

    Args:
        windows: clean pre-activations, ``[h, w, batch, places, units]``.
        features: ``phi(y)`` of the clean pass; None to unpool by the clean switches.
        chosen: 1 at the clean switch, in the shape of ``windows``.
        normals: of `normals_shape`.
        noise: of the windows of each class.
        activation: name of the forward activation.
        mirror: form of the mirror.
        classes: of rows and columns.
    """
    h, w, batch, places, units = windows.shape
    flat, dtype = (h * w, batch, places * units), windows.dtype
    spread = of_windows(noise.spread.permute(0, 1, 4, 3, 2), *classes).to(dtype).reshape(h * w, places, places * units)
    clean = None if features is None else chosen * features.permute(2, 3, 0, 1).unsqueeze(3)
    rho, phi = forward_activation(activation), feedback_activation(activation, mirror)
    total = torch.zeros_like(noise.factor)
    for sample in normals.to(dtype):
        z = sample.permute(2, 3, 0, 1).reshape(h * w, batch, places)
        c = torch.baddbmm(windows.view(flat), z, spread).view_as(windows)
        top = c.amax(3, keepdim=True)
        won = c.eq_(top)  # in place, so that ones and zeros are floats
        if clean is None:
            won.mul_(through_slope(activation, mirror, top))
            total += by_class(_sums_where(won, chosen), *classes).permute(0, 1, 3, 2, 4)
        else:
            change = won.mul_(phi(rho(top))).sub_(clean).view(flat)
            response = by_class((z.mT @ change).view(h, w, places, places, units), *classes).permute(0, 1, 4, 2, 3)
            total += torch.linalg.solve_triangular(noise.factor.mT, response.double(), upper=True)
    return total / len(normals)


def _sums_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Sum values at place ``j`` over the images whose clean switch is at ``k``: ``[h, w, place j, units, place k]``."""
    product = torch.empty_like(values)
    return torch.stack([torch.mul(values, each, out=product).sum(2) for each in chosen.chunk(chosen.shape[3], 3)], -1)


def _onto_kernel(W: Tensor, T: Tensor, classes: Classes) -> Tensor:
    """Sum ``W[tap of j] T_jk`` into the tap of ``k`` that meets the same pixel: ``[units, channels, taps]``."""
    rows, columns = (each.shared.to(T.dtype).flatten(3).flatten(0, 2) for each in classes)
    (n_rows, n_columns, units), k, kernel = T.shape[:3], classes[0].shared.shape[1], W.shape[-1]
    T = T.reshape(n_rows, n_columns, units, k, k, k, k).permute(2, 0, 3, 5, 1, 4, 6)
    T = T.reshape(units, n_rows * k * k, n_columns * k * k)
    response = (rows.mT @ T @ columns).view(units, *[kernel] * 4)  # row of j's tap, of k's; column of j's, of k's
    response = response.permute(0, 1, 3, 2, 4).reshape(units, kernel**2, kernel**2)
    return W.flatten(2) @ response.to(W.dtype)


def _sum_over_taps(values: Tensor, classes: Classes) -> Tensor:
    """Sum ``[rows, columns, units, places]`` over places whence a tap sees the image: ``[units, kernel, kernel]``."""
    rows, columns = (torch.einsum("rjjtt->rjt", each.shared) for each in classes)
    k = rows.shape[1]
    return torch.einsum("rcoij,rit,cju->otu", values.view(*values.shape[:3], k, k), rows, columns)


def _mean_term(V: Tensor, mean: Tensor, geometry: ConvGeometry) -> Tensor:
    """``wgrad(convT(mean; V), mean)``: half the gradient of ``|convT(mean; V)|^2``, summed over the batch."""
    if V.dim() == 2:
        rows = mean.flatten(1)
        return F.linear(rows.t(), F.linear(rows, V.t()).t())
    back = F.conv_transpose2d(mean, V, None, geometry.stride, geometry.padding, geometry.output_padding)
    term: Tensor = conv2d_weight(back, V.shape, mean, geometry.stride, geometry.padding)  # type: ignore[no-untyped-call]
    return torch.empty_like(V).copy_(term)  # in the memory format of all that it will be added to
