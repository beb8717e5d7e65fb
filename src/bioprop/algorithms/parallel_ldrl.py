"""Parallel L-DRL: the feedback of all stages trained at once."""

from collections.abc import Mapping, Sequence

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from bioprop.algorithms.layerwise_feedback import FeedbackStep
from bioprop.algorithms.ldrl import LDRL, Auto, SwitchesOf
from bioprop.algorithms.ldrl_objectives import SecondNoise
from bioprop.algorithms.settings import check_range, number
from bioprop.functional.activations import MirrorName
from bioprop.functional.feedback_losses import FeedbackGradient
from bioprop.functional.feedback_steps import mean_gradient, normalized_steps
from bioprop.functional.speed import DEFAULT_SPEED, Speed
from bioprop.networks.network import Network
from bioprop.networks.stages import StagePass


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
        self.samples = int(number("samples", samples, whole=True))
        check_range("samples", [self.samples], 1)

    def _train_feedback(self, passes: Sequence[StagePass]) -> dict[str, Tensor]:
        stages = self.mirrored_stages()
        course: dict[str, list[Tensor]] = {name: [] for name, _, _ in stages}
        passes = passes[1:]
        owners = self._owners(passes)
        counts = {
            name: self.iterations_of(name, mirror, clean)
            for (name, _, mirror), clean in zip(stages, passes, strict=True)
            if self._trains_here(name, owners)
        }
        with torch.no_grad():
            objectives = {
                name: self.feedback_objective(name, stage, mirror, clean, self._noise(place, clean))
                for place, ((name, stage, mirror), clean) in enumerate(zip(stages, passes, strict=True))
                if counts.get(name)
            }
            for iteration in range(max(counts.values(), default=0)):
                draws = range(iteration * self.samples, (iteration + 1) * self.samples)
                gradients = {
                    name: mean_gradient(objective, draws)
                    for name, objective in objectives.items()
                    if iteration < counts[name]
                }
                self._step_all_stages(gradients := self._averaged(gradients))
                for name, stage, mirror in stages:
                    if name in gradients:
                        course[name].append(gradients[name].loss)
                        self._tell_observers(name, stage, mirror, iteration, gradients[name].loss)
        self.streams.next_batch()
        losses = {name: torch.stack(each).mean() for name, each in course.items() if each}
        return self._exchange(losses, owners)

    def _step_all_stages(self, gradients: Mapping[str, FeedbackGradient]) -> None:
        """Take one step of the feedback weights of all stages together."""
        for (name, _, mirror), lr in zip(self.mirrored_stages(), self.feedback_lr, strict=True):
            if name in gradients and self._feedback_optimizer is None:
                normalized_steps(dict(mirror.named_parameters()), gradients[name], lr)
            elif name in gradients:
                self._hand_over(mirror, gradients[name])
        if self._feedback_optimizer is not None:
            self._feedback_optimizer.step()
            self._feedback_optimizer.zero_grad()
