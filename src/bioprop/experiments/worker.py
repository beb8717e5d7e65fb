"""One run of a comparison, in a process of its own: it trains or tests through the command line, and measures."""

import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.cli import ArgsType

from bioprop.callbacks import AlignmentToBackprop, RunPictures
from bioprop.cli import BiopropCLI, main
from bioprop.commands import STREAMS, secure_output, unbreakable
from bioprop.datamodules import ImageDataModule
from bioprop.errors import DivergenceError, UserError
from bioprop.experiments.costs import MOST_BATCHES, TURN_SECONDS, TURNS, WARM_UP, Costs, PeakMemory, StepTimes, Turn
from bioprop.experiments.environment import hardware, versions
from bioprop.experiments.results import FAILURE, Epoch, Result, Status, Test
from bioprop.files import read_checkpoint
from bioprop.runs.folder import LAST, RUN_FILES

Report = Callable[[int, float | None], None]
#: Options of a run whose batches alone are of interest.
UNWATCHED = (
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=0",
    "--trainer.num_sanity_val_steps=0",
)


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
        epochs: number of epochs that the run has.
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
    epochs: int = 0


class RunRecord(Callback):
    """Keep what every epoch brought and cost; checkpoints hold it, so that a resumed run has the whole course."""

    def __init__(self, report: Report) -> None:
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
        number, metrics = trainer.current_epoch + 1, trainer.callback_metrics
        # figures of an epoch that measured nothing would be those of an earlier one
        validated = trainer.check_val_every_n_epoch is None or not number % trainer.check_val_every_n_epoch
        known = {name: float(value) for name, value in metrics.items() if validated or not name.startswith("val/")}
        every = next(each.every_n_epochs for each in _callbacks(trainer) if isinstance(each, AlignmentToBackprop))
        aligned = every and not number % every
        epoch = Epoch(
            val_accuracy=known.get("val/accuracy"),
            seconds=known["train/seconds"],
            angles=_named(known, "angle/") if aligned else {},
            angles_gn=_named(known, "angle_gn/") if aligned else {},
            train_loss=known.get("train/loss"),
            val_loss=known.get("val/loss"),
        )
        self.epochs.append(asdict(epoch))
        self._report(number, epoch.val_accuracy)

    def state_dict(self) -> dict[str, Any]:
        """Return the part of the record that a checkpoint keeps."""
        return {"epochs": list(self.epochs), "peak_memory": self.peak_memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.epochs, self.peak_memory = list(state_dict["epochs"]), state_dict["peak_memory"]


class RecordedCLI(BiopropCLI):
    """The command line, with a record of the run."""

    def __init__(self, args: ArgsType, record: RunRecord) -> None:
        self._record = record
        super().__init__(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the record behind all other callbacks; only the checkpoint comes later, and holds the record's state."""
        callbacks = self.trainer_defaults["callbacks"]
        # the comparison has pictures of its own
        self.trainer_defaults["callbacks"] = [each for each in callbacks if not isinstance(each, RunPictures)]
        self.trainer_defaults["callbacks"].append(self._record)
        return super().instantiate_trainer(**kwargs)


class TimedCLI(BiopropCLI):
    """The command line without the command: all objects are made, and refuse what they refuse; it trains by turns."""

    def _run_subcommand(self, subcommand: str) -> None:
        self.model.configure_optimizers()
        self.model.check_schedule(self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Time the steps."""
        self._times = StepTimes()
        return super().instantiate_trainer(profiler=self._times, **kwargs)

    def turn(self, batches: int, data: ImageDataModule) -> Turn:
        """Train one more epoch of some batches, without callbacks, and return the time of a step."""
        self.trainer.callbacks = []  # type: ignore[attr-defined]
        self.trainer.limit_train_batches = batches
        self.trainer.fit_loop.max_epochs = self.trainer.current_epoch + 1
        self.trainer.fit(self.model, datamodule=data)
        return self._times.take()


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
        main(["fit", *job.arguments, *_resume(job.folder)], partial(RecordedCLI, record=record))
    except DivergenceError as error:
        status, message = "diverged", str(error)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        status, message = "failed", _sentence(error, job.folder)
    Result(
        status,
        message,
        learning_rate=job.learning_rate,
        epochs=tuple(Epoch.of(epoch) for epoch in record.epochs),
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
    tested = main(["test", *job.arguments, *arguments], partial(RecordedCLI, record=record))
    accuracy = float(tested.trainer.callback_metrics["test/accuracy"])
    Test(accuracy, len(tested.datamodule.resident["test"].labels)).save(job.folder)


def check(runs: Mapping[str, Sequence[str]], directory: Path, answer: Connection) -> None:
    """Make all objects of runs, given by name and arguments; answer with the first mistake, if there is one."""
    _work_quietly(directory)
    for name, arguments in runs.items():
        try:
            main(["fit", *arguments], TimedCLI)
        except (Exception, SystemExit) as error:
            answer.send(f"{name}: {error if isinstance(error, UserError) else f'{type(error).__name__}: {error}'}")
            return


def measure(runs: Mapping[str, Sequence[str]], directory: Path, answer: Connection) -> None:
    """Train a few batches of runs, given by name and arguments, in turns, so that whatever the machine does hits all.

    Answers with a pair of name and `Turn` again and again, in the end with all of them as `Costs`. A run that cannot
    be trained is left out.
    """
    _work_quietly(directory)
    began = time.perf_counter()
    with TemporaryDirectory() as scratch:
        options = [*UNWATCHED, f"--trainer.default_root_dir={scratch}"]
        held: dict[str, Any] = {}
        batches, turns = dict.fromkeys(runs, WARM_UP), {name: list[Turn]() for name in runs}
        for name, arguments in runs.items():
            with suppress(Exception, SystemExit):
                held[name] = main(["fit", *arguments, *options], TimedCLI)
        starting = (time.perf_counter() - began) / len(runs)
        data = next((command.datamodule for command in held.values()), None)  # the same images for all
        for number in range(TURNS + 1):
            for name in list(held):
                try:
                    turn = held[name].turn(batches[name], data)
                except Exception:
                    traceback.print_exc()
                    del held[name]
                    continue
                if number:  # the first turn says how many batches fill one
                    turns[name].append(turn)
                else:
                    batches[name] = WARM_UP + min(max(round(TURN_SECONDS / turn.step), 1), MOST_BATCHES)
                answer.send((name, turn))
        of_epoch = len(data.train_dataloader()) if data is not None else 0
        found = {name: turns[name] if name in held else [] for name in runs}
        device = next((command.model.device for command in held.values()), torch.device("cpu"))
        answer.send(Costs(found, of_epoch, starting, hardware(device), versions()))


def _work_quietly(directory: Path) -> None:
    _belong_to_parent()
    secure_output()
    _write_output_to(Path(os.devnull))
    os.chdir(directory)


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


def _named(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
