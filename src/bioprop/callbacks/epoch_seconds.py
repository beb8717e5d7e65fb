"""Wall-clock seconds of an epoch."""

import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class EpochSeconds(Callback):
    """Log ``train/seconds``: wall-clock time of an epoch's batches, validation and other callbacks' work left out.

    Over several processes it is their mean. On a GPU the clock is read when the device is idle, at the epoch's two ends
    only. In a resumed epoch the time before the checkpoint counts, that of batches done twice once.
    """

    def __init__(self) -> None:
        self._start = self._end = self._before = 0.0
        self._device = torch.device("cpu")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the time of a checkpoint; an epoch that starts anew sets it back."""
        self._device = pl_module.device
        self._start = _now(self._device) - self._before

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

    def state_dict(self) -> dict[str, Any]:
        """Seconds of the epoch so far."""
        return {"seconds": _now(self._device) - self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the seconds of a checkpoint."""
        self._before = state_dict["seconds"]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
