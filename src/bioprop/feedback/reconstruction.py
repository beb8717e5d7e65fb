"""Losses that train feedback to reconstruct, and their gradients.

One stage at a time (Lee et al., ECML 2015) in closed form, which `bioprop.feedback.losses` has by autograd; or all
stages above at once (Meulemans et al., NeurIPS 2020).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bioprop.feedback.losses import FeedbackGradient, FeedbackObjective, reconstruction_gradient
from bioprop.feedback.noise import NoiseStream
from bioprop.feedback.training import FeedbackTraining
from bioprop.networks.layers import FeedbackLayer
from bioprop.networks.mirrors import LayerMirror, Mirror
from bioprop.networks.stages import Stage, StagePass


class ReconstructionTraining(FeedbackTraining):
    """Feedback training by the reconstruction loss of one stage at a time (Lee et al., 2015)."""

    def objective(
        self, name: str, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
    ) -> FeedbackObjective:
        """Prepare the reconstruction loss of one stage and batch, on fresh noise at the stage's input."""
        shape = stage.noise_shape(clean.inputs)
        layers = mirror.layers(stage, clean) if isinstance(mirror, LayerMirror) else None

        def gradient_at(draw: int) -> FeedbackGradient:
            (eps,) = noise.draw(self.noise[name], shape)
            if layers is not None and isinstance(mirror, LayerMirror):
                return FeedbackGradient(*layer_reconstruction_gradient(layers.layers[0], mirror.bias, eps), None)
            return reconstruction_gradient(stage, mirror, clean.inputs, eps.view(clean.inputs.shape))

        return gradient_at


@torch.no_grad()
def layer_reconstruction_gradient(
    layer: FeedbackLayer, bias: Tensor | None, input_noise: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of the reconstruction loss (Lee et al., 2015), as `losses.reconstruction_gradient` defines it.

    With the residual ``r = s + eps - G(F(s + eps))`` and ``D = features(F(s + eps))``: ``-2/batch wgrad(r, D)``.

    Args:
        layer: on a batch.
        bias: of the mirror, one value a channel or input unit.
        input_noise: ``eps``, like the layer's inputs.

    Returns:
        Gradients of ``weight`` and ``bias`` by name, and loss.
    """
    batch = len(input_noise)
    output, switches = layer.respond(input_noise)
    features = layer.unpool(layer.activation.phi(output), switches)
    missing = layer.inputs + input_noise - layer.project(features)
    gradients: dict[str, Tensor] = {}
    if bias is not None:
        missing -= bias.view(-1, *[1] * (missing.dim() - 2))
        gradients["bias"] = missing.sum([axis for axis in range(missing.dim()) if axis != 1]).mul_(-2.0 / batch)
    gradients["weight"] = layer.layer.weight_gradient(missing, features).mul_(-2.0 / batch)
    return gradients, missing.square().sum() / batch


def difference_reconstruction_gradient(
    decode: Callable[[Tensor], Tensor],
    parameters: Mapping[str, Tensor],
    noisy: Tensor,
    clean: Tensor,
    noise: Tensor,
    sigma: float,
    decay: float,
) -> FeedbackGradient:
    """Gradient of the difference reconstruction loss, DRL (Meulemans et al., 2020, section 4).

    ``L_n = 1/sigma^2 mean_batch |g^diff(f_{n->N}(s^n + sigma eps)) - (s^n + sigma eps)|^2 + decay |Q|^2`` with the
    difference correction ``g^diff(z) = g(z) + s^n - g(z_clean)``, in which ``s^n`` cancels:
    ``L_n = 1/sigma^2 mean_batch |g(z) - g(z_clean) - sigma eps|^2 + decay |Q|^2``.

    To first order in the noise, its minimiser among linear maps is the damped pseudo-inverse
    ``Q = mean(J)^T (mean(J J^T) + decay I)^-1`` of the Jacobian ``J = ds^N/ds^n``.

    Args:
        decode: ``g``, from what ``noisy`` is to ``[batch, *shape of s^n]``.
        parameters: of ``g`` by name: ``Q``, biases included.
        noisy: ``z``: the output for ``s^n + sigma eps``, or what stages of feedback further up made of it.
        clean: ``z_clean``: the same for ``s^n``.
        noise: ``sigma eps``, ``[batch, *shape of s^n]``.
        sigma: standard deviation of the noise.
        decay: of the parameters, 0 for none; the damping of the pseudo-inverse.

    Returns:
        The gradient by name of parameter, through both ``g``, and the loss; without a curvature.
    """
    with torch.enable_grad():
        residual = decode(noisy) - decode(clean) - noise
        loss = _mean_square(residual) / sigma**2 + decay * _square(parameters)
    return _differentiate(loss, parameters)


def plain_reconstruction_gradient(
    decode: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor], noisy: Tensor, states: Tensor, decay: float
) -> FeedbackGradient:
    """Gradient of plain reconstruction, DDTP-control's loss (Meulemans et al., 2020).

    ``L_n = mean_batch |g(f_{n->N}(s^n + sigma eps)) - (s^n + sigma eps)|^2 + decay |Q|^2``: no difference correction,
    no division by ``sigma^2``. Where the stages above cannot be inverted, what ``g`` cannot reconstruct of ``s^n``
    itself outweighs the noise.

    Args:
        decode: ``g``, from the output to ``[batch, *shape of s^n]``.
        parameters: of ``g`` by name: ``Q``, biases included.
        noisy: the output for ``states``.
        states: ``s^n + sigma eps``, ``[batch, *shape of s^n]``.
        decay: of the parameters, 0 for none.

    Returns:
        The gradient by name of parameter, and the loss; without a curvature.
    """
    with torch.enable_grad():
        loss = _mean_square(decode(noisy) - states) + decay * _square(parameters)
    return _differentiate(loss, parameters)


def _mean_square(residual: Tensor) -> Tensor:
    """Mean over the batch of the sum of squares of each sample."""
    return residual.flatten(1).square().sum(1).mean()


def _square(parameters: Mapping[str, Tensor]) -> Tensor:
    """``|Q|^2``, with biases, as the weight decay of the authors' optimizer has it."""
    return torch.stack([value.square().sum() for value in parameters.values()]).sum()


def _differentiate(loss: Tensor, parameters: Mapping[str, Tensor]) -> FeedbackGradient:
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return FeedbackGradient(dict(zip(parameters, gradients, strict=True)), loss.detach(), None)
