"""The keeping of a run: checkpoints, metrics, settings and folder, its signals, and processes that train together."""

from bioprop.runs.checkpointing import RunCheckpoints
from bioprop.runs.config import SaveRunConfig
from bioprop.runs.metrics import MetricsFile, NoMetrics
from bioprop.runs.processes import GradientAveraging
from bioprop.runs.report import RunReport
from bioprop.runs.signals import RunStopped
from bioprop.runs.wandb import WandbSummary

__all__ = [
    "GradientAveraging",
    "MetricsFile",
    "NoMetrics",
    "RunCheckpoints",
    "RunReport",
    "RunStopped",
    "SaveRunConfig",
    "WandbSummary",
]
