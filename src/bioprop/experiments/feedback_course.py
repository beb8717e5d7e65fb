"""Draw the course of feedback training: ``python -m bioprop.experiments.feedback_course RUN_FOLDER``."""

import sys
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console

from bioprop.errors import UserError
from bioprop.experiments.figures import draw_feedback_training


def draw(run_folder: Path) -> None:
    """Draw ``feedback_training.png`` from the run's ``feedback_training.csv`` and print its path.

    Args:
        run_folder: folder of a run that was trained with the callback FeedbackRecord.
    """
    picture = run_folder / "feedback_training.png"
    draw_feedback_training(run_folder / "feedback_training.csv", picture)
    Console().print(f"picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    try:
        auto_cli(draw)
    except UserError as error:
        sys.stderr.write(f"bioprop: error: {error}\n")
        sys.exit(2)
