"""The time that a comparison takes: measured by batches, fitted into a number of seconds, shown before it starts."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from statistics import median

from rich.console import Console

from bioprop.errors import UserError
from bioprop.experiments import worker
from bioprop.experiments.configs import Settings
from bioprop.experiments.costs import TURNS, Costs
from bioprop.experiments.names import method
from bioprop.experiments.plan import MOST_ROUNDS, Comparison
from bioprop.experiments.processes import ask
from bioprop.experiments.progress import Progress
from bioprop.experiments.report import show_table

#: Hyperparameters that make epochs which train feedback alone.
ALONE = ("feedback_pretraining_epochs", "extra_feedback_epochs")


def measure(
    words: Mapping[str, Sequence[str]], rows: Mapping[str, Settings], console: Console, progress: Progress | None = None
) -> Costs:
    """Measure the cost of a batch of every row, in turns; epochs that train feedback alone are left out."""
    runs = {
        name: [*given, *(f"--model.init_args.{key}=0" for key in ALONE if key in rows[name]["model"]["init_args"])]
        for name, given in words.items()
    }
    with nullcontext(progress) if progress else Progress(console, lambda: None) as shown:
        step = shown.track("time per batch, in turns", len(runs) * (TURNS + 1))
        for said in ask(worker.measure, runs):
            if isinstance(said, Costs):
                return said
            step()
    raise UserError("the time per batch could not be measured: try one of the runs alone, by bioprop fit")


def fit_into(
    seconds: float,
    rows: Mapping[str, Settings],
    words: Mapping[str, Sequence[str]],
    comparison: Comparison,
    console: Console,
) -> Costs:
    """Give every row the number of epochs that fit into so many seconds; rows of before keep theirs."""
    new = [name for name in rows if name not in comparison.rows]
    costs = measure(words, rows, console) if new else Costs({})
    for name, settings in rows.items():
        trainer = settings["trainer"]
        if name in comparison.rows:
            trainer["max_epochs"] = comparison.rows[name]["trainer"]["max_epochs"]
        elif costs.seconds(name):
            trainer["max_epochs"] = max(1, int(seconds / (costs.batches * median(costs.seconds(name)))))
        else:
            raise UserError(f"the time per batch of {name} could not be measured: try it alone, by bioprop fit")
    return costs


def show_plan(comparison: Comparison, rows: Sequence[str], costs: Costs, at_once: int, console: Console) -> None:
    """Show the runs that are missing, and how long they will take by the time of a batch."""
    table, total, count = [], 0.0, 0
    for row in rows:
        trials = sum(trial.is_missing for trial in comparison.trials(row))
        runs = comparison.seeds[row] - sum(not run.is_missing for run in comparison.runs(row))
        epochs = comparison.rows[row]["trainer"]["max_epochs"]
        each = costs.starting + epochs * costs.batches * median(costs.seconds(row) or [math.nan])
        count, total = count + trials + runs, total + (trials + runs) * each
        figures = (trials, runs, epochs, f"{each:.0f}", f"{(trials + runs) * each:.0f}")
        headings = ("trials", "runs", "epochs", "seconds of each", "seconds of all")
        table.append({"algorithm": method(row)} | dict(zip(headings, map(str, figures), strict=True)))
    show_table("to do", table, console)
    more = ""
    if len(comparison.lr_factors) > 1 and comparison.rounds < MOST_ROUNDS:
        more = f"; up to {MOST_ROUNDS - comparison.rounds} more trials of each where a best rate is at the edge"
    duration = timedelta(seconds=round(total / at_once)) if math.isfinite(total) else "unknown time"
    said = f"{count} runs, about {duration} with --parallel {at_once} (validation left out){more}"
    console.print(said, soft_wrap=True)
