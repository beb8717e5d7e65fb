"""Training of feedback operators: some iterations for each stage on every batch, each stage on its own."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from bioprop.distributed import gather_rows, mean_over_processes, process_count, process_rank
from bioprop.errors import UserError
from bioprop.feedback.losses import FeedbackGradient, FeedbackObjective
from bioprop.feedback.noise import ALONE, NoiseStream, Peers, RandomStreams
from bioprop.feedback.recorded import Recorded
from bioprop.feedback.sharing import average_gradients, average_weights, hand_out_stages, share_stages
from bioprop.feedback.speed import Sharing, Speed
from bioprop.functional.angles import angle_degrees, flatten_all
from bioprop.functional.precision import bfloat16_products
from bioprop.networks.mirrors import Mirror
from bioprop.networks.stages import Stage, StagePass
from bioprop.ranges import check_range, number, per_stage

FeedbackStep = Literal["sgd", "adam", "normalized"]
#: Share of the mean curvature that is added to every unit's, so that a silent unit takes no giant step.
CURVATURE_FLOOR = 0.03


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


Observers = list[Callable[[FeedbackIteration], None]]


class StageBatch(NamedTuple):
    """A stage that is trained on one batch.

    Attributes:
        name: of the stage.
        stage: ``F^n``.
        mirror: ``G^n``.
        clean: the clean pass of the stage.
        iterations: feedback iterations to take.
    """

    name: str
    stage: Stage
    mirror: Mirror
    clean: StagePass
    iterations: int


class FeedbackTraining(ABC):
    """The settings of feedback training, and the loop over the iterations of a batch.

    Settings are one value for all stages or exactly one for each that has feedback; ``auto`` where ``finds_settings``
    says that they follow from the batch, which is None in the attributes, by name of stage.

    Args:
        feedback: the operators by name of stage.
        streams: where noise is drawn from.
        observers: what is called after every iteration.
        noise: standard deviation, in units of the activations, above 0.
        feedback_lr: learning rate, or fraction of a Newton step for ``normalized``.
        iterations: feedback iterations a batch, 0 to leave a stage's feedback as it was drawn.
        feedback_step: ``sgd``, ``adam`` or ``normalized``, by the loss's curvature.
        feedback_momentum: of ``sgd``, in [0, 1).
        speed: how the gradients are computed.
        feedback_decay: weight decay of ``adam``, which is part of its gradient, at least 0.
        samples: draws of the noise that the gradient of an iteration is the mean of.
        finds_settings: whether noise, rate and iterations may be ``auto``.

    Attributes:
        sharing: the part that several processes share of feedback training; None where there is one.
        peers: the processes that average their feedback gradients.

    Raises:
        UserError: if a setting is out of its range, or a list has the wrong length.
    """

    def __init__(
        self,
        feedback: nn.ModuleDict,
        streams: RandomStreams,
        observers: Observers,
        noise: float | Sequence[float] | str,
        feedback_lr: float | Sequence[float] | str,
        iterations: int | Sequence[int] | str,
        feedback_step: FeedbackStep,
        feedback_momentum: float,
        speed: Speed,
        feedback_decay: float = 0.0,
        samples: int = 1,
        finds_settings: bool = False,
    ) -> None:
        self.feedback, self.streams, self.observers = feedback, streams, observers
        self.feedback_step, self.speed, self.samples = feedback_step, speed, samples
        names = list(feedback)
        self.noise = per_stage("noise", noise, names, auto=finds_settings)
        self.feedback_lr = per_stage("feedback_lr", feedback_lr, names, auto=finds_settings)
        self.iterations = per_stage("iterations", iterations, names, whole=True, auto=finds_settings)
        self.feedback_momentum = number("feedback_momentum", feedback_momentum)
        self.feedback_decay = number("feedback_decay", feedback_decay)
        check_range("feedback_decay", [self.feedback_decay], 0.0)
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
        if feedback_step != "adam" and self.feedback_decay:
            raise UserError(f"feedback_decay is {feedback_decay}, but it belongs to feedback_step: adam alone")
        if speed.processes not in get_args(Sharing):
            raise UserError(f"speed.processes {speed.processes!r} is not known: choose one of {get_args(Sharing)}")
        if feedback_step == "adam" and speed.processes != "gradients":
            raise UserError(
                f"speed.processes {speed.processes} leaves each process its own moments of Adam: with feedback_step: "
                "adam use speed.processes: gradients"
            )
        self._recorded = defaultdict[str, Recorded](lambda: Recorded(self.streams))
        self.optimizer: torch.optim.Optimizer | None
        self.sharing: Sharing | None
        self.peers: Peers
        self.restart()

    @abstractmethod
    def objective(
        self, name: str, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
    ) -> FeedbackObjective:
        """Prepare the loss of one stage and batch.

        Args:
            name: of the stage.
            stage: ``F^n``.
            mirror: ``G^n``.
            clean: its clean pass: ``s^{n-1}``, ``s^n``, switches.
            noise: where noise is drawn from.

        Returns:
            A function from the number of the draw of noise to the gradient of the loss.
        """

    def find_iterations(self, mirror: Mirror, clean: StagePass) -> int:
        """Return the number of iterations that ``auto`` stands for."""
        raise NotImplementedError

    def restart(self) -> torch.optim.Optimizer | None:
        """Begin a new fit: without momentum and recorded graphs. Returns the optimizer, if the step needs one."""
        self.optimizer = self._make_optimizer()
        self._recorded.clear()
        self.sharing = self.speed.processes if process_count() > 1 else None
        together = self.sharing == "gradients"
        self.peers = Peers(process_count(), process_rank(), mean_over_processes, gather_rows) if together else ALONE
        return self.optimizer

    # -- one batch -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self, stages: Sequence[tuple[str, Stage, Mirror]], passes: Sequence[StagePass]) -> dict[str, Tensor]:
        """Train every stage on one batch; return the mean feedback loss by name of stage.

        Args:
            stages: those that have feedback, from the input to the output.
            passes: their clean passes; further ones are left out.
        """
        batches = []
        for (name, stage, mirror), clean in zip(stages, passes, strict=False):
            given = self.iterations[name]
            iterations = self.find_iterations(mirror, clean) if given is None else given
            batches.append(StageBatch(name, stage, mirror, clean, iterations))
        by_stages = self.sharing == "stages"
        rank = process_rank() if self.sharing else 0
        owners = self._owners(batches) if by_stages else {}
        losses: dict[str, Tensor] = {}
        for index, each in enumerate(batches):
            if not each.iterations or owners.get(each.name, rank) != rank:
                continue
            # whoever trains a stage on the images of all processes draws what one process would draw
            train = partial(self._train_stage, each, index, 0 if by_stages else rank)
            with self._products(each.clean.inputs):
                if self._may_record(each.clean) and not self._recording_failed():
                    losses[each.name] = self._recorded[each.name](train, each.clean).clone()
                else:
                    losses[each.name] = train(*each.clean)
        self.streams.next_batch()
        if self.sharing == "weights":
            average_weights(self.feedback, self.optimizer, losses)
        if owners:
            return hand_out_stages(dict(self.feedback.items()), self.optimizer, losses, owners)
        return losses

    def _train_stage(self, each: StageBatch, index: int, rank: int, *clean: Tensor | None) -> Tensor:
        """Descend one stage's feedback loss on one batch; return its mean."""
        values = StagePass(*clean)  # type: ignore[arg-type]
        noise = self.streams.noise(index, values.inputs, rank)
        gradient_at = self.objective(each.name, each.stage, each.mirror, values, noise)
        course = []
        for iteration in range(each.iterations):
            draws = range(iteration * self.samples, (iteration + 1) * self.samples)
            gradient = gradient_at(iteration) if self.samples == 1 else mean_gradient(gradient_at, draws)
            if self.sharing == "gradients":
                gradient = average_gradients({each.name: gradient})[each.name]
            self._step(each, gradient)
            course.append(gradient.loss)
            for observe in self.observers:
                forward, feedback = (flatten_all(side) for side in zip(*each.mirror.pairs(each.stage), strict=True))
                observe(FeedbackIteration(each.name, iteration, gradient.loss, angle_degrees(forward, feedback)))
        return torch.stack(course).mean()

    def _step(self, each: StageBatch, gradient: FeedbackGradient) -> None:
        weights = dict(each.mirror.named_parameters())
        if self.optimizer is None:
            normalized_step(weights, gradient, self.feedback_lr[each.name])
            return
        try:
            for name, parameter in weights.items():
                found = gradient.parameters.get(name)
                if found is not None and found.stride() != parameter.stride():
                    # the fused step goes through memory, whatever the order of the dimensions in it
                    found = torch.empty_like(parameter).copy_(found)
                parameter.grad = found
            self.optimizer.step()  # the other stages' gradients are None: they stay as they are
        finally:  # a recording that fails here must leave none behind
            self.optimizer.zero_grad()

    def _products(self, inputs: Tensor) -> AbstractContextManager[None]:
        """Return the context in which products are computed."""
        if not self.speed.bfloat16:
            return nullcontext()
        if inputs.dtype is not torch.float32:
            raise UserError(
                f"speed.bfloat16 computes with float32 weights, and these are {inputs.dtype}: leave it out, or train "
                "with --trainer.precision=32-true"
            )
        return bfloat16_products()

    def _may_record(self, clean: StagePass) -> bool:
        """Return whether the iterations can be a CUDA graph: no graph of autograd, no exchange, and nobody watching."""
        # Adam counts its steps outside of the graph
        alone = clean.affine is not None and not self.observers and self.sharing != "gradients"
        alone = alone and self.feedback_step != "adam" and self.streams.given is None
        return self.speed.cuda_graph and clean.inputs.is_cuda and alone

    def _recording_failed(self) -> bool:
        """Whether one stage could not be recorded, after which all run one by one."""
        return any(each.failed for each in self._recorded.values())

    # -- several processes ---------------------------------------------------------------------------------------

    def _owners(self, batches: Sequence[StageBatch]) -> Mapping[str, int]:
        """Return the rank that trains each trained stage, by name; empty where observers want to see every stage."""
        trained = [each for each in batches if each.iterations]
        if self.observers:
            return {}
        weights = {each.name: sum(weight.numel() for weight in each.mirror.parameters()) for each in trained}
        passes = {each.name: each.clean for each in trained}
        owners = share_stages(passes, weights, [each.iterations for each in trained])
        return dict(zip(passes, owners, strict=True))

    # -- the optimizer -------------------------------------------------------------------------------------------

    def _make_optimizer(self) -> torch.optim.Optimizer | None:
        """Build the optimizer of the feedback weights, one parameter group a stage; None where the step needs none."""
        if self.feedback_step == "normalized" or not self.feedback:
            return None
        groups = [
            {"params": list(mirror.parameters()), "lr": lr}
            for mirror, lr in zip(self.feedback.values(), self.feedback_lr.values(), strict=True)
        ]
        if self.feedback_step == "adam":
            return torch.optim.Adam(groups, weight_decay=self.feedback_decay, fused=True)
        # one pass over the weights instead of three
        return torch.optim.SGD(groups, momentum=self.feedback_momentum, fused=True)


def _numbers(values: Mapping[str, Any]) -> list[float]:
    return [value for value in values.values() if value is not None]


def mean_gradient(gradient_at: FeedbackObjective, draws: Sequence[int]) -> FeedbackGradient:
    """Average a feedback gradient over draws of its noise; its loss and curvature too.

    Args:
        gradient_at: the gradient on fresh noise, by the number of the draw.
        draws: those numbers, at least one, in order.
    """
    gradients = [gradient_at(draw) for draw in draws]
    curvatures = [gradient.curvature for gradient in gradients if gradient.curvature is not None]
    return FeedbackGradient(
        _mean_by_name([gradient.parameters for gradient in gradients]),
        _mean([gradient.loss for gradient in gradients]),
        _mean_by_name(curvatures) if curvatures else None,
    )


def _mean(values: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, values) / len(values)


def _mean_by_name(values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _mean([each[name] for each in values]) for name in values[0]}


@torch.no_grad()
def normalized_step(weights: Mapping[str, Tensor], gradient: FeedbackGradient, eta: float | None) -> None:
    """``V_o <- V_o - eta gradient_o / (D_o + 0.03 mean(D))``, in place, for the weights that leave each unit ``o``.

    Ours: a diagonal Newton step with the curvature ``D`` of the feedback loss, so that the same ``eta`` in (0, 1] fits
    every stage, noise and batch. There is no momentum.

    The largest stable ``eta`` depends on the batch all the same: noise on ``units`` units has a sample covariance whose
    largest eigenvalue is about ``(1 + sqrt(units / batch))^2`` times its mean, so the step is stable while ``eta``
    times that is below 2; and around the minimiser the noise in ``V`` is about ``sqrt(fan_in / batch * eta / 2)`` of
    ``V`` on a linear stage. Wide linear stages therefore want a small ``eta`` (0.03 on LeNet's 4096 -> 512 units and
    128 images) or a large batch.

    Args:
        weights: ``V`` by name, ``[units, ...]`` each.
        gradient: of the feedback loss, for all or some of the names, with a curvature for each.
        eta: fraction of the Newton step; None for a curvature that is damped already (`Probing.damped`), with neither
            fraction nor floor.

    Raises:
        ValueError: if the gradient carries no curvatures.
    """
    if gradient.curvature is None:
        raise ValueError("the normalized step needs a feedback loss that estimates its curvature")
    for name, curvature in gradient.curvature.items():
        weight, found = weights[name], gradient.parameters[name]
        if curvature.dim() == 1:  # one for each unit, not for each of its taps
            curvature = curvature.view(-1, *[1] * (weight.dim() - 1))
        if eta is None:
            weight -= found / curvature
        else:
            weight -= eta * found / (curvature + CURVATURE_FLOOR * curvature.mean())
