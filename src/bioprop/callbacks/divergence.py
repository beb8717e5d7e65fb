"""Stops a run whose numbers are no longer numbers."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from bioprop.algorithms.base import Algorithm
from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.distributed import mean_over_processes
from bioprop.errors import DivergenceError
from bioprop.networks.network import named_stages

#: Feedback weights this many times larger than the forward weights are the cause, even if still finite.
RUNAWAY = 1e4
#: Batches from one look to the next.
LOOK_EVERY = 20


class Watched(NamedTuple):
    """What is kept of a batch until the next look, on the device.

    Attributes:
        batch: its number.
        stages: names of the stages that have a feedback loss.
        values: norms of all parameters after the batch, its loss, and the feedback losses.
    """

    batch: int
    stages: tuple[str, ...]
    values: Tensor


class DivergenceGuard(Callback):
    """Stop soon after a loss or a weight has become infinite or NaN, naming the batch, the stage and what to lower.

    Every loss and the norm of every weight is kept on the device, and read together once in `LOOK_EVERY` batches,
    before validation, at the end of an epoch, and before a checkpoint is written: the last one is good.
    """

    def __init__(self) -> None:
        self._watched: list[Watched] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a run that was broken off."""
        self._watched.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what the batch has come to, and look where it is time.

        Raises:
            DivergenceError: naming the stage and the hyperparameter to lower.
        """
        if not isinstance(pl_module, Algorithm):
            return
        # taken in the weights' own precision: a norm that overflows there is divergence too
        norms = torch._foreach_norm([parameter.detach() for parameter in pl_module.parameters()])
        losses: Mapping[str, Tensor] = outputs["feedback_losses"]
        if self._watched and self._watched[-1].stages != tuple(losses):
            self._look(trainer, pl_module)
        values = torch.stack([each.float() for each in (*norms, outputs["loss"], *losses.values())])
        self._watched.append(Watched(batch_idx, tuple(losses), values))
        if trainer.is_last_batch or len(self._watched) == LOOK_EVERY:
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any] | None = None) -> None:
        """Read what was kept.

        Raises:
            DivergenceError: for the first batch with a number that is none, naming the stage and what to lower.
        """
        watched, self._watched = self._watched, []
        if not watched or not isinstance(pl_module, Algorithm):
            return
        (values,) = mean_over_processes([torch.stack([each.values for each in watched])])  # all stop, or none
        values = values.cpu()
        norms = values[:, : sum(1 for _ in pl_module.parameters())]
        sound = torch.isfinite(values).all(1) & torch.isfinite(torch.linalg.vector_norm(norms, dim=1))
        if sound.all():
            return
        first = int(sound.logical_not().nonzero()[0])
        batch, stages, _ = watched[first]
        output, _ = named_stages(pl_module.network)[-1]
        overflow = f"the output of stage {output} became infinite or NaN: lower the learning rate of model.optimizer"
        losses = dict(zip(stages, values[first, norms.shape[1] + 1 :].tolist(), strict=True))
        cause = next(_causes(pl_module, norms[first], losses), overflow)
        raise DivergenceError(
            f"training diverged in epoch {trainer.current_epoch}, batch {batch}: {cause} ({_last_checkpoint(trainer)})"
        )

    # before weights are evaluated, or written, and after an epoch that ended before its last batch
    on_validation_start = on_train_epoch_end = on_save_checkpoint = _look


def _causes(algorithm: Algorithm, norms: Tensor, feedback_losses: Mapping[str, float]) -> Iterator[str]:
    """Say what went wrong: feedback weights first, since they steer the forward weights.

    Activations that exploded break the feedback loss too, so both learning rates are named then.
    """
    norm_of: dict[Tensor, float] = dict(zip(algorithm.parameters(), norms.tolist(), strict=True))

    def is_finite(module: nn.Module) -> bool:
        return all(math.isfinite(norm_of[parameter]) for parameter in module.parameters())

    feedback, ran_away = nn.ModuleDict(), set[str]()
    if isinstance(algorithm, TargetAlgorithm) and algorithm.trains_feedback:
        feedback = algorithm.feedback
        ran_away = _ran_away(algorithm, norm_of)
    for name, operator in feedback.items():
        if not math.isfinite(feedback_losses.get(name, 0.0)) or name in ran_away or not is_finite(operator):
            yield (
                f"the feedback weights of stage {name} grew beyond all bounds: lower model.feedback_lr for it, or the "
                "learning rate of model.optimizer"
            )
    broken = [name for name, stage in named_stages(algorithm.network) if not is_finite(stage)]
    if broken:  # one step spreads it to every stage below, or above
        stages = ", ".join(broken)
        yield f"the weights of stage {stages} became infinite or NaN: lower the learning rate of model.optimizer"


def _ran_away(algorithm: TargetAlgorithm, norm_of: Mapping[Tensor, float]) -> set[str]:
    """Names of the stages whose feedback weights, if finite, have left the size of the forward weights far behind."""
    return {
        name
        for name, stage, mirror in algorithm.mirrored_stages()
        if any(norm_of[back] > RUNAWAY * norm_of[forward] for forward, back in mirror.pairs(stage))
    }


def _last_checkpoint(trainer: Trainer) -> str:
    path = getattr(trainer.checkpoint_callback, "last_model_path", "")
    # the path is set before the file is written
    return f"the last good checkpoint is {path}" if path and Path(path).is_file() else "there is no checkpoint yet"
