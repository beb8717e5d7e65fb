"""The reconstruction loss of feedback operators that are not linear in their weights: ``G(y) = psi(V^T y + c)``."""

import torch
from torch import Tensor, nn

from bioprop.functional.feedback_losses import FeedbackGradient, RunsStage


def outer_reconstruction_gradient(
    stage: RunsStage, mirror: nn.Module, inputs: Tensor, input_noise: Tensor
) -> FeedbackGradient:
    """Gradient of ``L = mean_batch |s + eps - G(F(s + eps))|^2`` (Lee et al., 2015), whatever the form of ``G``.

    Args:
        stage: ``F^n``; its weights get no gradient.
        mirror: ``G^n``, called with the output and the switches of the noisy pass.
        inputs: ``s^{n-1}``, ``[batch, *input_shape]``.
        input_noise: ``eps``, like ``inputs``.

    Returns:
        The gradient of every parameter of ``G^n``, without a curvature.
    """
    noisy = inputs + input_noise
    with torch.no_grad():
        output, switches = stage.run(noisy)
    parameters = dict(mirror.named_parameters())
    with torch.enable_grad():
        loss = (noisy - mirror(output, switches)).flatten(1).square().sum(1).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return FeedbackGradient(dict(zip(parameters, gradients, strict=True)), loss.detach(), None)
