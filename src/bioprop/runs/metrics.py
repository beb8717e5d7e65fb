"""A run's ``metrics.csv``, which an interrupted run goes on writing where its checkpoint was."""

import csv
import logging
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from bioprop.files import replacing

logger = logging.getLogger(__name__)


class MetricsFile(CSVLogger):
    """Lightning's `CSVLogger`, which survives an interruption and a full disk.

    A resumed run keeps the rows up to its checkpoint (`keep`) and goes on below them; Lightning's own deletes the file.
    A row that cannot be written waits in memory for the next attempt. Arguments: those of `CSVLogger`.
    """

    def _get_next_version(self) -> int:
        """Make the folder at once: a run that starts in the same moment gets another."""
        version: int = super()._get_next_version()
        while True:
            try:
                rank_zero_only(Path(self.root_dir, f"version_{version}").mkdir)(parents=True)
                return version
            except FileExistsError:
                version += 1

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsWriter":
        """The rows and the file that holds them."""
        if self._experiment is None:
            self._experiment = MetricsWriter(self.log_dir)
        writer: MetricsWriter = self._experiment  # type: ignore[assignment]
        return writer

    def rows(self) -> int:
        """Return the number of rows so far; 0 in all processes but the first, which writes."""
        self.save()
        writer = self.experiment
        return len(writer.metrics) if isinstance(writer, MetricsWriter) else 0

    def keep(self, rows: int) -> bool:
        """Take over the first rows of the file that is in the folder, and drop the rest.

        Args:
            rows: number of rows to keep.

        Returns:
            Whether there was a file, and this is the process that writes.
        """
        writer = self.experiment
        return isinstance(writer, MetricsWriter) and writer.keep(rows)


class NoMetrics(MetricsFile):
    """The logger that ``--trainer.logger false`` stands for: a run has a folder of its own, without metrics in it."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write nothing."""


class MetricsWriter(ExperimentWriter):
    """The rows of a run, and the file that holds them, which is written as a whole.

    Args:
        log_dir: folder of the file, made if need be.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        self._warned = False

    def keep(self, rows: int) -> bool:
        """Take over the first rows of the file, and drop the rest."""
        if not self.path.is_file():
            return False
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            self.metrics = list[Any](reader)[:rows]
            self.metrics_keys = list(reader.fieldnames or ())
        self._write()
        return True

    def save(self) -> None:
        """Write the rows; report a refusal once, and try again at the next call."""
        if not self.metrics:
            return
        self._record_new_keys()
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                logger.warning("%s: %s: metrics wait in memory until it can be written", self.path, error.strerror)
            self._warned = True
        else:
            self._warned = False

    def _write(self) -> None:
        with replacing(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(self.metrics)

    def _check_log_dir_exists(self) -> None:
        """Leave what is in the folder alone: Lightning's own deletes the metrics."""
