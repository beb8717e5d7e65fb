"""L-DRL's closed form for several iterations at once: all of it that does not depend on the feedback weight ``V``.

An iteration's gradient is ``2/batch (wgrad(V^T D2, D2) - wgrad(eps, D1))`` (`closed_forms.ldrl_closed_form`), where
``D1`` and ``D2`` follow from the noise and the clean pass alone. So the noise of a group of iterations, one forward
product on the stack of it, one pass of point-wise work and the weight gradients of ``D1`` come first; what is left to
each iteration is ``V^T D2``, one weight gradient and the step of ``V``. The arithmetic is the same, in fewer and larger
pieces: for GPUs, which a batch of small maps does not fill.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bioprop.functional.closed_forms import CleanPass, LayerPair, features_change, inner, square_sum
from bioprop.functional.feedback_losses import FeedbackGradient, FeedbackObjective
from bioprop.functional.pooling import Places

#: Bytes that the largest tensor of a group may have. About ten of that size are held at once, and a recorded CUDA graph
#: keeps its own; maps that fill it alone keep a GPU busy by themselves.
GROUP_BYTES = 64 * 2**20

#: From the number of an iteration and a number of iterations to their noise ``eps``, ``eta``, stacked along the batch.
DrawGroup = Callable[[int, int], Sequence[Tensor]]


class FirstTerms(NamedTuple):
    """What one iteration has ready before it looks at ``V``.

    Attributes:
        gradient: ``wgrad(eps, D1)``, in the shape of the weight.
        second: ``D2``, in the shape of the layer's output.
        curvature: of the loss, ``[units]``.
    """

    gradient: Tensor
    second: Tensor
    curvature: Tensor


def group_size(iterations: int, *largest: Tensor) -> int:
    """How many iterations to prepare at once: groups as even as they can be, in the memory that one may take.

    Args:
        iterations: of a batch, all in all.
        largest: tensors that every iteration of a group has its own copy or likeness of.
    """
    each = max(tensor.numel() * tensor.element_size() for tensor in largest)
    groups = -(-iterations // max(1, GROUP_BYTES // max(1, each)))
    return -(-iterations // max(1, groups))


def repeated(clean: CleanPass, times: int) -> CleanPass:
    """Stack a clean pass on itself, for that many iterations on the same batch."""

    def stack(values: Tensor) -> Tensor:
        return torch.cat([values] * times)  # keeps the layout, which `repeat` does not

    places = clean.places
    if places is not None:
        places = Places(stack(places.switches), None if places.kept is None else stack(places.kept))
    return CleanPass(stack(clean.affine), stack(clean.output), places, stack(clean.phi), stack(clean.features))


@torch.no_grad()
def first_terms(
    pair: LayerPair,
    prepared: Tensor,
    clean: CleanPass,
    input_noise: Tensor,
    output_noise: Tensor,
    iterations: int,
    sigma: float,
    clean_switches: bool = False,
    antithetic: bool = False,
) -> list[FirstTerms]:
    """Prepare a group of iterations of `closed_forms.ldrl_closed_form`.

    Args:
        pair: stage and mirror.
        prepared: ``W``, prepared by the products.
        clean: `repeated` as often as there are iterations, like all that follows.
        input_noise: ``eps``, ``[iterations * batch, ...]`` in the form the products take.
        output_noise: ``eta``, ``[iterations * batch, *output_shape]``.
        iterations: of the group.
        sigma: standard deviation of both.
        clean_switches: see `closed_forms.ldrl_closed_form`.
        antithetic: likewise.
    """
    products = pair.products
    change = products.forward(input_noise, prepared)
    first = features_change(pair, clean, change, clean_switches)
    if antithetic:
        first = (first - features_change(pair, clean, -change, clean_switches)).mul_(0.5)
    del change
    gradients = products.weight_gradients(input_noise, first, iterations)
    del first
    step = pair.phi(clean.output + output_noise).sub_(clean.phi)
    if pair.phi_is_identity:
        curvature = gradients[0].new_full((iterations, step.shape[1]), 2.0 * sigma**2 * step[0, 0].numel())
    else:
        squares = step.view(iterations, -1, *step.shape[1:]).square()
        curvature = squares.sum([1, *range(3, squares.dim())]).mul_(2.0 / squares.shape[1])
    second = pair.unpool(step, clean.places).chunk(iterations)
    return [FirstTerms(*each) for each in zip(gradients, second, curvature.unbind(), strict=True)]


@torch.no_grad()
def ldrl_after(pair: LayerPair, ready: FirstTerms, feedback: Tensor) -> FeedbackGradient:
    """Complete one iteration's gradient, loss and curvature.

    Args:
        pair: stage and mirror.
        ready: by `first_terms`.
        feedback: ``V``, as it is at this iteration.
    """
    products, batch = pair.products, len(ready.second)
    back = products.backward(ready.second, products.prepare(feedback))
    gradient = products.weight_gradient(back, ready.second).sub_(ready.gradient)
    # as in `ldrl_closed_form`
    loss = (2.0 * inner(feedback, gradient) - square_sum(back)) / batch
    return FeedbackGradient({"weight": gradient.mul_(2.0 / batch)}, loss, ready.curvature)


def ldrl_in_groups(
    pair: LayerPair,
    prepared: Tensor,
    clean: CleanPass,
    feedback: Tensor,
    draw: DrawGroup,
    iterations: int,
    group: int,
    sigma: float,
    clean_switches: bool = False,
    antithetic: bool = False,
) -> FeedbackObjective:
    """The L-DRL loss of one batch, as a function of the iterations' numbers that prepares a group when it runs out.

    Args:
        pair: stage and mirror.
        prepared: ``W``, prepared by the products.
        clean: by `clean_pass`.
        feedback: ``V``, stepped in place between the iterations.
        draw: noise of iterations that follow each other.
        iterations: that will be asked for, in order: nothing is prepared beyond them.
        group: how many are prepared at once, at most.
        sigma: standard deviation of the noise.
        clean_switches: see `closed_forms.ldrl_closed_form`.
        antithetic: likewise.
    """
    stacked, batch = repeated(clean, group), len(clean.affine)
    ready: dict[int, FirstTerms] = {}

    def gradient_at(iteration: int) -> FeedbackGradient:
        if iteration not in ready:
            count = max(1, min(group, iterations - iteration))
            part = stacked.block(slice(0, count * batch))
            eps, eta = draw(iteration, count)
            found = first_terms(pair, prepared, part, eps, eta, count, sigma, clean_switches, antithetic)
            ready.update(enumerate(found, iteration))
        return ldrl_after(pair, ready.pop(iteration), feedback)

    return gradient_at
