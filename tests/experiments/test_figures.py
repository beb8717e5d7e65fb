from pathlib import Path

import pytest
from PIL import Image

from bioprop.errors import UserError
from bioprop.experiments.figures import draw_feedback_training, draw_figures
from bioprop.experiments.plan import Run
from bioprop.experiments.results import Epoch, Result, Test
from bioprop.experiments.summary import Ended, Row


def colours(path: Path) -> int:
    with Image.open(path) as picture:
        assert min(picture.size) > 500
        return len(picture.convert("RGB").getcolors(1 << 24))


def make_row(name: str, level: float, seeds: int = 3, angles: bool = True) -> Row:
    ended = []
    for seed in range(seeds):
        epochs = tuple(
            Epoch(
                val_accuracy=level * (1 - 0.5 ** (number + 1)) + 0.01 * seed,
                seconds=0.1 + level,
                batch_seconds=0.1,
                step_seconds=1.0,
                feedback_seconds=0.5,
                angles={"conv1": 90 * level + number, "fc1": 40 * level, "overall": 1.0} if angles else {},
            )
            for number in range(5)
        )
        run = Run(name, Path(name), seed, 1.0, False)
        ended.append(Ended(run, Result("finished", epochs=epochs), Test(level, 100)))
    return Row(name, "LDRL", seeds, [], ended)


def test_figures_of_few_and_of_many_rows_are_drawn(tmp_path: Path) -> None:
    draw_figures([make_row("one", 0.9), make_row("two", 0.5, seeds=1, angles=False)], tmp_path / "few", "a title")
    draw_figures([make_row(f"row {n}", n / 20) for n in range(1, 20)], tmp_path / "many", "a title")

    names = {"accuracy.png", "angles.png", "time.png", "comparison.png"}
    assert {path.name for path in (tmp_path / "few").iterdir()} == names
    for name in names:
        assert colours(tmp_path / "few" / name) > 50
        assert colours(tmp_path / "many" / name) > colours(tmp_path / "few" / name)


def test_no_figure_is_drawn_of_runs_that_did_not_finish(tmp_path: Path) -> None:
    row = make_row("one", 0.9)
    diverged = row._replace(runs=[each._replace(result=Result("diverged"), test=None) for each in row.runs])
    draw_figures([diverged], tmp_path / "none", "a title")

    assert not (tmp_path / "none").exists()


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


@pytest.mark.parametrize(
    "content",
    [
        b"a,b\n1,2\n",
        b"epoch,batch,stage,iteration,loss\n0,0,fc1,0,1\n",
        b"epoch,batch,stage,iteration,loss,angle\n0,0,fc1,0,low,1\n",
        b"epoch,batch,stage,iteration,loss,angle\n0,0,fc1\n",
        b"\xff\xfe\x00nonsense\n1\n",
        b"epoch;batch;stage;iteration;loss;angle\n0;0;fc1;0;1;1\n",
    ],
)
def test_another_programs_record_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "feedback_training.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"training\.csv is not what FeedbackRecord writes: its columns must be"):
        draw_feedback_training(tmp_path / "feedback_training.csv", tmp_path / "course.png")
    assert not (tmp_path / "course.png").exists()
