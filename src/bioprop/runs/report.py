"""What a run says when it is over."""

import logging
import shlex
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping

from bioprop.runs.checkpointing import RunCheckpoints
from bioprop.runs.folder import CONFIG_FILE, run_folder

logger = logging.getLogger(__name__)


class RunReport(Callback):
    """Say why training ended, where its files are, how good the best checkpoint is and which command judges it."""

    def __init__(self) -> None:
        self._trains = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for training to begin."""
        self._trains = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there is something to train."""
        self._trains = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it, in the first process."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for each in trainer.early_stopping_callbacks:
            if isinstance(each, EarlyStopping) and each.stopping_reason_message:
                reason = each.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
                logger.info("stopped early, in epoch %d: %s", each.stopped_epoch, reason)
        folder = run_folder(trainer)
        if not self._trains:
            logger.info("nothing was left to train after %d epochs: raise --trainer.max_epochs", trainer.current_epoch)
        said = f"trained {trainer.current_epoch} epochs, in {folder}"
        kept = [each for each in trainer.checkpoint_callbacks if isinstance(each, RunCheckpoints)]
        if kept and kept[0].best_model_score is not None:
            said += f": best {kept[0].monitor} {float(kept[0].best_model_score):.4f}"
        logger.info(said)
        best = kept and (kept[0].best_model_path or kept[0].last_model_path)
        config = folder / CONFIG_FILE
        if best and Path(best).is_file() and config.is_file():
            logger.info("next: bioprop test --config %s --ckpt_path %s", shlex.quote(str(config)), shlex.quote(best))
