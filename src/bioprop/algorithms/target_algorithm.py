"""Methods that learn from targets: the pass through the stages, the targets that come down, and the forward phase."""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from bioprop.algorithms.base import Algorithm, Gradients
from bioprop.distributed import gather_rows, process_count, process_rank
from bioprop.errors import UserError
from bioprop.feedback.training import FeedbackIteration, FeedbackTraining, Observers
from bioprop.functional.angles import angle_degrees, flatten_all
from bioprop.functional.gradients import input_gradient, preserve_buffers
from bioprop.functional.precision import products_in_autocast_type
from bioprop.networks.mirrors import Mirror
from bioprop.networks.network import Network
from bioprop.networks.stages import Stage, StagePass
from bioprop.ranges import check_range, number


class TargetAlgorithm(Algorithm):
    """A method that gives every stage a target; subclasses say which, and how feedback weights are trained.

    A training step is: one pass through the stages; phase 1, the feedback weights; phase 2, targets for all stages and
    one local gradient a stage. Targets are those of difference target propagation (Lee et al., 2015),
    ``t^{n-1} = s^{n-1} + G^n(t^n) - G^n(s^n)``, as differences ``t^n - s^n`` from the activations: they keep the digits
    that subtracting two nearly equal tensors would lose.

    The gradient of the local loss ``mean_batch 1/2 |F^n(s^{n-1}) - t^n|^2`` carries a factor ``beta``; the optimizer is
    handed it over ``beta``, in the units of BP's, so that one learning rate means the same for every method. A
    published update that carries ``beta`` is the same step with ``lr x beta`` and ``weight_decay / beta`` (SGD), or
    with ``eps / beta`` and ``weight_decay / beta`` (Adam).

    Args:
        network: the forward network: a chain of stages.
        beta: step of the output target along the gradient, above 0.
        optimizer: makes the optimizer of the forward weights.
        settings: the other arguments of `Algorithm`.

    Attributes:
        chain: names and stages of the network, from the input to the output.
        feedback: the feedback operators ``G^n`` by name of stage. ``G^1`` would reach the input: nothing needs it.

    Raises:
        UserError: if the network is no chain of stages, or ``beta`` is out of its range.
    """

    #: Form local gradients in closed form where the kind of stage has one.
    closed_form = True
    #: How feedback is trained stage by stage, in methods that do so.
    feedback_training: FeedbackTraining | None = None

    @abstractmethod  # without feedback of a subclass it would be BP
    def __init__(
        self,
        network: Network,
        beta: float,
        optimizer: OptimizerCallable,
        **settings: Any,
    ) -> None:
        super().__init__(network, optimizer, **settings)
        if not isinstance(network, Network):
            raise UserError(
                f"target propagation needs a chain of stages, and {type(network).__name__} is none: make it a "
                "bioprop.networks.Network"
            )
        self.network: Network
        self.chain, self._has_buffers = network.stages(), any(True for _ in network.buffers())
        self.beta = number("beta", beta)
        check_range("beta", [self.beta], 0.0, low_allowed=False)
        self.feedback = nn.ModuleDict()
        self._observers: Observers = []

    # -- the two phases ------------------------------------------------------------------------------------------

    def _learn(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Gradients]:
        if shared := self._shares_stages():
            images, labels = gather_rows(images), gather_rows(labels)
        # both phases see the same forward weights: one pass serves them
        passes = self.clean_passes(images)
        losses = self._phase_1(passes)
        forward, logits, _ = self._local_gradients(passes, labels)
        return losses, Gradients(forward, logits[process_rank() :: process_count()] if shared else logits, shared)

    def clean_passes(self, images: Tensor) -> list[StagePass]:
        """Run every stage once, each cut off from the one below; return the passes from the input to the output.

        Args:
            images: ``[batch, channels, height, width]``.
        """
        passes: list[StagePass] = []
        inputs = images
        for _, stage in self.chain:
            passes.append(stage.clean_pass(inputs, self.closed_form))
            inputs = passes[-1].output.detach()
        return passes

    def _phase_1(self, passes: Sequence[StagePass]) -> dict[str, Tensor]:
        """Train the feedback weights; passes made for it move no running statistics."""
        with self._profiled("train_feedback"), preserve_buffers(self.network) if self._has_buffers else nullcontext():
            return self._train_feedback(passes)

    @products_in_autocast_type
    def train_feedback(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Phase 1 on one batch; changes nothing but feedback weights.

        Args:
            images: ``[batch, channels, height, width]``, of which each of several processes gives its rows.
            labels: not used; feedback training is unsupervised.

        Returns:
            The mean feedback loss, by name of stage, for those that train.
        """
        images = gather_rows(images) if self._shares_stages() else images
        with preserve_buffers(self.network):
            return self._train_feedback(self.clean_passes(images))

    @property
    def trains_feedback(self) -> bool:
        """Return whether there are feedback weights that learn."""
        return self.feedback_training is not None

    def _may_record(self, images: Tensor) -> bool:
        training = self.feedback_training
        # Adam counts its steps outside of the graph
        possible = training is None or (training.speed.cuda_graph and training.feedback_step != "adam")
        return possible and not self._observers and super()._may_record(images)

    def _recorded_with(self) -> Hashable:
        training = self.feedback_training
        settings = () if training is None else (training.noise, training.feedback_lr, training.iterations)
        return super()._recorded_with(), tuple(value for each in settings for value in each.values())

    def _shares_stages(self) -> bool:
        """Return whether each of several processes trains the feedback of some stages, on the images of all."""
        return self.feedback_training is not None and self.feedback_training.sharing == "stages"

    def _train_feedback(self, passes: Sequence[StagePass]) -> dict[str, Tensor]:
        """Train the feedback weights, if the method has any to train, around the clean pass of one batch."""
        return (
            {} if self.feedback_training is None else self.feedback_training.train(self.mirrored_stages(), passes[1:])
        )

    def _gradients(self, images: Tensor, labels: Tensor) -> Gradients:
        return self._local_gradients(self.clean_passes(images), labels)

    def _local_gradients(self, passes: Sequence[StagePass], labels: Tensor) -> Gradients:
        """Phase 2: the step of the output along the loss's gradient, its way down, and one gradient a stage."""
        logits = passes[-1].output.detach()
        with torch.no_grad():
            differences = self.target_differences(passes, -self.beta * self.output_loss.gradient(logits, labels))
        gradients: dict[str, Tensor] = {}
        for (name, stage), clean, difference in zip(self.chain, passes, differences, strict=True):
            # d/ds of mean_batch 1/2 |s - t|^2 is (s - t)/batch; over beta, for the units of the BP gradient
            found = stage.local_gradients(clean, difference / (-self.beta * len(labels)))
            gradients |= {f"{name}.{parameter}": gradient for parameter, gradient in found.items()}
        return Gradients(gradients, logits)

    # -- targets -------------------------------------------------------------------------------------------------

    def target_differences(self, passes: Sequence[StagePass], output: Tensor) -> list[Tensor]:
        """Return ``t^n - s^n`` for every stage, from the input to the output, given the output's.

        Here ``t^{n-1} - s^{n-1} = G^n(t^n) - G^n(s^n)``; a stage without a feedback operator passes its target down by
        the gradient.

        Args:
            passes: the clean pass of every stage.
            output: ``t^N - s^N``, ``[batch, classes]``.
        """
        differences = [output]
        for (name, stage), clean in zip(self.chain[:0:-1], passes[:0:-1], strict=True):
            if name in self.feedback:
                differences.append(self.difference_below(name, clean, differences[-1]))
            else:
                differences.append(input_gradient(stage, clean.inputs, differences[-1]))
        return differences[::-1]

    def difference_below(self, name: str, clean: StagePass, difference: Tensor) -> Tensor:
        """Return ``t^{n-1} - s^{n-1} = G^n(t^n) - G^n(s^n)``.

        Args:
            name: of stage n, which has a feedback operator.
            clean: its clean pass.
            difference: ``t^n - s^n``, like the stage's output.
        """
        mirror = cast(Mirror, self.feedback[name])
        return mirror.difference(clean.output.detach(), difference, clean.switches)

    # -- feedback operators --------------------------------------------------------------------------------------

    def mirrored_stages(self) -> list[tuple[str, Stage, Mirror]]:
        """Return name, stage and feedback operator of every stage that has one, from the input to the output."""
        stages = dict(self.chain)
        return [(name, stages[name], cast(Mirror, mirror)) for name, mirror in self.feedback.items()]

    @torch.no_grad()
    def symmetrize_feedback(self) -> None:
        """Copy every forward weight into its feedback weight, ``G^n = (F^n)^T``: a copy, never the same tensor."""
        for _, stage, mirror in self.mirrored_stages():
            for forward, feedback in mirror.pairs(stage):
                feedback.copy_(forward)

    def feedback_angles(self) -> dict[str, float]:
        """Return degrees between each stage's forward and feedback weights, by name of stage."""
        pairs = {name: zip(*mirror.pairs(stage), strict=True) for name, stage, mirror in self.mirrored_stages()}
        return {name: float(angle_degrees(*(flatten_all(side) for side in sides))) for name, sides in pairs.items()}

    def configure_optimizers(self) -> Any:
        """Add the feedback optimizer, if any, behind the forward one, so that checkpoints hold its momentum."""
        optimizers, schedulers = super().configure_optimizers()
        feedback = None if self.feedback_training is None else self.feedback_training.restart()
        return [*optimizers, *([feedback] if feedback else [])], schedulers

    @contextmanager
    def observe_feedback(self, observer: Callable[[FeedbackIteration], None]) -> Iterator[None]:
        """Call ``observer`` after every feedback iteration within the context; costs nothing outside of it.

        The angle is NaN where a feedback weight is no forward weight's counterpart.
        """
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)
