"""The commands ``bioprop fit|validate|test|predict``, a LightningCLI."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc import locate
from types import SimpleNamespace
from typing import Any, cast

import torch
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import Checkpoint, ProgressBar
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, Logger

from bioprop.algorithms import Algorithm
from bioprop.algorithms.trainer_precision import check_precision
from bioprop.callbacks import (
    AlignmentToBackprop,
    DivergenceGuard,
    EpochSeconds,
    GradientClipping,
    PredictionsFile,
    RunningLoss,
    RunPictures,
)
from bioprop.cli_parser import OneSentenceParser, in_order, resolve_homes
from bioprop.datamodules import ImageDataModule
from bioprop.distributed import LostProcessError, is_lost_process, process_rank
from bioprop.errors import UserError
from bioprop.faults import as_user_error
from bioprop.files import read_checkpoint
from bioprop.runs import MetricsFile, NoMetrics, RunCheckpoints, RunReport, SaveRunConfig, WandbSummary
from bioprop.runs.folder import go_on_in_its_folder, newest_checkpoint, run_labels, run_settings
from bioprop.runs.processes import averaging_for_several_devices, refuse_copies, refuse_strangers
from bioprop.runs.wandb import reported_to_wandb

#: Arguments of a network that flow from the data.
DECIDED_BY_DATA = ("image_shape", "num_classes")
#: Settings that a run goes on with, and that its config.yaml has, but no checkpoint.
OF_THE_RUN = ("seed_everything", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm")


class BiopropCLI(LightningCLI):
    """Names network, algorithm and data by class; each has its own arguments."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            Algorithm,
            ImageDataModule,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            # one process unless asked for more: Lightning's "auto" takes every GPU it finds
            trainer_defaults={
                "callbacks": [
                    DivergenceGuard(),
                    EpochSeconds(),
                    PredictionsFile(),
                    WandbSummary(),
                    RunReport(),
                    RunPictures(),
                ],
                "devices": 1,
            },
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser whose errors are one sentence each."""
        parser = OneSentenceParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="YAML file of options; of several, the later ones win."
        )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; options override files, whatever their order, and ``~`` is the home folder in all paths.

        Raises:
            UserError: for a seed out of range, a home folder that is not known, or what no class can be named for.
        """
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list):
            behind = next((at for at, word in enumerate(words, 1) if word in self.subcommands()), len(words))
            words = [*words[:behind], *in_order(words[behind:])]
        super().parse_arguments(parser, words)
        resolve_homes(self.config)
        seed = self.config[self.config.subcommand].get("seed_everything")
        if seed is not None and not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything is {seed}, but it must be from 0 to {2**32 - 1}")
        refuse_untyped(self.config[self.config.subcommand].model)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let image shape and number of classes flow from the data to the network, and name the standing callbacks."""
        for name in DECIDED_BY_DATA:
            parser.link_arguments(f"data.{name}", f"model.init_args.network.init_args.{name}", apply_on="instantiate")
        parser.add_lightning_class_args(RunCheckpoints, "checkpoint")
        parser.add_lightning_class_args(AlignmentToBackprop, "alignment")

    def _parse_ckpt_path(self) -> None:
        """Keep the checkpoint's hyperparameters from overwriting the command line's.

        Lightning merges them silently; we compare the two when the checkpoint is loaded, and refuse a conflict.
        """

    def before_instantiate_classes(self) -> None:
        """Log to ``runs/<algorithm>[_<rule>]_<network>_<data>/version_<n>`` unless a logger was named."""
        config = self.config[self.subcommand]
        algorithm = cast(type[Algorithm], locate(config.model.class_path))
        # before Lightning turns "16-mixed" on a CPU into another one, and before there is a run's folder
        check_precision(config.trainer.precision, algorithm.__name__, algorithm.precisions, algorithm.precision_reason)
        if self.subcommand != "fit" and config.ckpt_path is None:
            raise UserError(
                f"bioprop {self.subcommand} needs --ckpt_path, or it would judge untrained weights: "
                "give a file, 'best' or 'last'"
            )
        if config.trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"accumulate_grad_batches is {config.trainer.accumulate_grad_batches}, but it is not supported, since "
                "each algorithm steps by gradients of its own: leave it out, and raise data.batch_size"
            )
        for key in DECIDED_BY_DATA:
            if config.model.init_args.network.get(f"init_args.{key}") is not None:
                raise UserError(f"{key} of the network is decided by the data: leave it out")
        root = config.trainer.default_root_dir or "runs"
        if config.trainer.logger in (None, True, False):
            writes = NoMetrics if config.trainer.logger is False else MetricsFile
            arguments = Namespace(save_dir=str(root), name=run_labels(config).name)  # type: ignore[no-untyped-call]
            path = f"bioprop.runs.{writes.__name__}"
            config.trainer.logger = Namespace(class_path=path, init_args=arguments)  # type: ignore[no-untyped-call]
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        for each in loggers:
            if each.class_path.endswith("WandbLogger"):
                arguments = each.init_args
                arguments.save_dir = root if arguments.save_dir in (None, ".") else arguments.save_dir
                Path(arguments.save_dir).mkdir(parents=True, exist_ok=True)  # or W&B warns, and writes elsewhere
            if locate(each.class_path) is CSVLogger:  # ours takes the same arguments
                each.class_path = "bioprop.runs.MetricsFile"
        if self.subcommand != "fit":
            self._tell_what_was_trained_on(config, loggers[0], root)

    def _tell_what_was_trained_on(self, config: Namespace, logger: Namespace, root: str | Path) -> None:
        """Name the checkpoint to data that have no training images, whose classes and form come from there."""
        data = config.data.get("init_args") or {}
        if "trained_on" not in data or data["trained_on"] is not None or (Path(data["data_dir"]) / "train").is_dir():
            return
        if config.ckpt_path in ("last", "best"):
            made = cast(type[Logger], locate(logger.class_path))(**vars(logger.init_args))
            place = SimpleNamespace(logger=made, default_root_dir=root)
            dirpath = self._get(self.config, "checkpoint").dirpath
            config.ckpt_path = str(newest_checkpoint(config.ckpt_path, cast(Trainer, place), dirpath, config))
        data["trained_on"] = config.ckpt_path

    def _dump_config(self) -> None:
        """Give a network without arguments a place for them, which Lightning 2.6.6 expects where links lead to."""
        super()._dump_config()
        self.config_dump["model"]["init_args"]["network"].setdefault("init_args", {})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer.

        Raises:
            UserError: if it refuses one of its arguments.
        """
        try:
            with averaging_for_several_devices():
                return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:
            raise UserError(" ".join(str(error).split())) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Do by callbacks of ours what Lightning would refuse: save nothing, clip what an algorithm steps along."""
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_checkpointing") is False and not any(isinstance(each, Checkpoint) for each in given):
            config["enable_checkpointing"] = None
            for each in callbacks:
                if isinstance(each, RunCheckpoints):
                    each.saves = False
        if config.get("enable_progress_bar") is not False and not any(isinstance(each, ProgressBar) for each in given):
            callbacks.append(RunningLoss())
        value, algorithm = config.pop("gradient_clip_val", None), config.pop("gradient_clip_algorithm", None)
        if value:
            callbacks.append(GradientClipping(value, algorithm or "norm"))
        return super()._instantiate_trainer(config, callbacks)

    def after_instantiate_classes(self) -> None:
        """Find the checkpoint that ``--ckpt_path last``, ``best`` or ``auto`` means, and go on in its run's folder.

        Raises:
            UserError: if there is no such file, a command that evaluates was given no checkpoint, or the run to go on
                with is still running.
        """
        refuse_strangers(self.trainer.world_size)
        refuse_copies(self.trainer)
        precise = torch.float64 if self.trainer.precision == "64-true" else torch.float32
        self.model.example_input_array = torch.zeros(1, *self.datamodule.image_shape, dtype=precise)  # for FLOPs
        config = self.config_init[self.subcommand]
        checkpoints = self._get(self.config_init, "checkpoint")
        if config.ckpt_path in ("last", "best", "auto") and (config.ckpt_path != "auto" or self.subcommand == "fit"):
            settings = self.config[self.subcommand]
            found = newest_checkpoint(config.ckpt_path, self.trainer, checkpoints.dirpath, settings)
            config.ckpt_path = found and str(found)
        elif config.ckpt_path is not None and not Path(config.ckpt_path).exists():
            raise UserError(
                f"--ckpt_path {config.ckpt_path}: there is no such file; 'last' and 'best' work too, and for fit 'auto'"
            )
        self.config[self.subcommand].ckpt_path = config.ckpt_path  # what config.yaml is to say
        if config.ckpt_path is not None:
            checkpoint = read_checkpoint(config.ckpt_path)
            if self.subcommand == "fit":
                path = Path(config.ckpt_path)
                self._refuse_what_no_checkpoint_holds(path)
                if go_on_in_its_folder(self.trainer, path, checkpoint, checkpoints.dirpath):
                    checkpoints.hold_before_logging(path.parent)

    def _refuse_what_no_checkpoint_holds(self, checkpoint: Path) -> None:
        """Compare settings with those of the run the checkpoint belongs to, whose files alone have them."""
        saved = run_settings(checkpoint.parent)
        for key in OF_THE_RUN if saved is not None else ():
            before, now = (_at(each, key) for each in (saved, self.config[self.subcommand]))
            if before != now:
                raise UserError(
                    f"the checkpoint's run has {key} {before} and now it is {now}: give the same, or start a new run "
                    "without --ckpt_path"
                )


def _at(settings: Any, key: str) -> Any:
    """The value of a dotted name in nested settings; None where there is none."""
    for part in key.split("."):
        settings = settings.get(part)
    return settings


def refuse_untyped(model: Namespace) -> None:
    """Look for arguments of an algorithm that a class is to be named for, but that have no type.

    Raises:
        UserError: saying how to annotate them.
    """
    untyped = [name for name, value in vars(model.init_args).items() if callable(value)]
    if not isinstance(model.init_args.get("network"), Namespace):
        untyped = ["network"]
    if untyped:
        kind = "bioprop.networks.AnyModule" if untyped[0] == "network" else "pytorch_lightning.cli.OptimizerCallable"
        raise UserError(
            f"{untyped[0]} of {model.class_path.rpartition('.')[2]} has no type, so that no class can be named for it: "
            f"annotate the argument in the constructor, as {untyped[0]}: {kind}"
        )


def main(args: ArgsType = None, command_line: Callable[[ArgsType], BiopropCLI] = BiopropCLI) -> BiopropCLI:
    """Run one command.

    Args:
        args: the words after ``bioprop``; those of the process by default.
        command_line: what parses and runs them.

    Returns:
        The command line object, with the trainer, model and data it made.

    Raises:
        UserError: for a mistake that only showed while the run was set up or under way.
        SystemExit: with status 2, for arguments that do not parse.
    """
    with _calm_output(), _plain_user_errors(), reported_to_wandb():
        return command_line(args)


@contextmanager
def _plain_user_errors() -> Iterator[None]:
    """Turn what went wrong outside the code into a sentence, by the rule of `as_user_error`; bugs pass."""
    try:
        yield
    except Exception as error:
        found = as_user_error(error)
        if found is None and is_lost_process(error):
            found = LostProcessError(
                f"process {process_rank()} lost the connection to another process, which has ended or hangs: see what "
                "it said, then go on with --ckpt_path last"
            )
        if found is None:
            raise
        raise found from found.__cause__


@contextmanager
def _calm_output() -> Iterator[None]:
    """Show our own notes; hide Lightning's advertisements, and advice that does not apply to images in memory."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("💡")

    root, notes = logging.getLogger("bioprop"), logging.StreamHandler()
    notes.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(notes)
    root.setLevel(logging.INFO)
    lightning = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    lightning.addFilter(is_news)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval")
        warnings.filterwarnings("ignore", ".*LeafSpec", category=FutureWarning)
        # Lightning 2.6.6 calls methods that jsonargparse is about to drop
        warnings.filterwarnings("ignore", r"(?s).*(was deprecated in v4|JsonargparseDeprecationWarning)")
        # `main(args)` from Python is how the demo, sweeps and tests run a command, whatever the process was called with
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        # a run that starts from another's checkpoint keeps its own
        warnings.filterwarnings("ignore", "The dirpath has changed")
        try:
            yield
        finally:
            lightning.removeFilter(is_news)
            root.removeHandler(notes)
