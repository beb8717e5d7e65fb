"""What watches a run: alignment with BP, the course of feedback training, divergence, time, predictions."""

from bioprop.callbacks.alignment import AlignmentToBackprop
from bioprop.callbacks.divergence import DivergenceError, DivergenceGuard
from bioprop.callbacks.epoch_seconds import EpochSeconds
from bioprop.callbacks.feedback_record import FeedbackRecord
from bioprop.callbacks.predictions import PredictionsFile
from bioprop.callbacks.wandb_runs import WandbSummary

__all__ = [
    "AlignmentToBackprop",
    "DivergenceError",
    "DivergenceGuard",
    "EpochSeconds",
    "FeedbackRecord",
    "PredictionsFile",
    "WandbSummary",
]
