"""Every algorithm has a page, with the same parts and the figures that the tables of `docs/results/` hold."""

import re
from pathlib import Path

import pytest

from bioprop import algorithms
from bioprop.experiments.report import Report, _markdown
from docs.figures import MARKS, TABLES, fill, read_table
from tests.docs.pages import ROOT, links, name_of

PAGES = sorted((ROOT / "docs" / "algorithms").glob("*.md"))
CONFIGS = sorted((ROOT / "lightning_configs").glob("*_*_*.yaml"))
PARTS = ["Equations", "When not to use it", "Figures", "Run it", "Arguments"]
every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def names_on(page: Path) -> list[str]:
    """The names, as in lightning_configs/, of what a page is about."""
    found = MARKS.search(page.read_text())
    assert found
    return found[2].split()


def test_every_configured_algorithm_has_one_page() -> None:
    names = sorted({path.stem.split("_")[0] for path in CONFIGS})
    assert sorted(name for page in PAGES for name in names_on(page)) == names


def test_every_configured_class_has_its_arguments_on_one_page() -> None:
    shown = re.findall(r"autoclass:: bioprop\.algorithms\.(\w+)", "".join(page.read_text() for page in PAGES))
    named = {name for path in CONFIGS for name in re.findall(r"bioprop\.algorithms\.(\w+)", path.read_text())}
    assert len(shown) == len(set(shown))
    assert named <= set(shown) <= set(algorithms.__all__)


@every_page
def test_a_page_has_its_parts_in_their_order(page: Path) -> None:
    headings = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
    assert [heading for heading in headings if heading in PARTS] == PARTS


@every_page
def test_its_figures_are_those_of_the_tables(page: Path) -> None:
    text = page.read_text()
    assert fill(text) == text, "run python -m docs.figures"


@every_page
def test_the_overview_links_it(page: Path) -> None:
    assert f"algorithms/{page.name}" in set(links(ROOT / "docs" / "algorithms.md"))


def test_rows_of_two_tables_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `bioprop compare` writes them: accuracy and cost apart, methods by name."""
    rows = [{"algorithm": name, "test accuracy, %": "9"} for name in ("BP", "L-DRL, published", "weight mirror")]
    cost = [{"algorithm": row["algorithm"], "time per batch, x BP": str(at)} for at, row in enumerate(rows)]
    (tmp_path / "results" / "two").mkdir(parents=True)
    (tmp_path / "results" / "two" / "table.md").write_text(_markdown(Report("both", {"a": rows, "cost": cost}, ["-"])))
    monkeypatch.setattr("docs.figures.DOCS", tmp_path)

    found = read_table("two")
    assert list(found) == ["backprop", "ldrlpublished", "weightmirror"]
    assert found["weightmirror"]["time per batch, x BP"] == "2"
    assert found["weightmirror"]["test accuracy, %"] == "9"


@pytest.mark.parametrize("table", TABLES)
def test_every_table_has_bp_to_compare_with(table: str) -> None:
    assert "backprop" in read_table(table)
