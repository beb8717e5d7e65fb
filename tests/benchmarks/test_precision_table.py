"""The table of precisions is made from end to end."""

import csv
from pathlib import Path

import pytest

from benchmarks.precision_table import difference_table, measure


@pytest.mark.slow
def test_every_run_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    measure(("backprop_lenet_digits", "dtp_lenet_digits"), seeds=2, threads=1, out="table", options=options)
    with (tmp_path / "table" / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["config"], row["precision"]) for row in rows[::2]] == [
        ("backprop_lenet_digits", "32-true"),
        ("backprop_lenet_digits", "32-true"),
        ("dtp_lenet_digits", "32-true"),
        ("dtp_lenet_digits", "32-true"),
    ]
    assert all(float(row["rounding"]) == 0.0 for row in rows[::2])
    assert all(0.0 < float(row["rounding"]) < 10.0 for row in rows[1::2])
    assert "bf16-mixed" in capsys.readouterr().out


def test_carried_differences_lose_less_than_subtracted_results() -> None:
    table = difference_table()
    exact, carried, subtracted, backprop = ([float(cell) for cell in column.cells] for column in table.columns[2:])
    assert len(exact) == 6
    assert all(one < other < worse for one, other, worse in zip(exact, carried, subtracted, strict=True))
    small = [2, 5]  # beta 0.005: what is left is what rounding in the products costs BP as well
    assert [carried[row] for row in small] == pytest.approx([backprop[row] for row in small], rel=0.1)
