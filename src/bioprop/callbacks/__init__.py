"""Callbacks that watch a run: alignment with BP, feedback training, divergence, time, pictures, predictions."""

from bioprop.callbacks.alignment import AlignmentToBackprop
from bioprop.callbacks.divergence import DivergenceGuard
from bioprop.callbacks.epoch_seconds import EpochSeconds
from bioprop.callbacks.feedback_record import FeedbackRecord
from bioprop.callbacks.pictures import RunPictures
from bioprop.callbacks.predictions import PredictionsFile
from bioprop.callbacks.progress import RunningLoss

__all__ = [
    "AlignmentToBackprop",
    "DivergenceGuard",
    "EpochSeconds",
    "FeedbackRecord",
    "PredictionsFile",
    "RunPictures",
    "RunningLoss",
]
