"""What methods that train a feedback operator a stage share: their settings, and the loop that trains them."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from bioprop.algorithms.base import Gradients
from bioprop.algorithms.mirrored_feedback import MirroredFeedback
from bioprop.algorithms.random_streams import NoiseStream, RandomStreams
from bioprop.algorithms.recorded import Recorded
from bioprop.algorithms.settings import check_range, number, per_stage
from bioprop.algorithms.sharing import average_gradients, average_weights, hand_out_stages, share_stages
from bioprop.distributed import gather_rows, process_count, process_rank
from bioprop.errors import UserError
from bioprop.functional.activations import MirrorName
from bioprop.functional.angles import angle_degrees, flatten_all
from bioprop.functional.feedback_losses import FeedbackGradient, FeedbackObjective
from bioprop.functional.feedback_steps import normalized_steps
from bioprop.functional.speed import Sharing, Speed
from bioprop.networks.mirrors import Mirror, build_mirror
from bioprop.networks.network import Network
from bioprop.networks.stages import Stage, StagePass

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


class LayerwiseFeedback(MirroredFeedback):
    """Difference targets through trained feedback operators; subclasses say how their weights are trained.

    Feedback training is layer-wise: some iterations for each stage on every batch, independently of the others. As many
    stages as ``gradient_stages`` says, counted from the output, pass their target down by the gradient instead: they
    have no feedback operator, and no hyperparameters of its training.
    """

    #: Whether ``noise``, ``feedback_lr`` and ``iterations`` may be left to the algorithm: ``auto``, None in the tuples.
    finds_settings = False

    def __init__(
        self,
        network: Network,
        beta: float,
        noise: float | Sequence[float] | str,
        feedback_lr: float | Sequence[float] | str,
        feedback_momentum: float,
        feedback_step: FeedbackStep,
        iterations: int | Sequence[int] | str,
        mirror: str,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        speed: Speed,
        gradient_stages: int = 0,
    ) -> None:
        super().__init__(network, beta, optimizer, scheduler)
        self.speed = speed
        self.closed_form = speed.closed_form
        if speed.processes not in get_args(Sharing):
            raise UserError(f"speed.processes {speed.processes!r} is not known: choose one of {get_args(Sharing)}")
        pairs = list(pairwise(network.stages()))
        mirrored = pairs[: max(0, len(pairs) - gradient_stages)]
        names = [name for _, (name, _) in mirrored]
        self.feedback_momentum = number("feedback_momentum", feedback_momentum)
        self.noise = per_stage("noise", noise, names, auto=self.finds_settings)
        self.feedback_lr = per_stage("feedback_lr", feedback_lr, names, auto=self.finds_settings)
        self.iterations = per_stage("iterations", iterations, names, whole=True, auto=self.finds_settings)
        self.feedback_step = feedback_step
        check_range("noise", _numbers(self.noise), 0.0, low_allowed=False)
        check_range("feedback_lr", _numbers(self.feedback_lr), 0.0, low_allowed=False)
        check_range("iterations", _numbers(self.iterations), 0)
        check_range("feedback_momentum", [self.feedback_momentum], 0.0)
        if self.feedback_momentum >= 1.0:
            raise UserError(f"feedback_momentum is {feedback_momentum}, but momentum at or above 1 never comes to rest")
        if feedback_step not in get_args(FeedbackStep):
            raise UserError(f"feedback_step {feedback_step!r} is not known: choose one of {get_args(FeedbackStep)}")
        if feedback_step == "normalized" and max(_numbers(self.feedback_lr), default=0.0) > 1.0:
            raise UserError(
                f"feedback_lr {max(_numbers(self.feedback_lr))} is above 1, beyond which the normalized feedback step "
                "overshoots: use a value in (0, 1], such as 0.1"
            )
        for (_, below), (name, stage) in mirrored:
            self.feedback[name] = self._build_mirror(below, stage, mirror)
        self.streams = RandomStreams()
        self._recorded = defaultdict[str, Recorded](Recorded)
        self._observers: list[Callable[[FeedbackIteration], None]] = []
        self._feedback_optimizer = self._make_feedback_optimizer()

    def _build_mirror(self, below: Stage, stage: Stage, form: str) -> Mirror:
        """Build ``G^n`` of a stage, given the one below it too, in the form of mirror asked for."""
        return build_mirror(stage, cast(MirrorName, form))

    # -- phase 1: the feedback weights ---------------------------------------------------------------------------

    @abstractmethod
    def feedback_objective(
        self, name: str, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
    ) -> FeedbackObjective:
        """Prepare the method's feedback loss for one stage and batch.

        Args:
            name: of the stage.
            stage: ``F^n``.
            mirror: ``G^n``.
            clean: the clean pass of the stage: ``s^{n-1}``, ``s^n``, switches.
            noise: where noise is drawn from.

        Returns:
            A function from the number of the iteration to the gradient of the loss on fresh noise.
        """

    def setting_of(self, name: str, values: Sequence[Any]) -> Any:
        """Return a stage's own value of a hyperparameter of feedback training, None where it is ``auto``."""
        return dict(zip(self.feedback, values, strict=True))[name]

    def iterations_of(self, name: str, mirror: Mirror, clean: StagePass) -> int:
        """How many feedback iterations a batch takes for one stage.

        Args:
            name: of the stage.
            mirror: its feedback operator.
            clean: its clean pass.
        """
        return int(self.setting_of(name, self.iterations))

    def _train_feedback(self, passes: Sequence[StagePass]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        stages = self.mirrored_stages()
        passes = passes[1 : 1 + len(stages)]
        owners = self._owners(passes)
        with torch.no_grad():
            for place, ((name, stage, mirror), clean) in enumerate(zip(stages, passes, strict=True)):
                iterations = self.iterations_of(name, mirror, clean)
                if not iterations or not self._trains_here(name, owners):
                    continue
                noise = self._noise(place, clean)
                train = partial(self._train_stage, name, stage, mirror, iterations, noise)
                if self._may_record(clean):
                    losses[name] = self._recorded[name](train, clean, noise.generator())
                else:
                    losses[name] = train(*clean)
        self.streams.next_batch()
        return self._exchange(losses, owners)

    def _noise(self, place: int, clean: StagePass) -> NoiseStream:
        # whoever trains a stage on the images of all processes draws what one process would draw
        rank = 0 if self._shares("stages") else process_rank()
        return self.streams.noise(place, clean.inputs, rank)

    def _train_stage(
        self,
        name: str,
        stage: Stage,
        mirror: Mirror,
        iterations: int,
        noise: NoiseStream,
        *clean: Tensor | None,
    ) -> Tensor:
        """Train one stage's feedback on one batch; return the mean loss."""
        gradient_at = self.feedback_objective(name, stage, mirror, StagePass(*clean), noise)  # type: ignore[arg-type]
        lr = self.setting_of(name, self.feedback_lr)
        course = []
        for iteration in range(iterations):
            gradient = self._averaged({name: gradient_at(iteration)})[name]
            self._step_feedback_weights(mirror, gradient, lr)
            course.append(gradient.loss)
            self._tell_observers(name, stage, mirror, iteration, gradient.loss)
        return torch.stack(course).mean()

    def _may_record(self, clean: StagePass) -> bool:
        """Whether a stage's iterations can be a CUDA graph: no graph of autograd, no exchange, and nobody watching."""
        alone = clean.affine is not None and not self._observers and not self._shares("gradients")
        return self.speed.cuda_graph and clean.inputs.is_cuda and alone

    def _step_feedback_weights(self, mirror: Mirror, gradient: FeedbackGradient, lr: float | None) -> None:
        if self._feedback_optimizer is None:
            normalized_steps(dict(mirror.named_parameters()), gradient, lr)
            return
        self._hand_over(mirror, gradient)
        self._feedback_optimizer.step()  # the other stages' gradients are None: they stay as they are
        self._feedback_optimizer.zero_grad()

    @staticmethod
    def _hand_over(mirror: Mirror, gradient: FeedbackGradient) -> None:
        """Put a gradient where the feedback optimizer looks for it."""
        for name, parameter in mirror.named_parameters():
            found = gradient.parameters.get(name)
            if found is not None and found.stride() != parameter.stride():
                # the fused step goes through memory, whatever the order of the dimensions in it
                found = torch.empty_like(parameter).copy_(found)
            parameter.grad = found

    # -- several processes ---------------------------------------------------------------------------------------

    def train_feedback(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Phase 1 on one batch, of which each of several processes gives its rows, see `TargetAlgorithm`."""
        return super().train_feedback(gather_rows(images) if self._shares("stages") else images, labels)

    def _learn(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Gradients]:
        if not self._shares("stages"):
            return super()._learn(images, labels)
        losses, (forward, logits, _) = super()._learn(gather_rows(images), gather_rows(labels))
        return losses, Gradients(forward, logits[process_rank() :: process_count()], of_all_processes=True)

    def _shares(self, what: Sharing) -> bool:
        """Whether there are several processes that share feedback training in this way."""
        return process_count() > 1 and self.speed.processes == what

    def _averaged(self, gradients: dict[str, FeedbackGradient]) -> dict[str, FeedbackGradient]:
        return average_gradients(gradients) if self._shares("gradients") else gradients

    def _owners(self, passes: Sequence[StagePass]) -> dict[str, int]:
        """Which process trains which of the stages that are trained; empty where every process trains all."""
        if not self._shares("stages") or self._observers:  # observers want to see every stage
            return {}
        stages = zip(self.mirrored_stages(), passes, strict=True)
        counts = {name: self.iterations_of(name, mirror, clean) for (name, _, mirror), clean in stages}
        trained = [name for name, count in counts.items() if count]
        clean = {name: each for name, each in zip(self.feedback, passes, strict=True) if name in trained}
        weights = {name: sum(each.numel() for each in self.feedback[name].parameters()) for name in trained}
        owners = share_stages(clean, weights, [counts[name] for name in trained])
        return dict(zip(trained, owners, strict=True))

    @staticmethod
    def _trains_here(name: str, owners: Mapping[str, int]) -> bool:
        return owners.get(name, process_rank()) == process_rank()

    def _exchange(self, losses: dict[str, Tensor], owners: Mapping[str, int]) -> dict[str, Tensor]:
        """Bring all processes to the same feedback weights after a batch; return the losses of all stages."""
        if self._shares("weights"):
            average_weights(self.feedback, self._feedback_optimizer, losses)
        if not owners:
            return losses
        return hand_out_stages(dict(self.feedback.items()), self._feedback_optimizer, losses, owners)

    # -- observers -----------------------------------------------------------------------------------------------

    def _tell_observers(self, name: str, stage: Stage, mirror: Mirror, iteration: int, loss: Tensor) -> None:
        for observe in self._observers:
            forward, feedback = (flatten_all(side) for side in zip(*mirror.pairs(stage), strict=True))
            observe(FeedbackIteration(name, iteration, loss, angle_degrees(forward, feedback)))

    @contextmanager
    def observe_feedback(self, observer: Callable[[FeedbackIteration], None]) -> Iterator[None]:
        """Call ``observer`` after every feedback iteration within the context; costs nothing outside of it."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    def configure_optimizers(self) -> Any:
        """Add the feedback optimizer behind the forward one, so that checkpoints hold its momentum."""
        optimizers, schedulers = super().configure_optimizers()
        self._feedback_optimizer = self._make_feedback_optimizer()  # a new fit starts without momentum
        self._recorded.clear()
        return [*optimizers, *([self._feedback_optimizer] if self._feedback_optimizer else [])], schedulers

    def _make_feedback_optimizer(self) -> torch.optim.Optimizer | None:
        """Build the SGD of the feedback weights, one parameter group a stage; None where the step needs none."""
        if self.feedback_step != "sgd" or not self.feedback:
            return None
        groups = [
            {"params": list(mirror.parameters()), "lr": lr}
            for mirror, lr in zip(self.feedback.values(), self.feedback_lr, strict=True)
        ]
        # one pass over the weights instead of three
        return torch.optim.SGD(groups, momentum=self.feedback_momentum, fused=True)


def _numbers(values: Sequence[Any]) -> list[float]:
    return [value for value in values if value is not None]
