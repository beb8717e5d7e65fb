"""L-DRL: layer-wise difference target propagation with the difference reconstruction loss."""

from typing import Any, Literal

import torch
from pytorch_lightning.cli import OptimizerCallable

from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.feedback.ldrl import LDRLTraining, NoiseAt, SwitchesOf
from bioprop.feedback.noise import RandomStreams, SecondNoise
from bioprop.feedback.speed import DEFAULT_SPEED, Speed
from bioprop.feedback.training import FeedbackStep
from bioprop.functional.activations import MirrorName
from bioprop.networks.mirrors import build_mirror
from bioprop.networks.network import Network

Auto = Literal["auto"]


class LDRL(TargetAlgorithm):
    """Layer-wise feedback training towards the transposed Jacobian (Ernoult et al., ICML 2022).

    For each stage n >= 2 and some iterations a batch: draw noise ``eps`` at the stage's input, take a second noise
    ``eta`` at its output, and descend ``mean_batch[ -2 <eps, G(F(s^{n-1} + eps)) - G(s^n)> + |G(s^n + eta) -
    G(s^n)|^2 ]`` in the feedback weights. Its minimiser is ``J_G = J_F^T`` (Jacobian Matching Condition), under which
    the forward update tends to the BP gradient as ``beta -> 0`` (Gradient Matching Property).

    The ``second_noise`` decides what a batch costs; the mean gradient is the same to first order in the noise
    (`bioprop.feedback.losses` derives all three, `bioprop.feedback.noise` the settings ``auto``):

    - ``echo`` (ours): what ``G`` itself answers to ``eps``. The gradient's noise then vanishes where ``J_G = J_F^T``,
      and two iterations a batch do what takes hundreds with independent noise. It never reads a forward weight:
      ``F`` is a black box that answers to ``s + eps``. But it sends noise up through the feedback weights, which no
      local rule can: results with it are those of the published rule with very many samples, not of a local circuit.
    - ``expected`` (ours): integrated out, which leaves a local rule: Hebb's product and a decay. Noisier than the echo.
    - ``independent``: a draw of its own, as published. Needs numbers for noise, rate and iterations.

    Hyperparameters of feedback training are one value for all stages or exactly one for each stage n >= 2.

    Args:
        network: the forward network.
        beta: step of the output target along the gradient, above 0.
        second_noise: ``echo``, ``expected`` or ``independent``, see above.
        noise: ``sigma``, in units of the activations, above 0; ``auto`` for a hundredth of the root mean square of the
            stage's inputs.
        feedback_lr: for ``normalized`` the fraction ``eta`` of a Newton step, in (0, 1]; it is damped as least mean
            squares asks but for independent noise, and ``auto`` is all of it. For ``sgd`` and ``adam`` the learning
            rate.
        iterations: feedback iterations a batch, each on the whole batch, 0 to leave a stage's feedback as it was drawn.
            ``auto`` with an echo: two, on as many images as give a unit two samples for each of its weights; where a
            batch has fewer, the second is along the batch's own activities. ``auto`` with ``expected``: one
            for each direction of a weight that there is to a sample of the batch, four at least.
        switches: whose max-pool switches unpool the noisy output: those of the ``clean`` pass (ours) or of the
            ``noisy`` one, as published. Noise flips some switches, and each flip moves a whole activation, not a small
            difference: this biases the published loss, however small the noise, away from ``J_G = J_F^T``. Likewise
            the inner slopes of a block with ``noise_at="stage"``. Independent noise alone takes ``noisy``.
        mirror: ``exact`` (ours) or ``paper``, the authors' form of the feedback operator.
        feedback_step: ``normalized`` (ours: by the loss's curvature, no momentum), ``sgd``, as published, or ``adam``,
            as in the authors' parallel variant.
        feedback_momentum: of ``sgd``.
        feedback_decay: weight decay of ``adam``.
        noise_at: how the feedback of a stage of several layers (a residual block) is trained: by noise around each
            ``layer`` (ours) or around the ``stage`` as a whole, as published, which needs ``sgd``. Only the former has
            ``V = W`` for its one minimiser: factors that cancel between two layers leave the whole as it is.
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
        beta: float = 0.05,
        second_noise: SecondNoise = "echo",
        noise: Auto | float | tuple[float, ...] = "auto",
        feedback_lr: Auto | float | tuple[float, ...] = "auto",
        iterations: Auto | int | tuple[int, ...] = "auto",
        switches: SwitchesOf = "clean",
        mirror: MirrorName = "exact",
        feedback_step: FeedbackStep = "normalized",
        feedback_momentum: float = 0.9,
        feedback_decay: float = 0.0,
        noise_at: NoiseAt = "layer",
        speed: Speed = DEFAULT_SPEED,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        **settings: Any,
    ) -> None:
        super().__init__(network, beta, optimizer, **settings)
        for name, stage in network.stages()[1:]:
            self.feedback[name] = build_mirror(stage, mirror)
        self.streams = RandomStreams()
        self.feedback_training: LDRLTraining = LDRLTraining(
            second_noise,
            switches,
            noise_at,
            feedback=self.feedback,
            streams=self.streams,
            observers=self._observers,
            noise=noise,
            feedback_lr=feedback_lr,
            iterations=iterations,
            feedback_step=feedback_step,
            feedback_momentum=feedback_momentum,
            speed=speed,
            feedback_decay=feedback_decay,
        )
        self.closed_form = speed.closed_form
