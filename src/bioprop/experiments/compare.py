"""Training and testing several configurations through the command line, as a user would, and reading the results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bioprop.cli import main
from bioprop.experiments.runs import Run, read_run


def train_and_test(name: str, config: Path, folder: Path, options: Sequence[str] = ()) -> Run:
    """Run ``bioprop fit``, then ``bioprop test`` on the best checkpoint.

    Args:
        name: name of the run and of its folder.
        config: the configuration of both commands.
        folder: where the run's folder is made.
        options: further words of the command line.
    """
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", f"--trainer.logger.name={name}"]
    shared = ["--config", str(config), "--trainer.enable_model_summary=false", *logger, *options]
    trained = main(["fit", *shared])
    best = trained.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    tested = main(["test", *shared, "--ckpt_path", best])
    metrics = Path(str(trained.trainer.log_dir)) / "metrics.csv"
    return read_run(name, metrics, float(tested.trainer.callback_metrics["test/accuracy"]))


def train_and_test_all(configs: Mapping[str, Path], folder: Path, options: Sequence[str] = ()) -> list[Run]:
    """Do so for every configuration by its name, one after the other, with the same options."""
    return [train_and_test(name, config, folder, options) for name, config in configs.items()]
