"""The common part of the methods of Meulemans et al. (2020): feedback that undoes all stages above; its schedule."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from bioprop.algorithms.base import Gradients
from bioprop.algorithms.checkpoints import describe_optimization
from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.distributed import process_rank
from bioprop.errors import UserError
from bioprop.feedback.losses import FeedbackGradient
from bioprop.feedback.noise import RandomStreams
from bioprop.feedback.sharing import average_gradients
from bioprop.feedback.training import FeedbackIteration
from bioprop.networks.network import Network
from bioprop.networks.stages import StagePass
from bioprop.ranges import check_range, count, per_stage

#: From the output for noisy activations, and the noise, to the gradient of one feedback operator's loss.
ReconstructionObjective = Callable[[Tensor, Tensor], FeedbackGradient]

logger = logging.getLogger(__name__)


class FeedbackSchedule(NamedTuple):
    """First P epochs of feedback alone, then again and again one epoch that trains both and E of feedback alone.

    All are epochs of the trainer, with validation and checkpoints: F epochs that train both need
    ``max_epochs = P + F (1 + E)``.

    Attributes:
        pretraining_epochs: P.
        extra_epochs: E.
    """

    pretraining_epochs: int
    extra_epochs: int

    def trains_forward(self, epoch: int) -> bool:
        """Return whether an epoch, counted from 0, trains forward weights; every one trains feedback weights."""
        since = epoch - self.pretraining_epochs
        return since >= 0 and since % (1 + self.extra_epochs) == 0

    def warn_of_no_training(self, max_epochs: int | None) -> None:
        """Say so where no epoch of a run trains forward weights."""
        if max_epochs is not None and 0 <= max_epochs <= self.pretraining_epochs:
            logger.warning(
                "all %d epochs train feedback weights alone (feedback_pretraining_epochs is %d): raise max_epochs to "
                "train the network",
                max_epochs,
                self.pretraining_epochs,
            )


class DifferenceReconstruction(TargetAlgorithm):
    """Feedback trained to undo all stages above it at once; subclasses say what the feedback is and how it is judged.

    A feedback iteration perturbs the activations ``s^n`` of every hidden stage in turn, runs the stages above, forms
    the gradient of every feedback operator's loss and takes one optimizer step for all.

    The first P = ``feedback_pretraining_epochs`` epochs train feedback alone; then every epoch that trains both is
    followed by E = ``extra_feedback_epochs`` of feedback alone. In the latter forward weights and their schedule stand
    still, but all are epochs of the trainer: F epochs that train both need ``max_epochs = P + F (1 + E)``.

    Deviations from the authors' program, in all of the family: feedback is trained before the targets of the same
    batch are formed, not after; forward weights are drawn as the network draws them, not by Xavier's normal rule
    (feedback weights are). The units differ. There, the output's step is along the gradient of the mean loss over the
    batch, and local losses are means without 1/2, on conv stages also over units; here, the step is along the gradient
    of each sample's own loss, local losses carry 1/2, and the optimizer is handed their gradient over ``beta``, in BP's
    units. Adam's learning rates stay, and an ``eps`` reported for the forward Adam is ``batch/(2 beta)`` times as large
    here, on a conv stage ``batch units/(2 beta)`` times. Feedback losses are summed, not averaged, over the units of a
    stage: an ``eps`` reported for them is ``units`` times as large here, and an Adam weight decay ``w`` is
    ``feedback_decay = w units/2``.

    Hyperparameters of feedback training are one value for all feedback operators or exactly one for each.

    Args:
        network: the forward network.
        beta: ``eta``, step of the output target along the gradient, above 0. Adam's learning rate is the reported one
            divided by ``eta``, as in the authors' program.
        noise: ``sigma``, in units of the activations, above 0.
        feedback_lr: learning rate of the feedback weights.
        feedback_decay: of ``|Q|^2`` in the feedback loss, biases included, at least 0; the damping of the Gauss-Newton
            targets.
        iterations: feedback iterations a batch, 0 to leave feedback as it was drawn.
        feedback_pretraining_epochs: epochs at the start in which feedback weights are trained alone.
        extra_feedback_epochs: epochs in which feedback weights are trained alone after each that trains both.
        feedback_optimizer: makes the optimizer of the feedback weights, from groups that hold their learning rates.
        feedback_eps: ``eps`` of the feedback optimizer, such as Adam's; None for the optimizer's own.
        forward_lr: learning rates of the forward weights, one for each stage, in place of the optimizer's; None for
            the optimizer's.
        forward_eps: ``eps`` of the forward optimizer, likewise.
        optimizer: makes the optimizer of the forward weights.
        settings: the other arguments of `Algorithm`.

    Raises:
        UserError: if a hyperparameter is out of its range, or a list has the wrong length.
    """

    trains_feedback = True
    precisions: tuple[str, ...] = ("32-true", "64-true")
    precision_reason = (
        "its feedback learns from differences between two passes through all stages above, which bfloat16 would drown"
    )

    def __init__(
        self,
        network: Network,
        beta: float = 0.06,
        noise: float | tuple[float, ...] = 0.1,
        feedback_lr: float | tuple[float, ...] = 1e-3,
        feedback_decay: float | tuple[float, ...] = 1e-4,
        iterations: int = 1,
        feedback_pretraining_epochs: int = 0,
        extra_feedback_epochs: int = 0,
        feedback_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params),
        feedback_eps: float | tuple[float, ...] | None = None,
        forward_lr: float | tuple[float, ...] | None = None,
        forward_eps: float | tuple[float, ...] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        **settings: Any,
    ) -> None:
        super().__init__(network, beta, optimizer, **settings)
        self.feedback = nn.ModuleDict(self.make_feedback())
        operators = list(self.feedback)
        self.noise = per_stage("noise", noise, operators)
        self.feedback_lr = per_stage("feedback_lr", feedback_lr, operators)
        self.feedback_decay = per_stage("feedback_decay", feedback_decay, operators)
        self.iterations = count("iterations", iterations)
        self.schedule = FeedbackSchedule(
            count("feedback_pretraining_epochs", feedback_pretraining_epochs),
            count("extra_feedback_epochs", extra_feedback_epochs),
        )
        check_range("noise", self.noise.values(), 0.0, low_allowed=False)
        check_range("feedback_lr", self.feedback_lr.values(), 0.0, low_allowed=False)
        check_range("feedback_decay", self.feedback_decay.values(), 0.0)
        self.feedback_eps = _positive("feedback_eps", feedback_eps, operators)
        names, stages = zip(*network.stages(), strict=True)
        self.forward_lr = _positive("forward_lr", forward_lr, names)
        self.forward_eps = _positive("forward_eps", forward_eps, names)
        if self.forward_lr or self.forward_eps:
            groups = _groups(stages, lr=self.forward_lr, eps=self.forward_eps)
            self._make_optimizer = lambda _: _with_eps("forward_eps", optimizer(groups()))
        self.streams = RandomStreams()
        self._make_feedback_optimizer = feedback_optimizer
        self._feedback_optimizer = self._build_feedback_optimizer()

    @abstractmethod
    def make_feedback(self) -> Mapping[str, nn.Module]:
        """Draw one feedback operator for each hidden stage of ``network``, from the input to the output, by name."""

    # -- phase 1: the feedback weights ---------------------------------------------------------------------------

    @abstractmethod
    def feedback_objectives(self, passes: Sequence[StagePass]) -> list[ReconstructionObjective]:
        """Prepare the loss of every feedback operator, in the order of ``feedback``, for one batch.

        Args:
            passes: the clean pass of every stage.

        Returns:
            For each hidden stage n, a function from ``f_{n->N}(s^n + sigma eps)`` and ``sigma eps`` to the gradient.
        """

    def _train_feedback(self, passes: Sequence[StagePass]) -> dict[str, Tensor]:
        course: list[Tensor] = []
        objectives = self.feedback_objectives(passes)
        rank = process_rank()
        noises = [self.streams.noise(index, passes[0].inputs, rank=rank) for index in range(len(objectives))]
        with torch.no_grad():
            for iteration in range(self.iterations if objectives else 0):
                gradients = {}
                for index, (name, objective, stream) in enumerate(zip(self.feedback, objectives, noises, strict=True)):
                    states = passes[index + 1].inputs
                    (noise,) = stream.draw(self.noise[name], states.shape)
                    gradients[name] = objective(self._run_above(index, states + noise), noise)
                gradients = average_gradients(gradients)
                self._step_feedback_weights(gradients)
                course.append(torch.stack([gradient.loss for gradient in gradients.values()]))
                self._tell_observers(iteration, course[-1])
        self.streams.next_batch()
        return dict(zip(self.feedback, torch.stack(course).mean(0), strict=True)) if course else {}

    def _run_above(self, index: int, states: Tensor) -> Tensor:
        """``f_{n->N}``: the output for activations of the hidden stage at this index."""
        for _, stage in self.chain[index + 1 :]:
            states = stage(states)
        return states

    def _step_feedback_weights(self, gradients: Mapping[str, FeedbackGradient]) -> None:
        for operator, feedback in self.feedback.items():
            for name, parameter in feedback.named_parameters():
                parameter.grad = gradients[operator].parameters[name]
        if self._feedback_optimizer is not None:
            self._feedback_optimizer.step()
            self._feedback_optimizer.zero_grad()

    def _tell_observers(self, iteration: int, losses: Tensor) -> None:
        for observe in self._observers:
            angles = self.feedback_angles()
            for name, loss in zip(self.feedback, losses, strict=True):
                observe(FeedbackIteration(name, iteration, loss, torch.tensor(angles.get(name, float("nan")))))

    # -- the schedule --------------------------------------------------------------------------------------------

    def _learn(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Gradients]:
        if self.schedule.trains_forward(self.current_epoch):
            return super()._learn(images, labels)
        passes = self.clean_passes(images)
        losses = self._phase_1(passes)
        # no gradients: the forward optimizer's step changes nothing, but `global_step` goes on counting batches
        return losses, Gradients({}, passes[-1].output.detach())

    def on_fit_start(self) -> None:
        """Say so where no epoch of the run will train forward weights."""
        super().on_fit_start()
        self.schedule.warn_of_no_training(self.trainer.max_epochs)

    def on_train_epoch_end(self) -> None:
        """Step the forward schedule after the epochs that trained forward weights."""
        if self.schedule.trains_forward(self.current_epoch):
            super().on_train_epoch_end()

    def _schedule_steps(self, epochs: int) -> int:
        return sum(map(self.schedule.trains_forward, range(epochs)))

    # -- optimizers ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Add the feedback optimizer behind the forward one, so that checkpoints hold its state."""
        optimizers, schedulers = super().configure_optimizers()
        self._feedback_optimizer = self._build_feedback_optimizer()  # a new fit starts without its history
        if self._feedback_optimizer is None:
            return optimizers, schedulers
        described = describe_optimization(self._feedback_optimizer, None)
        self._optimization["feedback_optimizer"] = described["optimizer"]
        return [*optimizers, self._feedback_optimizer], schedulers

    def _build_feedback_optimizer(self) -> torch.optim.Optimizer | None:
        """Build the optimizer of the feedback weights, one parameter group an operator; None without hidden stages."""
        groups = _groups(self.feedback.values(), lr=self.feedback_lr, eps=self.feedback_eps)
        try:
            return _with_eps("feedback_eps", self._make_feedback_optimizer(groups())) if self.feedback else None
        except (ValueError, TypeError) as error:
            raise UserError(f"the feedback optimizer refuses its arguments: {error}") from error


def _positive(option: str, values: Any, names: Sequence[str]) -> dict[str, float]:
    """Return an option's numbers by name, all above 0; empty for None."""
    if values is None:
        return {}
    found: dict[str, float] = per_stage(option, values, names)
    check_range(option, found.values(), 0.0, low_allowed=False)
    return found


def _groups(parts: Iterable[nn.Module], **settings: Mapping[str, float]) -> Callable[[], list[dict[str, Any]]]:
    """Make one parameter group for each part, afresh in every call, with the settings that are not empty."""
    given = {name: list(values.values()) for name, values in settings.items() if values}
    return lambda: [
        {"params": list(part.parameters()), **{name: values[place] for name, values in given.items()}}
        for place, part in enumerate(parts)
    ]


def _with_eps(option: str, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Refuse an ``eps`` for an optimizer that has none: it would be kept and not be used."""
    if "eps" in optimizer.param_groups[0] and "eps" not in optimizer.defaults:
        raise UserError(
            f"{option} is for an optimizer with an eps, such as Adam, and {type(optimizer).__name__} has none"
        )
    return optimizer
