"""Speed of feedback training: closed forms, plain autograd, BP; whole steps and single stages, in one process.

    make bench            (or: python -m benchmarks.bench --network lenet)

Before anything is timed, plain and ours must train alike in float64. Then all variants take turns, every round, the
quick ones among themselves; figures are medians over the rounds. Tables go to the console, all numbers to
<out>/bench.csv.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console

from benchmarks import stages
from benchmarks.arithmetic import COUNTED_BATCH, convolution_rate, count_gigaflop
from benchmarks.measuring import interleaved
from benchmarks.memory import peak_memory
from benchmarks.overhead import overheads
from benchmarks.report import Row, timed_row, timing_table, value_table, write_csv
from benchmarks.settings import PUBLISHED, Setting
from benchmarks.twins import assert_equal
from benchmarks.variants import RELEASED, VARIANTS, Variant
from bioprop.errors import UserError
from bioprop.experiments.environment import processor

#: Columns of the console that the tables need.
WIDTH = 130


@dataclass(frozen=True)
class Amounts:
    """Amount of measuring.

    Args:
        rounds: timed rounds of the whole steps.
        stage_rounds: timed rounds of the single stages and of the convolutions.
        stage_iterations: feedback iterations of a stage in each of them, at most.
        memory: whether the peak memory of a step is measured.
        lightning_batches: batches that Lightning's overhead is measured on, 0 for none.
    """

    rounds: int = 5
    stage_rounds: int = 5
    stage_iterations: int = 10
    memory: bool = True
    lightning_batches: int = 300


def bench(
    network: Literal["simplevgg", "lenet", "both"] = "both",
    batch: int | None = None,
    rounds: int = 5,
    threads: int = 2,
    out: Path = Path("runs/bench"),
    lightning: bool = True,
) -> None:
    """Measure, print the tables and write the CSV.

    Args:
        network: names of the settings to measure, with the published hyperparameters.
        batch: images in a batch; as published if left out (SimpleVGG 128, LeNet 256).
        rounds: timed rounds of everything.
        threads: number of torch's threads.
        out: folder of bench.csv.
        lightning: whether Lightning's overhead, which does not depend on the network, is measured.
    """
    if rounds < 5:
        raise UserError(f"rounds is {rounds}, too few for a median to mean something: choose 5 or more")
    chosen = PUBLISHED if network == "both" else {network: PUBLISHED[network]}
    settings = {name: setting if batch is None else replace(setting, batch=batch) for name, setting in chosen.items()}
    amounts = Amounts(rounds=rounds, stage_rounds=rounds)
    measure(settings, amounts if lightning else replace(amounts, lightning_batches=0), threads, out)


def measure(settings: Mapping[str, Setting], amounts: Amounts, threads: int, out: Path) -> list[Row]:
    """Measure all settings, print the tables and write the CSV; returns its rows."""
    for setting in settings.values():
        assert_equal(setting)
    torch.set_num_threads(threads)
    run = {"threads": threads, "torch": torch.__version__, "cpu": processor()}
    console = Console()
    console.width = max(console.width, WIDTH)
    rows: list[Row] = []
    values: list[Row] = []
    for name, setting in settings.items():
        with console.status(f"measuring {name}"):
            timed, rate = _time(name, setting, amounts)
        title = f"{name}, batch {setting.batch}, {threads} threads, torch {run['torch']}, {run['cpu']}"
        console.print(timing_table(f"{title}\none iteration of a stage; a whole training step", timed))
        if amounts.memory:
            values += _memory(name, setting, threads)
        rows += [replace(row, batch=setting.batch, **run) for row in timed]
        values += [rate] if rate is not None else []
    values += _lightning(amounts.lightning_batches) if amounts.lightning_batches else []
    if values:
        console.print(value_table(values))
    rows += [replace(row, **run) for row in values]
    write_csv(rows, out / "bench.csv")
    console.print(f"all numbers: {out / 'bench.csv'}")
    return rows


def _time(name: str, setting: Setting, amounts: Amounts) -> tuple[list[Row], Row | None]:
    """Rows of stages and steps, and of the convolutions they are compared with."""
    best = convolution_rate(setting.build(), setting.batch, amounts.stage_rounds)
    rate = None if best is None else best[1]
    timed = [*_stages(name, setting, amounts, rate), *_steps(name, setting, amounts, rate)]
    if best is None:
        return timed, None
    return timed, Row(name, "convolution rate", best[0], value=best[1], unit="GF/s", batch=setting.batch)


def _stages(name: str, setting: Setting, amounts: Amounts, rate: float | None) -> Iterator[Row]:
    iterations = min(amounts.stage_iterations, *setting.iterations)
    runs = stages.stage_runs(setting, iterations)
    counted = stages.stage_runs(setting, 1, COUNTED_BATCH)
    counts = {key: count_gigaflop(run) for key, run in counted.items()}
    seconds = interleaved({" ".join(key): run for key, run in runs.items()}, amounts.stage_rounds)
    each = {key: [time / iterations for time in seconds[" ".join(key)]] for key in runs}
    for (stage, variant), times in each.items():
        gigaflop = counts[stage, variant] * setting.batch / COUNTED_BATCH
        row = timed_row(name, f"stage {stage}", variant, times, each[stage, stages.PLAIN], None, gigaflop, rate)
        yield replace(row, rounds=amounts.stage_rounds)


def _steps(name: str, setting: Setting, amounts: Amounts, rate: float | None) -> Iterator[Row]:
    seconds: dict[str, list[float]] = {}
    # after a step of many seconds the next ones of a fraction of a second find cold caches: each kind takes its turns
    for quick in (True, False):
        group = {variant: each for variant, each in VARIANTS.items() if (each.repeats > 1) == quick}
        seconds |= _take_turns(name, setting, group, amounts.rounds)
    for variant, each in VARIANTS.items():
        plain = None if each.plain is None else seconds[each.plain]
        gigaflop = _step_gigaflop(setting, each)
        released = seconds[RELEASED] if each.plain == "plain" else None
        row = timed_row(name, "step", variant, seconds[variant], plain, seconds["BP"], gigaflop, rate, released)
        yield replace(row, rounds=amounts.rounds)


def _take_turns(name: str, setting: Setting, group: Mapping[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Seconds of whole steps by variant; all of a group in every round."""
    images, labels = setting.draw()
    learners = {variant: each.make(setting) for variant, each in group.items()}
    # one feedback iteration a stage: a whole round of steps takes minutes
    short = {variant: each.make(setting.short()) for variant, each in group.items()}
    seconds = interleaved(
        {variant: lambda learner=learner: learner.step(images, labels) for variant, learner in learners.items()},
        rounds,
        {variant: each.repeats for variant, each in group.items()},
        {variant: lambda learner=learner: learner.step(images, labels) for variant, learner in short.items()},
    )
    for variant, learner in learners.items():
        if not all(bool(weight.isfinite().all()) for weight in learner.weights):
            raise UserError(f"{name}: {variant} diverged, so that its time says nothing: choose smaller learning rates")
    return seconds


def _step_gigaflop(setting: Setting, variant: Variant) -> float:
    step, batch = variant.make(setting).step, setting.draw(COUNTED_BATCH)
    return count_gigaflop(lambda: step(*batch)) * setting.batch / COUNTED_BATCH


def _memory(name: str, setting: Setting, threads: int) -> Iterator[Row]:
    for variant in ("plain", "closed form"):
        peak, added = peak_memory(setting, variant, threads)
        for value, unit in ((peak, "MiB, peak of a process"), (added, "MiB of it by two steps")):
            yield Row(name, "memory", variant, value=value, unit=unit, batch=setting.batch)


def _lightning(batches: int) -> Iterator[Row]:
    for algorithm, seconds in overheads(batches).items():
        row = timed_row("small MLP", "lightning", algorithm, seconds, None, None, 0.0, None)
        milliseconds = 1e3 * (row.seconds_median or 0.0)
        yield replace(row, gigaflop=None, gflops_rate=None, value=milliseconds, unit="ms a batch", rounds=len(seconds))


if __name__ == "__main__":
    try:
        auto_cli(bench, as_positional=False)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
