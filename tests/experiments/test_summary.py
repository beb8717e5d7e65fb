"""Figures of a comparison against independent computation."""

import gc
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bioprop.errors import UserError
from bioprop.experiments import costs
from bioprop.experiments.costs import BATCH, FEEDBACK, WARM_UP, Costs, PeakMemory, StepTimes, Turn
from bioprop.experiments.plan import MOST_ROUNDS, Comparison, Run
from bioprop.experiments.report import make_report, write_rows
from bioprop.experiments.results import Epoch, Result, Test, write_whole
from bioprop.experiments.summary import Ended, Row, backprop_seconds, differences_to_backprop, spread, summarize
from tests.experiments.runs import read_csv

SETTINGS = {
    "model": {
        "class_path": "bioprop.algorithms.Backprop",
        "init_args": {"network": {"class_path": "bioprop.networks.LeNet"}, "optimizer": {"init_args": {"lr": 0.1}}},
    },
    "data": {"class_path": "bioprop.datamodules.Digits", "init_args": {"batch_size": 64, "seed": 0}},
    "trainer": {"max_epochs": 3},
}
EPOCHS = (
    Epoch(0.5, 9.0, {"conv1": 80.0, "fc1": 40.0, "fc2": 0.1, "hidden_stages": 60.0, "overall": 1.0}),
    Epoch(0.8, 3.0, {"conv1": 60.0, "fc1": 20.0, "fc2": 0.2, "hidden_stages": 40.0, "overall": 2.0}),
    Epoch(0.7, 5.0, {}),
)


def test_figures_of_a_run() -> None:
    result = Result("finished", epochs=EPOCHS)

    assert (result.best_val_accuracy, result.best_epoch) == (0.8, 2)
    assert result.seconds == pytest.approx(17.0)
    assert result.mean_angle() == pytest.approx(50.0)  # the output stage left out
    assert math.isnan(result.mean_angle("angles_gn"))


def test_a_result_of_before_the_mean_was_stored_leaves_the_output_stage_out_too(tmp_path: Path) -> None:
    angles = {"conv1": 80.0, "fc1": 40.0, "fc2": 0.1, "overall": 1.0}
    earlier = {"val_accuracy": 0.5, "seconds": 9.0, "batch_seconds": 0.2, "step_seconds": 1.0, "feedback_seconds": 0.1}
    stored = {"status": "finished", "learning_rate": [0.1], "epochs": [{**earlier, "angles": angles, "angles_gn": {}}]}
    (tmp_path / "result.json").write_text(json.dumps(stored))
    result = Result.load(tmp_path)
    assert result is not None
    assert result.mean_angle() == pytest.approx(60.0)
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
        b'{"status": "finished", "epochs": [{"val_accuracy": 1}], "learning_rate": []}',
        b'{"status": "finished", "learning_rate": [], "epochs": [{"val_accuracy": "high", "seconds": 1, '
        b'"angles": {}}]}',
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


def write_runs(folder: Path, name: str, accuracies: list[float | None]) -> None:
    """Runs of a row: an accuracy on the test images, or None for one that diverged."""
    for seed, accuracy in enumerate(accuracies):
        run = folder / "runs" / name / f"seed_{seed}"
        if accuracy is None:
            Result("diverged", "training diverged").save(run)
        else:
            epochs = (
                Epoch(accuracy, 2.0 + seed, {"fc1": 30.0 + seed, "fc2": 0.0, "hidden_stages": 30.0 + seed}, {}, 0.5),
            )
            Result("finished", epochs=epochs, peak_memory=500.0, hardware="a machine", jobs=2).save(run)
            Test(accuracy, 50).save(run)


def compared(folder: Path, **accuracies: list[float | None]) -> Comparison:
    """A comparison whose row ``bp`` is BP, with these runs."""
    other = {**SETTINGS, "model": {**SETTINGS["model"], "class_path": "bioprop.algorithms.LDRL"}}
    rows = {name: SETTINGS if name == "bp" else other for name in accuracies}
    for name, each in accuracies.items():
        write_runs(folder, name, each)
    return Comparison(
        folder, rows, {name: len(each) for name, each in accuracies.items()}, commands=["bioprop compare x"]
    )


COSTS = Costs({"bp": [Turn(0.1, 0.0), Turn(0.2, 0.0), Turn(0.1, 0.0)], "slow": [Turn(0.25, 0.5), Turn(0.35, 0.5)]}, 20)


def test_table_and_csv_agree_with_independent_figures(tmp_path: Path) -> None:
    comparison = compared(tmp_path, bp=[0.9, 0.8, 0.94], slow=[0.5, None, 0.7, None])
    comparison.seeds["slow"] = 5
    COSTS.save(tmp_path)
    rows = summarize(comparison)
    report = make_report(comparison, rows, Costs.load(tmp_path))

    accuracies = np.array([0.9, 0.8, 0.94]) * 100
    accuracy, cost = report.tables.values()
    assert accuracy[0] == {
        "algorithm": "bp",
        "runs": "3",
        "test accuracy, %": f"{accuracies.mean():.2f} ± {accuracies.std(ddof=1):.2f}",
        "angle to BP, °": "31.0 ± 1.0",
    }
    assert cost[0] == {
        "algorithm": "bp",
        "time per batch, ms": f"133.33 ± {np.std([100, 200, 100], ddof=1):.2f}",
        "time per batch, x BP": f"1.33 ± {np.std([1, 2, 1], ddof=1):.2f}",
        "time on feedback, %": "0 ± 0",
        "peak memory, MiB": "500 ± 0",
        "training of a run, s": "3.0 ± 1.0",
    }
    assert accuracy[1]["runs"] == "2 of 5 (2 diverged, 1 to do)"
    assert accuracy[1]["test accuracy, %"] == f"60.00 ± {np.std([50, 70], ddof=1):.2f}"
    assert cost[1]["time per batch, x BP"] == f"3.00 ± {np.std([2.5, 3.5], ddof=1):.2f}"
    assert any("Up to 2 runs trained side by side" in note for note in report.notes)
    assert any("50 to test" in note for note in report.notes)
    assert any("Nothing can be said about differences to BP: that takes 3 seeds" in note for note in report.notes)
    assert "Made by: bioprop compare x" in report.notes
    assert "slow seed 1: diverged: training diverged" in report.notes

    write_rows(comparison)
    written = read_csv(tmp_path / "runs.csv")
    assert [row["status"] for row in written] == ["finished"] * 3 + ["finished", "diverged", "finished", "diverged"]
    assert [float(row["test_accuracy"]) for row in written[:3]] == [0.9, 0.8, 0.94]
    curves = read_csv(tmp_path / "curves.csv")
    assert [(row["name"], row["seed"], row["epoch"]) for row in curves] == [
        (name, str(seed), "1") for name, seeds in (("bp", (0, 1, 2)), ("slow", (0, 2))) for seed in seeds
    ]
    assert curves[1] | {"val_accuracy": "0.8", "train_loss": "0.5", "angle_hidden": "31", "seconds": "3"} == curves[1]
    figures = read_csv(tmp_path / "table.csv")
    assert float(figures[1]["times_backprop"]) == pytest.approx(3.0)
    latex = (tmp_path / "table.tex").read_text()
    assert f"bp & 3 & {accuracies.mean():.2f} $\\pm$ {accuracies.std(ddof=1):.2f} & 31.0 $\\pm$ 1.0 \\\\" in latex
    assert latex.count("\\end{tabular}") == 2
    assert "test accuracy, \\% &" in latex
    assert not (tmp_path / "trials.csv").exists()


def test_without_bp_there_is_no_ratio_and_no_difference(tmp_path: Path) -> None:
    comparison = compared(tmp_path, slow=[0.5, 0.6, 0.8])
    rows = summarize(comparison)
    report = make_report(comparison, rows, COSTS)

    assert math.isnan(backprop_seconds(rows, COSTS))
    accuracy, cost = report.tables.values()
    assert cost[0]["time per batch, x BP"] == "-"
    assert "p" not in accuracy[0]


def test_differences_are_paired_by_seed_and_corrected_for_their_number(tmp_path: Path) -> None:
    """Against the textbook's formulas: t of the mean difference, and Holm's rule."""
    bp, near, far = [0.90, 0.80, 0.94, 0.85], [0.89, 0.80, 0.95, 0.83], [0.70, 0.62, 0.73, 0.64]
    comparison = compared(
        tmp_path, bp=bp, near=near, far=far, twin=[0.92, 0.82, 0.96, 0.87], few=[None, 0.5, 0.6, None]
    )
    found = differences_to_backprop(summarize(comparison))

    assert set(found) == {"near", "far"}  # a twin's differences are all the same, two pairs too few
    raw = {}
    for name, values in (("near", near), ("far", far)):
        apart = np.array(values) - np.array(bp)
        error = apart.std(ddof=1) / 2  # of the mean of four
        assert found[name].mean == pytest.approx(apart.mean())
        assert found[name].effect == pytest.approx(apart.mean() / apart.std(ddof=1))
        assert (found[name].low, found[name].high) == pytest.approx(
            (apart.mean() - 3.18245 * error, apart.mean() + 3.18245 * error),
            rel=1e-4,  # t(0.975, 3)
        )
        raw[name] = 2 * (1 - t_of_three(abs(apart.mean() / error)))
    assert found["far"].p == pytest.approx(2 * raw["far"], rel=1e-6)
    assert found["near"].p == pytest.approx(raw["near"], rel=1e-6)
    cells = make_report(comparison, summarize(comparison), COSTS).tables["accuracy and angle"]
    assert cells[1]["difference to BP, points"].startswith(f"{100 * found['near'].mean:+.2f} [")
    assert cells[0]["p"] == cells[3]["p"] == cells[4]["p"] == "-"


def t_of_three(t: float) -> float:
    """Student's distribution function with 3 degrees of freedom, in closed form."""
    x = t / math.sqrt(3)
    return 0.5 + (x / (1 + x * x) + math.atan(x)) / math.pi


def trial(factor: float, result: Result | None, folder: Path) -> None:
    if result is not None:
        result.save(folder / "trials" / "row" / f"x{factor:g}")


def test_the_best_trial_is_chosen_once_all_have_ended(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path, {"row": SETTINGS}, {"row": 2}, [0.1, 1.0, 10.0])
    best, equal = (Result("finished", epochs=(Epoch(accuracy, 1.0),)) for accuracy in (0.9, 0.9))
    worse = Result("finished", epochs=(Epoch(0.2, 1.0),))
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
    step(5.0, 1.0)
    assert times.take() == (6.0, 4.0 / 13.0)  # the fastest step, the share of all
    step(4.0, 5.0)
    assert times.take() == (10.0, 0.5)


def test_the_search_for_a_rate_goes_outwards_until_the_best_is_inside(tmp_path: Path) -> None:
    """With as many trials for the row whose best was inside from the start."""

    def accuracy(row: str, factor: float) -> float:
        return 1 / (1 + abs(math.log(factor / {"low": 0.02, "inside": 1.2}[row])))

    comparison = Comparison(tmp_path, {"low": SETTINGS, "inside": SETTINGS}, {"low": 1, "inside": 1}, [0.3, 1.0, 3.0])
    while True:
        for row in comparison.rows:
            for each in comparison.trials(row):
                Result("finished", epochs=(Epoch(accuracy(row, each.factor), 1.0),)).save(each.folder)
        if not comparison.needs_round(["low", "inside"]):
            break
        comparison.rounds += 1
    factors = {row: [each.factor for each in comparison.trials(row)] for row in comparison.rows}
    assert factors["low"] == [0.3, 1.0, 3.0, 0.09, 0.027, 0.0081]  # the last is worse: the best is inside
    assert factors["inside"][:4] == [0.3, 1.0, 3.0, 1.732]  # between the best and its better neighbour
    assert len(factors["inside"]) == 6
    assert comparison.chosen_factor("low") == 0.027
    assert not comparison.is_at_edge("low")
    assert not any(row.at_edge for row in summarize(comparison))


def test_the_search_ends_and_a_rate_at_the_edge_is_marked(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path, {"row": SETTINGS}, {"row": 1}, [0.5, 1.0])
    comparison.rounds = MOST_ROUNDS
    for _ in range(MOST_ROUNDS + 1):
        for each in comparison.trials("row"):
            Result("finished", epochs=(Epoch(each.factor / 100, 1.0),), learning_rate=(each.factor,)).save(each.folder)
    assert [each.factor for each in comparison.trials("row")] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert not comparison.needs_round(["row"])
    write_runs(tmp_path, "row", [0.5])
    (run,) = comparison.runs("row")
    Result("finished", learning_rate=(1.6,)).save(run.folder)
    report = make_report(comparison, summarize(comparison), COSTS)
    assert report.tables["accuracy and angle"][0]["learning rate"] == "1.6 (edge)"
    assert any(note.startswith("(edge):") for note in report.notes)
    assert any("of 6 trials" in note and "then 4 more for all" in note for note in report.notes)


def test_what_is_decided_stays_so_when_a_row_is_added(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path, {"row": SETTINGS}, {"row": 1}, [0.5, 1.0])
    for each in comparison.trials("row"):
        Result("finished", epochs=(Epoch(each.factor / 10, 1.0),)).save(each.folder)
    assert comparison.needs_round(["row"])
    write_runs(tmp_path, "row", [0.5])
    assert not comparison.needs_round(["row"])


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
