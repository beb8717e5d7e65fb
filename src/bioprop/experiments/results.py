"""The results of a run, for tables and figures, in files that are whole or not there."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, Self, TypeVar, get_args

from bioprop.errors import UserError

T = TypeVar("T")
Status = Literal["finished", "diverged", "failed"]
RESULT, FAILURE, TEST = "result.json", "failure.json", "test.json"


@dataclass(frozen=True)
class Epoch:
    """One epoch of training.

    Attributes:
        val_accuracy: fraction of the validation images classified right; None where it was not measured.
        seconds: wall-clock seconds of the epoch's batches, validation left out.
        batch_seconds: median seconds of a training step.
        step_seconds: seconds of all timed steps.
        feedback_seconds: those of them that went into training feedback weights.
        angles: degrees between update and BP gradient by stage, and ``overall``; empty where not measured.
        angles_gn: the same to the update of Gauss-Newton targets.
    """

    val_accuracy: float | None
    seconds: float
    batch_seconds: float
    step_seconds: float
    feedback_seconds: float
    angles: Mapping[str, float] = field(default_factory=dict)
    angles_gn: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A run that has ended.

    Attributes:
        status: ``finished``, ``diverged`` (its numbers became infinite or NaN) or ``failed`` (tried again next time).
        message: why, if it did not finish.
        learning_rate: learning rate of the forward weights; several where each stage has its own.
        epochs: in order.
        peak_memory: MiB, see `bioprop.experiments.costs.PeakMemory`.
        images: number of training and validation images.
        hardware: machine on which it ran.
        versions: what ran.
        jobs: number of runs that went on side by side.
        ended: date and time, in UTC.
    """

    status: Status
    message: str = ""
    learning_rate: tuple[float, ...] = ()
    epochs: tuple[Epoch, ...] = ()
    peak_memory: float = math.nan
    images: Mapping[str, int] = field(default_factory=dict)
    hardware: str = ""
    versions: str = ""
    jobs: int = 1
    ended: str = ""

    @property
    def best_val_accuracy(self) -> float | None:
        """That of the checkpoint that is tested."""
        return None if self.best_epoch is None else self.epochs[self.best_epoch - 1].val_accuracy

    @property
    def best_epoch(self) -> int | None:
        """The first epoch, counted from 1, of the best validation accuracy: the one that is tested."""
        measured = [epoch.val_accuracy for epoch in self.epochs]
        seen = [accuracy for accuracy in measured if accuracy is not None]
        return measured.index(max(seen)) + 1 if seen else None

    @property
    def seconds_per_epoch(self) -> float:
        """The mean over epochs, the first left out where there are more: it pays for warming up."""
        seconds = [epoch.seconds for epoch in self.epochs]
        return fmean(seconds[1:] or seconds) if seconds else math.nan

    @property
    def batch_seconds(self) -> float:
        """Seconds of a training step: the median over epochs of each epoch's median."""
        return median(epoch.batch_seconds for epoch in self.epochs) if self.epochs else math.nan

    @property
    def feedback_share(self) -> float:
        """Share of the steps' time that trains feedback weights, in [0, 1]."""
        total = sum(epoch.step_seconds for epoch in self.epochs)
        return sum(epoch.feedback_seconds for epoch in self.epochs) / total if total else math.nan

    def mean_angle(self, kind: Literal["angles", "angles_gn"] = "angles") -> float:
        """Degrees, the mean over stages and epochs; every stage counts the same, whatever the size of its gradient."""
        courses = [getattr(epoch, kind) for epoch in self.epochs]
        means = [fmean(by_stage(course).values()) for course in courses if by_stage(course)]
        return fmean(means) if means else math.nan

    def save(self, folder: Path) -> None:
        """Write ``result.json``, or ``failure.json`` for a run that is to be tried again."""
        write_whole(folder / (FAILURE if self.status == "failed" else RESULT), json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read the result of a run from its folder; None if it has not ended.

        Raises:
            UserError: if the file is damaged, or another program's.
        """
        for name in (RESULT, FAILURE):
            if (folder / name).is_file():
                return _read(folder / name, cls._of)
        return None

    @classmethod
    def _of(cls, stored: dict[str, Any]) -> Self:
        epochs = tuple(Epoch(**epoch) for epoch in stored.pop("epochs"))
        result = cls(epochs=epochs, learning_rate=tuple(stored.pop("learning_rate")), **stored)
        if result.status not in get_args(Status):
            raise ValueError(f"status {result.status}")
        # what tables are made of: a value of another type would only be met there
        figures = [result.best_val_accuracy or 0.0, result.seconds_per_epoch, result.batch_seconds]
        figures += [result.feedback_share, result.mean_angle(), result.mean_angle("angles_gn")]
        if not all(isinstance(each, int | float) for each in (*figures, result.peak_memory, *result.learning_rate)):
            raise TypeError(f"{figures}")
        return result


@dataclass(frozen=True)
class Test:
    """Fraction of the test images that the best checkpoint classifies right, and how many there are."""

    __test__ = False  # pytest: no suite of tests

    accuracy: float
    images: int

    def save(self, folder: Path) -> None:
        """Write ``test.json``."""
        write_whole(folder / TEST, json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read it from the run's folder; None if the test images were not read yet.

        Raises:
            UserError: if the file is damaged, or another program's.
        """
        return _read(folder / TEST, cls._of) if (folder / TEST).is_file() else None

    @classmethod
    def _of(cls, stored: dict[str, Any]) -> Self:
        return cls(float(stored.pop("accuracy")), int(stored.pop("images")), **stored)


def by_stage(angles: Mapping[str, float]) -> dict[str, float]:
    """The angles of the single stages: all but that of the whole update."""
    return {stage: angle for stage, angle in angles.items() if stage != "overall"}


def _read(path: Path, make: Callable[[Any], T]) -> T:
    try:
        return make(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # what all sorts of content lead to
        raise UserError(f"{path} is damaged: put it back, or delete it to have that run done again") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there as a whole or as it was before, whenever the process dies; leave equal ones alone."""
    data = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
