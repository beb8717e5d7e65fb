"""Figures of a comparison: what its runs say together."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median, stdev
from typing import NamedTuple

from scipy import stats

from bioprop.experiments.costs import Costs
from bioprop.experiments.names import family, method
from bioprop.experiments.plan import Comparison, Run
from bioprop.experiments.results import Result, Test
from bioprop.runs.folder import class_name

#: With fewer pairs of runs nothing is said about a difference.
FEWEST_PAIRS = 3


class Spread(NamedTuple):
    """Mean and standard deviation (n - 1) over n runs; the latter is None for one run, the former nan for none."""

    mean: float
    deviation: float | None
    runs: int


class Difference(NamedTuple):
    """A row's test accuracy less that of BP with the same seeds (Student's paired t-test).

    Attributes:
        mean: of the differences, as a fraction of the test images.
        low: lower end of the 95% confidence interval of the mean.
        high: upper end.
        p: two-sided probability of a mean so far from 0 without a difference; by Holm's (1979) step-down rule for all
            rows of the comparison, so that the chance of any false finding among them is below it.
        effect: mean over standard deviation of the differences (Cohen's d for pairs).
    """

    mean: float
    low: float
    high: float
    p: float
    effect: float


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
        family: of methods.
        at_edge: whether the best of the trials has the smallest or the largest learning rate.
    """

    name: str
    algorithm: str
    seeds: int
    trials: Sequence[Ended]
    runs: Sequence[Ended]
    family: str = ""
    at_edge: bool = False

    @property
    def title(self) -> str:
        """For people."""
        return method(self.name)

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
    def tested(self) -> dict[int, float]:
        """Fraction of the test images classified right, by seed."""
        return {each.run.seed: each.test.accuracy for each in self.runs if each.test is not None}

    @property
    def test_accuracy(self) -> Spread:
        """Fraction of the test images classified right, over the tested runs."""
        return spread(self.tested.values())


def spread(values: Iterable[float]) -> Spread:
    """Mean, standard deviation (n - 1) and number of values; nothing is dropped, so one nan makes both nan."""
    listed = list(values)
    if not listed:
        return Spread(math.nan, None, 0)
    if any(math.isnan(value) for value in listed):
        return Spread(math.nan, math.nan, len(listed))
    return Spread(fmean(listed), stdev(listed) if len(listed) > 1 else None, len(listed))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% confidence interval of the mean by Student's t; infinitely wide for one value."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def differences_to_backprop(rows: Sequence[Row]) -> dict[str, Difference]:
    """Compare the test accuracies of every row with those of the first row of BP, seed by seed.

    Rows with too few seeds in common with it are left out, and so are those whose differences are all the same: nothing
    can be said of either.
    """
    base = backprop(rows)
    found: dict[str, Difference] = {}
    for row in rows if base else ():
        assert base is not None
        pairs = [(accuracy, base.tested[seed]) for seed, accuracy in row.tested.items() if seed in base.tested]
        apart = [one - other for one, other in pairs]
        if row is base or len(apart) < FEWEST_PAIRS or max(apart) - min(apart) < 1e-12:
            continue
        test = stats.ttest_rel(*zip(*pairs, strict=True))
        found[row.name] = Difference(fmean(apart), *interval(apart), float(test.pvalue), fmean(apart) / stdev(apart))
    largest = 0.0
    for place, (name, each) in enumerate(sorted(found.items(), key=lambda item: item[1].p)):
        largest = min(max(largest, (len(found) - place) * each.p), 1.0)
        found[name] = each._replace(p=largest)
    return found


def summarize(comparison: Comparison) -> list[Row]:
    """Read what the results folder holds, row by row."""
    return [
        Row(
            name,
            class_name(settings["model"]),
            comparison.seeds[name],
            [Ended(run, run.result, None) for run in comparison.trials(name)],
            [Ended(run, run.result, run.test) for run in comparison.runs(name)],
            family(settings),
            comparison.is_at_edge(name),
        )
        for name, settings in comparison.rows.items()
    ]


def backprop(rows: Sequence[Row]) -> Row | None:
    """The comparison's first row of BP."""
    return next((row for row in rows if row.algorithm == "Backprop"), None)


def backprop_seconds(rows: Sequence[Row], costs: Costs) -> float:
    """Seconds of a training step of BP, the median over turns; nan where it was not measured."""
    base = backprop(rows)
    return median(costs.seconds(base.name) or [math.nan]) if base else math.nan


def _count(runs: Sequence[Ended], status: str) -> int:
    return sum(each.result is not None and each.result.status == status for each in runs)
