"""The main job at the size of a coffee break: BP, DTP and L-DRL on real digits, compared (``make demo``)."""

import sys
from pathlib import Path

from rich.console import Console

from bioprop.errors import UserError
from bioprop.experiments.compare import train_and_test_all
from bioprop.experiments.figures import draw_comparison
from bioprop.experiments.tables import screen_table, write_table

CONFIGS = Path(__file__).parents[3] / "lightning_configs"
RUNS = {name: CONFIGS / f"{name.lower()}_lenet_digits.yaml" for name in ("Backprop", "DTP", "LDRL")}
TITLE = "scikit-learn's digits, small LeNet, the same seed, split and epochs"


def run_demo(folder: Path = Path("runs/demo")) -> None:
    """Train the three algorithms, show the table, write ``table.csv`` and ``comparison.png`` into the folder."""
    console = Console()
    console.rule(f"training {', '.join(RUNS)} on digits, one after the other")
    runs = train_and_test_all(RUNS, folder)
    write_table(runs, folder / "table.csv")
    draw_comparison(runs, folder / "comparison.png", TITLE)
    console.print(screen_table(runs, TITLE))
    console.print(f"table:   {folder / 'table.csv'}\npicture: {folder / 'comparison.png'}", soft_wrap=True)


if __name__ == "__main__":
    try:
        run_demo()
    except UserError as error:
        sys.stderr.write(f"bioprop: error: {error}\n")
        sys.exit(2)
