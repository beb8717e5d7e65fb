"""The house: imports run one way, and one batch of L-DRL is a short walk."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from pytorch_lightning import LightningModule

import bioprop
from bioprop.algorithms import LDRL, ParallelLDRL
from bioprop.testing.helpers import draw_batch, small_lenet

ROOT = Path(bioprop.__file__).parent
#: Each package may import those before it.
ORDER = ("functional", "networks", "feedback", "algorithms", "runs", "callbacks", "experiments")
#: Files, and calls from one file into another, that one batch of L-DRL on four stages may take.
FILES, HOPS = 11, 98


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package: str) -> None:
    above = ("cli", "testing") if package != "experiments" else ("testing",)  # whose runs are commands
    later = {f"bioprop.{name}" for name in (*ORDER[ORDER.index(package) + 1 :], *above)}
    found = {
        f"{path.name}: {name}"
        for path in modules_of(package)
        for name in imports_of(path)
        if ".".join(name.split(".")[:2]) in later
    }
    assert found == set()


def test_what_all_packages_use_imports_from_none_of_them() -> None:
    shared = ("commands.py", "distributed.py", "errors.py", "faults.py", "files.py", "ranges.py", "removed.py")
    found = {name for file in shared for name in imports_of(ROOT / file) if name.startswith("bioprop.")}
    assert {name.split(".")[1] for name in found}.isdisjoint(ORDER)


@pytest.mark.parametrize("package", ["functional", "networks", "feedback"])
def test_the_mathematics_does_not_know_lightning(package: str) -> None:
    assert modules_of(package)
    found = {path.name for path in modules_of(package) for name in imports_of(path) if "lightning" in name}
    assert found == set()


@pytest.mark.parametrize("package", [*ORDER, "datamodules", "testing", "."])
def test_a_file_is_a_page(package: str) -> None:
    """Or it is split by meaning."""
    lengths = {path.name: len(path.read_text().splitlines()) for path in modules_of(package)}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def levels(cls: type) -> int:
    """Levels of inheritance below LightningModule."""
    if not issubclass(cls, LightningModule) or cls is LightningModule:
        return 0
    return 1 + max(levels(base) for base in cls.__bases__)


def test_algorithms_lie_few_levels_below_lightning() -> None:
    assert levels(LDRL) == 4
    assert levels(ParallelLDRL) == 5  # L-DRL and one argument


def test_one_batch_is_a_short_walk() -> None:
    algorithm, (images, labels) = LDRL(small_lenet()), draw_batch()
    files: set[str] = set()
    hops = 0

    def watch(frame: FrameType, event: str, arg: object) -> None:
        nonlocal hops
        here = frame.f_code.co_filename
        if event != "call" or not here.startswith(str(ROOT)):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(str(ROOT)):
            caller = caller.f_back
        files.add(here)
        hops += caller is not None and caller.f_code.co_filename != here

    algorithm._learn(images, labels)  # what is done once only
    torch.manual_seed(0)
    sys.setprofile(watch)
    try:
        algorithm._learn(images, labels)
    finally:
        sys.setprofile(None)
    names = sorted(str(Path(file).relative_to(ROOT)) for file in files)
    assert len(files) <= FILES, names
    assert hops <= HOPS
    assert {"feedback/training.py", "feedback/ldrl.py", "networks/stages.py"} <= set(names)
