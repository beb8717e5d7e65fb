"""Runs on Weights & Biases: their names, charts, summaries and exit status.

Everything here is idle where the logger is another one, and nothing here imports ``wandb``: Lightning's logger does,
when a run begins.
"""

import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from bioprop.errors import UserError
from bioprop.feedback.training import FeedbackIteration
from bioprop.runs.folder import flat, run_labels

if TYPE_CHECKING:
    from wandb import Run

#: Horizontal axis of the charts of feedback training: iterations on the recorded batches, one batch after the other.
FEEDBACK_STEP = "feedback/iteration"


def wandb_run(trainer: Trainer) -> "Run | None":
    """Return the W&B run that a trainer logs to from this process; None with other loggers, and on other ranks."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            run: Run = logger.experiment
            return run
    return None


def describe_run(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Name and tag a W&B run by algorithm, network and data, give it its settings, and draw charts over epochs.

    The name ends in the run's id, which is also the name of its folder; a name of the user's stays. The settings are
    listed flat under the names that the command line, and so a sweep, has for them (``model.optimizer.lr``).

    Args:
        trainer: trainer that is about to begin.
        settings: the resolved configuration as plain data, the content of ``config.yaml``.
    """
    run = wandb_run(trainer)
    if run is None:
        return
    labels = run_labels(settings)
    if not _named_by_user(settings["trainer"]["logger"]):
        run.name = f"{labels.name}_{run.id}"
    run.tags = tuple(dict.fromkeys((*(run.tags or ()), *labels)))
    # All that is logged belongs to an epoch. Overwrites the logger's pattern: of two that match, W&B takes either.
    run.define_metric("*", step_metric="epoch", step_sync=True, overwrite=True)
    entries = {name: value for name, value in flat(settings).items() if value is not None} | labels._asdict()
    if run.sweep_id:  # a sweep's own parameters are there already, under the same names, and locked
        entries = {name: value for name, value in entries.items() if name not in run.config}
    run.config.update(entries, allow_val_change=True)  # type: ignore[no-untyped-call]
    leave_hyperparameters(trainer)


def leave_hyperparameters(trainer: Trainer) -> None:
    """Keep a W&B run free of the same hyperparameters once more, under names that lack their owner's."""
    if wandb_run(trainer) is None:
        return
    trainer.lightning_module._log_hyperparams = False
    if trainer.datamodule is not None:  # type: ignore[attr-defined]
        trainer.datamodule._log_hyperparams = False  # type: ignore[attr-defined]


def _named_by_user(loggers: Any) -> bool:
    """Return whether the configuration of the loggers, or W&B's environment variable, holds a name for the run."""
    listed = loggers if isinstance(loggers, list) else [loggers]
    given = [logger["init_args"].get("name") for logger in listed if logger["class_path"].endswith("WandbLogger")]
    return bool(os.environ.get("WANDB_NAME") or any(given))


class WandbSummary(Callback):
    """Keep the best validation accuracy as the run's summary on W&B, where the last one would stand otherwise.

    As a plain number, unlike with W&B's own ``define_metric(..., summary="max")``: a sweep's charts look for the metric
    under its own name.
    """

    def __init__(self) -> None:
        self._best = -math.inf

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise the summary if this epoch's validation, which is over by now, was the best."""
        run, accuracy = wandb_run(trainer), trainer.callback_metrics.get("val/accuracy")
        if run is not None and accuracy is not None:
            self._best = max(self._best, float(accuracy))
            run.summary["val/accuracy"] = self._best

    def state_dict(self) -> dict[str, Any]:
        """The best so far, for a run that goes on."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best of a checkpoint."""
        self._best = state_dict["best"]


def chart_feedback(run: "Run", course: Sequence[FeedbackIteration], start: int) -> int:
    """Log the course of feedback training on one batch as line charts, ``feedback/<stage>/loss`` and ``.../angle``.

    Args:
        run: W&B run to log to.
        course: losses and angles of each stage and iteration.
        start: number of iterations charted before, at which this batch's first one is drawn.

    Returns:
        The ``start`` of the next batch.
    """
    rows: dict[int, dict[str, float]] = {}
    for seen in course:
        row = rows.setdefault(start + seen.iteration, {FEEDBACK_STEP: start + seen.iteration})
        row[f"feedback/{seen.stage}/loss"] = float(seen.loss)
        if not math.isnan(angle := float(seen.angle)):  # the feedback weight has a forward weight to be compared with
            row[f"feedback/{seen.stage}/angle"] = angle
    if start == 0:
        for name in sorted({name for row in rows.values() for name in row} - {FEEDBACK_STEP}):
            run.define_metric(name, step_metric=FEEDBACK_STEP)
    for _, row in sorted(rows.items()):
        run.log(row)
    return max(rows, default=start - 1) + 1


@contextmanager
def reported_to_wandb() -> Iterator[None]:
    """End the W&B run that begins inside with the status of what happened: one that stops on an error has failed.

    Raises:
        UserError: if W&B refuses to begin the run, for want of an account or of a connection.
    """
    before = _active_run()
    try:
        yield
    except BaseException as error:
        _finish(before, exit_status(error))
        if isinstance(error, Exception) and type(error).__module__.partition(".")[0] == "wandb":
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"Weights & Biases refuses the run ({reason}): run `wandb login` once, set "
                "WANDB_MODE=offline to keep runs on this machine, or leave the W&B logger out to write CSV files"
            ) from error
        raise
    _finish(before, 0)


def exit_status(error: BaseException) -> int:
    """Return the status with which a process ends on an error; never that of success, except for ``sys.exit(0)``."""
    if isinstance(error, SIGTERMException):  # stopped half-way, by a sweep's early termination or a cluster
        return 128 + signal.SIGTERM
    if isinstance(error, SystemExit):
        code = error.code
        return code if isinstance(code, int) else int(code is not None)
    return 2 if isinstance(error, UserError) else 1


def _active_run() -> "Run | None":
    module = sys.modules.get("wandb")
    return None if module is None else module.run


def _finish(before: "Run | None", status: int) -> None:
    run = _active_run()
    if run is not None and run is not before:  # one that the caller had begun is the caller's to end
        run.finish(exit_code=status)
