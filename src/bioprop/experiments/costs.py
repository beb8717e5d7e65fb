"""The cost of training: seconds of a batch and of its feedback phase, and memory; on any device."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from pytorch_lightning.profilers import Profiler

from bioprop.experiments.results import read, write_whole

#: Actions that Lightning's loop and `bioprop.algorithms.base.Algorithm` name.
BATCH, FEEDBACK = "run_training_batch", "[Algorithm]train_feedback"
#: First batches of a turn, which fill caches, allocate and record graphs: not timed where there are others.
WARM_UP = 3
#: Turns of every row, seconds of one, and the most batches in one.
TURNS, TURN_SECONDS, MOST_BATCHES = 7, 0.4, 20
COSTS = "costs.json"
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Turn(NamedTuple):
    """Seconds of the fastest of some training steps, and the share of the time of all spent on feedback.

    Whatever else the machine does makes steps slower, never faster.
    """

    step: float
    feedback_share: float


@dataclass(frozen=True)
class Costs:
    """The cost of a batch of every row, measured in turns in one process while nothing else ran.

    Attributes:
        turns: turns of each row by name; a row that could not be measured has none.
        batches: number of batches of an epoch.
        starting: seconds until a run begins to train.
        hardware: machine on which they were measured.
        versions: what ran.
    """

    turns: Mapping[str, list[Turn]]
    batches: int = 0
    starting: float = 0.0
    hardware: str = ""
    versions: str = ""

    def seconds(self, row: str) -> list[float]:
        """Seconds of a training step of a row, turn by turn."""
        return [turn.step for turn in self.turns.get(row, [])]

    def save(self, folder: Path) -> None:
        """Write ``costs.json``."""
        write_whole(folder / COSTS, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``costs.json``; of no rows where there is none.

        Raises:
            UserError: if the file is damaged, or another program's.
        """
        path = folder / COSTS
        return read(path, cls._of) if path.is_file() else cls({})

    @classmethod
    def _of(cls, stored: dict[str, Any]) -> Self:
        turns = {row: [Turn(*map(float, each)) for each in listed] for row, listed in stored.pop("turns").items()}
        return cls(turns, **stored)


class StepTimes(Profiler):
    """Time every training step and the feedback phase within it; nothing else is timed.

    A step is what Lightning hands to the algorithm: loading, callbacks, validation and angles are left out. On a GPU
    the clock is read when the device is idle.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[float, float]] = []
        self._started: dict[str, float] = {}
        self._feedback = 0.0

    def start(self, action_name: str) -> None:
        """Read the clock, for the two actions that are timed."""
        if action_name in (BATCH, FEEDBACK):
            self._started[action_name] = _now()

    def stop(self, action_name: str) -> None:
        """Read it again."""
        if action_name == FEEDBACK:
            self._feedback += _now() - self._started.pop(FEEDBACK)
        elif action_name == BATCH:
            self._seen.append((_now() - self._started.pop(BATCH), self._feedback))
            self._feedback = 0.0

    def take(self) -> Turn:
        """Summarize the steps since the last call, without the first."""
        steps, feedback = zip(*(self._seen[WARM_UP:] or self._seen[-1:]), strict=True)
        self._seen = []
        return Turn(min(steps), sum(feedback) / sum(steps) if sum(steps) else 0.0)


class PeakMemory:
    """Most memory (MiB) used between `start` and `read`.

    On a GPU that is what torch has allocated there. Otherwise it is the resident memory of the whole process, with
    Python and its libraries; where the system cannot forget an earlier peak, since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        """Forget earlier peaks, where the system can."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif CLEAR.exists():
            try:
                CLEAR.write_text("5")  # Linux: the peak becomes what is resident now
            except OSError:
                return

    def read(self) -> float:
        """Return the peak in MiB."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device) / 2**20)
        if STATUS.exists():  # Linux's getrusage reports the parent's peak where that was higher
            (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) / 2**10
        try:
            import resource
        except ImportError:  # Windows has none
            return float("nan")
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # macOS counts bytes


def _now() -> float:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()
