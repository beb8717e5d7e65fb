"""What watches a run and saves it: alignment with BP, feedback training, divergence, time, predictions, checkpoints."""

from bioprop.callbacks.alignment import AlignmentToBackprop
from bioprop.callbacks.checkpointing import RunCheckpoints
from bioprop.callbacks.divergence import DivergenceError, DivergenceGuard
from bioprop.callbacks.epoch_seconds import EpochSeconds
from bioprop.callbacks.feedback_record import FeedbackRecord
from bioprop.callbacks.predictions import PredictionsFile
from bioprop.callbacks.run_config import SaveRunConfig
from bioprop.callbacks.run_report import RunReport
from bioprop.callbacks.stop_signals import RunStopped
from bioprop.callbacks.wandb_runs import WandbSummary

__all__ = [
    "AlignmentToBackprop",
    "DivergenceError",
    "DivergenceGuard",
    "EpochSeconds",
    "FeedbackRecord",
    "PredictionsFile",
    "RunCheckpoints",
    "RunReport",
    "RunStopped",
    "SaveRunConfig",
    "WandbSummary",
]
