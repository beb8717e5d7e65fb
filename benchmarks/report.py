"""The rows of the benchmark: as a CSV in long form, and as tables."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One thing that was measured.

    Attributes:
        network: name of the setting.
        part: ``step``, ``stage conv2`` (seconds are of one iteration), ``lightning`` (of one batch), ``memory``,
            ``convolution rate``.
        variant: name of the way of computing it.
        seconds_median: median time over the rounds.
        seconds_min: shortest time.
        seconds_max: longest time.
        ratio_to_plain: seconds over those of plain autograd for the same method.
        ratio_to_released: seconds over those of plain autograd as its authors released it.
        ratio_to_bp: seconds over those of our BP on the same network.
        gigaflop: arithmetic in convolutions and matrix products, in 1e9 operations.
        gflops_rate: the same a second.
        fraction_of_conv_rate: share of the best rate that float32 convolutions reached in the same run.
        value: anything else that was measured.
        unit: unit of the value.
        rounds: timed rounds.
        threads: number of torch's threads.
        batch: images in a batch.
        torch: version.
        cpu: name of the processor.
    """

    network: str
    part: str
    variant: str
    seconds_median: float | None = None
    seconds_min: float | None = None
    seconds_max: float | None = None
    ratio_to_plain: float | None = None
    ratio_to_released: float | None = None
    ratio_to_bp: float | None = None
    gigaflop: float | None = None
    gflops_rate: float | None = None
    fraction_of_conv_rate: float | None = None
    value: float | None = None
    unit: str = ""
    rounds: int | None = None
    threads: int | None = None
    batch: int | None = None
    torch: str = ""
    cpu: str = ""


def timed_row(
    network: str,
    part: str,
    variant: str,
    seconds: Sequence[float],
    plain: Sequence[float] | None,
    backprop: Sequence[float] | None,
    gigaflop: float,
    conv_rate: float | None,
    released: Sequence[float] | None = None,
) -> Row:
    """Make the row of something that was timed.

    Args:
        network: name of the setting.
        part: name of the part that was timed.
        variant: name of the way of computing it.
        seconds: time of every round.
        plain: times of plain autograd for the same method; None where there is none to compare with.
        backprop: times of BP; None where there is none to compare with.
        gigaflop: arithmetic.
        conv_rate: rate of the machine's convolutions, in 1e9 operations a second.
        released: seconds of plain autograd as released, likewise.
    """
    middle = median(seconds)
    return Row(
        network,
        part,
        variant,
        middle,
        min(seconds),
        max(seconds),
        None if plain is None else middle / median(plain),
        None if released is None else middle / median(released),
        None if backprop is None else middle / median(backprop),
        gigaflop,
        gigaflop / middle,
        None if conv_rate is None else gigaflop / middle / conv_rate,
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write all rows; what was not measured stays empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def timing_table(title: str, rows: Sequence[Row]) -> Table:
    """Show rows that were timed, in the order they come."""
    table = Table(title=title)
    table.add_column("part", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for heading in (
        "ms",
        "min",
        "max",
        "speed-up\nover plain",
        "over plain\nas released",
        "ratio\nto BP",
        "GF",
        "GF/s",
        "of conv\nrate",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        assert row.seconds_median is not None
        assert row.seconds_min is not None
        assert row.seconds_max is not None
        table.add_row(
            row.part,
            row.variant,
            _digits(1e3 * row.seconds_median),
            _digits(1e3 * row.seconds_min),
            _digits(1e3 * row.seconds_max),
            "" if row.ratio_to_plain is None else f"{1 / row.ratio_to_plain:.2f}",
            "" if row.ratio_to_released is None else f"{1 / row.ratio_to_released:.2f}",
            "" if row.ratio_to_bp is None else f"{row.ratio_to_bp:.1f}",
            _digits(row.gigaflop or 0.0),
            f"{row.gflops_rate:.0f}",
            "" if row.fraction_of_conv_rate is None else f"{row.fraction_of_conv_rate:.2f}",
        )
    return table


def _digits(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def value_table(rows: Sequence[Row]) -> Table:
    """Show rows of other values."""
    table = Table("network", "part", "variant", title="memory, overhead")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for row in rows:
        table.add_row(row.network, row.part, row.variant, f"{row.value:,.1f}", row.unit)
    return table
