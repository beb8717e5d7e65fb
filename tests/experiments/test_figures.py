from pathlib import Path

from PIL import Image

from bioprop.experiments.costs import Costs, Turn
from bioprop.experiments.figures import draw_figures
from bioprop.experiments.plan import Run
from bioprop.experiments.results import Epoch, Result, Test
from bioprop.experiments.summary import Ended, Row


def colours(path: Path) -> int:
    with Image.open(path) as picture:
        assert min(picture.size) > 500
        return len(picture.convert("RGB").getcolors(1 << 24))


def make_row(name: str, level: float, seeds: int = 3, angles: bool = True, family: str = "") -> Row:
    ended = []
    for seed in range(seeds):
        epochs = tuple(
            Epoch(
                val_accuracy=level * (1 - 0.5 ** (number + 1)) + 0.01 * seed,
                seconds=0.1 + level,
                angles={"conv1": 90 * level + number, "fc1": 40 * level, "overall": 1.0} if angles else {},
            )
            for number in range(5)
        )
        run = Run(name, Path(name), seed, 1.0, False)
        ended.append(Ended(run, Result("finished", epochs=epochs), Test(level, 100)))
    return Row(name, "LDRL" if family else "Backprop", seeds, [], ended, family)


COSTS = Costs(
    {"backprop": [Turn(0.1, 0.0)], "two": [Turn(0.2, 0.0)]} | {f"row {n}": [Turn(0.05 * n, 0.0)] for n in range(1, 12)}
)
FIGURES = ("accuracy", "angles", "accuracy_angle", "accuracy_cost", "curves", "time", "angle_curves")


def test_figures_of_few_and_of_many_rows_are_drawn_and_always_the_same(tmp_path: Path) -> None:
    few = [make_row("backprop", 0.9), make_row("two", 0.5, seeds=1, angles=False, family="others")]
    many = [make_row("backprop", 0.9), *(make_row(f"row {n}", n / 20, family=f"family {n % 3}") for n in range(1, 12))]
    draw_figures(few, COSTS, tmp_path / "few", "a title")
    draw_figures(many, COSTS, tmp_path / "many", "a title")

    names = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")} | {"comparison.png"}
    assert {path.name for path in (tmp_path / "few").iterdir()} == names
    for name in (*FIGURES, "comparison"):
        assert colours(tmp_path / "few" / f"{name}.png") > 50
        assert colours(tmp_path / "many" / f"{name}.png") > colours(tmp_path / "few" / f"{name}.png")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "few").iterdir()}
    draw_figures(few, COSTS, tmp_path / "few", "a title")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "few").iterdir()} == before


def test_no_figure_is_drawn_of_runs_that_did_not_finish(tmp_path: Path) -> None:
    row = make_row("one", 0.9)
    diverged = row._replace(runs=[each._replace(result=Result("diverged"), test=None) for each in row.runs])
    draw_figures([diverged], COSTS, tmp_path / "none", "a title")

    assert not (tmp_path / "none").exists()
