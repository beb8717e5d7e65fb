"""What all methods that learn from targets share: the pass through the stages, and the forward phase."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from bioprop.algorithms.base import Algorithm, Gradients
from bioprop.algorithms.precisions import products_in_autocast_type
from bioprop.algorithms.settings import check_range, number
from bioprop.errors import UserError
from bioprop.functional.gradients import preserve_buffers
from bioprop.functional.targets import output_difference
from bioprop.networks.local_gradients import local_gradients, run_stages
from bioprop.networks.network import Network
from bioprop.networks.stages import StagePass


class TargetAlgorithm(Algorithm):
    """A method that gives every stage a target; subclasses say which, and how feedback weights are trained.

    A training step is: one pass through the stages; phase 1, the feedback weights; phase 2, targets for all stages and
    one local gradient a stage. The gradient of the local loss ``mean_batch 1/2 |F^n(s^{n-1}) - t^n|^2`` carries a
    factor ``beta``; the optimizer is handed it over ``beta``, in the units of BP's, so that one learning rate means the
    same for every method. A published update that carries ``beta`` is the same step with ``lr x beta`` and
    ``weight_decay / beta`` (SGD), or with ``eps / beta`` and ``weight_decay / beta`` (Adam).

    Args:
        network: the forward network: a chain of stages.
        beta: step of the output target along the gradient, above 0.
        optimizer: makes the optimizer of the forward weights.
        scheduler: makes its learning-rate schedule, stepped once an epoch; None for a constant rate.

    Raises:
        UserError: if the network is no chain of stages, or ``beta`` is out of its range.
    """

    #: Form local gradients in closed form where the kind of stage has one.
    closed_form = True

    def __init__(
        self, network: Network, beta: float, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
    ) -> None:
        super().__init__(network, optimizer, scheduler)
        if not isinstance(network, Network):
            raise UserError(
                f"target propagation needs a chain of stages, and {type(network).__name__} is none: make it a "
                "bioprop.networks.Network"
            )
        self.network: Network
        self.beta = number("beta", beta)
        check_range("beta", [self.beta], 0.0, low_allowed=False)

    @products_in_autocast_type
    def train_feedback(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Phase 1 on one batch; changes nothing but feedback weights.

        Args:
            images: ``[batch, channels, height, width]``.
            labels: not used; feedback training is unsupervised.

        Returns:
            The mean feedback loss, by name of stage, for those that train.
        """
        with preserve_buffers(self.network):
            return self._train_feedback(run_stages(self.network, images, self.closed_form))

    def _train_feedback(self, passes: Sequence[StagePass]) -> dict[str, Tensor]:
        """Train the feedback weights, if the method has any to train, around the clean pass of one batch."""
        return {}

    def _learn(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Gradients]:
        # both phases see the same forward weights: one pass serves them
        passes = run_stages(self.network, images, self.closed_form)
        # statistics of batch norm are those of clean passes
        with self._profiled("train_feedback"), preserve_buffers(self.network):
            losses = self._train_feedback(passes)
        return losses, self._local_gradients(passes, labels)

    def _gradients(self, images: Tensor, labels: Tensor) -> Gradients:
        return self._local_gradients(run_stages(self.network, images, self.closed_form), labels)

    def _local_gradients(self, passes: Sequence[StagePass], labels: Tensor) -> Gradients:
        logits = passes[-1].output.detach()
        with torch.no_grad():
            output = output_difference(logits, labels, self.beta, self.output_loss)
            differences = self.target_differences(passes, output)
        # d/ds of mean_batch 1/2 |s - t|^2 is (s - t)/batch; over beta, for the units of the BP gradient
        errors = [difference / (-self.beta * len(labels)) for difference in differences]
        return Gradients(local_gradients(self.network, passes, errors), logits)

    @abstractmethod
    def target_differences(self, passes: Sequence[StagePass], output: Tensor) -> list[Tensor]:
        """Return ``t^n - s^n`` for every stage, from the input to the output, given the output's.

        Args:
            passes: the clean pass of every stage.
            output: ``t^N - s^N``, ``[batch, classes]``.
        """
