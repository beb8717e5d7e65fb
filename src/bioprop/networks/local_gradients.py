"""The pass through a chain of stages, and the gradients that stay within a stage."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bioprop.functional.activations import SLOPES
from bioprop.functional.closed_forms import blocks
from bioprop.functional.gradients import stage_gradients
from bioprop.functional.pooling import unpool_adding
from bioprop.networks.layer_pairs import layer_products
from bioprop.networks.network import Network
from bioprop.networks.stages import ConvStage, LinearStage, Stage, StagePass


def run_stages(network: Network, images: Tensor, closed_form: bool = True) -> list[StagePass]:
    """Run every stage once, each cut off from the one below.

    Args:
        network: the stages.
        images: ``[batch, channels, height, width]``.
        closed_form: form no graph where `local_gradients` needs none.

    Returns:
        The pass of every stage, from the input to the output.
    """
    passes: list[StagePass] = []
    inputs = images
    for _, stage in network.stages():
        if closed_form and isinstance(stage, LinearStage | ConvStage) and layer_products(stage) is not None:
            with torch.no_grad():
                affine = stage.affine(inputs)
                passes.append(StagePass(inputs, affine, *stage.activate(affine)))
        else:
            with torch.enable_grad():
                passes.append(StagePass(inputs, None, *stage.run(inputs)))
        inputs = passes[-1].output.detach()
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
    gradients: dict[str, Tensor] = {}
    for (name, stage), each, error in zip(network.stages(), passes, errors, strict=True):
        if each.affine is None:
            found = stage_gradients(stage, [each.output], [error])
        else:
            found = _closed_form(stage, each, error)
        gradients |= {f"{name}.{parameter}": gradient for parameter, gradient in found.items()}
    return gradients


@torch.no_grad()
def _closed_form(stage: Stage, each: StagePass, error: Tensor) -> dict[str, Tensor]:
    """``wgrad(x, P^T(rho'(a) error))`` with the slope read off the output, for stages of one layer."""
    products = layer_products(stage)
    if products is None or each.affine is None or not isinstance(stage, LinearStage | ConvStage):
        raise TypeError(f"a {type(stage).__name__} has no closed form")
    axes = [axis for axis in range(error.dim()) if axis != 1]
    gradients: dict[str, Tensor] = {}
    # maps before pooling are made for a block at a time: on SimpleVGG's first stage, 8 instead of 28 ms
    for samples in blocks(each.affine, fewest=8):
        part = error[samples] * SLOPES[stage.activation](each.output[samples])
        found: dict[str, Tensor] = {}
        if stage.weight.requires_grad:
            maps = part
            if isinstance(stage, ConvStage) and stage.pool is not None and each.switches is not None:
                maps = unpool_adding(part, each.switches[samples], stage.pool, stage.map_size)
            found["weight"] = products.weight_gradient(products.shape_inputs(each.inputs[samples]), maps)
        if stage.bias is not None and stage.bias.requires_grad:
            found["bias"] = part.sum(axes)
        gradients = {name: gradients[name].add_(new) if gradients else new for name, new in found.items()}
    return {f"{stage.layer_name}.{name}": gradient for name, gradient in gradients.items()}
