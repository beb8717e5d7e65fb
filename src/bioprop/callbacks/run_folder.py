"""The one definition of where a run keeps its files."""

from pathlib import Path

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger


def experiment_folder(trainer: Trainer) -> Path:
    """The folder in which every run of the same name has a folder of its own."""
    logger: Logger | None = trainer.logger
    if logger is None:
        return Path(trainer.default_root_dir)
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder, the one that Lightning's ModelCheckpoint puts ``checkpoints/`` into.

    Not the logger's folder: that of W&B is shared by all the runs started from one place.
    """
    if trainer.logger is None:
        return experiment_folder(trainer)
    version = trainer.logger.version
    return experiment_folder(trainer) / (version if isinstance(version, str) else f"version_{version}")
