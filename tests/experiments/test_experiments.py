import csv
from pathlib import Path

import pytest
from PIL import Image

from bioprop.errors import UserError
from bioprop.experiments import demo
from bioprop.experiments.figures import draw_comparison, draw_feedback_training
from bioprop.experiments.runs import Run, read_run
from bioprop.experiments.tables import write_table

METRICS = """\
angle/conv1,angle/fc1,angle/overall,epoch,step,train/seconds,val/accuracy
99.0,98.0,97.0,-1,0,,
,,,0,9,,0.25
40.0,20.0,30.0,0,9,9.0,
,,,1,19,,0.5
20.0,0.0,10.0,1,19,3.0,
"""


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.csv"
    path.write_text(METRICS)
    return path


def test_run_is_read_without_the_row_from_before_training(metrics: Path) -> None:
    run = read_run("LDRL", metrics, 0.75)

    assert run == Run("LDRL", 0.75, [0.25, 0.5], {"conv1": [40.0, 20.0], "fc1": [20.0, 0.0]}, [9.0, 3.0])
    assert run.mean_angle == 20.0
    assert run.seconds_per_epoch == 3.0


def test_missing_or_empty_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv does not exist"):
        read_run("LDRL", tmp_path / "nowhere.csv", 0.0)
    (tmp_path / "metrics.csv").write_text(METRICS.splitlines()[0])
    with pytest.raises(UserError, match="no finished epoch"):
        read_run("LDRL", tmp_path / "metrics.csv", 0.0)


def test_table_and_picture_are_written(metrics: Path, tmp_path: Path) -> None:
    run = read_run("LDRL", metrics, 0.75)
    write_table([run], tmp_path / "out" / "table.csv")
    draw_comparison([run, run._replace(algorithm="DTP")], tmp_path / "out" / "picture.png", "a title")

    with (tmp_path / "out" / "table.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["algorithm", "test_accuracy", "mean_angle", "seconds_per_epoch"],
            ["LDRL", "0.7500", "20.0000", "3.0000"],
        ]
    with Image.open(tmp_path / "out" / "picture.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_course_of_feedback_training_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"feedback_training\.csv holds no feedback training"):
        draw_feedback_training(tmp_path / "feedback_training.csv", tmp_path / "course.png")
    rows = [
        (0, batch, stage, k, -1.0 / (k + 1), 90 - k) for batch in (0, 5) for stage in ("fc1", "fc2") for k in range(3)
    ]
    lines = [",".join(map(str, row)) for row in (("epoch", "batch", "stage", "iteration", "loss", "angle"), *rows)]
    (tmp_path / "feedback_training.csv").write_text("\n".join(lines))
    draw_feedback_training(tmp_path / "feedback_training.csv", tmp_path / "course.png")
    with Image.open(tmp_path / "course.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.slow
def test_demo_compares_the_three_and_ldrl_is_within_two_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo.run_demo()

    with Path("runs/demo/table.csv").open() as file:
        rows = {row["algorithm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["Backprop", "DTP", "LDRL"]
    accuracy = {name: float(row["test_accuracy"]) for name, row in rows.items()}
    assert accuracy["Backprop"] > 0.95
    assert accuracy["LDRL"] > accuracy["Backprop"] - 0.02
    assert accuracy["DTP"] > 0.8
    assert float(rows["Backprop"]["mean_angle"]) < 0.01 < float(rows["LDRL"]["mean_angle"]) < 60.0
    assert Path("runs/demo/comparison.png").is_file()
