"""The report of a comparison for people and for other programs: tables, on the screen too, and figures."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bioprop.experiments.figures import draw_figures
from bioprop.experiments.plan import TRIAL_SEED, Comparison, Run
from bioprop.experiments.results import Result, write_whole
from bioprop.experiments.summary import Ended, Row, Spread, backprop_seconds, summarize
from bioprop.runs.folder import class_name

RUN_COLUMNS = (
    "name",
    "algorithm",
    "seed",
    "status",
    "learning_rate",
    "lr_factor",
    "test_accuracy",
    "best_val_accuracy",
    "best_epoch",
    "epochs",
    "angle",
    "angle_overall_last",
    "angle_gauss_newton",
    "seconds_per_epoch",
    "batch_seconds",
    "times_backprop",
    "feedback_share",
    "peak_memory_mib",
    "jobs",
    "hardware",
    "versions",
    "ended",
    "message",
)
#: A row takes part in choosing the learning rate: it has no test accuracy, and no ratio worth reporting.
TRIAL_COLUMNS = tuple(name for name in RUN_COLUMNS if name not in ("test_accuracy", "times_backprop"))


class Report(NamedTuple):
    """The table as text: heading of each column, cells row by row; and what stands below, sentence by sentence."""

    title: str
    headings: list[str]
    cells: list[list[str]]
    notes: list[str]


def write_rows(comparison: Comparison) -> None:
    """Write ``runs.csv``, ``trials.csv`` (where there are trials) and ``table.md``."""
    rows = summarize(comparison)
    base = backprop_seconds(rows)
    write_whole(
        comparison.folder / "runs.csv", _csv(RUN_COLUMNS, [run for row in rows for run in row.runs], rows, base)
    )
    trials = [trial for row in rows for trial in row.trials]
    if trials:
        write_whole(comparison.folder / "trials.csv", _csv(TRIAL_COLUMNS, trials, rows, base))
    write_whole(comparison.folder / "table.md", _markdown(make_report(comparison, rows)))


def write_report(comparison: Comparison) -> None:
    """Write tables and figures."""
    write_rows(comparison)
    draw_figures(summarize(comparison), comparison.folder, _title(comparison))


def show_report(comparison: Comparison, console: Console) -> None:
    """Show the table on the screen, and say where the files are."""
    rows = summarize(comparison)
    report = make_report(comparison, rows)
    table = Table(title=report.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(report.headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=not number)
    for cells in report.cells:
        table.add_row(*map(escape, cells))
    console.print(table)
    for message in _messages(rows):
        console.print(escape(message), soft_wrap=True)
    shown = [path.name for path in sorted(comparison.folder.glob("*.*")) if path.suffix in (".md", ".csv", ".png")]
    console.print(f"results: {_near(comparison.folder)}: {', '.join(shown)}", soft_wrap=True)


def make_report(comparison: Comparison, rows: Sequence[Row]) -> Report:
    """Lay the figures out."""
    base = backprop_seconds(rows)
    tuned = len(comparison.lr_factors) > 1
    gauss_newton = any(not math.isnan(result.mean_angle("angles_gn")) for row in rows for result in row.finished)
    headings = ["algorithm", "runs", "learning rate", "test accuracy, %", "angle to BP, °", "angle to Gauss-Newton, °"]
    headings += ["seconds per epoch", "time per batch, x BP", "peak memory, MiB", "time on feedback, %"]
    cells = [
        [
            row.name,
            f"{len(row.finished)} of {row.seeds} ({', '.join(row.troubles)})" if row.troubles else f"{row.seeds}",
            " ".join(f"{rate:g}" for rate in row.learning_rate) or "-",
            _cell(row.test_accuracy, 2, 100),
            _cell(row.spread(Result.mean_angle), 1),
            _cell(row.spread(lambda result: result.mean_angle("angles_gn")), 1),
            _cell(row.spread(lambda result: result.seconds_per_epoch), 2),
            _cell(row.spread(lambda result: result.batch_seconds / base), 2),
            _cell(row.spread(lambda result: result.peak_memory), 0),
            _cell(row.spread(lambda result: result.feedback_share), 0, 100),
        ]
        for row in rows
    ]
    shown = [tuned or heading != "learning rate" for heading in headings]
    shown = [
        keep and (gauss_newton or "Gauss-Newton" not in heading) for keep, heading in zip(shown, headings, strict=True)
    ]

    def keep(texts: list[str]) -> list[str]:
        return [text for text, kept in zip(texts, shown, strict=True) if kept]

    return Report(_title(comparison), keep(headings), [keep(row) for row in cells], _notes(comparison, rows, base))


def _title(comparison: Comparison) -> str:
    settings = next(iter(comparison.rows.values()))
    return f"{class_name(settings['model']['init_args']['network'])} on {class_name(settings['data'])}"


def _notes(comparison: Comparison, rows: Sequence[Row], base: float) -> list[str]:
    """Everything the table depends on and does not show."""
    settings = next(iter(comparison.rows.values()))
    data, trainer = settings["data"]["init_args"], settings["trainer"]
    ended = [each for row in rows for each in row.runs if each.result is not None]
    results = [each.result for each in ended if each.result is not None]
    everything = [*results, *(trial.result for row in rows for trial in row.trials if trial.result is not None)]
    images = next((result.images for result in results if result.images), {})
    tested = next((each.test.images for each in ended if each.test is not None), None)
    counts = [
        f"{images[split]:,} to {use}" for split, use in (("train", "train on"), ("val", "validate")) if split in images
    ]
    counts += [f"{tested:,} to test"] if tested is not None else []
    notes = [
        "Mean ± standard deviation (n - 1) over the finished runs, one a seed; runs that diverged or failed are "
        "counted, and in no mean.",
        f"Every run: {trainer['max_epochs']} epochs, those that train feedback alone included; batches of "
        f"{data.get('batch_size', '?')}; the same split ({'; '.join(counts) or 'no run has begun'}; data.seed "
        f"{data.get('seed', '?')}). Seeds set weights and noise.",
        "The checkpoint with the best validation accuracy is tested; the test images are read once, after "
        "all training.",
    ]
    if len(comparison.lr_factors) > 1:
        factors = ", ".join(f"{factor:g}" for factor in comparison.lr_factors)
        notes.append(
            f"Learning rate: the best by validation accuracy of {len(comparison.lr_factors)} trials of each algorithm "
            f"(its configuration's rate times {factors}; seed {TRIAL_SEED}, which is not reported; all in trials.csv)."
        )
    notes.append("Angle: between update and reference on a held validation batch, mean over stages and epochs.")
    notes.append(
        "Time per batch: median training step, without loading, validation and the first batches"
        + ("." if not math.isnan(base) else "; no ratio, since no row is BP that has finished.")
    )
    notes.append(_memory_note(results))
    most = max((result.jobs for result in everything), default=1)
    if most > 1:
        notes.append(f"Times were taken with up to {most} runs side by side: they are those of a shared machine.")
    notes += [f"Hardware: {each}." for each in dict.fromkeys(result.hardware for result in everything) if each]
    notes += [f"Versions: {each}." for each in dict.fromkeys(result.versions for result in everything) if each]
    notes += [f"Made by: {command}" for command in comparison.commands if command]
    last = max((result.ended for result in everything), default="")
    notes += [f"Last run ended: {last[:10]}."] if last else []
    return [*notes, *_messages(rows)]


def _memory_note(results: Sequence[Result]) -> str:
    if any("GPU" in result.hardware for result in results):
        return "Peak memory: what torch allocates on the GPU in training."
    return "Peak memory: what the process has resident in training, Python and its libraries included."


def _messages(rows: Sequence[Row]) -> list[str]:
    """Return the messages of the runs that did not finish; a trial that diverged is news only where all did."""
    return [
        f"{each.run.title}: {each.result.status}: {_said(each.run, each.result)}"
        for row in rows
        for each in (*row.runs, *row.trials)
        if each.result is not None and each.result.message
        if each.result.status == "failed" or not each.run.is_trial or not row.runs
    ]


def _markdown(report: Report) -> str:
    lines = [report.headings, ["---"] * len(report.headings), *report.cells]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    notes = "\n".join(f"- {note}" for note in report.notes)
    return f"# {report.title}\n\n{table}\n\n{notes}\n"


def _csv(columns: Sequence[str], ended: Sequence[Ended], rows: Sequence[Row], base: float) -> str:
    classes = {row.name: row.algorithm for row in rows}
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run, result, test in ended:
        if result is None:
            continue
        last = result.epochs[-1].angles.get("overall", math.nan) if result.epochs else math.nan
        figures = {
            "learning_rate": " ".join(f"{rate:g}" for rate in result.learning_rate),
            "lr_factor": f"{run.factor:g}",
            "test_accuracy": _number(test.accuracy if test else None),
            "best_val_accuracy": _number(result.best_val_accuracy),
            "best_epoch": result.best_epoch,
            "epochs": len(result.epochs),
            "angle": _number(result.mean_angle()),
            "angle_overall_last": _number(last),
            "angle_gauss_newton": _number(result.mean_angle("angles_gn")),
            "seconds_per_epoch": _number(result.seconds_per_epoch),
            "batch_seconds": _number(result.batch_seconds),
            "times_backprop": _number(result.batch_seconds / base),
            "feedback_share": _number(result.feedback_share),
            "peak_memory_mib": _number(result.peak_memory),
        }
        named = {"name": run.row, "algorithm": classes[run.row], "seed": run.seed, "status": result.status}
        stored = {name: getattr(result, name) for name in ("jobs", "hardware", "versions", "ended")}
        writer.writerow({**named, **figures, **stored, "message": _said(run, result)})
    return text.getvalue()


def _said(run: Run, result: Result) -> str:
    """A run's message, with paths as they lie in the results folder, wherever that is read."""
    return result.message.replace(f"{run.folder.parents[2]}/", "")


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


def _cell(spread: Spread, digits: int, scale: float = 1.0) -> str:
    if math.isnan(spread.mean):
        return "-"
    mean = f"{scale * spread.mean:.{digits}f}"
    return mean if spread.deviation is None else f"{mean} ± {scale * spread.deviation:.{digits}f}"


def _near(path: Path) -> Path:
    """The path as seen from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
