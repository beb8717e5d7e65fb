"""A script that trains in two processes, for tests: ``python two_processes.py FOLDER WHAT [go on]``.

WHAT befalls the run in its fifth batch: ``term0`` or ``term1`` (SIGTERM to one process), ``full`` (no file can be
written for two batches), or ``nothing``.
"""

import os
import resource
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from bioprop.algorithms import LDRL
from bioprop.callbacks import AlignmentToBackprop
from bioprop.datamodules.loader import ResidentLoader
from bioprop.networks import LeNet
from bioprop.runs import GradientAveraging, RunCheckpoints
from bioprop.runs.metrics import MetricsFile


class Befall(Callback):
    """Does what is asked for."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 4 and self.what == f"term{trainer.global_rank}":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.what == "full" and trainer.global_step in (4, 6):
            limit = 20_000 if trainer.global_step == 4 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def main(folder: Path, what: str, goes_on: bool) -> None:
    """Train."""
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    generator, share = torch.Generator().manual_seed(2), (int(os.environ.get("LOCAL_RANK", "0")), 2)
    images, labels = torch.randn(40, 1, 16, 16, generator=generator), torch.randint(10, (40,), generator=generator)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=GradientAveraging(),
        max_epochs=2,
        logger=MetricsFile(folder.parent, name="", version=folder.name),
        callbacks=[RunCheckpoints(1), AlignmentToBackprop(8), Befall(what)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        LDRL(LeNet((1, 16, 16), 10, channels=(3, 4), hidden=8), iterations=2),
        ResidentLoader(images, labels, 8, shuffle=True, share=share, equal_shares=True),
        ResidentLoader(images, labels, 8, share=share),
        ckpt_path=folder / "checkpoints" / "last.ckpt" if goes_on else None,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], len(sys.argv) > 3)
