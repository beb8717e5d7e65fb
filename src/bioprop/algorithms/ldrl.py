"""L-DRL: layer-wise difference target propagation with the difference reconstruction loss."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.distributed import gather_rows, mean_over_processes, process_count, process_rank
from bioprop.errors import UserError
from bioprop.feedback.ldrl import has_curvature, ldrl_objective
from bioprop.feedback.losses import FeedbackObjective
from bioprop.feedback.noise import (
    ALONE,
    ECHO_ITERATIONS,
    NoiseStream,
    Peers,
    RandomStreams,
    Rule,
    SecondNoise,
    expected_iterations,
)
from bioprop.feedback.speed import DEFAULT_SPEED, Speed
from bioprop.feedback.training import FeedbackStep, FeedbackTraining, StageBatch
from bioprop.functional.activations import MirrorName
from bioprop.networks.mirrors import Mirror, build_mirror
from bioprop.networks.network import Network
from bioprop.networks.stages import Stage, StagePass

SwitchesOf = Literal["noisy", "clean"]
NoiseAt = Literal["layer", "stage"]
Auto = Literal["auto"]


class LDRL(TargetAlgorithm):
    """Layer-wise feedback training towards the transposed Jacobian (Ernoult et al., ICML 2022).

    For each stage n >= 2 and some iterations a batch: draw noise ``eps`` at the stage's input, take a second noise
    ``eta`` at its output, and descend ``mean_batch[ -2 <eps, G(F(s^{n-1} + eps)) - G(s^n)> + |G(s^n + eta) -
    G(s^n)|^2 ]`` in the feedback weights. Its minimiser is ``J_G = J_F^T`` (Jacobian Matching Condition), under which
    the forward update tends to the BP gradient as ``beta -> 0`` (Gradient Matching Property).

    The ``second_noise`` decides what a batch costs; the mean gradient is the same to first order in the noise
    (`bioprop.feedback.losses` derives all three, `bioprop.feedback.noise` the settings ``auto``):

    - ``echo`` (ours): what ``G`` itself answers to ``eps``. The gradient's noise then vanishes where ``J_G = J_F^T``,
      and two iterations a batch do what takes hundreds with independent noise. It never reads a forward weight:
      ``F`` is a black box that answers to ``s + eps``. But it sends noise up through the feedback weights, which no
      local rule can: results with it are those of the published rule with very many samples, not of a local circuit.
    - ``expected`` (ours): integrated out, which leaves a local rule: Hebb's product and a decay. Noisier than the echo.
    - ``independent``: a draw of its own, as published. Needs numbers for noise, rate and iterations.

    Hyperparameters of feedback training are one value for all stages or exactly one for each stage n >= 2.

    Args:
        network: the forward network.
        beta: step of the output target along the gradient, above 0.
        second_noise: ``echo``, ``expected`` or ``independent``, see above.
        noise: ``sigma``, in units of the activations, above 0; ``auto`` for a hundredth of the root mean square of the
            stage's inputs.
        feedback_lr: for ``normalized`` the fraction ``eta`` of a Newton step, in (0, 1]; it is damped as least mean
            squares asks but for independent noise, and ``auto`` is all of it. For ``sgd`` and ``adam`` the learning
            rate.
        iterations: feedback iterations a batch, each on the whole batch, 0 to leave a stage's feedback as it was drawn.
            ``auto`` with an echo: two, on as many images as give a unit two samples for each of its weights; where a
            batch has fewer, the second is along the batch's own activities. ``auto`` with ``expected``: one
            for each direction of a weight that there is to a sample of the batch, four at least.
        switches: whose max-pool switches unpool the noisy output: those of the ``clean`` pass (ours) or of the
            ``noisy`` one, as published. Noise flips some switches, and each flip moves a whole activation, not a small
            difference: this biases the published loss, however small the noise, away from ``J_G = J_F^T``. Likewise
            the inner slopes of a block with ``noise_at="stage"``. Independent noise alone takes ``noisy``.
        mirror: ``exact`` (ours) or ``paper``, the authors' form of the feedback operator.
        feedback_step: ``normalized`` (ours: by the loss's curvature, no momentum), ``sgd``, as published, or ``adam``,
            as in the authors' parallel variant.
        feedback_momentum: of ``sgd``.
        feedback_decay: weight decay of ``adam``.
        noise_at: how the feedback of a stage of several layers (a residual block) is trained: by noise around each
            ``layer`` (ours) or around the ``stage`` as a whole, as published, which needs ``sgd``. Only the former has
            ``V = W`` for its one minimiser: factors that cancel between two layers leave the whole as it is.
        speed: how the gradients are computed; changes rounding, not the method.
        optimizer: makes the optimizer of the forward weights.
        settings: the other arguments of `Algorithm`.

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
        switches: SwitchesOf = "clean",
        mirror: MirrorName = "exact",
        feedback_step: FeedbackStep = "normalized",
        feedback_momentum: float = 0.9,
        feedback_decay: float = 0.0,
        noise_at: NoiseAt = "layer",
        speed: Speed = DEFAULT_SPEED,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        **settings: Any,
    ) -> None:
        super().__init__(network, beta, optimizer, **settings)
        for option, value, known in (
            ("second_noise", second_noise, get_args(SecondNoise)),
            ("switches", switches, get_args(SwitchesOf)),
            ("noise_at", noise_at, get_args(NoiseAt)),
        ):
            if value not in known:
                raise UserError(f"{option} {value!r} is not known: choose one of {', '.join(known)}")
        self.second_noise, self.noise_at = second_noise, noise_at
        self._clean_switches = switches == "clean"
        for name, stage in network.stages()[1:]:
            self.feedback[name] = build_mirror(stage, mirror)
        self.streams = RandomStreams()
        self.feedback_training: FeedbackTraining = FeedbackTraining(
            self.feedback,
            self.streams,
            self._observers,
            noise=noise,
            feedback_lr=feedback_lr,
            iterations=iterations,
            feedback_step=feedback_step,
            feedback_momentum=feedback_momentum,
            speed=speed,
            feedback_decay=feedback_decay,
            finds_settings=True,
        )
        self.closed_form = speed.closed_form
        self._check_combinations()

    def _train_feedback(self, passes: Sequence[StagePass]) -> dict[str, Tensor]:
        """Phase 1: every stage n >= 2 descends its feedback loss, on fresh noise in every iteration."""
        batches = []
        for (name, stage, mirror), clean in zip(self.mirrored_stages(), passes[1:], strict=True):
            iterations = self.iterations_of(name, mirror, clean)
            objective = partial(self.feedback_objective, name, stage, mirror)
            batches.append(StageBatch(name, stage, mirror, clean, iterations, objective))
        return self.feedback_training.train(batches)

    def target_differences(self, passes: Sequence[StagePass], output: Tensor) -> list[Tensor]:
        """Return ``t^n - s^n`` through the feedback operators, from the input to the output, given the output's."""
        return self.differences_through_feedback(passes, output)

    def iterations_of(self, name: str, mirror: Mirror, clean: StagePass) -> int:
        """Number of feedback iterations that one stage takes on a batch.

        Args:
            name: of the stage.
            mirror: its feedback operator.
            clean: its clean pass.
        """
        given = self.feedback_training.iterations[name]
        if given is not None:
            return int(given)
        if self.second_noise == "echo":
            return ECHO_ITERATIONS
        fan_in = max(weight[0].numel() for each, weight in mirror.named_parameters() if each != "bias")
        samples = len(clean.inputs) * self._peers().size * clean.output[0, 0].numel()
        return expected_iterations(fan_in / samples)

    def feedback_objective(
        self, name: str, stage: Stage, mirror: Mirror, clean: StagePass, noise: NoiseStream
    ) -> FeedbackObjective:
        """Prepare the L-DRL loss of one stage and batch: noise at the stage's input, the second noise at its output.

        Args:
            name: of the stage.
            stage: ``F^n``.
            mirror: ``G^n``.
            clean: its clean pass: ``s^{n-1}``, ``s^n``, switches.
            noise: where noise is drawn from.

        Returns:
            A function from the number of the draw of noise to the gradient of the loss.
        """
        training = self.feedback_training
        rule = Rule(
            self.second_noise,
            self._clean_switches,
            training.noise[name],
            training.iterations[name] is not None,
            self.noise_at == "layer",
            training.samples,
            self._peers(),
        )
        return ldrl_objective(rule, stage, mirror, clean, noise)

    def _peers(self) -> Peers:
        """The processes that average their feedback gradients."""
        if self.feedback_training.sharing() != "gradients":
            return ALONE
        return Peers(process_count(), process_rank(), mean_over_processes, gather_rows)

    def _check_combinations(self) -> None:
        """Refuse what has no meaning together.

        Raises:
            UserError: naming the setting and what works.
        """
        training = self.feedback_training
        settings = {"noise": training.noise, "feedback_lr": training.feedback_lr, "iterations": training.iterations}
        left = [name for name, values in settings.items() if None in values.values()]
        if self.second_noise == "independent" and left:
            raise UserError(
                f"{', '.join(left)}: auto follows from the sizes for second_noise echo and expected; independent noise "
                "needs numbers, such as noise: 0.1, feedback_lr: 0.05, iterations: 20"
            )
        if self.second_noise != "independent" and not self._clean_switches:
            raise UserError(
                f"switches noisy: a switch that noise flips moves a whole activation, and the few samples of "
                f"second_noise {self.second_noise} do not average that out: use switches: clean, or second_noise: "
                "independent"
            )
        if training.feedback_step != "normalized" and "feedback_lr" in left:
            raise UserError(
                "feedback_lr: auto is a normalized step: with feedback_step "
                f"{training.feedback_step} give a number, such as 0.01"
            )
        for name, _, mirror in self.mirrored_stages():
            if training.feedback_step == "normalized" and not has_curvature(mirror, self.noise_at == "layer"):
                raise UserError(
                    f"noise_at stage has no curvature for each of {name}'s several feedback weights, which the "
                    "normalized step divides by: use feedback_step: sgd, or noise_at: layer"
                )
            if self.second_noise == "expected" and not has_curvature(mirror, self.noise_at == "layer"):
                raise UserError(
                    f"second_noise expected is not known for the feedback of {name} as a whole: use echo, or "
                    "noise_at: layer"
                )
