"""DTP: difference target propagation with feedback trained to reconstruct."""

from typing import Literal, get_args

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable

from bioprop.algorithms.layerwise_feedback import LayerwiseFeedback
from bioprop.algorithms.random_streams import NoiseStream
from bioprop.errors import UserError
from bioprop.functional.closed_forms import reconstruction_closed_form
from bioprop.functional.feedback_losses import FeedbackGradient, FeedbackObjective, reconstruction_gradient
from bioprop.functional.speed import DEFAULT_SPEED, Speed
from bioprop.networks.layer_pairs import layer_pair, noise_shape
from bioprop.networks.mirrors import LayerMirror, Mirror
from bioprop.networks.network import Network
from bioprop.networks.outer_mirrors import activation_of, build_outer_mirror
from bioprop.networks.stages import Stage, StagePass

ReconstructingMirrorName = Literal["exact", "paper", "outer"]
PenultimateTarget = Literal["feedback", "gradient"]


class DTP(LayerwiseFeedback):
    """Difference target propagation (Lee, Zhang, Fischer & Bengio, ECML 2015).

    For each stage n >= 2 and some iterations a batch: draw noise ``eps``, then descend the reconstruction loss
    ``mean_batch |s^{n-1} + eps - G(F(s^{n-1} + eps))|^2`` in the feedback weights, which makes ``G`` an inverse of
    ``F``. Targets follow ``t^{n-1} = s^{n-1} + G(t^n) - G(s^n)``. The update is not the gradient, nor near it.

    Lee et al.'s own form is ``mirror="outer"`` with ``penultimate_target="gradient"`` on tanh stages. Without the
    difference correction this is `TargetPropagation`.

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
        scheduler: makes its learning-rate schedule, stepped once an epoch; None for a constant rate.

    Raises:
        UserError: if a hyperparameter is out of its range, a list has the wrong length, or a stage has no mirror.
    """

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
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if mirror not in get_args(ReconstructingMirrorName):
            known = ", ".join(get_args(ReconstructingMirrorName))
            raise UserError(f"mirror {mirror!r} is not known: choose one of {known}")
        if penultimate_target not in get_args(PenultimateTarget):
            known = ", ".join(get_args(PenultimateTarget))
            raise UserError(f"penultimate_target {penultimate_target!r} is not known: choose one of {known}")
        super().__init__(
            network,
            beta=beta,
            noise=noise,
            feedback_lr=feedback_lr,
            feedback_momentum=feedback_momentum,
            feedback_step="sgd",
            iterations=iterations,
            mirror=mirror,
            optimizer=optimizer,
            scheduler=scheduler,
            speed=speed,
            gradient_stages=1 if penultimate_target == "gradient" else 0,
        )

    def _build_mirror(self, below: Stage, stage: Stage, form: str) -> Mirror:
        if form != "outer":
            return super()._build_mirror(below, stage, form)
        # hands out values in the range of the stage below
        return build_outer_mirror(stage, activation_of(below))

    def feedback_objective(
        self, name: str, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
    ) -> FeedbackObjective:
        """The reconstruction loss, on fresh noise at the stage's input."""
        sigma = self.setting_of(name, self.noise)
        shape = noise_shape(stage, clean.inputs)
        pair = layer_pair(stage, mirror, self.speed)

        def by_autograd(iteration: int) -> FeedbackGradient:
            (eps,) = noise.draw(iteration, sigma, shape)
            return reconstruction_gradient(stage, mirror, clean.inputs, eps.view(clean.inputs.shape))

        if pair is None or clean.affine is None or not isinstance(mirror, LayerMirror):
            return by_autograd
        weight, inputs = pair.products.prepare(pair.weight), pair.products.shape_inputs(clean.inputs)
        affine = clean.affine

        def in_closed_form(iteration: int) -> FeedbackGradient:
            (eps,) = noise.draw(iteration, sigma, shape)
            return reconstruction_closed_form(pair, weight, affine, mirror.weight, mirror.bias, inputs, eps)

        return in_closed_form
