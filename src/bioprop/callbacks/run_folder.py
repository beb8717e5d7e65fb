"""The one definition of what a run is called and where it keeps its files, none of which another run may replace."""

from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger

from bioprop.errors import UserError

CONFIG_FILE = "config.yaml"
#: What a run writes into its folder, besides checkpoints.
RUN_FILES = (CONFIG_FILE, "hparams.yaml", "metrics.csv", "feedback_training.csv", "predictions.csv")
LAST = "last.ckpt"


class RunLabels(NamedTuple):
    """What a run trains: lower-case names of algorithm (and rule, where it is several by one), network and data."""

    algorithm: str
    network: str
    data: str

    @property
    def name(self) -> str:
        """The three joined, as ``ldrl_lenet_digits``."""
        return "_".join(self)


def run_labels(settings: Any) -> RunLabels:
    """Read the labels off a configuration, parsed (a jsonargparse namespace) or as plain data."""
    arguments = settings["model"]["init_args"]
    classes = (settings["model"], arguments["network"], settings["data"])
    algorithm, network, data = (each["class_path"].rpartition(".")[2].lower() for each in classes)
    rule = arguments.get("rule")  # an algorithm that is several by this choice
    return RunLabels(f"{algorithm}_{rule}" if rule else algorithm, network, data)


def experiment_folder(trainer: Trainer, logger: Logger | None = None) -> Path:
    """The folder in which every run of the same name has a folder of its own.

    Args:
        trainer: of the run.
        logger: which of its loggers decides; the first by default.
    """
    logger = logger or trainer.logger
    if logger is None:
        return Path(trainer.default_root_dir)
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)


def logger_folders(trainer: Trainer) -> list[Path]:
    """The folder that each logger has for the run."""
    versions = [logger.version for logger in trainer.loggers]
    names = [version if isinstance(version, str) else f"version_{version}" for version in versions]
    return [experiment_folder(trainer, logger) / name for logger, name in zip(trainer.loggers, names, strict=True)]


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder, the one that Lightning's ModelCheckpoint puts ``checkpoints/`` into.

    Not the logger's folder: that of W&B is shared by all the runs started from one place.
    """
    return logger_folders(trainer)[0] if trainer.loggers else experiment_folder(trainer)


def goes_on(trainer: Trainer, dirpath: str | Path | None) -> bool:
    """Whether the trainer goes on from the ``last.ckpt`` of its own folder, and so with the run that lies there.

    Any other checkpoint (``best.ckpt``, a copy) begins a run in a folder of its own: the rest of its run would be lost.

    Args:
        trainer: whose checkpoint is loaded, or about to be.
        dirpath: where it saves checkpoints; None for ``checkpoints/`` in the run's folder.
    """
    own = Path(dirpath or run_folder(trainer) / "checkpoints") / LAST
    return trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == own.resolve()


def refuse_to_replace(trainer: Trainer, command: str) -> None:
    """Look for files of another run where this one, which does not go on with it, is about to write.

    Args:
        trainer: of the run.
        command: ``fit`` and so on; those that evaluate leave a ``config.yaml`` that is there as it is.

    Raises:
        UserError: in all processes, naming the file.
    """
    names = [name for name in RUN_FILES if name != CONFIG_FILE or command == "fit"]
    found: list[Path] = []
    if trainer.is_global_zero:
        folders = logger_folders(trainer) or [run_folder(trainer)]
        found = [folder / name for folder in folders for name in names if (folder / name).exists()]
    found = trainer.strategy.broadcast(found)
    if found:
        raise UserError(
            f"{found[0]} is there already, and this run would replace it: choose another folder (without "
            "--trainer.logger.version every run has its own), or go on with that run by --ckpt_path last"
        )
