"""The notebooks run, and show what their text says; the picture is the one that its code draws."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot

from docs.pictures import PICTURE, draw
from tests.docs.pages import ROOT

NOTEBOOKS = ROOT / "docs" / "notebooks"
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


def cells(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return found


def run(name: str) -> dict[str, Any]:
    """Run the code of a notebook in this process; return its variables."""
    names: dict[str, Any] = {}
    with matplotlib.rc_context({"backend": "agg"}):
        for cell in cells(name):
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
        pyplot.close("all")
    return names


def test_notebooks_are_kept_without_outputs() -> None:
    names = [path.stem for path in NOTEBOOKS.glob("*.ipynb")]
    assert len(names) == 3
    for name in names:
        assert all(cell.get("outputs", []) == [] for cell in cells(name)), name


@pytest.mark.slow
def test_the_first_comparison() -> None:
    last = {name: course[-1] for name, course in run("first_comparison")["courses"].items()}

    assert last["BP"]["angle/overall"] < 1e-3
    assert last["L-DRL"]["angle/overall"] < 5.0
    assert last["DTP"]["angle/overall"] > 45.0
    assert min(last[name]["val/accuracy"] for name in ("BP", "L-DRL")) > 0.9
    assert last["DTP"]["val/accuracy"] > 0.8


@pytest.mark.slow
def test_feedback_learns() -> None:
    names = run("feedback_learns")

    assert max(names["drift"]["echo"].values()) < 0.1
    assert min(names["drift"]["expected"].values()) > 1.0
    assert min(names["drift"]["independent"].values()) > 1.0
    for stage, angle in names["courses"]["echo"][-1].items():
        assert angle < min(names["courses"][name][-1][stage] for name in ("expected", "independent"))
    ends = {name: course[-1]["overall"] for name, course in names["trained"].items()}
    assert ends["echo"] < 10.0 < min(ends["expected"], ends["independent"])
    assert all(course[0]["fc2"] < 1e-3 for course in names["trained"].values())


@pytest.mark.slow
def test_ones_own_network() -> None:
    names = run("own_network")

    assert all(each["accuracy"] > 0.8 for each in [*names["chain"].values(), *names["any_module"].values()])
    assert names["chain"]["L-DRL"]["angle"] < 5.0
    assert names["any_module"]["transpose"]["angle"] < 1e-3
    # of first order in beta
    assert names["symmetric"][0.05] == pytest.approx(names["symmetric"][0.5] / 10, rel=0.1)
    assert names["symmetric"][0.005] == pytest.approx(names["symmetric"][0.5] / 100, rel=0.1)


def test_the_picture_is_what_its_code_draws(tmp_path: Path) -> None:
    """Down to the glyphs and lines; places of text may differ between releases of matplotlib."""
    draw(tmp_path / "drawn.svg")
    kept, drawn = (re.findall(r"<!-- (.+?) -->", path.read_text()) for path in (PICTURE, tmp_path / "drawn.svg"))
    assert any("G" in text for text in kept)
    assert drawn == kept
