"""When a run saves its state, and what it does where that fails."""

import logging
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch.nn.utils import get_total_norm

from bioprop.algorithms.evaluation import Evaluated
from bioprop.callbacks.checkpoint_folder import CheckpointFolder
from bioprop.callbacks.divergence import DivergenceError
from bioprop.callbacks.stop_signals import RunStopped, StopSignals
from bioprop.checkpoint_files import CheckpointFiles
from bioprop.errors import UserError
from bioprop.files import WriteError

logger = logging.getLogger(__name__)


class RunCheckpoints(CheckpointFolder):
    """Keep ``last.ckpt``, from which a run goes on, and ``best.ckpt``, that of the best metric, in ``checkpoints/``.

    ``last.ckpt`` is written at the end of every epoch, every so many batches, and when the run is told to stop:
    SIGTERM, Ctrl-C and SIGHUP (a closed terminal's) let the batch finish, save, and end the process with status 143,
    130 and 129; a second one ends it at once.
    A run resumed from it equals the uninterrupted one bit for bit, since a checkpoint is only made where nothing is
    under way: where validation follows a batch, after it; after an epoch's last batch, at the end of the epoch.

    A file appears under its name once it is complete on the disk. A write that is refused (a full disk) leaves the
    previous checkpoint and is reported; training goes on and tries again when the next checkpoint is due. If the last
    one of the run fails too, the run ends in an error. Weights that are not finite are never saved.

    Args:
        every_n_batches: batches from one ``last.ckpt`` to the next, counted through all epochs; 0 writes it at the end
            of each epoch alone.
        monitor: the logged metric that decides which checkpoint is the best, as it stands at the end of an epoch.
        mode: whether the best is the highest ("max") or the lowest ("min").
        save_top_k: how many of the best are kept; -1 keeps one of every epoch that brings the metric.
        filename: of the best, without ``.ckpt`` and folders; may hold names of metrics, ``{epoch}`` and ``{step}`` in
            braces, with ``_`` for their ``/``.
        dirpath: where the files go, those of one run alone; by default ``checkpoints/`` in the run's folder.

    Raises:
        UserError: if ``every_n_batches`` is below 0, or ``filename`` is no name for the best checkpoint.
    """

    def __init__(
        self,
        every_n_batches: int = 0,
        monitor: str = "val/accuracy",
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
        filename: str = "best",
        dirpath: str | None = None,
    ) -> None:
        if every_n_batches < 0:
            raise UserError(f"checkpoint.every_n_batches is {every_n_batches}, but it must be at least 0 (0: never)")
        super().__init__(
            dirpath,
            filename,
            monitor,
            save_last=True,
            save_top_k=save_top_k,
            mode=mode,
            save_on_train_epoch_end=True,
            enable_version_counter=save_top_k != 1,
        )
        self.every_n_batches = every_n_batches
        self.saves = True  # or only listens to signals: `enable_checkpointing` of a trainer that has this callback
        self.signals = StopSignals()
        self._due = False
        self._stopping = 0
        self._requeue: Callable[[], Any] | None = None
        self._failure: str | None = None

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write files whole or not at all."""
        with warnings.catch_warnings():  # a run that goes on has files in its folder
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        self.signals.remember()
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Claim the folder, now that the checkpoint to go on from is accepted.

        Raises:
            UserError: if it cannot be written, or is another run's.
        """
        if self._saves(trainer):
            self.claim(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals from here on: there is something to be saved."""
        super().on_train_start(trainer, pl_module)
        self._due, self._stopping, self._requeue, self._failure = False, 0, None, None
        self.signals.listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave, where the run was told to stop and everything of the previous batch is done.

        Raises:
            RunStopped: with the exit status.
        """
        if self._stopping:
            name = signal.Signals(self._stopping).name
            if trainer.is_global_zero:
                logger.warning("stopped by %s after batch %d: %s", name, trainer.global_step, self._way_on(trainer))
            raise RunStopped(128 + self._stopping)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where that is due; once validation is over, or the epoch, where they follow."""
        stopping, requeue = self.signals.told(trainer)
        self._stopping = self._stopping or stopping
        self._requeue = self._requeue or requeue
        regular = self.every_n_batches > 0 and trainer.global_step % self.every_n_batches == 0
        self._due = self._due or regular or self._stopping > 0
        if not _validation_follows(trainer) and not _ends_epoch(trainer):
            self._save_what_is_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was put off until after a validation within the epoch."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not _ends_epoch(trainer):
            self._save_what_is_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best, and the last."""
        stopping, requeue = self.signals.told(trainer)
        self._stopping, self._requeue, self._due = self._stopping or stopping, self._requeue or requeue, True
        candidates = self._monitor_candidates(trainer)
        # an earlier epoch's metric is not that of these weights; one that is logged nowhere is Lightning's to report
        known = self.monitor in candidates
        stale = known and isinstance(pl_module, Evaluated) and not pl_module.logged_this_epoch(str(self.monitor))
        if self._saves(trainer) and not stale and (known or trainer.fit_loop.epoch_loop.val_loop._has_run):
            self._attempt(trainer, lambda: self._save_topk_checkpoint(trainer, candidates))
        self._save_what_is_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try once more, where the last checkpoint could not be written.

        Raises:
            UserError: if that fails too: the trained weights would be lost without a word.
        """
        if self._failure and self._saves(trainer):
            self._save_last(trainer)
        if self._failure:
            raise UserError(
                f"training is over, but its last checkpoint could not be written: {self._failure}; "
                f"{self._kept()}: make room, and go on from there with --ckpt_path last"
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let SIGTERM end the process: there is nothing to be saved yet."""
        self.signals.let_through()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let SIGTERM end a process that only evaluates."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.signals.let_through()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let SIGTERM end the process."""
        self.signals.let_through()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let SIGTERM end the process."""
        self.signals.let_through()

    # -- saving --------------------------------------------------------------------------------------------------

    def _save_what_is_due(self, trainer: Trainer) -> None:
        if self._due:
            self._due = False
            self._save_last(trainer)
        if self._requeue is not None:
            requeue, self._requeue = self._requeue, None
            requeue()

    def _save_last(self, trainer: Trainer) -> None:
        if not self._saves(trainer):
            return
        path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)

        def save() -> None:
            self.last_model_path = path  # before saving: it is a part of what is saved
            self._save_checkpoint(trainer, path)

        self._attempt(trainer, save)

    def _attempt(self, trainer: Trainer, save: Callable[[], None]) -> None:
        """Save; where that is refused, report it and forget about it, in all processes alike."""
        before = self.__dict__ | {"best_k_models": dict(self.best_k_models)}
        try:
            save()
        except WriteError as error:
            self.__dict__.update(before)
            self._failure = f"{error.filename}: {error.strerror}"
            if trainer.is_global_zero:
                logger.warning(
                    "the checkpoint after batch %d could not be written: %s: %s, training goes on, and the next one "
                    "will be tried when it is due",
                    trainer.global_step,
                    self._failure,
                    self._kept(),
                )
        else:
            self._failure = None

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save in all processes.

        Raises:
            DivergenceError: if a weight is not finite.
            WriteError: in all processes, if the first could not write the file.
        """
        weights = [parameter.detach() for parameter in trainer.lightning_module.parameters()]
        if not torch.isfinite(get_total_norm(weights)):
            raise DivergenceError(
                f"the weights are infinite or NaN after batch {trainer.global_step}, so they are not saved: "
                f"{self._kept()}"
            )
        refused: WriteError | None = None
        try:
            super()._save_checkpoint(trainer, filepath)
        except WriteError as error:
            refused = error
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other processes wait by now
        # the exception itself: all processes raise it, or none
        refused = trainer.strategy.broadcast(refused)
        if refused is not None:
            raise refused

    def _kept(self) -> str:
        path = self.last_model_path
        return f"the last good checkpoint is {path}" if path and Path(path).is_file() else "there is no checkpoint yet"

    def _saves(self, trainer: Trainer) -> bool:
        fits = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        return self.saves and fits and not _only_tries(trainer)

    def _way_on(self, trainer: Trainer) -> str:
        if _only_tries(trainer):
            return "fast_dev_run saves nothing"
        if not self.saves:
            return "enable_checkpointing is off, so nothing was saved"
        if self._failure:
            return f"its state could not be saved ({self._failure}); {self._kept()}"
        return f"--ckpt_path last, or {self.last_model_path}, goes on from here"


def _only_tries(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _validation_follows(trainer: Trainer) -> bool:
    """Whether the trainer validates after the batch that just ended."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _ends_epoch(trainer: Trainer) -> bool:
    """Whether the batch that just ended is the epoch's last."""
    stops = trainer.should_stop and trainer.fit_loop._can_stop_early
    return bool(trainer.is_last_batch or stops or 0 <= trainer.max_steps <= trainer.global_step)
