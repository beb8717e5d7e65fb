"""Gradients as values: nothing here touches ``.grad``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def backprop_gradients(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    mean_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of the mean loss with respect to every trainable parameter.

    Args:
        network: any module from images to logits.
        images: ``[batch, channels, height, width]``.
        labels: ``[batch]``.
        mean_loss: of the logits and the labels, a mean over the batch.

    Returns:
        The gradient by parameter name, of those the forward pass uses, and the logits ``[batch, classes]``.
    """
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        logits: Tensor = network(images)
        loss = mean_loss(logits, labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    used = {name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    return used, logits.detach()


def input_gradient(stage: Callable[[Tensor], Tensor], inputs: Tensor, error: Tensor) -> Tensor:
    """``J^T error``: what an error at a stage's output is at its input, by the transposed Jacobian.

    Args:
        stage: ``F^n``.
        inputs: ``s^{n-1}``, ``[batch, *input_shape]``.
        error: like the stage's output.
    """
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        output = stage(inputs)
    return torch.autograd.grad(output, inputs, error)[0]


def stage_gradients(module: nn.Module, outputs: Sequence[Tensor], errors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients that stay within their stage: each stage's error reaches its own parameters only.

    Args:
        module: whose trainable parameters get a gradient.
        outputs: of every stage, each computed from inputs that are cut off from the stage below.
        errors: the derivative of the loss with respect to each output, in its shape.

    Returns:
        The gradient by parameter name; frozen parameters have none.
    """
    trained = [(output, error) for output, error in zip(outputs, errors, strict=True) if output.requires_grad]
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not parameters:
        return {}
    gradients = torch.autograd.grad(
        [output for output, _ in trained], list(parameters.values()), [error for _, error in trained]
    )
    return dict(zip(parameters, gradients, strict=True))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and every part of it back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def preserve_buffers(module: nn.Module) -> Iterator[None]:
    """Put copies in the places of the buffers, so that passes in training mode move no statistics of batch norm.

    The buffers themselves are not even written to: a graph made before, which refers to them, can still be used.
    """
    owners = [
        (owner, name, buffer) for owner in module.modules() for name, buffer in owner.named_buffers(recurse=False)
    ]
    try:
        for owner, name, buffer in owners:
            setattr(owner, name, buffer.detach().clone())
        yield
    finally:
        for owner, name, buffer in owners:
            setattr(owner, name, buffer)


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Put buffers and random generators back afterwards, so that a measurement leaves no trace.

    Without it a forward pass in training mode would move batch-norm statistics and draw dropout masks.
    """
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with preserve_buffers(module), torch.random.fork_rng(devices=devices):
        yield
