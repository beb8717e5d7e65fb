"""What the methods of target propagation share: feedback weights, the loop that trains them, the forward phase."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from bioprop.algorithms.base import Algorithm, Gradients
from bioprop.algorithms.random_streams import RandomStreams
from bioprop.algorithms.settings import check_range, number, per_stage
from bioprop.errors import UserError
from bioprop.functional.activations import MirrorName
from bioprop.functional.angles import angle_degrees
from bioprop.functional.feedback_losses import FeedbackGradient
from bioprop.functional.feedback_steps import normalized_step
from bioprop.functional.gradients import stage_gradients
from bioprop.functional.targets import output_difference
from bioprop.networks.mirrors import Mirror, build_mirror
from bioprop.networks.network import Network
from bioprop.networks.stages import LayerStage, Stage, StageOutput

FeedbackStep = Literal["sgd", "normalized"]


class FeedbackIteration(NamedTuple):
    """One iteration of feedback training, as observers see it.

    Attributes:
        stage: name of the stage whose feedback weights were stepped.
        iteration: number of the iteration within the batch, from 0.
        loss: feedback loss before the step, a scalar tensor on the device.
        angle: degrees between forward and feedback weight after the step, likewise.
    """

    stage: str
    iteration: int
    loss: Tensor
    angle: Tensor


class TargetPropagation(Algorithm):
    """Difference target propagation: subclasses say how feedback weights are trained.

    A training step is: phase 1, `train_feedback`; phase 2, targets from the output down and one local gradient a
    stage. The gradient of the local loss ``mean_batch 1/2 |F^n(s^{n-1}) - t^n|^2`` carries a factor ``beta``, so the
    effective forward learning rate is the optimizer's times ``beta``.
    """

    def __init__(
        self,
        network: Network,
        beta: float,
        noise: float | Sequence[float],
        feedback_lr: float | Sequence[float],
        feedback_momentum: float,
        feedback_step: FeedbackStep,
        iterations: int | Sequence[int],
        mirror: MirrorName,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        **settings: str,
    ) -> None:
        super().__init__(network, optimizer, scheduler)
        if not isinstance(network, Network):
            raise UserError(
                f"target propagation needs a chain of stages, and {type(network).__name__} is none: make it a "
                "bioprop.networks.Network"
            )
        self.network: Network
        mirrored = network.stages()[1:]  # G^1 would reach the input: nothing needs it
        names = [name for name, _ in mirrored]
        self.beta = number("beta", beta)
        self.feedback_momentum = number("feedback_momentum", feedback_momentum)
        self.noise = per_stage("noise", noise, names)
        self.feedback_lr = per_stage("feedback_lr", feedback_lr, names)
        self.iterations = per_stage("iterations", iterations, names, whole=True)
        self.feedback_step = feedback_step
        check_range("beta", [self.beta], 0.0, low_allowed=False)
        check_range("noise", self.noise, 0.0, low_allowed=False)
        check_range("feedback_lr", self.feedback_lr, 0.0, low_allowed=False)
        check_range("iterations", self.iterations, 0)
        check_range("feedback_momentum", [self.feedback_momentum], 0.0)
        if self.feedback_momentum >= 1.0:
            raise UserError(f"feedback_momentum is {feedback_momentum}, but momentum at or above 1 never comes to rest")
        if feedback_step not in get_args(FeedbackStep):
            raise UserError(f"feedback_step {feedback_step!r} is not known: choose one of {get_args(FeedbackStep)}")
        if feedback_step == "normalized" and max(self.feedback_lr, default=0.0) > 1.0:
            raise UserError(
                f"feedback_lr {max(self.feedback_lr)} is above 1, beyond which the normalized feedback step "
                "overshoots: use a value in (0, 1], such as 0.1"
            )
        self.feedback = nn.ModuleDict({name: build_mirror(stage, mirror) for name, stage in mirrored})
        self.streams = RandomStreams()
        self._observers: list[Callable[[FeedbackIteration], None]] = []
        self._feedback_optimizer = self._make_feedback_optimizer()
        self.remember(
            beta=self.beta,
            noise=self.noise,
            feedback_lr=self.feedback_lr,
            iterations=self.iterations,
            mirror=mirror,
            feedback_step=feedback_step,
            feedback_momentum=self.feedback_momentum,
            **settings,
        )

    def mirrored_stages(self) -> list[tuple[str, LayerStage, Mirror]]:
        """Return name, stage and feedback operator of every stage that has one, from the input to the output."""
        stages = self.network.stages()[1:]
        return [(name, cast(LayerStage, stage), cast(Mirror, self.feedback[name])) for name, stage in stages]

    # -- phase 1: the feedback weights ---------------------------------------------------------------------------

    @abstractmethod
    def feedback_gradient(
        self, stage: Stage, mirror: Mirror, inputs: Tensor, clean: StageOutput, sigma: float, generator: torch.Generator
    ) -> FeedbackGradient:
        """Gradient of the method's feedback loss on fresh noise, for one stage.

        Args:
            stage: ``F^n``.
            mirror: ``G^n``.
            inputs: ``s^{n-1}``, ``[batch, *stage.input_shape]``.
            clean: ``s^n`` and the switches of its pass.
            sigma: standard deviation of the noise.
            generator: where the noise comes from, on the device of the inputs.
        """

    def train_feedback(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Phase 1 on one batch: some iterations for each stage, independently of the others.

        Args:
            images: ``[batch, channels, height, width]``.
            labels: not used; feedback training is unsupervised.

        Returns:
            The mean feedback loss over the iterations, by name of stage, for those that have any.
        """
        losses: dict[str, Tensor] = {}
        settings = zip(self.mirrored_stages(), self.noise, self.feedback_lr, self.iterations, strict=True)
        with torch.no_grad():
            clean = self.network.stages()[0][1].run(images)
            for place, ((name, stage, mirror), sigma, lr, iterations) in enumerate(settings):
                inputs, clean = clean.output, stage.run(clean.output)
                generator = self.streams.generator(place, images.device)
                course = []
                for iteration in range(iterations):
                    gradient = self.feedback_gradient(stage, mirror, inputs, clean, sigma, generator)
                    self._step_feedback_weights(mirror, gradient, lr)
                    course.append(gradient.loss)
                    for observe in self._observers:
                        angle = angle_degrees(stage.weight, mirror.weight)
                        observe(FeedbackIteration(name, iteration, gradient.loss, angle))
                if course:
                    losses[name] = torch.stack(course).mean()
        self.streams.next_batch()
        return losses

    def _step_feedback_weights(self, mirror: Mirror, gradient: FeedbackGradient, lr: float) -> None:
        if self._feedback_optimizer is None:
            normalized_step(mirror.weight, gradient, lr)
            return
        mirror.weight.grad = gradient.weight
        if mirror.bias is not None:
            mirror.bias.grad = gradient.bias
        self._feedback_optimizer.step()  # the other stages' gradients are None: they stay as they are
        self._feedback_optimizer.zero_grad()

    @contextmanager
    def observe_feedback(self, observer: Callable[[FeedbackIteration], None]) -> Iterator[None]:
        """Call ``observer`` after every feedback iteration within the context; costs nothing outside of it."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    # -- phase 2: the forward weights ----------------------------------------------------------------------------

    @property
    def gradient_scale(self) -> float:
        """``beta``: the local losses are what the published update descends."""
        return self.beta

    def _gradients(self, images: Tensor, labels: Tensor) -> Gradients:
        states, inputs = [], images
        with torch.enable_grad():
            for _, stage in self.network.stages():
                states.append(stage.run(inputs.detach()))  # every stage is cut off from the one below
                inputs = states[-1].output
        logits = inputs.detach()
        differences = self.target_differences(states, output_difference(logits, labels, self.beta))
        # d/ds of mean_batch 1/2 |s - t|^2 is (s - t)/batch; over beta, for the units of the BP gradient
        errors = [difference / (-self.beta * len(images)) for difference in differences]
        outputs = [state.output for state in states]
        return Gradients(stage_gradients(self.network, outputs, errors), logits)

    @torch.no_grad()
    def target_differences(self, states: Sequence[StageOutput], output: Tensor) -> list[Tensor]:
        """Return ``t^n - s^n`` for every stage, from the input to the output, given the output's.

        Args:
            states: ``s^n`` and the switches of the clean pass, for every stage.
            output: ``t^N - s^N``, ``[batch, classes]``.
        """
        differences = [output]
        for (_, _, mirror), state in zip(self.mirrored_stages()[::-1], states[:0:-1], strict=True):
            differences.append(mirror.difference(state.output, differences[-1], state.switches))
        return differences[::-1]

    # -- feedback weights as a whole -----------------------------------------------------------------------------

    @torch.no_grad()
    def symmetrize_feedback(self) -> None:
        """Copy every forward weight into its feedback weight, ``G^n = (F^n)^T``: a copy, never the same tensor."""
        for _, stage, mirror in self.mirrored_stages():
            mirror.weight.copy_(stage.weight)

    def feedback_angles(self) -> dict[str, float]:
        """Return degrees between each stage's forward and feedback weight, by name of stage."""
        return {
            name: float(angle_degrees(stage.weight, mirror.weight)) for name, stage, mirror in self.mirrored_stages()
        }

    def configure_optimizers(self) -> Any:
        """Add the feedback optimizer behind the forward one, so that checkpoints hold its momentum."""
        optimizers, schedulers = super().configure_optimizers()
        self._feedback_optimizer = self._make_feedback_optimizer()  # a new fit starts without momentum
        return [*optimizers, *([self._feedback_optimizer] if self._feedback_optimizer else [])], schedulers

    def _make_feedback_optimizer(self) -> torch.optim.Optimizer | None:
        """Build the SGD of the feedback weights, one parameter group a stage; None where the step needs none."""
        if self.feedback_step != "sgd" or not self.feedback:
            return None
        groups = [
            {"params": list(mirror.parameters()), "lr": lr}
            for mirror, lr in zip(self.feedback.values(), self.feedback_lr, strict=True)
        ]
        return torch.optim.SGD(groups, momentum=self.feedback_momentum)
