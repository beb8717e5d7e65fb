"""The pass through a chain of stages, and the gradients that stay within a stage."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bioprop.functional.gradients import stage_gradients
from bioprop.networks.network import Network
from bioprop.networks.stages import StagePass


def run_stages(network: Network, images: Tensor) -> list[StagePass]:
    """Run every stage once, each cut off from the one below.

    Args:
        network: the stages.
        images: ``[batch, channels, height, width]``.

    Returns:
        The pass of every stage, from the input to the output.
    """
    passes: list[StagePass] = []
    inputs = images
    with torch.enable_grad():
        for _, stage in network.stages():
            output, switches = stage.run(inputs.detach())
            passes.append(StagePass(inputs.detach(), None, output, switches))
            inputs = output
    return passes


def local_gradients(network: Network, passes: Sequence[StagePass], errors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients that stay within their stage: each stage's error reaches its own parameters only.

    Args:
        network: the stages.
        passes: of every stage, by `run_stages`.
        errors: the derivative of the loss with respect to each stage's output, in its shape.

    Returns:
        The gradient by name of parameter; frozen parameters have none.
    """
    return stage_gradients(network, [each.output for each in passes], errors)
