"""Callbacks that watch a run: alignment with BP, feedback training, divergence, time, predictions."""

from bioprop.callbacks.alignment import AlignmentToBackprop
from bioprop.callbacks.divergence import DivergenceGuard
from bioprop.callbacks.epoch_seconds import EpochSeconds
from bioprop.callbacks.feedback_record import FeedbackRecord
from bioprop.callbacks.predictions import PredictionsFile

__all__ = ["AlignmentToBackprop", "DivergenceGuard", "EpochSeconds", "FeedbackRecord", "PredictionsFile"]
