"""The base class of all algorithms: the skeleton of a training step, and optimizers."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from pytorch_lightning.profilers import PassThroughProfiler
from torch import Tensor, nn

from bioprop.algorithms.checkpoints import describe_optimization
from bioprop.algorithms.evaluation import Batch, Evaluated
from bioprop.algorithms.trainer_precision import check_precision
from bioprop.distributed import mean_over_processes, process_count
from bioprop.errors import UserError
from bioprop.faults import refused_by_library
from bioprop.feedback.recorded import Recorded
from bioprop.functional.gradients import preserve_state
from bioprop.functional.output_losses import OutputLossName, output_loss
from bioprop.functional.precision import products_in_autocast_type

#: Epochs of a schedule that are gone through beforehand: a fraction of a second.
LONGEST_SCHEDULE = 10_000


class Gradients(NamedTuple):
    """The results of phase 2 on a batch.

    Attributes:
        forward: gradient of every forward parameter by its name in the network, in units of the BP gradient.
        logits: ``[batch, classes]``.
        of_all_processes: whether the gradients are already those of the rows of all processes.
    """

    forward: dict[str, Tensor]
    logits: Tensor
    of_all_processes: bool = False


class Algorithm(Evaluated, ABC):
    """A way to train a network; `training_step` is the whole of it.

    The forward optimizer is handed the gradient in the units of BP's, so that one learning rate means the same for
    every algorithm.

    Args:
        network: the forward network; its weights are the ones being trained.
        optimizer: makes the optimizer of the forward weights from their list.
        scheduler: makes the learning-rate schedule of that optimizer, stepped once an epoch; None for a constant rate.
        loss: at the output: ``cross_entropy``, or ``squared_error`` to the one-hot label, ``1/2 |s^N - onehot(y)|^2``.

    Raises:
        UserError: if a hyperparameter is out of its range, naming it.
    """

    #: Lightning precisions under which the algorithm's arithmetic keeps its meaning.
    precisions: tuple[str, ...] = ("32-true", "64-true", "bf16-mixed")
    #: Why a subclass leaves one of these out.
    precision_reason = "it is not one of those that were tried"

    #: Whether `_learn` may be recorded: it hands everything on by its return value, and which operations it makes
    #: depends on no tensor's values. Every class says so for itself: a subclass may do more.
    recordable = False

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        loss: OutputLossName = "cross_entropy",
    ) -> None:
        super().__init__(network)
        self.automatic_optimization = False
        self.output_loss = output_loss(loss)
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._recorded: Recorded | None = None

    # -- the algorithm -------------------------------------------------------------------------------------------

    @products_in_autocast_type
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Phase 1 trains the feedback weights, phase 2 the forward weights, on the same batch."""
        images, labels = self._as_network(batch)
        feedback_losses, gradients = self._learn_recorded(images, labels)
        self._step_forward_weights(self._direction(self._average(gradients)))
        loss = self.output_loss.mean(gradients.logits, labels)
        self._count_batch("train", batch_idx, gradients.logits, labels, loss)
        if feedback_losses:
            total = torch.stack(list(feedback_losses.values())).sum()
            self._count("train/feedback_loss", batch_idx, total * len(labels), len(labels))
        return {"loss": loss, "feedback_losses": feedback_losses}

    def _learn_recorded(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Gradients]:
        """`_learn`, as a CUDA graph where it can be one: its gradients are overwritten by the next batch."""
        if self._recorded is None or not self._may_record(images):
            return self._learn(images, labels)
        losses, gradients = self._recorded(self._learn, (images, labels), self._recorded_with())
        if losses:  # whoever keeps them may read them later
            losses = dict(zip(losses, torch.stack(list(losses.values())), strict=True))
        return losses, gradients

    def _may_record(self, images: Tensor) -> bool:
        """Return whether `_learn` may be a CUDA graph: on a GPU, in one process, where nobody times its phases."""
        untimed = isinstance(self.trainer.profiler, PassThroughProfiler)  # type: ignore[attr-defined]
        return images.is_cuda and untimed and process_count() == 1

    def _recorded_with(self) -> Hashable:
        """Return what a recording of `_learn` is made with beside the batch: numbers, tensors, modes of modules."""
        numbers = [(name, value) for name, value in vars(self).items() if isinstance(value, int | float | str)]
        tensors = [(each.data_ptr(), each.requires_grad) for each in (*self.parameters(), *self.buffers())]
        return tuple(numbers), tuple(tensors), tuple(module.training for module in self.modules())

    def _learn(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Gradients]:
        """Phase 1, then the gradients of phase 2: feedback losses by stage, and what the forward weights step by."""
        with self._profiled("train_feedback"):
            losses = self.train_feedback(images, labels)
        return losses, self._gradients(images, labels)

    def _profiled(self, phase: str) -> AbstractContextManager[None]:
        """Let Lightning's profiler tell a phase apart (``--trainer.profiler simple``); nothing without a trainer."""
        if self._trainer is None:
            return nullcontext()
        profiled: AbstractContextManager[None] = self._trainer.profiler.profile(  # type: ignore[attr-defined]
            f"[Algorithm]{phase}"
        )
        return profiled

    @abstractmethod
    def _gradients(self, images: Tensor, labels: Tensor) -> Gradients:
        """Compute the gradients of one batch; buffers and random state may move."""

    def _average(self, gradients: Gradients) -> dict[str, Tensor]:
        """Average gradients, and the buffers that the batch has moved, over all processes, each in one exchange."""
        forward = gradients.forward
        if process_count() > 1 and not gradients.of_all_processes:
            forward = dict(zip(forward, mean_over_processes(list(forward.values())), strict=True))
            # batch norm's statistics are each process's own, and so are its running ones until here
            buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
            for buffer, mean in zip(buffers, mean_over_processes(buffers), strict=True):
                buffer.copy_(mean)
        return forward

    def _direction(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the direction that the forward weights step along, given the gradients of all images of a batch."""
        return gradients

    @products_in_autocast_type
    def forward_gradients(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the update direction of every forward parameter, in units of the mean-loss BP gradient.

        Changes nothing: no weights, buffers, ``.grad`` or random state.

        Args:
            images: ``[batch, channels, height, width]``.
            labels: ``[batch]``.

        Returns:
            A tensor for each name of ``network.named_parameters()`` that is not frozen, in the parameter's shape.
        """
        with preserve_state(self):
            return self._direction(self._gradients(images, labels).forward)

    def train_feedback(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Phase 1 on one batch: train the feedback weights, if the algorithm has any.

        Returns:
            The mean feedback loss by name of stage; empty without feedback weights.
        """
        return {}

    def symmetrize_feedback(self) -> None:
        """Set every feedback weight to a copy of its forward weight (``G = F^T``); nothing without feedback weights."""

    def feedback_angles(self) -> dict[str, float]:
        """Return degrees between each forward weight and its feedback weight, by stage; empty without the latter."""
        return {}

    def _step_forward_weights(self, gradients: dict[str, Tensor]) -> None:
        for name, parameter in self.network.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name]
        # The forward optimizer comes first; wrapped by Lightning, its steps make `global_step` count batches.
        optimizers = self.optimizers()
        optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers
        optimizer.step()
        optimizer.zero_grad()

    # -- Lightning -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Build the forward optimizer and its schedule.

        Raises:
            UserError: if one of them refuses its arguments, or the optimizer needs to evaluate the loss again.
        """
        try:
            optimizer = self._make_optimizer(self.network.parameters())
            scheduler = None if self._make_scheduler is None else self._make_scheduler(optimizer)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"the optimizer or its schedule refuses its arguments: {error}") from error
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UserError(
                "LBFGS needs the loss several times a step, which no algorithm here offers: choose SGD or Adam"
            )
        self._optimization = describe_optimization(optimizer, scheduler)
        return [optimizer], [] if scheduler is None else [scheduler]

    def _with_feedback_optimizer(
        self, optimizer: torch.optim.Optimizer, optimizers: list[Any], schedulers: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Add an optimizer of matrices, and a schedule like the forward one's, behind those of the network."""
        self._optimization["feedback_optimizer"] = describe_optimization(optimizer, None)["optimizer"]
        if self._make_scheduler is not None:
            schedulers = [*schedulers, self._make_scheduler(optimizer)]
        return [*optimizers, optimizer], schedulers

    def setup(self, stage: str) -> None:
        """Refuse a precision in which the algorithm would be another one, whatever the command.

        Args:
            stage: the command.

        Raises:
            UserError: naming the precisions that work.
        """
        check_precision(self.trainer.precision, type(self).__name__, self.precisions, self.precision_reason)

    def on_fit_start(self) -> None:
        """Refuse at start-up what would train something else than the algorithm.

        Raises:
            UserError: for a number of processes the algorithm does not support, for settings of optimizers or
                schedules that are not those of the checkpoint to resume from, and for a schedule that ends too early.
        """
        # what a module of the user's own does in Python, a recording would do no more
        known = all(type(each).__module__.startswith(("torch.", "bioprop.")) for each in self.network.modules())
        hooked = any(each._forward_hooks or each._forward_pre_hooks for each in self.network.modules())
        may_be = vars(type(self)).get("recordable") and known and not hooked
        self._recorded = Recorded(getattr(self, "streams", None)) if may_be else None
        self.refuse_other_optimization()
        self.check_schedule(self.trainer)
        if self.trainer.world_size > 1 and not hasattr(self.trainer.strategy, "leaves_averaging_to_algorithms"):
            raise UserError(
                f"strategy {type(self.trainer.strategy).__name__} does not average the gradients of "
                f"{type(self).__name__}: leave --trainer.strategy out, or give Trainer(strategy=GradientAveraging())"
            )
        if self.trainer.world_size > 1 and any(isinstance(each, nn.SyncBatchNorm) for each in self.modules()):
            raise UserError("sync_batchnorm is not supported: batch norm takes the statistics of each process's images")

    def on_fit_end(self) -> None:
        """Give the memory of recordings back."""
        self._recorded = None

    def on_train_epoch_end(self) -> None:
        """Step the learning-rate schedules: Lightning leaves them alone in manual optimization.

        One that follows a metric counts the values of it: an epoch without validation brings none of ``val/loss``.

        Raises:
            UserError: if a schedule follows a metric that is not logged, or refuses to go on.
        """
        schedulers = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if not isinstance(scheduler, ReduceLROnPlateau):
                _step(scheduler)
            elif self.logged_this_epoch(scheduler.monitor):
                scheduler.step(self.trainer.callback_metrics[scheduler.monitor])
            elif not self._may_be_logged(scheduler.monitor):
                raise UserError(
                    f"the scheduler monitors {scheduler.monitor!r}, which is not logged: choose one of "
                    f"{', '.join(sorted(self.trainer.callback_metrics))}"
                )

    def check_schedule(self, trainer: Trainer) -> None:
        """Go through the learning-rate schedule to the trainer's last epoch, in a copy that touches no weight.

        Raises:
            UserError: if it refuses to be stepped that often, as one made for fewer epochs does.
        """
        if self._make_scheduler is None or trainer.max_steps >= 0:  # steps that may end training before
            return
        scheduler = self._make_scheduler(self._make_optimizer(self.network.parameters()))
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
            for _ in range(self._schedule_steps(min(trainer.max_epochs or 0, LONGEST_SCHEDULE))):
                _step(scheduler)

    def _schedule_steps(self, epochs: int) -> int:
        """Return the number of steps that learning-rate schedules take in so many epochs."""
        return epochs


def _step(scheduler: Any) -> None:
    """End an epoch of a schedule; what a library's own refuses is a mistake in its arguments."""
    try:
        scheduler.step()
    except Exception as error:
        if not refused_by_library(error):
            raise
        raise UserError(
            f"{type(scheduler).__name__} does not last beyond epoch {scheduler.last_epoch - 1} ({error}): it is "
            "stepped once an epoch, so change its arguments in model.scheduler, or trainer.max_epochs"
        ) from error
