"""The main job at the size of a coffee break: BP, DTP and L-DRL on real digits, compared (``make demo``)."""

import sys
from pathlib import Path

from rich.console import Console

from bioprop.cli import main
from bioprop.errors import UserError
from bioprop.experiments.figures import draw_comparison
from bioprop.experiments.runs import Run, read_run
from bioprop.experiments.tables import screen_table, write_table

CONFIGS = Path(__file__).parents[3] / "lightning_configs"
RUNS = {"Backprop": "backprop", "DTP": "dtp", "LDRL": "ldrl"}
TITLE = "scikit-learn's digits, small LeNet, the same seed, split and epochs"


def train_and_test(algorithm: str, config: Path, folder: Path) -> Run:
    """Run ``bioprop fit`` and then ``bioprop test`` on the best checkpoint, as a user would.

    Args:
        algorithm: name of the run and of its folder.
        config: the configuration of both commands.
        folder: where the run's folder is made.
    """
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", f"--trainer.logger.name={algorithm}"]
    shared = ["--config", str(config), "--trainer.enable_model_summary=false", *logger]
    trained = main(["fit", *shared])
    best = trained.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    tested = main(["test", *shared, "--ckpt_path", best])
    metrics = Path(str(trained.trainer.log_dir)) / "metrics.csv"
    return read_run(algorithm, metrics, float(tested.trainer.callback_metrics["test/accuracy"]))


def run_demo(folder: Path = Path("runs/demo")) -> None:
    """Train the three algorithms, show the table, write ``table.csv`` and ``comparison.png`` into the folder."""
    console = Console()
    runs = []
    for number, (algorithm, name) in enumerate(RUNS.items(), start=1):
        console.rule(f"{number} of {len(RUNS)}: {algorithm}")
        runs.append(train_and_test(algorithm, CONFIGS / f"{name}_lenet_digits.yaml", folder))
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
