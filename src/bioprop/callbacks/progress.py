"""The progress bar of a run."""

import time
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar

from bioprop.algorithms.evaluation import Evaluated


class RunningLoss(RichProgressBar):
    """Lightning's bar with the mean training loss of the epoch so far, drawn a few times a second.

    To show the loss is to wait for the device, so it is not done every batch. Arguments: those of `RichProgressBar`.
    """

    #: Seconds from one drawing to the next.
    pause = 0.3

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drawn = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw, if it was not done just now."""
        if trainer.is_last_batch or time.monotonic() - self._drawn >= self.pause:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._drawn = time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what Lightning shows, and the loss so far."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        loss = pl_module.running_loss() if trainer.training and isinstance(pl_module, Evaluated) else None
        return metrics if loss is None else metrics | {"train/loss": float(loss)}
