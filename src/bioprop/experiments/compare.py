"""One command to a fair table: ``bioprop compare``."""

import difflib
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NoReturn, TypeVar

import torch
from rich.console import Console

from bioprop.cli_parser import OneSentenceParser, resolve_homes
from bioprop.errors import UserError
from bioprop.experiments import worker
from bioprop.experiments.configs import Row, find_rows, name_configs, resolve
from bioprop.experiments.costs import Costs
from bioprop.experiments.durations import fit_into, measure, show_plan
from bioprop.experiments.environment import versions
from bioprop.experiments.plan import MOST_SEEDS, Comparison, Run, locked
from bioprop.experiments.processes import ask, run_jobs
from bioprop.experiments.progress import Progress
from bioprop.experiments.report import show_report, write_report, write_rows
from bioprop.experiments.summary import summarize
from bioprop.experiments.worker import Job
from bioprop.faults import as_user_error

T = TypeVar("T")

USAGE = "bioprop compare [options] [-- options of every run, as of bioprop fit]"
INTERRUPTED = 130
#: Algorithms that are compared where none are named.
STANDARD = "backprop,dtp,ldrl"

#: Options of a run that a comparison sets itself, and what is to be done instead of giving them.
DECIDED_BY_COMPARE = {
    "seed_everything": "--seeds N runs the seeds 0 to N - 1",
    "trainer.max_epochs": "change --epochs, or leave it out",
    "trainer.logger": "leave it out, each run writes metrics.csv below --folder",
    "trainer.enable_progress_bar": "leave it out, --folder holds a log.txt of each run",
    "trainer.enable_model_summary": "leave it out, --folder holds a log.txt of each run",
}


def compare(
    folder: Path | None = None,
    algorithms: list[str] | str = "",
    network: str = "",
    data: str = "",
    configs: list[str] | str = "",
    seeds: int = 3,
    epochs: int | None = None,
    equal_time: float | None = None,
    lr_factors: list[float] | str = "1",
    parallel: int = 1,
    plan: bool = False,
    options: Sequence[str] = (),
    command: str = "",
) -> int:
    """Train algorithms on the same network and data, test them, and write tables, figures and CSV files.

    Everything but the algorithm, its hyperparameters and its optimizer must be the same in all rows, or the comparison
    is refused before anything runs. All training comes first; then the checkpoint of each run that was best on the
    validation images reads the test images once, and the cost of a batch is measured with nothing else going on. Killed
    at any moment, the same command goes on where it was; with more rows or seeds it runs what is missing.

    Args:
        folder: results folder: table.md (.csv, .tex), runs.csv, curves.csv, trials.csv, figures (.png, .pdf), and all
            runs with checkpoints and logs; by default runs/compare_<network>_<data>.
        algorithms: names as in lightning_configs/<algorithm>_<network>_<data>.yaml, by default backprop,dtp,ldrl, or
            of classes, such as my_rules.MyRule, which have the defaults of the class.
        network: name of the network, as there: lenet, mlp, simplevgg, ..., or of a class, such as my_nets.MyNet.
        data: name of the data, as there: digits, cifar10, imagefolder, ...
        configs: configuration files to compare instead of the three above, such as a.yaml,b.yaml.
        seeds: number of runs of each algorithm: seeds 0, 1, ... for weights and noise; the split stays (data.seed).
        epochs: epochs of every run, with any that train feedback alone; by default what the files agree on.
        equal_time: seconds of training for every run, instead of equal epochs: each algorithm has as many epochs as
            fit, at least one, by its time per batch, which is measured beforehand.
        lr_factors: such as 0.3,1,3: each algorithm tries its learning rate times each factor, once, with a seed that
            is not reported, and keeps the one with the best validation accuracy. As long as that of an algorithm is the
            smallest or the largest, all try one more (four at most).
        parallel: runs side by side, each with its share of the threads.
        plan: show the runs and how long they will take, and do no more.
        options: further options of every run, as of ``bioprop fit``; on the command line, what follows ``--``.
        command: the command line, for the table.

    Returns:
        Exit status: 0 if every run has ended (diverged runs too), 1 if one failed and is to be tried again.

    Raises:
        UserError: for a mistake, before anything ran.
    """
    if not 1 <= seeds <= MOST_SEEDS:
        raise UserError(
            f"--seeds is {seeds}, but it must be from 1 to {MOST_SEEDS}: the number of runs of each algorithm"
        )
    for option, number in (("parallel", parallel), ("epochs", epochs)):
        if number is not None and number < 1:
            raise UserError(f"--{option} is {number}, but it must be at least 1")
    if equal_time is not None and not 0.0 < equal_time < float("inf"):
        raise UserError(f"--equal_time is {equal_time}, but it must be a number of seconds above 0")
    if equal_time is not None and epochs is not None:
        raise UserError("--equal_time decides the number of epochs: leave it or --epochs out")
    if algorithms == "" and network and data:
        algorithms = STANDARD
    if folder is None:
        folder = Path("runs", "_".join(filter(None, ("compare", network, data))))
    with TemporaryDirectory() as scratch:
        found = _find(_listed(algorithms), network, data, _listed(configs), Path(scratch))
        every = [*options, *([] if epochs is None else [f"--trainer.max_epochs={epochs}"])]
        _refuse_own(options, sets_epochs=epochs is not None or equal_time is not None)
        found = {name: row._replace(options=(*row.options, *every)) for name, row in found.items()}
        return compare_rows(found, folder, seeds, _factors(lr_factors), equal_time, parallel, plan, command)


def compare_rows(
    found: Mapping[str, Row],
    folder: Path,
    seeds: int,
    factors: list[float],
    equal_time: float | None,
    parallel: int,
    plan: bool,
    command: str,
) -> int:
    """Compare rows, wherever their settings come from; see `compare`."""
    folder, console = folder.resolve(), Console()
    rows = {name: resolve(row.config, row.options) for name, row in found.items()}
    words = {name: (f"--config={row.config}", *row.options) for name, row in found.items()}
    comparison = Comparison.load(folder)
    costs = Costs({})
    if equal_time is not None:
        costs = fit_into(equal_time, rows, words, comparison, console)
    comparison.admit(rows, seeds, factors, equal_time)
    missing = [name for name in rows if not (runs := comparison.runs(name)) or any(run.is_missing for run in runs)]
    for mistake in ask(worker.check, {name: words[name] for name in missing}):
        raise UserError(mistake)
    if plan:
        costs = costs if costs.turns else measure(words, rows, console)
        show_plan(comparison, list(rows), costs, parallel, console)
        return 0
    with locked(folder):
        comparison = Comparison.load(folder)
        comparison.admit(rows, seeds, factors, equal_time)
        comparison.save(command)
        return _run(comparison, list(rows), parallel, console)


def _refuse_own(options: Sequence[str], sets_epochs: bool) -> None:
    """Refuse options of the runs that a comparison would override."""
    for word in options:
        name = word.partition("=")[0].lstrip("-").rstrip("+")
        for own, instead in DECIDED_BY_COMPARE.items():
            if (name == own or name.startswith(f"{own}.")) and (own != "trainer.max_epochs" or sets_epochs):
                raise UserError(f"--{name} behind -- would be ignored, since bioprop compare sets it: {instead}")


def _run(comparison: Comparison, rows: Sequence[str], at_once: int, console: Console) -> int:
    """Do what is missing: trials, then training, then tests, then the measurement of costs."""
    code = versions()

    def epochs(row: str) -> int:
        return int(comparison.rows[row]["trainer"]["max_epochs"])

    def do(kind: Literal["fit", "test"], runs: Sequence[Run]) -> None:
        jobs = [_job(kind, run, comparison, at_once, code) for run in runs]
        run_jobs(jobs, at_once, progress)

    with Progress(console, lambda: write_rows(comparison)) as progress:
        # those of the seeds are not known before the trials are done
        ended = {row: sum(not run.is_missing for run in comparison.runs(row)) for row in rows}
        progress.expect((epochs(row), seed < ended[row]) for row in rows for seed in range(comparison.seeds[row]))
        counted = set[Path]()
        while True:
            trials = [trial for row in rows for trial in comparison.trials(row)]
            progress.expect((epochs(run.row), not run.is_missing) for run in trials if run.folder not in counted)
            counted |= {run.folder for run in trials}
            do("fit", [run for run in trials if run.is_missing])
            if any(trial.is_missing for trial in trials) or not comparison.needs_round(rows):
                break
            comparison.rounds += 1
            comparison.save()
        # seed by seed, so that whatever else the machine does falls on all algorithms alike
        runs = sorted((run for row in rows for run in comparison.runs(row)), key=lambda run: run.seed)
        do("fit", [run for run in runs if run.is_missing])
        do("test", [run for run in runs if _is_untested(run)])
        finished = [row.name for row in summarize(comparison) if row.finished]
        if finished and set(finished) != set(Costs.load(comparison.folder).turns):
            words = {name: comparison.arguments(comparison.runs(name)[0]) for name in finished}
            measure(words, comparison.rows, console, progress).save(comparison.folder)
    write_report(comparison)
    show_report(comparison, console)
    return int(any(row.failed for row in summarize(comparison) if row.name in rows))


def _is_untested(run: Run) -> bool:
    result = run.result
    return result is not None and result.status == "finished" and run.test is None


def _job(kind: Literal["fit", "test"], run: Run, comparison: Comparison, at_once: int, code: str) -> Job:
    return Job(
        kind,
        run.title,
        run.folder,
        comparison.arguments(run),
        comparison.learning_rate(run),
        keep_checkpoints=not run.is_trial,
        directory=Path.cwd(),
        versions=code,
        threads=None if at_once == 1 else max(1, torch.get_num_threads() // at_once),
        jobs=at_once,
        epochs=comparison.rows[run.row]["trainer"]["max_epochs"],
    )


def _find(algorithms: Sequence[str], network: str, data: str, configs: Sequence[str], scratch: Path) -> dict[str, Row]:
    """Find the settings of each row, however they were named."""
    if configs and (algorithms or network or data):
        raise UserError("--configs names whole files: leave --algorithms, --network and --data out, or --configs")
    if configs:
        return name_configs([Path(path).expanduser() for path in configs])
    if not algorithms:
        raise UserError("there is nothing to compare: give --algorithms backprop,ldrl --network lenet --data digits")
    if not network or not data:
        raise UserError("--algorithms needs --network and --data, such as --network lenet --data digits")
    return find_rows(algorithms, network, data, scratch)


def _factors(given: list[float] | str) -> list[float]:
    try:
        factors = [float(factor) for factor in _listed(given)]
    except ValueError:
        factors = []
    if not factors or any(not 0.0 < factor < float("inf") for factor in factors) or len(set(factors)) < len(factors):
        raise UserError(f"--lr_factors is {given}, but it must be different numbers above 0, such as 0.3,1,3")
    return factors


def _listed(given: list[T] | str) -> list[T] | list[str]:
    """A list, or what a string names between commas."""
    return [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else given


class CompareParser(OneSentenceParser):
    """Explains its errors by the options of `bioprop compare`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print a sentence and exit with status 2."""
        if match := re.search(r"(?i)unrecognized arguments: ([^\s=]+)", message):
            close = difflib.get_close_matches(match[1], [f"--{name}" for name in OPTIONS], n=1)
            hint = f"did you mean {close[0]}?" if close else f"they are {', '.join(f'--{name}' for name in OPTIONS)}."
            sentence = f"there is no option {match[1]}: {hint} Options of the runs themselves go behind a lone --"
            self.exit(2, f"bioprop compare: error: {sentence}\n")
        super().error(message, ex)


OPTIONS = [name for name in inspect.signature(compare).parameters if name not in ("options", "command")]


def run_words(function: Callable[..., int], parser: OneSentenceParser, words: Sequence[str]) -> int:
    """Call a function that runs comparisons with what stands on the command line.

    Args:
        function: takes its options, ``options`` of every run (what follows ``--``), and the whole ``command``.
        parser: knows its name and usage.
        words: what follows on the command line.

    Returns:
        The exit status.

    Raises:
        UserError: for a mistake in a value.
        SystemExit: with status 2, for arguments that do not parse.
    """
    cut = words.index("--") if "--" in words else len(words)
    parser.add_function_arguments(function, as_positional=False, skip={"options", "command"})
    own = [f"{word}=true" if word in ("--plan", "--list") else word for word in words[:cut]]
    given = resolve_homes(parser.parse_args(own))
    try:
        return function(**given.as_dict(), options=words[cut + 1 :], command=shlex.join([*parser.prog.split(), *words]))
    except KeyboardInterrupt:
        sys.stderr.write(
            f"{parser.prog}: interrupted; what has ended is kept, and the same command goes on from here\n"
        )
        return INTERRUPTED
    except OSError as error:
        raise as_user_error(error) or error from error


def main(words: Sequence[str]) -> int:
    """Run ``bioprop compare``; see `run_words`."""
    rules = (inspect.getdoc(compare) or "").split("\n\n")[1]
    return run_words(compare, CompareParser(prog="bioprop compare", usage=USAGE, description=rules), words)
