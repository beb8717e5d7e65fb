"""What ``bioprop predict`` leaves behind."""

import csv
import logging
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from bioprop.callbacks.run_folder import run_folder

logger = logging.getLogger(__name__)


class PredictionsFile(Callback):
    """Write ``predictions.csv`` into the run's folder: image, predicted class and its probability, one row an image."""

    def __init__(self) -> None:
        self._probabilities: list[Tensor] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's probabilities, off the device."""
        self._probabilities.append(outputs.float().cpu())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file once all batches are in."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        confidence, label = torch.cat(self._probabilities).max(dim=1)
        self._probabilities.clear()
        path = run_folder(trainer) / "predictions.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("image", "prediction", "probability"))
            # limited runs predict the first images only
            for name, index, value in zip(data.prediction_names(), label.tolist(), confidence.tolist(), strict=False):
                writer.writerow((name, data.classes[index], f"{value:.4f}"))
        logger.info("wrote %d predictions to %s", len(label), path)
