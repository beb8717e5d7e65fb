"""One run of a comparison, in a process of its own: it trains or tests through the command line, and measures."""

import math
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.cli import ArgsType
from torch import Tensor

from bioprop.callbacks import AlignmentToBackprop
from bioprop.cli import BiopropCLI, main
from bioprop.commands import STREAMS, secure_output, unbreakable
from bioprop.datamodules import ImageDataModule
from bioprop.errors import DivergenceError, UserError
from bioprop.experiments.costs import PeakMemory, StepTimes
from bioprop.experiments.environment import hardware
from bioprop.experiments.results import FAILURE, Epoch, Result, Status, Test
from bioprop.files import read_checkpoint
from bioprop.runs.folder import LAST, RUN_FILES

Report = Callable[[int, float | None], None]


@dataclass(frozen=True)
class Job:
    """The work of one process.

    Attributes:
        kind: ``fit`` or ``test``.
        title: for people.
        folder: folder of the run.
        arguments: words behind ``bioprop fit`` and ``bioprop test``, without the checkpoint.
        learning_rate: learning rate of the forward weights, to be noted.
        keep_checkpoints: keep the checkpoints when the run has finished.
        directory: folder in which the command was given, and which relative paths start from.
        versions: versions of the code that runs.
        threads: number of threads of arithmetic; None for torch's choice.
        jobs: number of runs side by side.
    """

    kind: Literal["fit", "test"]
    title: str
    folder: Path
    arguments: tuple[str, ...]
    learning_rate: tuple[float, ...] = ()
    keep_checkpoints: bool = True
    directory: Path = Path()
    versions: str = ""
    threads: int | None = None
    jobs: int = 1


class RunRecord(Callback):
    """Keep what every epoch brought and cost; checkpoints hold it, so that a resumed run has the whole course."""

    def __init__(self, report: Report) -> None:
        self.times = StepTimes()
        self.epochs: list[dict[str, Any]] = []
        self.peak_memory = math.nan
        self.images: dict[str, int] = {}
        self.hardware = ""
        self._report = report
        self._memory = PeakMemory(torch.device("cpu"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the run works on."""
        self.images = {split: len(held.labels) for split, held in _data(trainer).resident.items()}
        self.hardware = hardware(pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the memory of training: that of validation and angles is another matter."""
        self._memory = PeakMemory(pl_module.device)
        self._memory.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Read the peak behind the epoch's last batch, before validation begins."""
        if trainer.is_last_batch:
            peak = self._memory.read()
            self.peak_memory = peak if math.isnan(self.peak_memory) else max(self.peak_memory, peak)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the epoch's figures, which all other callbacks have logged by now."""
        steps = self.times.take()
        number, metrics = trainer.current_epoch + 1, trainer.callback_metrics
        # figures of an epoch that measured nothing would be those of an earlier one
        validated = trainer.check_val_every_n_epoch is None or not number % trainer.check_val_every_n_epoch
        val_accuracy = float(metrics["val/accuracy"]) if validated and "val/accuracy" in metrics else None
        every = next(each.every_n_epochs for each in _callbacks(trainer) if isinstance(each, AlignmentToBackprop))
        aligned = every and not number % every
        epoch = Epoch(
            val_accuracy=val_accuracy,
            seconds=float(metrics["train/seconds"]),
            batch_seconds=median(time.step for time in steps),
            step_seconds=sum(time.step for time in steps),
            feedback_seconds=sum(time.feedback for time in steps),
            angles=_named(metrics, "angle/") if aligned else {},
            angles_gn=_named(metrics, "angle_gn/") if aligned else {},
        )
        self.epochs.append(asdict(epoch))
        self._report(number, val_accuracy)

    def state_dict(self) -> dict[str, Any]:
        """Return the part of the record that a checkpoint keeps."""
        return {"epochs": list(self.epochs), "peak_memory": self.peak_memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.epochs, self.peak_memory = list(state_dict["epochs"]), state_dict["peak_memory"]


class MeasuredCLI(BiopropCLI):
    """The command line, with a record of the run."""

    def __init__(self, args: ArgsType, record: RunRecord) -> None:
        self._record = record
        super().__init__(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the record behind all other callbacks; only the checkpoint comes later, and holds the record's state."""
        self.trainer_defaults["callbacks"].append(self._record)
        return super().instantiate_trainer(profiler=self._record.times, **kwargs)


class DryCLI(MeasuredCLI):
    """The command line without the command: all objects are made, and refuse what they refuse; nothing is trained."""

    def _run_subcommand(self, subcommand: str) -> None:
        self.model.configure_optimizers()
        self.model.check_schedule(self.trainer)


def work(job: Job, reports: Connection) -> None:
    """Do a job; what it says goes into ``log.txt`` of its folder, its result into files there.

    Args:
        job: what to do.
        reports: pipe that takes (epoch, validation accuracy) after each epoch.
    """
    _belong_to_parent()
    secure_output()
    job.folder.mkdir(parents=True, exist_ok=True)
    _write_output_to(job.folder / "log.txt")
    os.chdir(job.directory)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if job.kind == "fit":
        fit(job, lambda epoch, accuracy: reports.send((epoch, accuracy)))
    else:
        test(job)


def fit(job: Job, report: Report) -> None:
    """Train, from the last checkpoint if there is one, and write the result whatever happens."""
    (job.folder / FAILURE).unlink(missing_ok=True)
    record = RunRecord(report)
    status: Status = "finished"
    message = ""
    try:
        main(["fit", *job.arguments, *_resume(job.folder)], partial(MeasuredCLI, record=record))
    except DivergenceError as error:
        status, message = "diverged", str(error)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        status, message = "failed", _sentence(error, job.folder)
    Result(
        status,
        message,
        learning_rate=job.learning_rate,
        epochs=tuple(Epoch(**epoch) for epoch in record.epochs),
        peak_memory=record.peak_memory,
        images=record.images,
        hardware=record.hardware,
        versions=job.versions,
        jobs=job.jobs,
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
    ).save(job.folder)
    if status != "failed" and not job.keep_checkpoints:
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)


def test(job: Job) -> None:
    """Read the test images once, with the checkpoint that was best on the validation images."""
    best = job.folder / "checkpoints" / "best.ckpt"
    record = RunRecord(lambda epoch, accuracy: None)
    arguments = (f"--trainer.default_root_dir={job.folder / 'test'}", "--trainer.logger=false", f"--ckpt_path={best}")
    tested = main(["test", *job.arguments, *arguments], partial(MeasuredCLI, record=record))
    accuracy = float(tested.trainer.callback_metrics["test/accuracy"])
    Test(accuracy, len(tested.datamodule.resident["test"].labels)).save(job.folder)


def check(runs: Mapping[str, tuple[str, ...]], directory: Path, answer: Connection) -> None:
    """Make all objects of runs, given by name and arguments; answer with the first mistake, or with None."""
    _belong_to_parent()
    secure_output()
    _write_output_to(Path(os.devnull))
    os.chdir(directory)
    for name, arguments in runs.items():
        try:
            main(["fit", *arguments], partial(DryCLI, record=RunRecord(lambda epoch, accuracy: None)))
        except (Exception, SystemExit) as error:
            answer.send(f"{name}: {error if isinstance(error, UserError) else f'{type(error).__name__}: {error}'}")
            return
    answer.send(None)


def _belong_to_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, however that happens: an orphan would write into the folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "a job runs in a process of its own"

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _write_output_to(path: Path) -> None:
    with path.open("a") as file:
        for name, descriptor in STREAMS.items():
            getattr(sys, name).flush()
            os.dup2(file.fileno(), descriptor)
            setattr(sys, name, unbreakable(descriptor))  # in UTF-8, whatever the terminal has


def _resume(folder: Path) -> list[str]:
    """Arguments that go on from the last checkpoint; where there is none that can be read, the run starts afresh."""
    last = folder / "checkpoints" / LAST
    with suppress(UserError):
        if last.is_file():
            read_checkpoint(last)
            return [f"--ckpt_path={last}"]
    # what an attempt has left that went no further, which a new run would refuse to replace
    shutil.rmtree(last.parent, ignore_errors=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    return []


def _sentence(error: BaseException, folder: Path) -> str:
    if isinstance(error, UserError):
        return str(error)
    (first, *_) = [*str(error).splitlines(), ""]
    return f"{type(error).__name__}: {first} (see {folder / 'log.txt'})"


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _data(trainer: Trainer) -> ImageDataModule:
    return trainer.datamodule  # type: ignore[attr-defined, no-any-return]


def _named(metrics: Mapping[str, Tensor], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}
