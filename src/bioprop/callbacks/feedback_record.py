"""The course of feedback training within a batch, for figures."""

import csv
import os
from contextlib import ExitStack
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from bioprop.algorithms.difference_reconstruction import DifferenceReconstruction
from bioprop.algorithms.layerwise_feedback import FeedbackIteration, LayerwiseFeedback
from bioprop.callbacks.run_folder import run_folder
from bioprop.callbacks.wandb_runs import chart_feedback, wandb_run
from bioprop.errors import UserError

FILE_NAME = "feedback_training.csv"
COLUMNS = ("epoch", "batch", "stage", "iteration", "loss", "angle")


class FeedbackRecord(Callback):
    """Write every iteration of feedback training on some batches to ``feedback_training.csv`` in the run's folder.

    Columns: epoch, batch, stage, iteration, feedback loss before the step, and the angle (degrees) between forward
    and feedback weight after it (nan where the latter is no forward weight's counterpart). Batches that are not
    recorded cost nothing; algorithms without feedback training leave no file. With Weights & Biases, loss and angle of
    every stage are line charts too.

    Args:
        every_n_batches: batches from one recorded batch to the next within an epoch, counted from its first.

    Raises:
        UserError: if ``every_n_batches`` is below 1.
    """

    def __init__(self, every_n_batches: int = 100) -> None:
        if every_n_batches < 1:
            raise UserError(f"FeedbackRecord: every_n_batches is {every_n_batches}, but it must be at least 1")
        self.every_n_batches = every_n_batches
        self._seen: list[FeedbackIteration] = []
        self._size = 0  # of the file, in bytes
        self._resumed_size: int | None = None
        self._observing = ExitStack()
        self._charted = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what was recorded after the checkpoint that a run goes on from in its own folder."""
        size, self._resumed_size = self._resumed_size, None
        path = run_folder(trainer) / FILE_NAME
        if size is not None and path.exists() and path.stat().st_size > size:
            os.truncate(path, size)
        self._size = path.stat().st_size if path.exists() else 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to observe a batch that is to be recorded."""
        if isinstance(pl_module, LayerwiseFeedback | DifferenceReconstruction) and not batch_idx % self.every_n_batches:
            self._observing.enter_context(pl_module.observe_feedback(self._seen.append))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what was seen."""
        self._observing.close()
        if not self._seen or not trainer.is_global_zero:
            self._seen.clear()
            return
        path = run_folder(trainer) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(COLUMNS)
            for seen in self._seen:
                row = (seen.stage, seen.iteration, float(seen.loss), float(seen.angle))
                writer.writerow((trainer.current_epoch, batch_idx, *row))
        if (run := wandb_run(trainer)) is not None:
            self._charted = chart_feedback(run, self._seen, self._charted)
        self._seen.clear()
        self._size = path.stat().st_size

    def state_dict(self) -> dict[str, Any]:
        """How long the file is."""
        return {"size": self._size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the length that the file had."""
        self._size = self._resumed_size = state_dict["size"]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop observing when a batch was cut short."""
        self._observing.close()
