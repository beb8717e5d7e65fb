"""The checkpoints of a run: the moments at which they are written, their names, and refused writes."""

import logging
import re
import signal
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn
from torch.nn.utils import get_total_norm

from bioprop.algorithms.evaluation import Evaluated
from bioprop.algorithms.resuming import epoch_ends_here, has_validated, validation_follows
from bioprop.errors import DivergenceError, UserError
from bioprop.files import CheckpointFiles, WriteError
from bioprop.runs.folder import LAST, goes_on, logger_folders
from bioprop.runs.lock import FolderLock
from bioprop.runs.signals import RunStopped, StopSignals

logger = logging.getLogger(__name__)


class RunCheckpoints(ModelCheckpoint):
    """Keep ``last.ckpt``, from which a run goes on, and ``best.ckpt``, that of the best metric, in ``checkpoints/``.

    ``last.ckpt`` is written at the end of every epoch, every so many batches, and when the run is told to stop:
    SIGTERM, Ctrl-C and SIGHUP (a closed terminal's) let the batch finish, save, and end the process with status 143,
    130 and 129; a second one ends it at once.
    A run resumed from it equals the uninterrupted one bit for bit, since a checkpoint is only made where nothing is
    under way: where validation follows a batch, after it; after an epoch's last batch, at the end of the epoch.

    A file appears under its name once it is complete on the disk. A write that is refused (a full disk) leaves the
    previous checkpoint and is reported; training goes on and tries again when the next checkpoint is due. If the last
    one of the run fails too, the run ends in an error. Weights that are not finite are never saved. A folder that holds
    another run's files of the same names is refused, and so is one that another process is writing into.

    Args:
        every_n_batches: batches from one ``last.ckpt`` to the next, counted through all epochs; 0 writes it at the end
            of each epoch alone.
        monitor: the logged metric that decides which checkpoint is the best, as it stands at the end of an epoch.
        mode: "max" if the highest value is the best, "min" if the lowest is.
        save_top_k: number of the best that are kept; -1 keeps one of every epoch that brings the metric.
        filename: name of the best, without ``.ckpt`` and folders; may hold names of metrics, ``{epoch}`` and ``{step}``
            in braces, with ``_`` for their ``/``.
        dirpath: folder of the files, those of one run alone; by default ``checkpoints/`` in the run's folder.

    Raises:
        UserError: if ``every_n_batches`` is below 0.
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
        self._lock = FolderLock()
        self._folders: list[str] = []  # of the loggers, for a run to go on in, wherever its checkpoints lie
        self._due = False
        self._failure: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write files whole or not at all."""
        with warnings.catch_warnings():  # a run that goes on has files in its folder
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        self.signals.remember()
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Claim the folder, now that the checkpoint to go on from is accepted and before anything is written.

        Raises:
            UserError: in all processes, if it cannot be written, is in use, or holds another run's checkpoints.
        """
        if not self._saves(trainer):
            return
        refusal = None
        self._folders = [str(folder) for folder in logger_folders(trainer)]
        if trainer.is_global_zero:
            folder = Path(str(self.dirpath))
            refusal = self._lock.take(folder) or self._others(trainer, folder)
        refusal = trainer.strategy.broadcast(refusal)
        if refusal:
            self._lock.release()
            raise UserError(refusal)

    @rank_zero_only
    def hold_before_logging(self, folder: Path) -> None:
        """Keep other processes out of the folder of a run to go on with, before its loggers wake up.

        Raises:
            UserError: in the first process, if another run is there.
        """
        if refusal := self._lock.take(folder):
            raise UserError(refusal)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals from here on: there is something to be saved."""
        super().on_train_start(trainer, pl_module)
        self._due, self._failure = False, None
        self.signals.listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave, where the run was told to stop and everything of the previous batch is done.

        Raises:
            RunStopped: with the exit status.
        """
        if number := self.signals.stopping:
            name = signal.Signals(number).name
            if trainer.is_global_zero:
                logger.warning("stopped by %s after batch %d: %s", name, trainer.global_step, self._way_on(trainer))
            raise RunStopped(128 + number)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where that is due; once validation is over, or the epoch, where they follow."""
        self.signals.look(trainer)
        self._due |= self.every_n_batches > 0 and trainer.global_step % self.every_n_batches == 0
        self._due |= self.signals.stopping > 0
        if not validation_follows(trainer) and not epoch_ends_here(trainer):
            self._save_what_is_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was put off until after a validation within the epoch."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not epoch_ends_here(trainer):
            self._save_what_is_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best, and the last."""
        self.signals.look(trainer)
        self._due = True
        candidates = self._monitor_candidates(trainer)
        known = self.monitor in candidates
        # an earlier epoch's metric is not that of these weights; one that is logged nowhere is Lightning's to report
        stale = known and isinstance(pl_module, Evaluated) and not pl_module.logged_this_epoch(str(self.monitor))
        if self._saves(trainer) and not stale and (known or has_validated(trainer)):
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

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let SIGTERM end a process that only evaluates, or has nothing to save yet."""
        if trainer.state.fn == TrainerFn.VALIDATING or trainer.sanity_checking:
            self.signals.let_through()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let SIGTERM end the process."""
        self.signals.let_through()

    on_predict_start = on_test_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the folder."""
        self._lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the folder."""
        self._lock.release()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that are not finite; a callback that knows the cause has spoken before.

        Raises:
            DivergenceError: if there are any.
        """
        if not torch.isfinite(get_total_norm([parameter.detach() for parameter in pl_module.parameters()])):
            raise DivergenceError(
                f"the weights are infinite or NaN after batch {trainer.global_step}, so they are not saved: "
                f"{self._kept()}"
            )

    def _save_what_is_due(self, trainer: Trainer) -> None:
        if self._due:
            self._due = False
            self._save_last(trainer)
        if self.signals.requeue is not None:
            requeue, self.signals.requeue = self.signals.requeue, None
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
        """Save; where that is refused, report it and go back to what is on the disk, in all processes alike."""
        before = self.state_dict() | {"best_k_models": dict(self.best_k_models)}
        try:
            save()
        except WriteError as error:
            self.load_state_dict(before)
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
            WriteError: in all processes, if the first could not write the file.
        """
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
        kept = Path(self.last_model_path or ".")
        return f"the last good checkpoint is {kept}" if kept.is_file() else "there is no checkpoint yet"

    def _saves(self, trainer: Trainer) -> bool:
        fits = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        return self.saves and fits and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _way_on(self, trainer: Trainer) -> str:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return "fast_dev_run saves nothing"
        if not self.saves:
            return "enable_checkpointing is off, so nothing was saved"
        if self._failure:
            return f"its state could not be saved ({self._failure}); {self._kept()}"
        return f"--ckpt_path last, or {self.last_model_path}, goes on from here"

    def _format_checkpoint_name(self, *args: Any, **kwargs: Any) -> str:
        """Replace the slash in a metric's name, which would make a sub-folder."""
        return super()._format_checkpoint_name(*args, **kwargs).replace("/", "_")

    def _others(self, trainer: Trainer, folder: Path) -> str | None:
        """Say which files of another run this one would replace."""
        if goes_on(trainer, folder) or (self.last_model_path and Path(self.last_model_path).parent == folder):
            return None
        pattern = re.sub(r"\{[^{}]*\}", "*", f"{self.filename}{self.FILE_EXTENSION}")  # of names of metrics
        found = sorted(path.name for path in folder.iterdir() if path.name == LAST or fnmatch(path.name, pattern))
        return found and (  # type: ignore[return-value]
            f"{folder / found[0]} is another run's, and this one would replace it: choose another folder "
            "(--checkpoint.dirpath, or leave that out), or go on with that run by --ckpt_path last"
        )

    def state_dict(self) -> dict[str, Any]:
        """Add the folders that the run has by its loggers."""
        return super().state_dict() | {"folders": self._folders}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Know the best checkpoint again where the run's folder was moved, or is named from another place."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not state or not trainer.ckpt_path or not self.dirpath:
            return
        if Path(trainer.ckpt_path).resolve().parent != (folder := Path(self.dirpath)).resolve():
            return
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = _moved(state[name], folder)
        state["best_k_models"] = {_moved(path, folder): score for path, score in state["best_k_models"].items()}
        state["dirpath"] = self.dirpath

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a checkpoint, with the score that Lightning leaves out."""
        super().load_state_dict(state_dict)
        if self.dirpath == state_dict["dirpath"]:
            self.current_score = state_dict["current_score"]


def _moved(path: str, folder: Path) -> str:
    return str(folder / Path(path).name) if path else path
