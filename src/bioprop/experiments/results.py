"""The results of a run, for tables and figures, in files that are whole or not there."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self, TypeVar, get_args

from bioprop.callbacks.alignment import HIDDEN
from bioprop.errors import UserError
from bioprop.files import replacing

T = TypeVar("T")
Status = Literal["finished", "diverged", "failed"]
RESULT, FAILURE, TEST = "result.json", "failure.json", "test.json"


@dataclass(frozen=True)
class Epoch:
    """One epoch of training.

    Attributes:
        val_accuracy: fraction of the validation images classified right; None where it was not measured.
        seconds: wall-clock seconds of the epoch's batches, validation left out.
        angles: degrees between update and BP gradient by stage, the mean over hidden ones, and ``overall``; empty where
            not measured.
        angles_gn: the same to the update of Gauss-Newton targets.
        train_loss: mean loss of the training images, while they trained.
        val_loss: mean loss of the validation images.
    """

    val_accuracy: float | None
    seconds: float
    angles: Mapping[str, float] = field(default_factory=dict)
    angles_gn: Mapping[str, float] = field(default_factory=dict)
    train_loss: float | None = None
    val_loss: float | None = None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """Make one of what a file or a checkpoint holds; those of earlier versions hold more figures, or fewer."""
        return cls(**{each.name: stored[each.name] for each in fields(cls) if each.name in stored})


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
    def seconds(self) -> float:
        """Wall-clock seconds of all training."""
        return sum(epoch.seconds for epoch in self.epochs)

    def mean_angle(self, kind: Literal["angles", "angles_gn"] = "angles") -> float:
        """Degrees, the mean over hidden stages and epochs; every stage counts the same; nan where not measured."""
        means = [hidden_mean(getattr(epoch, kind)) for epoch in self.epochs]
        measured = [mean for mean in means if not math.isnan(mean)]
        return fmean(measured) if measured else math.nan

    def save(self, folder: Path) -> None:
        """Write ``result.json``, or ``failure.json`` for a run that is to be tried again."""
        write_whole(folder / (FAILURE if self.status == "failed" else RESULT), json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read the result of a run from its folder; None if it has not ended.

        Raises:
            UserError: if the file is damaged, or another program's.
        """
        found = (folder / name for name in (RESULT, FAILURE) if (folder / name).is_file())
        return next((read(path, cls._of) for path in found), None)

    @classmethod
    def _of(cls, stored: dict[str, Any]) -> Self:
        epochs = tuple(Epoch.of(epoch) for epoch in stored.pop("epochs"))
        result = cls(epochs=epochs, learning_rate=tuple(map(float, stored.pop("learning_rate"))), **stored)
        if result.status not in get_args(Status):
            raise ValueError(f"status {result.status}")
        # what tables are made of: a value of another type would only be met there
        _ = (result.best_val_accuracy or 0.0) + result.seconds + result.mean_angle() + result.mean_angle("angles_gn")
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
        return read(folder / TEST, cls._of) if (folder / TEST).is_file() else None

    @classmethod
    def _of(cls, stored: dict[str, Any]) -> Self:
        return cls(float(stored.pop("accuracy")), int(stored.pop("images")), **stored)


def by_stage(angles: Mapping[str, float]) -> dict[str, float]:
    """The angles of the single stages."""
    return {stage: angle for stage, angle in angles.items() if stage not in ("overall", HIDDEN)}


def hidden_mean(angles: Mapping[str, float]) -> float:
    """The mean angle over the hidden stages; nan without any. Earlier records lack it: all stages but the last."""
    hidden = list(by_stage(angles).values())[:-1]
    return angles.get(HIDDEN, fmean(hidden) if hidden else math.nan)


def read(path: Path, make: Callable[[Any], T]) -> T:
    """Make something of a JSON file.

    Raises:
        UserError: if the file is damaged, or another program's.
    """
    try:
        return make(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # what all sorts of content lead to
        raise UserError(f"{path} is damaged: put it back, or delete it to have that run done again") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there as a whole or as it was before, whenever the process dies; leave equal ones alone."""
    data = content.encode() if isinstance(content, str) else content
    if not path.is_file() or path.read_bytes() != data:
        with replacing(path) as file:
            file.write(data)
