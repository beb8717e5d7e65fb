"""L-DRL's feedback training with the noise integrated out: a tool for study that reads the forward weights."""

from typing import cast

import torch
from torch import Tensor

from bioprop.algorithms.random_streams import NoiseStream
from bioprop.distributed import mean_over_processes
from bioprop.functional.expected_feedback import ExpectedLoss, expected_loss, normals_shape
from bioprop.functional.expected_steps import expected_steps
from bioprop.functional.feedback_steps import CURVATURE_FLOOR
from bioprop.networks.layer_pairs import expected_geometry
from bioprop.networks.mirrors import LayerMirror
from bioprop.networks.stages import LayerStage, Stage, StagePass


def prepare_expected_loss(
    stage: Stage, mirror: LayerMirror, clean: StagePass, sigma: float, noise: NoiseStream, clean_switches: bool
) -> ExpectedLoss:
    """Integrate the noise out of the L-DRL loss of one stage and batch.

    Args:
        stage: a linear or conv stage.
        mirror: its feedback operator.
        clean: its clean pass.
        sigma: standard deviation of the noise.
        noise: where the Gaussian vector of each pool window is drawn from.
        clean_switches: unpool the noisy output by the clean pass's switches.
    """
    layer, geometry = cast(LayerStage, stage), expected_geometry("", stage)
    shape = normals_shape(len(clean.inputs), geometry)
    normals = None if shape is None else noise.draw(0, 1.0, shape)[0]
    affine = layer.affine(clean.inputs) if clean.affine is None else clean.affine
    return expected_loss(
        layer.weight,
        mirror.weight,
        affine,
        clean.output.detach(),
        clean.switches,
        sigma,
        layer.activation,
        mirror.form,
        geometry,
        clean_switches,
        normals,
    )


def average_expected(loss: ExpectedLoss) -> ExpectedLoss:
    """Average the expected loss of a stage over all processes: all of its parts are sums or means over images."""
    A, D, mean_term, mean_loss, curvature = mean_over_processes(loss[:-1])
    return ExpectedLoss(A, D, mean_term, mean_loss, curvature, loss.batch)


def train_expected(
    mirror: LayerMirror,
    loss: ExpectedLoss,
    lr: float,
    iterations: int,
    optimizer: torch.optim.Optimizer | None,
    momentum: float,
) -> Tensor:
    """Take all iterations of a batch at once, by the feedback optimizer's rule or the normalized step.

    Args:
        mirror: whose weight is stepped.
        loss: of the stage and batch.
        lr: learning rate, or fraction of a Newton step.
        iterations: how many.
        optimizer: SGD of the feedback weights, which keeps the momentum; None for the normalized step.
        momentum: of that optimizer.

    Returns:
        The mean of the losses before the steps.
    """
    if optimizer is None:
        rate = lr / (loss.curvature + CURVATURE_FLOOR * loss.curvature.mean())
        return expected_steps(mirror.weight.data, loss, rate, iterations).mean()
    state = optimizer.state[mirror.weight]
    if state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(mirror.weight)
    return expected_steps(mirror.weight.data, loss, lr, iterations, momentum, state["momentum_buffer"]).mean()
