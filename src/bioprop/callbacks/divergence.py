"""Stops a run whose numbers are no longer numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from bioprop.algorithms.base import Algorithm
from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.distributed import mean_over_processes
from bioprop.errors import DivergenceError
from bioprop.networks.network import named_stages

#: Feedback weights this many times larger than the forward weights are the cause, even if still finite.
RUNAWAY = 1e4


class DivergenceGuard(Callback):
    """Stop as soon as a loss or a weight is infinite or NaN, naming the stage and what to lower.

    Looks once a batch at every loss and at the norm of the forward and of the feedback weights, read together in one
    transfer from the device. Checkpoints are made after this look, so the last one is good.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the batch that was just trained on.

        Raises:
            DivergenceError: naming the stage and the hyperparameter to lower.
        """
        if not isinstance(pl_module, Algorithm):
            return
        # taken in the weights' own precision: a norm that overflows there is divergence too
        norm = get_total_norm([parameter.detach() for parameter in pl_module.parameters()])
        losses: Mapping[str, Tensor] = outputs["feedback_losses"]
        watched = torch.stack([norm.float(), outputs["loss"].float(), *(loss.float() for loss in losses.values())])
        (watched,) = mean_over_processes([watched])  # all stop together, or none
        if not torch.isfinite(watched).all():
            output, _ = named_stages(pl_module.network)[-1]
            overflow = (
                f"the output of stage {output} became infinite or NaN: lower the learning rate of model.optimizer"
            )
            cause = next(_causes(pl_module, losses), overflow)
            kept = _last_checkpoint(trainer)
            raise DivergenceError(
                f"training diverged in epoch {trainer.current_epoch}, batch {batch_idx}: {cause} ({kept})"
            )


def _causes(algorithm: Algorithm, feedback_losses: Mapping[str, Tensor]) -> Iterator[str]:
    """Say what went wrong: feedback weights first, since they steer the forward weights.

    Activations that exploded break the feedback loss too, so both learning rates are named then.
    """
    feedback = nn.ModuleDict()
    ran_away = set()
    if isinstance(algorithm, TargetAlgorithm) and algorithm.trains_feedback:
        feedback = algorithm.feedback
        ran_away = _ran_away(algorithm)
    for name, operator in feedback.items():
        broken_loss = name in feedback_losses and not torch.isfinite(feedback_losses[name])
        if broken_loss or name in ran_away or not _finite(operator.parameters()):
            yield (
                f"the feedback weights of stage {name} grew beyond all bounds: lower model.feedback_lr for it, or the "
                "learning rate of model.optimizer"
            )
    broken = [name for name, stage in named_stages(algorithm.network) if not _finite(stage.parameters())]
    if broken:  # one step spreads it to every stage below, or above
        stages = ", ".join(broken)
        yield f"the weights of stage {stages} became infinite or NaN: lower the learning rate of model.optimizer"


def _ran_away(algorithm: TargetAlgorithm) -> set[str]:
    """Names of the stages whose feedback weights, if finite, have left the size of the forward weights far behind."""
    return {
        name
        for name, stage, mirror in algorithm.mirrored_stages()
        if any(bool(back.norm() > RUNAWAY * forward.norm()) for forward, back in mirror.pairs(stage))
    }


def _finite(parameters: Iterator[Tensor]) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters)


def _last_checkpoint(trainer: Trainer) -> str:
    path = getattr(trainer.checkpoint_callback, "last_model_path", "")
    return f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
