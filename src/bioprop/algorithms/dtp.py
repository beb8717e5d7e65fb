"""DTP: difference target propagation with feedback trained to reconstruct."""

from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from pytorch_lightning.cli import OptimizerCallable

from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.errors import UserError
from bioprop.feedback.noise import RandomStreams
from bioprop.feedback.reconstruction import ReconstructionTraining
from bioprop.feedback.speed import DEFAULT_SPEED, Speed
from bioprop.networks.mirrors import build_mirror
from bioprop.networks.network import Network
from bioprop.networks.outer_mirrors import activation_of, build_outer_mirror

ReconstructingMirrorName = Literal["exact", "paper", "outer"]
PenultimateTarget = Literal["feedback", "gradient"]


class DTP(TargetAlgorithm):
    """Difference target propagation (Lee, Zhang, Fischer & Bengio, ECML 2015).

    For each stage n >= 2 and some iterations a batch: draw noise ``eps``, then descend the reconstruction loss
    ``mean_batch |s^{n-1} + eps - G(F(s^{n-1} + eps))|^2`` in the feedback weights, which makes ``G`` an inverse of
    ``F``. Targets follow ``t^{n-1} = s^{n-1} + G(t^n) - G(s^n)``. The update is not the gradient, nor near it.

    Lee et al.'s own form of targets and feedback is ``mirror="outer"`` with ``penultimate_target="gradient"`` on tanh
    stages. Their forward steps have other sizes: there the output stage descends the plain gradient, as here, but
    hidden stages that of ``mean_batch |F^n(s^{n-1}) - t^n|^2``, which is ``2 beta`` times what the optimizer is handed
    here, with ``beta = lr_0 / batch`` for their target rate ``lr_0``. Without the difference correction this is
    `TargetPropagation`.

    Hyperparameters of feedback training are one value for all stages or exactly one for each stage that has feedback.

    Args:
        network: the forward network.
        beta: step of the output target along the gradient, above 0.
        noise: standard deviation of ``eps``, in units of the activations, above 0.
        feedback_lr: learning rate of the feedback weights (SGD).
        iterations: feedback iterations a batch, 0 to leave a stage's feedback as it was drawn.
        mirror: the form of the feedback operator: ``exact`` (ours) and ``paper`` (of Ernoult et al., 2022) apply an
            activation and then the weights; ``outer`` (of Lee et al.) the weights and then the activation of the stage
            below.
        penultimate_target: where the last hidden stage has its target from: from the output's through ``feedback``, or
            as Lee et al. have it from the ``gradient``, ``t^{N-1} = s^{N-1} - beta dL/ds^{N-1}``. With the latter the
            output stage has no feedback: lists of hyperparameters are one value shorter.
        feedback_momentum: of the feedback weights' SGD.
        speed: how the gradients are computed; changes rounding, not the method.
        optimizer: makes the optimizer of the forward weights.
        settings: the other arguments of `Algorithm`.

    Raises:
        UserError: if a hyperparameter is out of its range, a list has the wrong length, or a stage has no mirror.
    """

    recordable = True

    def __init__(
        self,
        network: Network,
        beta: float = 0.5,
        noise: float | tuple[float, ...] = 0.1,
        feedback_lr: float | tuple[float, ...] = 1e-3,
        iterations: int | tuple[int, ...] = 1,
        mirror: ReconstructingMirrorName = "exact",
        penultimate_target: PenultimateTarget = "feedback",
        feedback_momentum: float = 0.9,
        speed: Speed = DEFAULT_SPEED,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.025, momentum=0.9, weight_decay=2e-4
        ),
        **settings: Any,
    ) -> None:
        if mirror not in get_args(ReconstructingMirrorName):
            known = ", ".join(get_args(ReconstructingMirrorName))
            raise UserError(f"mirror {mirror!r} is not known: choose one of {known}")
        if penultimate_target not in get_args(PenultimateTarget):
            known = ", ".join(get_args(PenultimateTarget))
            raise UserError(f"penultimate_target {penultimate_target!r} is not known: choose one of {known}")
        super().__init__(network, beta, optimizer, **settings)
        pairs = list(pairwise(network.stages()))
        for (_, below), (name, stage) in pairs[:-1] if penultimate_target == "gradient" else pairs:
            if mirror == "outer":  # hands out values in the range of the stage below
                self.feedback[name] = build_outer_mirror(stage, activation_of(below))
            else:
                self.feedback[name] = build_mirror(stage, mirror)
        self.streams = RandomStreams()
        self.feedback_training: ReconstructionTraining = ReconstructionTraining(
            self.feedback,
            self.streams,
            self._observers,
            noise=noise,
            feedback_lr=feedback_lr,
            iterations=iterations,
            feedback_step="sgd",
            feedback_momentum=feedback_momentum,
            speed=speed,
        )
        self.closed_form = speed.closed_form
