"""Imports between the parts of the package run one way."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "bioprop"
#: Every part imports from those before it alone.
ORDER = ("functional", "networks", "feedback", "algorithms", "runs", "callbacks", "experiments")
IMPORT = re.compile(r"^\s*(?:from|import) bioprop\.(\w+)", re.MULTILINE)


@pytest.mark.parametrize("part", ORDER)
def test_no_part_imports_from_one_above_it(part: str) -> None:
    above = ORDER[ORDER.index(part) + 1 :]
    imported = {
        (str(path.relative_to(PACKAGE)), name)
        for path in (PACKAGE / part).rglob("*.py")
        for name in IMPORT.findall(path.read_text())
    }
    assert {(path, name) for path, name in imported if name in above} == set()


def test_what_all_parts_use_imports_from_none_of_them() -> None:
    shared = ("commands.py", "distributed.py", "errors.py", "faults.py", "files.py", "removed.py")
    imported = {name for file in shared for name in IMPORT.findall((PACKAGE / file).read_text())}
    assert imported.isdisjoint(ORDER)
