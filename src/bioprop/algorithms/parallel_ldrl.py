"""Parallel L-DRL: the feedback of all stages trained at once."""

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable

from bioprop.algorithms.ldrl import LDRL, Auto, SwitchesOf
from bioprop.feedback.noise import SecondNoise
from bioprop.feedback.speed import DEFAULT_SPEED, Speed
from bioprop.feedback.training import FeedbackStep
from bioprop.functional.activations import MirrorName
from bioprop.networks.network import Network
from bioprop.ranges import count
from bioprop.removed import refuses_removed


@refuses_removed()
class ParallelLDRL(LDRL):
    """L-DRL with one step of all feedback weights a batch, from several samples of noise.

    A variant in the program of Ernoult et al. (ICML 2022), not in their paper. Loss, second noise and targets are those
    of `LDRL`. There, in one iteration and with independent noise, the mean over ``samples`` draws takes the place of
    many noisy steps; with an echo, whose noise vanishes at the solution, a single draw will do.

    Hyperparameters of feedback training are one value for all stages or exactly one for each stage n >= 2.

    Args:
        network: the forward network.
        beta: step of the output target along the gradient, above 0.
        second_noise: ``echo``, ``expected`` or ``independent`` (as published), see `LDRL`.
        noise: ``sigma``, in units of the activations, above 0; ``auto``: see `LDRL`.
        feedback_lr: for ``normalized`` the fraction ``eta`` of a Newton step, in (0, 1]; for ``sgd`` the learning rate;
            ``auto``: see `LDRL`.
        iterations: steps a batch, 0 to leave a stage's feedback as it was drawn; ``auto``: see `LDRL`.
        samples: draws of the noise that the gradient of a step is the mean of.
        switches: whose max-pool switches unpool the noisy output, see `LDRL`.
        mirror: ``exact`` (ours) or ``paper``, the authors' form of the feedback operator.
        feedback_step: ``normalized`` (ours: by the loss's curvature, no momentum) or ``sgd``.
        feedback_momentum: of ``sgd``.
        speed: how the gradients are computed; changes rounding, not the method.
        optimizer: makes the optimizer of the forward weights.
        scheduler: makes its learning-rate schedule, stepped once an epoch; None for a constant rate.

    Raises:
        UserError: if a hyperparameter is out of its range, a list has the wrong length, or a stage has no mirror.
    """

    def __init__(
        self,
        network: Network,
        beta: float = 0.05,
        second_noise: SecondNoise = "echo",
        noise: Auto | float | tuple[float, ...] = "auto",
        feedback_lr: Auto | float | tuple[float, ...] = "auto",
        iterations: Auto | int | tuple[int, ...] = "auto",
        samples: int = 1,
        switches: SwitchesOf = "clean",
        mirror: MirrorName = "exact",
        feedback_step: FeedbackStep = "normalized",
        feedback_momentum: float = 0.9,
        speed: Speed = DEFAULT_SPEED,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(
            network,
            beta=beta,
            second_noise=second_noise,
            noise=noise,
            feedback_lr=feedback_lr,
            iterations=iterations,
            switches=switches,
            mirror=mirror,
            feedback_step=feedback_step,
            feedback_momentum=feedback_momentum,
            speed=speed,
            optimizer=optimizer,
            scheduler=scheduler,
        )
        self.feedback_training.samples = count("samples", samples, 1)
