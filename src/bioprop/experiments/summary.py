"""Figures of a comparison: what its runs say together."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from bioprop.experiments.plan import Comparison, Run
from bioprop.experiments.results import Result, Test
from bioprop.runs.folder import class_name


class Spread(NamedTuple):
    """Mean and standard deviation (n - 1) over n runs; the latter is None for one run, the former nan for none."""

    mean: float
    deviation: float | None
    runs: int


class Ended(NamedTuple):
    """A run and what it left; both None where it has not come so far."""

    run: Run
    result: Result | None
    test: Test | None


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        name: as the user gave it.
        algorithm: name of the class.
        seeds: number of runs that were asked for.
        trials: runs that choose the learning rate.
        runs: runs that are reported; none as long as no learning rate is chosen.
    """

    name: str
    algorithm: str
    seeds: int
    trials: Sequence[Ended]
    runs: Sequence[Ended]

    @property
    def finished(self) -> list[Result]:
        """The runs that trained to their end: what means and deviations are of."""
        return [each.result for each in self.runs if each.result is not None and each.result.status == "finished"]

    @property
    def learning_rate(self) -> tuple[float, ...]:
        """Of the forward weights, in all runs of the row; empty as long as none is chosen."""
        return next((each.result.learning_rate for each in self.runs if each.result is not None), ())

    @property
    def troubles(self) -> list[str]:
        """Return the reason for fewer finished runs than were asked for; empty where there is none."""
        unfinished = {
            "diverged": _count(self.runs, "diverged"),
            "failed": _count(self.runs, "failed"),
            "not tested": sum(result.status == "finished" and test is None for _, result, test in self.runs if result),
            "to do": sum(each.result is None for each in self.runs),
        }
        if self.trials and not self.runs:
            diverged, failed = _count(self.trials, "diverged"), _count(self.trials, "failed")
            if diverged == len(self.trials):
                return [f"all {diverged} trials diverged"]
            return [f"{failed} of {len(self.trials)} trials failed" if failed else "trials to do"]
        return [f"{count} {what}" for what, count in unfinished.items() if count]

    @property
    def failed(self) -> bool:
        """Return true if a run or a trial is to be tried again; one that diverged has ended."""
        waiting = any(each.result is None or each.result.status == "failed" for each in (*self.trials, *self.runs))
        untested = any(each.result and each.result.status == "finished" and not each.test for each in self.runs)
        return waiting or untested

    def spread(self, figure: Callable[[Result], float]) -> Spread:
        """Mean and deviation of a figure over the finished runs."""
        return spread(figure(result) for result in self.finished)

    @property
    def test_accuracy(self) -> Spread:
        """Fraction of the test images classified right, over the tested runs."""
        return spread(each.test.accuracy for each in self.runs if each.test is not None)


def spread(values: Iterable[float]) -> Spread:
    """Mean, standard deviation (n - 1) and number of values; nothing is dropped, so one nan makes both nan."""
    listed = list(values)
    if not listed:
        return Spread(math.nan, None, 0)
    if any(math.isnan(value) for value in listed):
        return Spread(math.nan, math.nan, len(listed))
    return Spread(fmean(listed), stdev(listed) if len(listed) > 1 else None, len(listed))


def summarize(comparison: Comparison) -> list[Row]:
    """Read what the results folder holds, row by row."""
    return [
        Row(
            name,
            class_name(settings["model"]),
            comparison.seeds[name],
            [Ended(run, run.result, None) for run in comparison.trials(name)],
            [Ended(run, run.result, run.test) for run in comparison.runs(name)],
        )
        for name, settings in comparison.rows.items()
    ]


def backprop_seconds(rows: Sequence[Row]) -> float:
    """Seconds of a training step of the comparison's first row of BP, the mean over its runs; nan without one."""
    means = (row.spread(lambda result: result.batch_seconds).mean for row in rows if row.algorithm == "Backprop")
    return next(means, math.nan)


def _count(runs: Sequence[Ended], status: str) -> int:
    return sum(each.result is not None and each.result.status == status for each in runs)
