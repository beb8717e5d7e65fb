"""Counting files by what was found of them, to be said in a line."""

from pathlib import Path

from bioprop.files import readable


class Tally:
    """How many files there are of each kind, with the name of the first: ``3 hidden ('a/.x'), 1 turned ('b/y')``."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str | Path]] = {}

    def add(self, kind: str, name: str | Path, count: int = 1) -> None:
        """Counts a file, or several; `kind` follows a number in the sentence."""
        before, first = self._found.get(kind, (0, name))
        self._found[kind] = (before + count, first)

    def update(self, other: "Tally") -> None:
        """Adds what another one has counted."""
        for kind, (count, name) in other._found.items():
            self.add(kind, name, count)

    def kinds(self) -> set[str]:
        """Returns the kinds counted so far."""
        return set(self._found)

    def __bool__(self) -> bool:
        return bool(self._found)

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind} ('{readable(name)}')" for kind, (count, name) in self._found.items())
