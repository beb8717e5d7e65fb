"""What an epoch of training costs."""

import time

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class EpochSeconds(Callback):
    """Log ``train/seconds``: wall-clock time of an epoch's batches, validation and other callbacks' work left out.

    Over several processes it is their mean. On a GPU the clock is read when the device is idle, at the epoch's two ends
    only.
    """

    def __init__(self) -> None:
        self._start = self._end = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = _now(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Read the clock after the last batch, before validation begins."""
        if trainer.is_last_batch:
            self._end = _now(pl_module.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the time in seconds."""
        pl_module.log("train/seconds", max(self._end - self._start, 0.0), sync_dist=True)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
