"""The one definition of what a run is called and where it keeps its files."""

from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger


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


def own_run(checkpoint: Path, trainer: Trainer) -> str | None:
    """Name the run in whose folder a run goes on when it is resumed: that of ``last.ckpt``, the end of a run so far.

    Any other checkpoint (``best.ckpt``, a copy) begins a run in a folder of its own: the rest of its run would be lost.

    Returns:
        The name of the folder among the runs of the same name; None to make a new one.
    """
    folder = checkpoint.resolve().parent
    siblings = experiment_folder(trainer).resolve()
    own = checkpoint.name == "last.ckpt" and folder.name == "checkpoints" and folder.parent.parent == siblings
    return folder.parent.name if own else None
