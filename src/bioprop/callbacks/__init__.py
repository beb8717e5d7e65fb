"""Callbacks of a run: alignment with BP, clipping, divergence, time, feedback training, pictures, predictions."""

from bioprop.callbacks.alignment import AlignmentToBackprop
from bioprop.callbacks.clipping import GradientClipping
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
    "GradientClipping",
    "PredictionsFile",
    "RunPictures",
    "RunningLoss",
]
