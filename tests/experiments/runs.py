"""Comparisons of a few digits, for tests."""

import csv
from pathlib import Path

import yaml

from bioprop.experiments.compare import main
from bioprop.experiments.configs import CONFIGS

LENET = ["--network=lenet", "--data=digits"]
TINY = [
    "--model.network.channels=[4,4]",
    "--model.network.hidden=8",
    "--data.batch_size=32",
    "--data.limit_train=96",
    "--data.limit_val=40",
    "--data.limit_test=50",
]


def compare(folder: Path, *words: str, options: list[str] | None = None) -> int:
    """Run ``bioprop compare`` in this process, on few images."""
    return main([f"--folder={folder}", *words, "--", *(TINY if options is None else options)])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(folder: Path) -> dict[str, dict[str, str]]:
    """The Markdown tables by row and heading, those of a row joined."""
    found: dict[str, dict[str, str]] = {}
    for part in (folder / "table.md").read_text().split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in part.splitlines()]
        if part.startswith("| "):
            for cells in lines[2:]:
                found.setdefault(cells[0], {}).update(zip(lines[0], cells, strict=True))
    return found


def write_config(path: Path, algorithm: str = "backprop", lr: float | None = None, model: str | None = None) -> Path:
    """Write the digits configuration of an algorithm, with another rate or class."""
    settings = yaml.safe_load((CONFIGS / f"{algorithm}_lenet_digits.yaml").read_text())
    if lr is not None:
        settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] = lr
    if model is not None:
        settings["model"]["class_path"] = model
    path.write_text(yaml.safe_dump(settings))
    return path
