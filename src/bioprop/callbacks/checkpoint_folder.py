"""Where a run's checkpoints lie and what they are called: in a folder that no other run writes into."""

import re
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from bioprop.callbacks.folder_lock import FolderLock
from bioprop.callbacks.run_folder import LAST, goes_on, logger_folders
from bioprop.errors import UserError

#: A metric in a file's name, as ``{val/accuracy:.2f}``.
FIELD = r"\{[^{}]*\}"


class CheckpointFolder(ModelCheckpoint):
    """Lightning's callback, which keeps to its folder and to itself.

    A metric's name loses its slash in a file's name: ``{val/accuracy}`` would make a sub-folder. A folder that holds
    another run's files of the same names is refused, and so is one that another process is writing into.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock = FolderLock()
        self._folders: list[str] = []  # of the loggers, for a run to go on in, wherever its checkpoints lie
        self._refuse_filename()

    def hold(self, folder: Path) -> str | None:
        """Keep other processes out of a folder until the run is over; say what is wrong with it, or None."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            return f"no checkpoint can be written in {folder} ({error.strerror}): choose another folder"
        # of the folder of the run, where that has the checkpoints
        holder = self._lock.take(folder.parent if folder.name == "checkpoints" else folder)
        if holder:
            return f"a run is writing into {folder} already ({holder}): wait until it ends, or stop it"
        return None

    @rank_zero_only
    def hold_before_logging(self, folder: Path) -> None:
        """Keep other processes out of the folder of a run to go on with, before its loggers wake up.

        Raises:
            UserError: in the first process, if another run is there.
        """
        if refusal := self.hold(folder):
            raise UserError(refusal)

    def claim(self, trainer: Trainer) -> None:
        """Make the folder this run's own, before anything is written into it.

        Raises:
            UserError: in all processes, if it cannot be written, is in use, or holds another run's checkpoints.
        """
        refusal = None
        self._folders = [str(folder) for folder in logger_folders(trainer)]
        if trainer.is_global_zero:
            folder = Path(str(self.dirpath))
            refusal = self.hold(folder) or self._others(trainer, folder)
        refusal = trainer.strategy.broadcast(refusal)
        if refusal:
            self._lock.release()
            raise UserError(refusal)

    def _others(self, trainer: Trainer, folder: Path) -> str | None:
        """What files of another run this one would replace."""
        if goes_on(trainer, folder) or (self.last_model_path and Path(self.last_model_path).parent == folder):
            return None
        pattern = re.sub(FIELD, "*", f"{self.filename}{self.FILE_EXTENSION}")
        found = sorted(path.name for path in folder.iterdir() if path.name == LAST or fnmatch(path.name, pattern))
        return found and (  # type: ignore[return-value]
            f"{folder / found[0]} is another run's, and this one would replace it: choose another folder "
            "(--checkpoint.dirpath, or leave that out), or go on with that run by --ckpt_path last"
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the folder."""
        self._lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the folder."""
        self._lock.release()

    # -- names ---------------------------------------------------------------------------------------------------

    def _refuse_filename(self) -> None:
        name = self.filename or ""
        if re.search(r"[/\\]", re.sub(FIELD, "", name)):
            raise UserError(
                f"checkpoint.filename is {name}, but it must be a name without folders: --checkpoint.dirpath says "
                "where the files go"
            )
        if f"{name}{self.FILE_EXTENSION}" == LAST:
            raise UserError(
                f"checkpoint.filename is {name}, but {LAST} is the file that a run goes on from: choose another"
            )
        try:
            self.format_checkpoint_name({})
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise UserError(
                f"checkpoint.filename is {name}, which is no pattern ({error}): names of metrics stand in braces, as "
                "in {epoch}-{val/accuracy:.2f}"
            ) from error

    def _format_checkpoint_name(
        self,
        filename: str | None,
        metrics: dict[str, Tensor],
        prefix: str | None = None,
        auto_insert_metric_name: bool = True,
    ) -> str:
        return super()._format_checkpoint_name(filename, metrics, prefix, auto_insert_metric_name).replace("/", "_")

    # -- what it remembers ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Add the folders that the run has by its loggers."""
        return super().state_dict() | {"folders": self._folders}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Know the best checkpoint again where the run's folder was moved, or is named from another place."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not state or not trainer.ckpt_path or not self.dirpath:
            return
        folder = Path(self.dirpath)
        if Path(trainer.ckpt_path).resolve().parent != folder.resolve():
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
