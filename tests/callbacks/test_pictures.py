"""Pictures of a single run."""

import math
from pathlib import Path

import pytest
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback

from bioprop.callbacks import AlignmentToBackprop, FeedbackRecord, RunPictures, pictures
from bioprop.runs.folder import run_folder
from tests.callbacks.test_in_training import fit, make

PICTURES = {"curves.png", "angles.png", "feedback_training.png"}


def drawn(trainer: Trainer) -> set[str]:
    return {path.name for path in run_folder(trainer).glob("*.png")}


def test_a_run_of_two_epochs_leaves_its_pictures(tmp_path: Path) -> None:
    watchers: list[Callback] = [AlignmentToBackprop(max_images=16), FeedbackRecord(2), RunPictures()]
    trainer = fit(tmp_path, make(), *watchers, epochs=2)

    assert drawn(trainer) == PICTURES
    for name in PICTURES:
        with Image.open(run_folder(trainer) / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_one_epoch_is_no_course_and_without_angles_there_is_no_picture_of_them(tmp_path: Path) -> None:
    assert drawn(fit(tmp_path / "one", make(), AlignmentToBackprop(max_images=16), RunPictures())) == set()
    assert drawn(fit(tmp_path / "none", make(), RunPictures(), epochs=2)) == {"curves.png"}


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:  # type: ignore[type-arg]
    """What is drawn, by name of the picture: title, label, panels and epochs."""
    found: dict[str, tuple] = {}  # type: ignore[type-arg]
    monkeypatch.setattr(pictures, "_draw", lambda path, *rest: found.__setitem__(path.name, rest))
    return found


def test_courses_are_those_of_the_file(tmp_path: Path, panels: dict[str, tuple]) -> None:  # type: ignore[type-arg]
    lines = ["epoch,step,val/accuracy,train/loss,angle/conv1,angle/fc2,angle/hidden_stages,angle/overall"]
    lines += ["-1,0,,,91,0.1,90.5,50", "0,9,0.25,,,,,", "0,9,,2.5,70,0.2,70.5,40", "1,19,0.75,1.5,60,0.3,60.5,30"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    pictures.draw_run(tmp_path)

    (loss, accuracy) = panels["curves.png"][2]
    assert loss == ("loss", {"train": [(1, 2.5), (2, 1.5)], "val": []})
    assert accuracy == ("accuracy (%)", {"train": [], "val": [(1, 25.0), (2, 75.0)]})
    ((_, angles),) = panels["angles.png"][2]
    assert angles == {
        "conv1": [(0, 91.0), (1, 70.0), (2, 60.0)],
        "fc2": [(0, 0.1), (1, 0.2), (2, 0.3)],
        "mean over hidden stages": [(0, 90.5), (1, 70.5), (2, 60.5)],
    }
    assert tmp_path.name in panels["angles.png"][0]


def test_recorded_batches_of_different_epochs_are_not_joined(
    tmp_path: Path,
    panels: dict[str, tuple],  # type: ignore[type-arg]
) -> None:
    record = tmp_path / "feedback_training.csv"
    rows = [(epoch, 0, "fc1", k, 10 * epoch + k, 1.0) for epoch in (0, 1) for k in range(2)]
    lines = [",".join(map(str, row)) for row in (("epoch", "batch", "stage", "iteration", "loss", "angle"), *rows)]
    record.write_text("\n".join(lines))
    pictures.draw_feedback_training(record, "a run")

    title, _, ((_, loss), _), epochs = panels["feedback_training.png"]
    assert title == "a run: training of feedback weights"
    values = [value for _, value in loss["fc1"]]
    assert values[:2] + values[3:5] == [0.0, 1.0, 10.0, 11.0]
    assert math.isnan(values[2])
    assert epochs == [(0, 0), (1, 1)]


def test_what_cannot_be_drawn_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Spoil(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: object) -> None:
            (run_folder(trainer) / "feedback_training.csv").write_text("epoch,other\n0,1\n")

    trainer = fit(tmp_path, make(), Spoil(), RunPictures(), epochs=2)
    assert drawn(trainer) == {"curves.png"}
    assert "were not drawn" in caplog.text
