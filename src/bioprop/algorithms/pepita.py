"""PEPITA: a second forward pass on images that the error has changed, in place of a backward pass."""

from typing import Any, cast

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from bioprop.algorithms.base import Algorithm, Gradients
from bioprop.errors import UserError
from bioprop.functional.gradients import stage_gradients
from bioprop.networks.network import Network
from bioprop.networks.stages import LinearStage
from bioprop.ranges import check_range, number


class PEPITA(Algorithm):
    """Present the error to perturb the input to modulate activity (Dellaferrera & Kreiman, ICML 2022).

    The first pass gives ``s^n`` and the error ``e = dL/ds^N``, the second, on ``x + e F`` with ``F`` fixed and random,
    ``r^n``. Hidden stages step along ``mean_batch (s^n - r^n) r^{n-1 T}``, without the slope of their activation; the
    output stage along its gradient in the second pass, as in the authors' program. Nothing is sent backwards.

    The difference of a stage is, to first order, ``-J (e F)`` with the Jacobian of the stages up to it: an error of the
    stage's own, if training brings forward weights to agree with ``-F``. Fully connected stages alone: on a conv stage
    the difference belongs to pooled units, which the published rule does not lead back.

    Args:
        network: an `MLP` without standardisation, or another chain of `LinearStage`.
        feedback_scale: size of ``F``, above 0: uniform in ``+- scale sqrt(6 / inputs)``.
        optimizer: makes the optimizer of the forward weights.
        settings: the other arguments of `Algorithm`.

    Raises:
        UserError: if a stage is not fully connected, or the scale is not above 0.
    """

    recordable = True

    precisions = ("32-true", "64-true")
    precision_reason = "it learns from differences between two passes, which bfloat16 would drown"

    def __init__(
        self,
        network: Network,
        feedback_scale: float = 0.05,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        **settings: Any,
    ) -> None:
        super().__init__(network, optimizer, **settings)
        scale = number("feedback_scale", feedback_scale)
        check_range("feedback_scale", [scale], 0.0, low_allowed=False)
        stages = [stage for _, stage in network.stages()] if isinstance(network, Network) else []
        if not stages or not all(isinstance(stage, LinearStage) for stage in stages):
            raise UserError(
                f"PEPITA is a rule for fully connected stages, and {type(network).__name__} has others: choose MLP, "
                "without standardize"
            )
        self.network: Network
        inputs = torch.Size(stages[0].input_shape).numel()
        drawn = torch.empty(stages[-1].output_shape[0], inputs).uniform_(-1, 1) * scale * (6 / inputs) ** 0.5
        self.backward_weights = nn.ParameterDict({"input": nn.Parameter(drawn, requires_grad=False)})

    def _gradients(self, images: Tensor, labels: Tensor) -> Gradients:
        with torch.no_grad():
            first = self._run(images)[1]
            error = self.output_loss.gradient(first[-1], labels)
        changed = images + (error @ self.backward_weights["input"]).view_as(images)
        affine, second = self._run(changed)
        errors = [before - after for before, after in zip(first[:-1], second[:-1], strict=True)]
        errors.append(self.output_loss.gradient(second[-1], labels))
        scaled = [each / len(images) for each in errors]
        return Gradients(stage_gradients(self.network, affine, scaled), first[-1])

    def _run(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return what every stage computes before and after its activation; no graph leads from stage to stage."""
        affine: list[Tensor] = []
        states = [images]
        for _, each in self.network.stages():
            stage = cast(LinearStage, each)
            with torch.enable_grad():
                affine.append(stage.affine(states[-1]))
            states.append(stage.activate(affine[-1].detach()).output)
        return affine, states[1:]
