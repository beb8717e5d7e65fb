"""The folder of a run: its name, its files, which no other run may replace, and the earlier runs beside it."""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger, WandbLogger

from bioprop.errors import UserError
from bioprop.files import read_checkpoint

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
#: What a run writes into its folder, besides checkpoints.
RUN_FILES = (CONFIG_FILE, "hparams.yaml", "metrics.csv", "feedback_training.csv", "predictions.csv")
LAST = "last.ckpt"


class RunLabels(NamedTuple):
    """Lower-case names of a run's algorithm (with its rule, where it is several by one), network and data."""

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
    algorithm, network, data = (class_name(each).lower() for each in classes)
    rule = arguments.get("rule")  # an algorithm that is several by this choice
    return RunLabels(f"{algorithm}_{rule}" if rule else algorithm, network, data)


def class_name(part: Mapping[str, Any]) -> str:
    """The class that a part of the settings names, without its module."""
    return str(part["class_path"]).rpartition(".")[2]


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Spell nested settings out by dotted names, without the words that only structure them."""
    if not isinstance(settings, Mapping):
        return {prefix: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "class_path":
            found[prefix] = class_name(settings)
        elif key in ("init_args", "dict_kwargs"):
            found |= flat(value, prefix) if value else {}
        else:
            found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def experiment_folder(trainer: Trainer, logger: Logger | None = None) -> Path:
    """The folder in which every run of the same name has a folder of its own.

    Args:
        trainer: trainer of the run.
        logger: the one of its loggers that decides; the first by default.
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
    """Return whether the trainer goes on from the ``last.ckpt`` of its own folder, and so with the run that lies there.

    Any other checkpoint (``best.ckpt``, a copy) begins a run in a folder of its own: the rest of its run would be lost.

    Args:
        trainer: trainer whose checkpoint is loaded, or about to be.
        dirpath: folder it saves checkpoints in; None for ``checkpoints/`` in the run's folder.
    """
    own = Path(dirpath or run_folder(trainer) / "checkpoints") / LAST
    return trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == own.resolve()


def refuse_to_replace(trainer: Trainer, command: str) -> None:
    """Look for files of another run where this one, which does not go on with it, is about to write.

    Args:
        trainer: trainer of the run.
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


# -- earlier runs ----------------------------------------------------------------------------------------------------


def newest_checkpoint(kind: str, trainer: Trainer, dirpath: str | None, settings: Any) -> Path | None:
    """Find the checkpoint ``last`` or ``best`` that was written last among the runs of what a command names.

    Runs of another algorithm, network or data in the same folder are passed over, and so are trials: runs on fewer
    images or batches than the command's own settings say.

    Args:
        kind: ``last`` or ``best``; ``auto`` for the last, if there is one.
        trainer: trainer of the command; its first logger says where its runs are.
        dirpath: folder of the checkpoints of the command's run; None for ``checkpoints/`` in each run's folder.
        settings: settings of the command, parsed.

    Returns:
        The file; None where there is none and that is ``auto``.

    Raises:
        UserError: if there is none, or there are several of which none is known to be the best.
    """
    trials = []
    for folder, files in _newest_first(kind, trainer, dirpath):
        config = run_settings(folder)
        if config is not None and run_labels(config) != run_labels(settings):
            continue
        if trial := _why_a_trial(config, settings):
            trials.append(f"{files[0]}, a trial with {trial}")
            continue
        newest = _best(folder, files) if kind == "best" else files[0]
        logger.info("using checkpoint %s%s", newest, _passed_over(trials))
        return newest
    if kind == "auto":
        logger.info("there is no run to go on with: this one starts afresh%s", _passed_over(trials))
        return None
    where = Path(dirpath) if dirpath else experiment_folder(trainer)
    raise UserError(
        f"--ckpt_path {kind}: no run in {where} has written {kind}.ckpt yet{_passed_over(trials)}; give a file's path"
    )


def _passed_over(trials: list[str]) -> str:
    return f" (passed over {'; '.join(trials)})" if trials else ""


def _newest_first(kind: str, trainer: Trainer, dirpath: str | None) -> Iterator[tuple[Path, list[Path]]]:
    """Yield folders of checkpoints with those of a kind in them, the newest first."""
    runs = experiment_folder(trainer)
    folders = [*runs.glob("*/checkpoints"), runs / "checkpoints"]
    given = _given_version(trainer.logger)
    if given is not None and (kind != "best" or (runs / given).is_dir()):
        folders = [runs / given / "checkpoints"]
    found = {}
    for folder in [Path(dirpath)] if dirpath else folders:
        files = [path for path in folder.glob("*.ckpt") if (path.name == LAST) == (kind != "best")]
        if files:
            found[folder] = sorted(files, key=_age)
    yield from sorted(found.items(), key=lambda item: _age(item[1][0]))


def _given_version(run_logger: Logger | None) -> str | None:
    """The folder's name that was given with a logger; None where the logger is to choose."""
    if isinstance(run_logger, WandbLogger):  # a sweep's agent says by the variable which run a process is
        return run_logger._id or os.environ.get("WANDB_RUN_ID")
    version = getattr(run_logger, "_version", None)
    return f"version_{version}" if isinstance(version, int) else version


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def _best(folder: Path, files: list[Path]) -> Path:
    """Find the best of a run's checkpoints: under any other name than the usual one, ``last.ckpt`` names it."""
    usual = folder / "best.ckpt"
    if files == [usual]:
        return usual
    named = folder / Path(str(_remembered(folder).get("best_model_path"))).name
    if named in files or usual in files:
        return named if named in files else usual
    if len(files) == 1:
        return files[0]
    names = ", ".join(sorted(path.name for path in files))
    raise UserError(f"--ckpt_path best: {folder} holds {names}, and no {LAST} that says which: give a file's path")


def _remembered(folder: Path) -> Mapping[str, Any]:
    """Read the state of the run's checkpoints and folders from the last checkpoint in a folder."""
    try:
        return checkpoints_state(read_checkpoint(folder / LAST)) if (folder / LAST).is_file() else {}
    except UserError:
        return {}


def checkpoints_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a checkpoint that `bioprop.runs.RunCheckpoints` wrote."""
    states: dict[str, dict[str, Any]] = checkpoint.get("callbacks", {})
    return next((state for key, state in states.items() if key.startswith("RunCheckpoints")), {})


def run_settings(folder: Path) -> Any | None:
    """Read the configuration of the run whose checkpoints lie in a folder; None where it is not to be found."""
    run = folder.resolve().parent
    if folder.resolve().name != "checkpoints":
        (run, *_) = (*map(Path, _remembered(folder).get("folders", ())), None)
    if run is None:
        return None
    path = run / CONFIG_FILE
    try:
        settings = yaml.safe_load(path.read_text())
        run_labels(settings)
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return None
    return settings


# -- trials ----------------------------------------------------------------------------------------------------------


def _why_a_trial(run: Any | None, now: Any) -> str | None:
    """Name the setting by which a run saw fewer images or batches than a command's run would."""
    if run is None:
        return None
    limits = _limits(now)
    for name, limit in _limits(run).items():
        same_unit = type(limit) is type(limits[name])
        if limit is not None and (limits[name] is None or (limit < limits[name] if same_unit else True)):
            return f"{name} {limit}"
    return None


def _limits(settings: Any) -> dict[str, Any]:
    data = settings["data"].get("init_args") or {}
    limits = {f"trainer.{name}": settings["trainer"].get(name) for name in ("limit_train_batches", "overfit_batches")}
    limits["data.limit_train"] = data.get("limit_train")
    everything = (0, 1.0)  # whole numbers are batches, fractions parts of all
    return {
        name: None if limit in everything and (limit == 0 or isinstance(limit, float)) else limit
        for name, limit in limits.items()
    }


# -- going on --------------------------------------------------------------------------------------------------------


def go_on_in_its_folder(trainer: Trainer, path: Path, checkpoint: Mapping[str, Any], dirpath: str | None) -> bool:
    """Make the loggers go on where the run that wrote a checkpoint left off, if it is that run's end so far.

    Any other checkpoint (``best.ckpt``, a copy) begins a run in a folder of its own: the rest of its run would be lost.

    Args:
        trainer: trainer that has logged nothing yet.
        path: path of the checkpoint.
        checkpoint: content of the checkpoint.
        dirpath: folder of the new run's checkpoints; None for ``checkpoints/`` in its folder.

    Returns:
        Whether it goes on.
    """
    folder = path.resolve().parent
    names = [Path(each).name for each in checkpoints_state(checkpoint).get("folders", ())]
    if dirpath is None:
        own = folder.name == "checkpoints" and folder.parent.parent == experiment_folder(trainer).resolve()
        names = [folder.parent.name, *names[1:]]
    else:
        own = folder == Path(dirpath).resolve()
    if path.name != LAST or not own:
        return False
    for each, name in zip(trainer.loggers, names, strict=False):
        if isinstance(each, WandbLogger) or (experiment_folder(trainer, each) / name).is_dir():
            _go_on(each, name)
    return True


def _go_on(run_logger: Logger, version: str) -> None:
    """Give a logger the version of an earlier run: for Weights & Biases, the id of the run to go on with."""
    number = version.removeprefix("version_")
    if isinstance(run_logger, WandbLogger):
        run_logger._id = run_logger._wandb_init["id"] = version
    elif hasattr(run_logger, "_version"):  # loggers of files
        run_logger._version = int(number) if number != version and number.isdecimal() else version
