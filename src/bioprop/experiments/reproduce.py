"""Published settings, run again: ``bioprop reproduce NAME``."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from rich.console import Console

from bioprop.cli_parser import OneSentenceParser
from bioprop.errors import UserError
from bioprop.experiments.compare import compare_rows, run_words
from bioprop.experiments.configs import Row
from bioprop.experiments.names import method
from bioprop.experiments.plan import Comparison
from bioprop.experiments.report import show_table
from bioprop.front import CONFIGS

FOLDER = CONFIGS / "reproduce"


class Expected(NamedTuple):
    """A published test accuracy and the range that ours is expected in, all in %."""

    low: float
    published: float
    high: float


class Reproduction(NamedTuple):
    """A published setting, the content of ``lightning_configs/reproduce/<name>.yaml``.

    Attributes:
        source: paper, and the number of its runs.
        seeds: number of seeds by default.
        reproduced: when and where the figures fell in range, or ``not run``.
        rows: settings by name.
        expected: test accuracies by name of row, where they are known.
    """

    source: str
    seeds: int
    reproduced: str
    rows: dict[str, Row]
    expected: dict[str, Expected]


def load(name: str) -> Reproduction:
    """Read a reproduction.

    Raises:
        UserError: if there is none of this name, naming those that there are.
    """
    path = FOLDER / f"{name}.yaml"
    if name not in names():
        raise UserError(f"there is no reproduction {name!r}: choose one of {', '.join(names())}; --list describes them")
    stored: dict[str, Any] = yaml.safe_load(path.read_text())
    rows = {
        row: Row(CONFIGS / each["config"], (*stored.get("options", ()), *each.get("options", ())))
        for row, each in stored["rows"].items()
    }
    expected = {row: Expected(*each["expected"]) for row, each in stored["rows"].items() if "expected" in each}
    return Reproduction(stored["source"], stored["seeds"], stored["reproduced"], rows, expected)


def names() -> list[str]:
    """The names of all reproductions."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def reproduce(
    name: str = "",
    seeds: int | None = None,
    folder: Path | None = None,
    parallel: int = 1,
    plan: bool = False,
    list: bool = False,
    options: Sequence[str] = (),
    command: str = "",
) -> int:
    """Run a published setting as a comparison, and say of each published test accuracy whether ours is in range.

    What the paper does not say, and what stands in for it, is told in lightning_configs/reproduce/<name>.yaml.

    Args:
        name: name of the reproduction.
        seeds: number of runs of each row; by default as many as were published.
        folder: results folder, as of bioprop compare; by default runs/reproduce_<name>.
        parallel: runs side by side.
        plan: show the runs and how long they will take, and do no more.
        list: show all reproductions, and which of them has been reproduced where and when.
        options: further options of every run, as of ``bioprop fit``; on the command line, what follows ``--``.
        command: the command line, for the table.

    Returns:
        Exit status: 0 if all is in range, 1 if not, or if a run failed.

    Raises:
        UserError: for a mistake, before anything ran.
    """
    console = Console()
    if list:
        found = {each: load(each) for each in names()}
        headings = ("name", "source", "rows", "reproduced")
        cells = [(n, r.source, ", ".join(map(method, r.rows)), r.reproduced) for n, r in found.items()]
        show_table("reproductions", [dict(zip(headings, row, strict=True)) for row in cells], console)
        return 0
    reproduction = load(name)
    seeds = reproduction.seeds if seeds is None else seeds
    if seeds < 1 or parallel < 1:
        raise UserError(f"--seeds is {seeds} and --parallel is {parallel}, but both must be at least 1")
    folder = folder or Path("runs", f"reproduce_{name}")
    rows = {row: each._replace(options=(*each.options, *options)) for row, each in reproduction.rows.items()}
    status = compare_rows(rows, folder, seeds, [1.0], None, parallel, plan, command)
    if plan:
        return status
    judged = judge(Comparison.load(folder.resolve()), reproduction)
    show_table(f"{name}: {reproduction.source}", judged, console)
    return max(status, int(any(row["in range"] != "yes" for row in judged)))


def judge(comparison: Comparison, reproduction: Reproduction) -> list[dict[str, str]]:
    """Hold the mean test accuracy of each row against the range that is expected."""
    judged = []
    for row, each in reproduction.expected.items():
        tested = [100 * run.test.accuracy for run in comparison.runs(row) if run.test is not None]
        found = fmean(tested) if tested else None
        judged.append(
            {
                "algorithm": method(row),
                "n": str(len(tested)),
                "test accuracy, %": "-" if found is None else f"{found:.2f}",
                "published": f"{each.published:g}",
                "range": f"{each.low:g} to {each.high:g}",
                "in range": "yes" if found is not None and each.low <= found <= each.high else "no",
            }
        )
    return judged


def main(words: Sequence[str]) -> int:
    """Run ``bioprop reproduce``; see `bioprop.experiments.compare.run_words`."""
    usage = "bioprop reproduce NAME [options] [-- options of every run, as of bioprop fit]"
    named = [f"--name={words[0]}", *words[1:]] if words and not words[0].startswith("-") else words
    return run_words(reproduce, OneSentenceParser(prog="bioprop reproduce", usage=usage), named)
