"""Figures of a comparison against independent computation."""

import csv
import gc
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bioprop.errors import UserError
from bioprop.experiments import costs
from bioprop.experiments.costs import BATCH, FEEDBACK, WARM_UP, PeakMemory, StepTimes
from bioprop.experiments.plan import Comparison, Run
from bioprop.experiments.report import make_report, write_rows
from bioprop.experiments.results import Epoch, Result, Test, write_whole
from bioprop.experiments.summary import Ended, Row, backprop_seconds, spread, summarize

SETTINGS = {
    "model": {
        "class_path": "bioprop.algorithms.Backprop",
        "init_args": {"network": {"class_path": "bioprop.networks.LeNet"}, "optimizer": {"init_args": {"lr": 0.1}}},
    },
    "data": {"class_path": "bioprop.datamodules.Digits", "init_args": {"batch_size": 64, "seed": 0}},
    "trainer": {"max_epochs": 3},
}
EPOCHS = (
    Epoch(0.5, 9.0, 0.2, 10.0, 1.0, {"conv1": 80.0, "fc1": 40.0, "overall": 1.0}),
    Epoch(0.8, 3.0, 0.1, 20.0, 5.0, {"conv1": 60.0, "fc1": 20.0, "overall": 2.0}),
    Epoch(0.7, 5.0, 0.4, 10.0, 2.0, {}),
)


def test_figures_of_a_run() -> None:
    result = Result("finished", epochs=EPOCHS)

    assert (result.best_val_accuracy, result.best_epoch) == (0.8, 2)
    assert result.seconds_per_epoch == pytest.approx(4.0)  # the first pays for warming up
    assert result.batch_seconds == pytest.approx(0.2)
    assert result.feedback_share == pytest.approx(8 / 40)
    assert result.mean_angle() == pytest.approx(np.mean([[80, 40], [60, 20]]))
    assert math.isnan(result.mean_angle("angles_gn"))


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    result = Result("finished", learning_rate=(0.1, 0.2), epochs=EPOCHS, peak_memory=3.0, images={"train": 5})
    assert Result.load(tmp_path) is None
    Result("failed", "once").save(tmp_path)
    assert Result.load(tmp_path) == Result("failed", "once", peak_memory=pytest.approx(math.nan, nan_ok=True))
    result.save(tmp_path)
    assert Result.load(tmp_path) == result


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"status": "finished", "epochs": [], "learning_rate": [], "other": 1}',
        b'{"status": "odd", "epochs": [], "learning_rate": []}',
        b'{"status": "finished", "epochs": [], "learning_rate": ["fast"]}',
        b'{"status": "finished", "epochs": [{"seconds": 1}], "learning_rate": []}',
        b'{"status": "finished", "learning_rate": [], "epochs": [{"val_accuracy": "high", "seconds": 1, '
        b'"batch_seconds": 1, "step_seconds": 1, "feedback_seconds": 0}]}',
    ],
)
def test_damaged_results_are_named(content: bytes, tmp_path: Path) -> None:
    for name, load in (("result.json", Result.load), ("failure.json", Result.load), ("test.json", Test.load)):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is damaged: put it back, or delete it to have that run done"):
            load(folder)


def test_spread_is_mean_and_sample_deviation() -> None:
    values = np.random.default_rng(0).normal(size=7)

    found = spread(values.tolist())
    assert found.mean == pytest.approx(values.mean())
    assert found.deviation == pytest.approx(values.std(ddof=1))
    assert found.runs == 7
    assert spread([4.0]) == (4.0, None, 1)
    assert math.isnan(spread([1.0, math.nan]).mean)
    assert math.isnan(spread([]).mean)


def write_runs(folder: Path, name: str, accuracies: list[float | None], batch: float) -> None:
    """Runs of a row: an accuracy on the test images, or None for one that diverged."""
    for seed, accuracy in enumerate(accuracies):
        run = folder / "runs" / name / f"seed_{seed}"
        if accuracy is None:
            Result("diverged", "training diverged").save(run)
        else:
            epochs = (Epoch(accuracy, 2.0 + seed, batch, 1.0, 0.25, {"fc1": 30.0 + seed}),)
            Result("finished", epochs=epochs, peak_memory=500.0, hardware="a machine", jobs=2).save(run)
            Test(accuracy, 50).save(run)


def test_table_and_csv_agree_with_independent_figures(tmp_path: Path) -> None:
    slow = {**SETTINGS, "model": {**SETTINGS["model"], "class_path": "bioprop.algorithms.LDRL"}}
    comparison = Comparison(
        tmp_path, {"bp": SETTINGS, "slow": slow}, {"bp": 3, "slow": 5}, [1.0], ["bioprop compare x"]
    )
    write_runs(tmp_path, "bp", [0.9, 0.8, 0.94], batch=0.1)
    write_runs(tmp_path, "slow", [0.5, None, 0.7, None], batch=0.25)
    rows = summarize(comparison)
    report = make_report(comparison, rows)

    accuracies = np.array([0.9, 0.8, 0.94]) * 100
    cells = [dict(zip(report.headings, line, strict=True)) for line in report.cells]
    assert "learning rate" not in report.headings
    assert cells[0] == {
        "algorithm": "bp",
        "runs": "3",
        "test accuracy, %": f"{accuracies.mean():.2f} ± {accuracies.std(ddof=1):.2f}",
        "angle to BP, °": "31.0 ± 1.0",
        "seconds per epoch": "3.00 ± 1.00",
        "time per batch, x BP": "1.00 ± 0.00",
        "peak memory, MiB": "500 ± 0",
        "time on feedback, %": "25 ± 0",
    }
    assert cells[1]["runs"] == "2 of 5 (2 diverged, 1 to do)"
    assert cells[1]["test accuracy, %"] == f"60.00 ± {np.std([50, 70], ddof=1):.2f}"
    assert cells[1]["time per batch, x BP"] == "2.50 ± 0.00"
    assert any("up to 2 runs side by side" in note for note in report.notes)
    assert any("50 to test" in note for note in report.notes)
    assert "Made by: bioprop compare x" in report.notes
    assert "slow seed 1: diverged: training diverged" in report.notes

    write_rows(comparison)
    with (tmp_path / "runs.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["status"] for row in written] == ["finished"] * 3 + ["finished", "diverged", "finished", "diverged"]
    assert [float(row["test_accuracy"]) for row in written[:3]] == [0.9, 0.8, 0.94]
    assert written[3]["times_backprop"] == "2.5"
    assert not (tmp_path / "trials.csv").exists()


def test_without_bp_there_is_no_ratio(tmp_path: Path) -> None:
    slow = {**SETTINGS, "model": {**SETTINGS["model"], "class_path": "bioprop.algorithms.LDRL"}}
    comparison = Comparison(tmp_path, {"slow": slow}, {"slow": 1})
    write_runs(tmp_path, "slow", [0.5], batch=0.25)
    rows = summarize(comparison)
    report = make_report(comparison, rows)

    assert math.isnan(backprop_seconds(rows))
    assert dict(zip(report.headings, report.cells[0], strict=True))["time per batch, x BP"] == "-"
    assert any("no ratio, since no row is BP" in note for note in report.notes)


def trial(factor: float, result: Result | None, folder: Path) -> None:
    if result is not None:
        result.save(folder / "trials" / "row" / f"x{factor:g}")


def test_the_best_trial_is_chosen_once_all_have_ended(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path, {"row": SETTINGS}, {"row": 2}, [0.1, 1.0, 10.0])
    best, equal = (Result("finished", epochs=(Epoch(accuracy, 1.0, 1.0, 1.0, 0.0),)) for accuracy in (0.9, 0.9))
    worse = Result("finished", epochs=(Epoch(0.2, 1.0, 1.0, 1.0, 0.0),))
    trial(0.1, worse, tmp_path)
    trial(1.0, best, tmp_path)
    assert comparison.chosen_factor("row") is None
    assert comparison.runs("row") == []
    trial(10.0, equal, tmp_path)
    assert comparison.chosen_factor("row") == 1.0  # the smaller of equals
    assert [run.seed for run in comparison.runs("row")] == [0, 1]
    run = comparison.runs("row")[0]
    assert comparison.learning_rate(run) == (0.1,)
    trial(1.0, Result("diverged", epochs=best.epochs), tmp_path)
    assert comparison.chosen_factor("row") == 10.0  # however good it was before
    trial(10.0, Result("diverged"), tmp_path)
    assert comparison.chosen_factor("row") == 0.1
    trial(0.1, Result("diverged"), tmp_path)
    assert comparison.chosen_factor("row") is None
    (row,) = summarize(comparison)
    assert row.troubles == ["all 3 trials diverged"]
    assert not row.failed


def test_the_learning_rates_of_all_stages_are_multiplied(tmp_path: Path) -> None:
    arguments = {**SETTINGS["model"]["init_args"], "forward_lr": [0.3, 0.7]}  # type: ignore[dict-item]
    settings = {**SETTINGS, "model": {**SETTINGS["model"], "init_args": arguments}}
    comparison = Comparison(tmp_path, {"row": settings}, {"row": 1}, [0.1, 1.0])
    run = comparison.trials("row")[0]

    assert comparison.learning_rate(run) == (0.03, 0.07)
    assert "--model.init_args.optimizer.init_args.lr=0.01" in comparison.arguments(run)
    assert "--model.init_args.forward_lr=[0.03, 0.07]" in comparison.arguments(run)


def test_step_times_tell_feedback_from_the_rest_and_leave_the_first_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(costs, "_now", lambda: clock[0])
    times = StepTimes()

    def step(before: float, feedback: float) -> None:
        with times.profile(BATCH):
            clock[0] += before
            with times.profile(FEEDBACK):
                clock[0] += feedback
            with times.profile("[Callback]anything"):
                clock[0] += 1.0

    for _ in range(WARM_UP):
        step(100.0, 100.0)
    step(2.0, 3.0)
    assert times.take() == [(6.0, 3.0)]
    step(4.0, 5.0)
    assert times.take() == [(10.0, 5.0)]


def test_an_epoch_of_few_batches_is_timed_by_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    times = StepTimes()
    for _ in range(2):
        with times.profile(BATCH):
            pass
    assert len(times.take()) == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets an earlier peak")
def test_peak_memory_forgets_what_was_before_it_started() -> None:
    memory = PeakMemory(torch.device("cpu"))
    gc.collect()
    memory.start()  # tests before this one may have held far more
    without = memory.read()
    held = torch.ones(64, 2**20)  # 256 MiB
    del held
    high = memory.read()
    assert without + 200 < high < without + 300
    memory.start()
    low = memory.read()
    assert low < high - 200
    held = torch.ones(32, 2**20)  # 128 MiB
    del held
    assert low + 70 < memory.read() < low + 190


def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "file"
    write_whole(path, "before")
    stamp = path.stat().st_mtime_ns
    write_whole(path, "before")
    assert path.stat().st_mtime_ns == stamp
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "after")
    assert path.read_text() == "before"


def test_a_row_without_its_tests_has_not_ended() -> None:
    run = Run("row", Path("row"), 0, 1.0, False)
    row = Row("row", "LDRL", 1, [], [Ended(run, Result("finished", epochs=EPOCHS), None)])

    assert row.failed
    assert row.troubles == ["1 not tested"]
