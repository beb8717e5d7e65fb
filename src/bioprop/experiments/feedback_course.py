"""Draw the course of feedback training: ``python -m bioprop.experiments.feedback_course RUN_FOLDER``."""

from pathlib import Path

from bioprop.commands import conduct


def draw(run_folder: Path) -> None:
    """Draw ``feedback_training.png`` from the run's ``feedback_training.csv`` and print its path.

    Args:
        run_folder: folder of a run that was trained with the callback FeedbackRecord.
    """
    from rich.console import Console

    from bioprop.experiments.figures import draw_feedback_training

    picture = run_folder / "feedback_training.png"
    draw_feedback_training(run_folder / "feedback_training.csv", picture)
    Console().print(f"picture: {picture}", soft_wrap=True)


def _command() -> None:
    from jsonargparse import auto_cli

    from bioprop.faults import as_user_error

    try:
        auto_cli(draw)
    except OSError as error:
        raise as_user_error(error) or error from error


if __name__ == "__main__":
    conduct(_command)
