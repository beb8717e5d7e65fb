"""The progress of a comparison: bars on a terminal, a line for each run elsewhere."""

from collections.abc import Callable, Iterable
from typing import Self

from rich import progress as rich_progress
from rich.console import Console
from rich.markup import escape

from bioprop.experiments.results import Result, Test
from bioprop.experiments.worker import Job


class Progress:
    """Shows the whole and the runs that are going on, and has tables written after each.

    Args:
        console: terminal or file that shows them.
        after_run: called when a run has ended.
    """

    def __init__(self, console: Console, after_run: Callable[[], None]) -> None:
        self._console, self._after_run = console, after_run
        self._total = self._done = 0
        self._bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.TextColumn("{task.fields[state]}"),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("left:"),
            rich_progress.TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=3600,  # seconds; epochs may take minutes
        )
        self._whole = self._bars.add_task("all runs", total=0, state="")
        self._tasks: dict[Job, rich_progress.TaskID] = {}
        self._seen: dict[Job, int] = {}

    def expect(self, runs: Iterable[tuple[int, bool]]) -> None:
        """Count further runs in.

        Args:
            runs: number of epochs of each, and whether it has ended before.
        """
        listed = list(runs)
        self._total += len(listed)
        self._done += sum(ended for _, ended in listed)
        task = self._bars.tasks[self._whole]
        self._bars.update(
            self._whole,
            total=(task.total or 0) + sum(epochs for epochs, _ in listed),
            completed=task.completed + sum(epochs for epochs, ended in listed if ended),
            state=self._state(),
        )

    def track(self, description: str, total: int) -> Callable[[], None]:
        """Show a bar for something else; return what moves it on."""
        task = self._bars.add_task(f"  {description}", total=total, state="")
        return lambda: self._bars.advance(task)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def started(self, job: Job) -> None:
        """Show a bar of its own."""
        state = "starting" if job.kind == "fit" else "testing"
        self._tasks[job] = self._bars.add_task(f"  {escape(job.title)}", total=job.epochs, state=state)
        self._seen[job] = 0

    def epoch(self, job: Job, number: int, accuracy: float | None) -> None:
        """Move the bars on; a run that goes on where it was begins with some epochs done."""
        validated = "" if accuracy is None else f", validation {100 * accuracy:.1f} %"
        self._bars.update(self._tasks[job], completed=number, state=f"epoch {number}{validated}")
        self._bars.advance(self._whole, number - self._seen[job])
        self._seen[job] = number

    def ended(self, job: Job, exit_code: int) -> None:
        """Say how the run ended; where it could not say so itself, take that down in its place."""
        self._bars.remove_task(self._tasks.pop(job))
        if job.kind == "fit":
            line = self._fit_ended(job, exit_code)
        else:
            tested = Test.load(job.folder)
            line = (
                f"test accuracy {100 * tested.accuracy:.2f} %"
                if tested
                else f"not tested: see {job.folder / 'log.txt'}"
            )
        self._console.print(f"{escape(job.title)}: {escape(line)}", soft_wrap=True, highlight=False)
        self._after_run()

    def _fit_ended(self, job: Job, exit_code: int) -> str:
        result = Result.load(job.folder)
        if result is None:
            reason = f"signal {-exit_code}" if exit_code < 0 else f"status {exit_code}"
            result = Result(
                "failed", f"its process ended by {reason} (see {job.folder / 'log.txt'})", versions=job.versions
            )
            result.save(job.folder)
        self._done += 1
        self._bars.advance(self._whole, job.epochs - self._seen.pop(job))
        self._bars.update(self._whole, state=self._state())
        best = result.best_val_accuracy
        reached = "" if best is None else f"best validation accuracy {100 * best:.2f} %, "
        figures = f"{reached}{result.seconds:.1f} s"
        outcome = result.status if not result.message else f"{result.status}: {result.message}"
        return f"[{self._done} of {self._total}] {outcome}{f' ({figures})' if result.epochs else ''}"

    def _state(self) -> str:
        return f"{self._done} of {self._total}"
