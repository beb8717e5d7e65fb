"""The course of feedback training within a batch, for figures."""

import csv
import io
import logging
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.errors import UserError
from bioprop.feedback.training import FeedbackIteration
from bioprop.runs.folder import run_folder
from bioprop.runs.wandb import chart_feedback, wandb_run

logger = logging.getLogger(__name__)

FILE_NAME = "feedback_training.csv"
COLUMNS = ("epoch", "batch", "stage", "iteration", "loss", "angle")


class FeedbackRecord(Callback):
    """Write every iteration of feedback training on some batches to ``feedback_training.csv`` in the run's folder.

    Columns: epoch, batch, stage, iteration, feedback loss before the step, and the angle (degrees) between forward
    and feedback weight after it (nan where the latter is no forward weight's counterpart); `RunPictures` draws them.
    Batches that are not recorded cost nothing; algorithms without feedback training leave no file. With Weights &
    Biases, loss and angle of every stage are line charts too. Rows that a full disk refuses wait in memory for the next
    attempt.

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
        self._waiting = ""  # rows that are not in the file yet
        self._warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what was recorded after the checkpoint that a run goes on from in its own folder."""
        size, self._resumed_size = self._resumed_size, None
        path = run_folder(trainer) / FILE_NAME
        self._size = path.stat().st_size if path.exists() else 0
        if size is not None and self._size < size:
            self._waiting = ""  # of a file in another folder
        elif size is not None and self._size > size:
            os.truncate(path, size)
            self._size = size

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to observe a batch that is to be recorded."""
        if (
            isinstance(pl_module, TargetAlgorithm)
            and pl_module.trains_feedback
            and not batch_idx % self.every_n_batches
        ):
            self._observing.enter_context(pl_module.observe_feedback(self._seen.append))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what was seen."""
        self._observing.close()
        if not self._seen or not trainer.is_global_zero:
            self._seen.clear()
            return
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        if not self._size and not self._waiting:
            writer.writerow(COLUMNS)
        for seen in self._seen:
            row = (seen.stage, seen.iteration, float(seen.loss), float(seen.angle))
            writer.writerow((trainer.current_epoch, batch_idx, *row))
        self._waiting += text.getvalue()
        if (run := wandb_run(trainer)) is not None:
            self._charted = chart_feedback(run, self._seen, self._charted)
        self._seen.clear()
        self._write(run_folder(trainer) / FILE_NAME)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try once more, where the last rows could not be written."""
        if self._waiting:
            self._write(run_folder(trainer) / FILE_NAME)

    def _write(self, path: Path) -> None:
        """Append what waits; where that is refused, say so once and let it wait for the next attempt."""
        rows = self._waiting.encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(rows)
        except OSError as error:
            if not self._warned:
                logger.warning("%s: %s: its rows wait in memory until it can be written", path, error.strerror)
            self._warned = True
            with suppress(OSError):
                os.truncate(path, self._size)  # half a row may have fitted
        else:
            self._size, self._waiting, self._warned = self._size + len(rows), "", False

    def state_dict(self) -> dict[str, Any]:
        """Return the length of the file, the rows that wait to be written to it, and the length of its charts."""
        return {"size": self._size, "waiting": self._waiting, "charted": self._charted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the length that the file had, what waited, and where its charts go on."""
        self._size = self._resumed_size = state_dict["size"]
        self._waiting = state_dict["waiting"]
        self._charted = state_dict.get("charted", 0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop observing when a batch was cut short."""
        self._observing.close()
