"""The report of a comparison for people and for other programs: tables, on the screen too, and figures."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bioprop.experiments.costs import TURNS, Costs
from bioprop.experiments.figures import draw_figures
from bioprop.experiments.names import experiment
from bioprop.experiments.plan import TRIAL_SEED, Comparison, Run
from bioprop.experiments.results import Result, hidden_mean, write_whole
from bioprop.experiments.summary import (
    FEWEST_PAIRS,
    Ended,
    Row,
    Spread,
    backprop_seconds,
    differences_to_backprop,
    spread,
    summarize,
)

#: Columns of figures: the name of each, digits, factor.
COLUMNS: dict[str, tuple[str, int, float]] = {
    "test accuracy, %": ("test_accuracy", 2, 100),
    "angle to BP, °": ("angle_hidden", 1, 1),
    "angle to Gauss-Newton, °": ("angle_gauss_newton_hidden", 1, 1),
    "time per batch, ms": ("batch_seconds", 2, 1000),
    "time per batch, x BP": ("times_backprop", 2, 1),
    "time on feedback, %": ("feedback_share", 0, 100),
    "peak memory, MiB": ("peak_memory_mib", 0, 1),
    "training of a run, s": ("seconds", 1, 1),
}
#: Characters of a cell on the screen that are not broken.
WIDEST = 15
#: Kinds of files of a results folder that are named on the screen.
SHOWN = (".md", ".csv", ".tex", ".png")


class Report(NamedTuple):
    """Tables of text by title, each a list of rows of cells by heading; and what stands below, by sentence."""

    title: str
    tables: dict[str, list[dict[str, str]]]
    notes: list[str]


def write_rows(comparison: Comparison) -> None:
    """Write ``runs.csv``, ``curves.csv``, ``trials.csv`` (where there are trials), ``table.md``, ``.csv``, ``.tex``."""
    rows, costs = summarize(comparison), Costs.load(comparison.folder)
    runs = [(row, each) for row in rows for each in row.runs]
    trials = [(row, each) for row in rows for each in row.trials]
    report = make_report(comparison, rows, costs)
    written = {
        "runs.csv": _csv([_run(row, each) for row, each in runs if each.result]),
        "trials.csv": _csv([_run(row, each) for row, each in trials if each.result]),
        "curves.csv": _csv([epoch for row, each in runs for epoch in _epochs(row, each)]),
        "table.csv": _csv(_figures(rows, costs)),
        "table.md": _markdown(report),
        "table.tex": _latex(report),
    }
    for name, content in written.items():
        if content:
            write_whole(comparison.folder / name, content)


def write_report(comparison: Comparison) -> None:
    """Write tables and figures."""
    write_rows(comparison)
    draw_figures(summarize(comparison), Costs.load(comparison.folder), comparison.folder, _title(comparison))


def show_report(comparison: Comparison, console: Console) -> None:
    """Show the tables on the screen, and say where the files are."""
    rows = summarize(comparison)
    report = make_report(comparison, rows, Costs.load(comparison.folder))
    for title, cells in report.tables.items():
        show_table(f"{report.title}: {title}", cells, console)
    for message in _messages(rows):
        console.print(escape(message), soft_wrap=True)
    shown = [path.name for path in sorted(comparison.folder.glob("*.*")) if path.suffix in SHOWN]
    console.print(f"results: {_near(comparison.folder)}: {', '.join(shown)}", soft_wrap=True)


def show_table(title: str, rows: Sequence[Mapping[str, str]], console: Console) -> None:
    """Show a table, wider than the screen rather than with broken words."""
    table = Table(title=escape(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(rows[0]):
        cells = [row[heading] for row in rows]
        word = max(len(word) for text in (heading, *cells) for word in text.split())
        least = max(word, min(max(map(len, cells)), WIDEST))
        table.add_column(heading, justify="right" if number else "left", min_width=least)
    for row in rows:
        table.add_row(*map(escape, row.values()))
    console.print(table, width=max(console.width, console.measure(table).minimum), crop=False)


def make_report(comparison: Comparison, rows: Sequence[Row], costs: Costs) -> Report:
    """Lay the figures out."""
    apart = differences_to_backprop(rows)
    accuracy, cost = [], []
    spreads = {row.name: _spreads(row, rows, costs) for row in rows}
    for row in rows:
        cells = {"algorithm": row.title, "runs": f"{row.seeds}"}
        if row.troubles:
            cells["runs"] = f"{len(row.finished)} of {row.seeds} ({', '.join(row.troubles)})"
        if len(comparison.lr_factors) > 1:
            cells["learning rate"] = _rate(row.learning_rate) + " (edge)" * row.at_edge
        if comparison.equal_time:
            cells["epochs"] = f"{comparison.rows[row.name]['trainer']['max_epochs']}"
        shown = {
            column: _cell(spreads[row.name][name], digits, factor) for column, (name, digits, factor) in COLUMNS.items()
        }
        cells["test accuracy, %"] = shown.pop("test accuracy, %")
        if apart:
            found = apart.get(row.name)
            cells["difference to BP, points"] = cells["p"] = cells["effect size"] = "-"
            if found:
                mean, low, high = (f"{100 * each:+.2f}" for each in (found.mean, found.low, found.high))
                cells["difference to BP, points"] = f"{mean} [{low}, {high}]"
                cells["p"] = "<0.001" if found.p < 0.001 else f"{found.p:.3f}"
                cells["effect size"] = f"{found.effect:+.1f}"
        cells["angle to BP, °"], gauss_newton = shown.pop("angle to BP, °"), shown.pop("angle to Gauss-Newton, °")
        if any(not math.isnan(each["angle_gauss_newton_hidden"].mean) for each in spreads.values()):
            cells["angle to Gauss-Newton, °"] = gauss_newton
        accuracy.append(cells)
        cost.append({"algorithm": row.title} | shown)
    tables = {"accuracy and angle": accuracy, "cost": cost}
    return Report(_title(comparison), tables, _notes(comparison, rows, costs, bool(apart)))


def _spreads(row: Row, rows: Sequence[Row], costs: Costs) -> dict[str, Spread]:
    """The figures of a row, over its runs or over the turns in which its cost was measured."""
    base, turns = backprop_seconds(rows, costs), costs.turns.get(row.name, [])
    return {
        "test_accuracy": row.test_accuracy,
        "angle_hidden": row.spread(Result.mean_angle),
        "angle_gauss_newton_hidden": row.spread(lambda result: result.mean_angle("angles_gn")),
        "batch_seconds": spread(turn.step for turn in turns),
        "times_backprop": spread(turn.step / base for turn in turns),
        "feedback_share": spread(turn.feedback_share for turn in turns),
        "peak_memory_mib": row.spread(lambda result: result.peak_memory),
        "seconds": row.spread(lambda result: result.seconds),
    }


def _title(comparison: Comparison) -> str:
    return experiment(next(iter(comparison.rows.values())))


def _notes(comparison: Comparison, rows: Sequence[Row], costs: Costs, compared: bool) -> list[str]:
    """Everything the tables depend on and do not show."""
    settings = next(iter(comparison.rows.values()))
    data, trainer = settings["data"]["init_args"], settings["trainer"]
    results = [each.result for row in rows for each in row.runs if each.result is not None]
    everything = [*results, *(trial.result for row in rows for trial in row.trials if trial.result is not None)]
    images = next((result.images for result in results if result.images), {})
    tested = next((each.test.images for row in rows for each in row.runs if each.test is not None), None)
    counts = [
        f"{images[split]:,} to {use}" for split, use in (("train", "train on"), ("val", "validate")) if split in images
    ]
    counts += [f"{tested:,} to test"] if tested is not None else []
    length = f"{trainer['max_epochs']} epochs, those that train feedback alone included"
    if comparison.equal_time:
        length = f"as many epochs as its time per batch lets into {comparison.equal_time:g} s of training"
    notes = [
        "Mean ± standard deviation (n - 1) over the finished runs, one a seed; runs that diverged or failed are "
        "counted, and in no mean.",
        f"Every run: {length}; batches of {data.get('batch_size', '?')}; the same split "
        f"({'; '.join(counts) or 'no run has begun'}; data.seed {data.get('seed', '?')}). Seeds set weights and noise.",
        "The checkpoint with the best validation accuracy is tested; the test images are read once, after "
        "all training.",
    ]
    if len(comparison.lr_factors) > 1:
        factors = ", ".join(f"{factor:g}" for factor in comparison.lr_factors)
        more = ""
        if comparison.rounds:
            more = (
                f", then {comparison.rounds} more for all, beyond the best where it was the smallest or largest, else "
                "beside it"
            )
        notes.append(
            f"Learning rate: the best by validation accuracy of {len(comparison.lr_factors) + comparison.rounds} "
            f"trials of each algorithm (its configuration's rate times {factors}{more}; seed {TRIAL_SEED}, which is "
            "not reported; all in trials.csv)."
        )
        if any(row.at_edge for row in rows):
            notes.append("(edge): the smallest or the largest rate tried was the best, and a better may lie beyond.")
    if compared:
        notes.append(
            "Difference to BP: runs paired by seed (the same weights, split and order), with Student's 95% interval; "
            "p: paired t-test, corrected for the number of rows by Holm's rule; effect size: mean over standard "
            "deviation of the differences. Where the interval holds 0, no difference is shown."
        )
    else:
        notes.append(
            f"Nothing can be said about differences to BP: that takes {FEWEST_PAIRS} seeds or more of BP and the other."
        )
    notes.append(
        "Angle: between update and reference on a held validation batch, mean over epochs and the hidden stages, whose "
        "error comes through feedback. The output stage, at 0° for every algorithm, is left out; 90° is chance."
    )
    if costs.turns:
        notes.append(
            f"Time per batch and on feedback: measured alone, after all training, {TURNS} turns of some batches of "
            "every row, in turns; a training step without loading and validation (epochs that train feedback alone "
            f"left out). On {costs.hardware}."
        )
    notes.append(_memory_note(results))
    most = max((result.jobs for result in everything), default=1)
    if most > 1:
        notes.append(f"Up to {most} runs trained side by side: seconds of training are those of a shared machine.")
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


# -- files -----------------------------------------------------------------------------------------------------------


def _markdown(report: Report) -> str:
    parts = [f"# {report.title}"]
    for cells in report.tables.values():
        lines = [list(cells[0]), ["---"] * len(cells[0]), *(list(row.values()) for row in cells)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts.append("\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(parts) + "\n"


def _latex(report: Report) -> str:
    """The tables in plain LaTeX, which needs no package."""
    symbols = {"\\": r"\textbackslash{}", "±": r"$\pm$", "°": r"$^\circ$", "<": "$<$", "≥": r"$\geq$"}
    symbols |= {each: f"\\{each}" for each in "%&_#${}"}

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(symbols.get(each, each) for each in cell) for cell in cells) + r" \\"

    parts = []
    for title, cells in report.tables.items():
        body = "\n".join(line(list(row.values())) for row in cells)
        parts.append(
            f"% {report.title}: {title}\n\\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}\n\\hline\n"
            f"{line(list(cells[0]))}\n\\hline\n{body}\n\\hline\n\\end{{tabular}}\n"
        )
    return "\n".join(parts)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV under all their names; numbers by six digits, empty where there is none."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _number(value) if isinstance(value, float) else value for name, value in row.items()})
    return text.getvalue() if rows else ""


def _run(row: Row, ended: Ended) -> dict[str, Any]:
    run, result, test = ended
    assert result is not None
    last = result.epochs[-1].angles.get("overall") if result.epochs else None
    tested = {} if run.is_trial else {"test_accuracy": test.accuracy if test else None}
    return {
        "name": row.name,
        "algorithm": row.algorithm,
        "seed": run.seed,
        "status": result.status,
        "learning_rate": _rate(result.learning_rate),
        "lr_factor": run.factor,
        **tested,
        "best_val_accuracy": result.best_val_accuracy,
        "best_epoch": result.best_epoch,
        "epochs": len(result.epochs),
        "angle_hidden": result.mean_angle(),
        "angle_overall_last": last,
        "angle_gauss_newton_hidden": result.mean_angle("angles_gn"),
        "seconds": result.seconds,
        "peak_memory_mib": result.peak_memory,
        **{name: getattr(result, name) for name in ("jobs", "hardware", "versions", "ended")},
        "message": _said(run, result),
    }


def _epochs(row: Row, ended: Ended) -> list[dict[str, Any]]:
    """The learning curve of a run."""
    epochs = ended.result.epochs if ended.result else ()
    return [
        {
            "name": row.name,
            "seed": ended.run.seed,
            "epoch": number,
            "seconds": sum(each.seconds for each in epochs[:number]),
            "train_loss": epoch.train_loss,
            "val_loss": epoch.val_loss,
            "val_accuracy": epoch.val_accuracy,
            "angle_hidden": hidden_mean(epoch.angles),
            **{f"angle_{stage}": angle for stage, angle in epoch.angles.items() if stage != "hidden_stages"},
        }
        for number, epoch in enumerate(epochs, 1)
    ]


def _figures(rows: Sequence[Row], costs: Costs) -> list[dict[str, Any]]:
    """The tables as numbers."""
    apart, listed = differences_to_backprop(rows), []
    for row in rows:
        cells = {"name": row.name, "algorithm": row.algorithm, "family": row.family, "finished": len(row.finished)}
        for name, each in _spreads(row, rows, costs).items():
            cells |= {name: each.mean, f"{name}_sd": each.deviation}
        found = apart[row.name]._asdict() if row.name in apart else {}
        listed.append(cells | {f"difference_{name}": value for name, value in found.items()})
    return listed


def _rate(rates: Sequence[float]) -> str:
    return " ".join(f"{rate:g}" for rate in rates) or "-"


def _said(run: Run, result: Result) -> str:
    """A run's message, with paths as they lie in the results folder, wherever that is read."""
    return result.message.replace(f"{run.folder.parents[2]}/", "")


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _cell(spread: Spread, digits: int, scale: float) -> str:
    if math.isnan(spread.mean):
        return "-"
    mean = f"{scale * spread.mean:.{digits}f}"
    return mean if spread.deviation is None else f"{mean} ± {scale * spread.deviation:.{digits}f}"


def _near(path: Path) -> Path:
    """The path as seen from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
