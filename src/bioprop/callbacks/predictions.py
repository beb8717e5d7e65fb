"""The file that ``bioprop predict`` leaves behind."""

import csv
import logging
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from bioprop.distributed import gather_rows
from bioprop.files import readable, replacing
from bioprop.runs.folder import run_folder

logger = logging.getLogger(__name__)


class PredictionsFile(Callback):
    r"""Write ``predictions.csv`` into the run's folder: image, predicted class, its probability and the true label.

    It has one row an image; the label of an image without one is left empty. The file is UTF-8. Bytes of a name that
    are not are written as ``\xe9``.
    """

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
        """Keep the batch's probabilities."""
        self._probabilities.append(outputs.float())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file once all batches are in."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        confidence, label = self._all_probabilities().max(dim=1)
        self._probabilities.clear()
        tries_only = trainer.fast_dev_run  # type: ignore[attr-defined]  # and has no folder of its own
        if tries_only or not trainer.is_global_zero:
            return
        path = run_folder(trainer) / "predictions.csv"
        with replacing(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("image", "prediction", "probability", "label"))
            # limited runs predict the first images only
            columns = (
                data.prediction_names(),
                label.tolist(),
                confidence.tolist(),
                data.resident["test"].labels.tolist(),
            )
            names = [*map(readable, data.classes), ""]
            for name, index, value, truth in zip(*columns, strict=False):
                writer.writerow((readable(name), names[index], f"{value:.4f}", names[truth]))
        logger.info("wrote %d predictions to %s", len(label), path)

    def _all_probabilities(self) -> Tensor:
        """Those of all processes, in the order of the images; the last batch may have left this one out."""
        counts = torch.tensor([len(self._probabilities)], device=self._probabilities[0].device)
        for _ in range(int(gather_rows(counts).max()) - len(self._probabilities)):
            self._probabilities.append(self._probabilities[0][:0])
        return torch.cat([gather_rows(batch) for batch in self._probabilities]).cpu()
