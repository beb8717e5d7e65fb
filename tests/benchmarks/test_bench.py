"""The benchmark runs from end to end, and counts arithmetic as one does by hand."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.arithmetic import count_gigaflop
from benchmarks.bench import Amounts, bench, measure
from benchmarks.memory import peak_memory
from benchmarks.stages import CLOSED, PLAIN, stage_runs
from benchmarks.variants import VARIANTS
from bioprop.errors import UserError
from tests.benchmarks.test_twins import SETTINGS

SMALL = Amounts(rounds=2, stage_rounds=2, stage_iterations=1, memory=False, lightning_batches=20)


def test_tables_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure({"tiny": SETTINGS["lenet"], "vgg": SETTINGS["vgg"]}, SMALL, threads=1, out=tmp_path / "new")

    with (tmp_path / "new" / "bench.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows)
    steps = {row["variant"]: row for row in written if row["network"] == "tiny" and row["part"] == "step"}
    assert set(steps) == set(VARIANTS)
    assert all(float(row["seconds_min"]) <= float(row["seconds_median"]) for row in steps.values())
    assert all(row["cpu"] and row["torch"] == torch.__version__ for row in written)
    assert float(steps["plain"]["ratio_to_plain"]) == 1.0
    assert float(steps["DTP, autograd"]["ratio_to_plain"]) == 1.0
    assert float(steps["BP"]["ratio_to_bp"]) == 1.0
    assert {row["part"] for row in written if row["network"] == "vgg"} == {
        *(f"stage {name}" for name in ("conv2", "conv3", "conv4", "fc")),
        "convolution rate",
        "step",
    }
    shown = capsys.readouterr().out
    assert "closed form, bfloat16" in shown


def test_arithmetic_is_counted_as_by_hand() -> None:
    setting = replace(SETTINGS["lenet"], batch=8)
    runs = stage_runs(setting, iterations=1, batch=2)
    # conv2: 2 images, 5x4 kernels of 5x5 at 8x8 places, 2 operations each; fc1: 80 inputs, 12 units
    conv2, fc1 = 2 * 2 * (5 * 4 * 25) * 64 / 1e9, 2 * 2 * 80 * 12 / 1e9

    for name, product in (("conv2", conv2), ("fc1", fc1)):
        assert count_gigaflop(runs[name, CLOSED]) == pytest.approx(4 * product)
        # F once, G three times, and the gradient of each of them
        assert count_gigaflop(runs[name, PLAIN]) == pytest.approx(7 * product)


@pytest.mark.slow
def test_peak_memory_is_of_a_process_of_its_own() -> None:
    ballast = torch.ones(2**28)  # a gigabyte that the other process must not be charged with
    peak, added = peak_memory(SETTINGS["lenet"], "closed form", threads=1)

    assert 0 <= added < peak < ballast.nbytes / 2**20
    assert peak > 50


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(UserError, match="rounds is 4"):
        bench(rounds=4)
