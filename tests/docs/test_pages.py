"""What pages name exists: links, files, modules; and every page can be found."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, README, ROOT, links, name_of

every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
#: Three screens of 50 lines.
LONGEST_README = 150


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        assert (page.parent / link).exists(), link


@every_page
def test_files_it_names_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"(?<![\w/.])(?:lightning_configs|docs|benchmarks|examples|tests|src)/[\w./]+\.\w+", text):
        assert (ROOT / name).is_file() or f"build/{name}" in text, name
    for module in re.findall(r"python -m ((?:benchmarks|examples|docs)\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += [(page.parent / link).resolve() for link in links(page) if link.endswith(".md")]
    assert {page for page in PAGES if page.name != "table.md"} <= reached


def test_the_index_links_every_page_that_its_contents_list() -> None:
    index = ROOT / "docs" / "index.md"
    listed = re.findall(r"^([\w/]+)$", "".join(re.findall(r"```{toctree}(.*?)```", index.read_text(), re.DOTALL)), re.M)
    assert listed
    assert set(listed) == {link.rpartition(".")[0] for link in links(index)}


def test_the_readme_is_three_screens() -> None:
    assert len(README.read_text().splitlines()) <= LONGEST_README
