"""The cost of training: seconds of a batch and of its feedback phase, and memory; on any device."""

import time
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_lightning.profilers import Profiler

#: Actions that Lightning's loop and `bioprop.algorithms.base.Algorithm` name.
BATCH, FEEDBACK = "run_training_batch", "[Algorithm]train_feedback"
#: First batches of a process, which allocate and record graphs: not timed where there are others.
WARM_UP = 5
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class BatchTime(NamedTuple):
    """Seconds of one training step, and how many of them went into feedback weights."""

    step: float
    feedback: float


class StepTimes(Profiler):
    """Time every training step and the feedback phase within it; nothing else is timed.

    A step is what Lightning hands to the algorithm: loading, callbacks, validation and angles are left out. On a GPU
    the clock is read when the device is idle.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[BatchTime] = []
        self._started: dict[str, float] = {}
        self._feedback = 0.0
        self._warm = False

    def start(self, action_name: str) -> None:
        """Read the clock, for the two actions that are timed."""
        if action_name in (BATCH, FEEDBACK):
            self._started[action_name] = _now()

    def stop(self, action_name: str) -> None:
        """Read it again."""
        if action_name == FEEDBACK:
            self._feedback += _now() - self._started.pop(FEEDBACK)
        elif action_name == BATCH:
            self._seen.append(BatchTime(_now() - self._started.pop(BATCH), self._feedback))
            self._feedback = 0.0

    def take(self) -> list[BatchTime]:
        """Return the times since the last call, without the process's first batches."""
        taken = self._seen if self._warm else self._seen[WARM_UP:] or self._seen[-1:]
        self._seen, self._warm = [], True
        return taken


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
