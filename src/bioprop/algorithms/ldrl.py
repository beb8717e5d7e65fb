"""L-DRL: layer-wise difference target propagation with the difference reconstruction loss."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable

from bioprop.algorithms.layerwise_feedback import FeedbackStep, LayerwiseFeedback
from bioprop.algorithms.random_streams import NoiseStream
from bioprop.errors import UserError
from bioprop.functional.activations import MirrorName
from bioprop.functional.closed_forms import clean_pass, ldrl_closed_form
from bioprop.functional.feedback_losses import FeedbackGradient, FeedbackObjective, ldrl_gradient
from bioprop.functional.layered_feedback import composed_ldrl_gradient, layered_ldrl_gradient
from bioprop.functional.precision import float32_products, products_are_reduced
from bioprop.functional.speed import DEFAULT_SPEED, Speed
from bioprop.networks.layer_pairs import layer_pair, noise_shape
from bioprop.networks.mirrors import LayerMirror, Mirror
from bioprop.networks.network import Network
from bioprop.networks.residual_mirrors import LayeredMirror
from bioprop.networks.stages import Stage, StagePass
from bioprop.removed import refuses_removed

SwitchesOf = Literal["noisy", "clean"]
NoiseAt = Literal["layer", "stage"]


@refuses_removed()
class LDRL(LayerwiseFeedback):
    """Layer-wise feedback training towards the transposed Jacobian (Ernoult et al., ICML 2022).

    For each stage n >= 2 and some iterations a batch: draw noise ``eps``, ``eta`` of standard deviation ``sigma``, then
    descend ``mean_batch[ -2 <eps, G(F(s^{n-1} + eps)) - G(s^n)> + |G(s^n + eta) - G(s^n)|^2 ]`` in the feedback
    weights. Its minimiser is ``J_G = J_F^T`` (Jacobian Matching Condition), under which the forward update tends to
    the BP gradient as ``beta -> 0`` (Gradient Matching Property).

    Hyperparameters of feedback training are one value for all stages or exactly one for each stage n >= 2.

    Args:
        network: the forward network.
        beta: step of the output target along the gradient, above 0.
        noise: ``sigma``, in units of the activations, above 0.
        feedback_lr: for ``normalized`` the fraction ``eta`` of a Newton step, in (0, 1]; for ``sgd`` the learning rate.
        iterations: feedback iterations a batch, 0 to leave a stage's feedback as it was drawn.
        switches: whose max-pool switches unpool the noisy output: those of the ``clean`` pass (ours) or of the
            ``noisy`` one, as published. Noise flips some switches, and each flip moves a whole activation, not a small
            difference: this biases the published loss, however small the noise, away from ``J_G = J_F^T``. Likewise
            the inner slopes of a block with ``noise_at="stage"``.
        mirror: ``exact`` (ours) or ``paper``, the authors' form of the feedback operator.
        feedback_step: ``normalized`` (ours: by the loss's curvature, no momentum) or ``sgd``, as published.
        feedback_momentum: of ``sgd``.
        noise_at: how the feedback of a stage of several layers (a residual block) is trained: by noise around each
            ``layer`` (ours) or around the ``stage`` as a whole, as published, which needs ``sgd``. Only the former has
            ``V = W`` for its one minimiser: factors that cancel between two layers leave the whole as it is.
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
        feedback_lr: float | tuple[float, ...] = 0.05,
        iterations: int | tuple[int, ...] = 20,
        switches: SwitchesOf = "clean",
        mirror: MirrorName = "exact",
        feedback_step: FeedbackStep = "normalized",
        feedback_momentum: float = 0.9,
        noise_at: NoiseAt = "layer",
        speed: Speed = DEFAULT_SPEED,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(
            network,
            beta=beta,
            noise=noise,
            feedback_lr=feedback_lr,
            feedback_momentum=feedback_momentum,
            feedback_step=feedback_step,
            iterations=iterations,
            mirror=mirror,
            optimizer=optimizer,
            scheduler=scheduler,
            speed=speed,
            switches=switches,
            noise_at=noise_at,
        )
        if switches not in get_args(SwitchesOf):
            raise UserError(f"switches {switches!r} is not known: choose one of {', '.join(get_args(SwitchesOf))}")
        if noise_at not in get_args(NoiseAt):
            raise UserError(f"noise_at {noise_at!r} is not known: choose one of {', '.join(get_args(NoiseAt))}")
        self.noise_at = noise_at
        for name, _, mirror_of_stage in self.mirrored_stages():
            if feedback_step == "normalized" and not self._has_curvature(mirror_of_stage):
                raise UserError(
                    f"noise_at stage has no curvature for each of {name}'s several feedback weights, which the "
                    "normalized step divides by: use feedback_step: sgd, or noise_at: layer"
                )
        self._clean_switches = switches == "clean"

    def feedback_objective(
        self, stage: Stage, mirror: Mirror, clean: StagePass, sigma: float, noise: NoiseStream
    ) -> FeedbackObjective:
        """The L-DRL loss, on fresh noise at the stage's input and output."""
        if isinstance(mirror, LayeredMirror) and self._by_layers(mirror):
            layers, noise_shapes = mirror.layers(stage, clean, self.speed.bfloat16)
            return lambda iteration: layered_ldrl_gradient(layers, noise.draw(iteration, sigma, *noise_shapes), sigma)
        shapes = noise_shape(stage, clean.inputs), clean.output.shape
        pair = layer_pair(stage, mirror, self.speed)
        if pair is None or clean.affine is None or not isinstance(mirror, LayerMirror):
            return self._by_autograd(stage, mirror, clean, sigma, noise, shapes)
        weight = pair.products.prepare(pair.weight)
        kept = clean_pass(pair, clean.affine, clean.output, clean.switches)

        def in_closed_form(iteration: int) -> FeedbackGradient:
            eps, eta = noise.draw(iteration, sigma, *shapes)
            return ldrl_closed_form(pair, weight, kept, mirror.weight, eps, eta, sigma, self._clean_switches)

        return in_closed_form

    def _by_autograd(
        self,
        stage: Stage,
        mirror: Mirror,
        clean: StagePass,
        sigma: float,
        noise: NoiseStream,
        shapes: tuple[Sequence[int], Sequence[int]],
    ) -> FeedbackObjective:
        """The same loss for any kind of stage.

        It subtracts whole passes, clean from noisy, where the closed form sends only the noise through the products:
        both are in float32 whatever the precision, or most of a small difference would be rounding.
        """
        exact = partial(float32_products, clean.inputs.device)
        output, switches = clean.output, clean.switches
        if products_are_reduced():
            with exact():
                output, switches = stage.run(clean.inputs)
        output = output.detach()

        def gradient_at(iteration: int) -> FeedbackGradient:
            eps, eta = noise.draw(iteration, sigma, *shapes)
            values = clean.inputs, output, switches, eps.view(clean.inputs.shape), eta
            with exact():
                if isinstance(mirror, LayerMirror):
                    return ldrl_gradient(stage, mirror, *values, sigma, self._clean_switches)
                return composed_ldrl_gradient(stage, mirror, *values, self._clean_switches)

        return gradient_at

    def _by_layers(self, mirror: LayeredMirror) -> bool:
        return self.noise_at == "layer" or not mirror.is_composed

    def _has_curvature(self, mirror: Mirror) -> bool:
        return isinstance(mirror, LayerMirror) or (isinstance(mirror, LayeredMirror) and self._by_layers(mirror))
