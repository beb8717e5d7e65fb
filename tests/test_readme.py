"""README and docs say what is true: the example runs, and links, files and commands that they name exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def test_python_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example.replace("128", "8"), names)

    gradients, network = names["gradients"], names["network"]
    assert isinstance(gradients, dict)
    assert isinstance(network, torch.nn.Module)
    assert set(gradients) == {name for name, _ in network.named_parameters()}
    assert names["angles"] == pytest.approx({"conv2": 0.0, "fc1": 0.0, "fc2": 0.0}, abs=1e-6)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_it_names_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"(?<![\w/.])(?:lightning_configs|docs|benchmarks|examples|tests|src)/[\w./]+\.\w+", text):
        assert (ROOT / name).is_file(), name
    for module in re.findall(r"python -m ((?:benchmarks|examples)\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            links = re.findall(r"\]\(([^)#\s]+\.md)\)", page.read_text())
            waiting += [(page.parent / link).resolve() for link in links]
    assert {page.resolve() for page in PAGES if page.name != "table.md"} <= {page.resolve() for page in reached}


def test_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (demo|test|help|lint|bench)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
