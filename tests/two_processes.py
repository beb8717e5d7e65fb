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
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, distributed

from bioprop.algorithms import Backprop
from bioprop.callbacks import AlignmentToBackprop, RunCheckpoints
from bioprop.datamodules.loader import ResidentLoader
from bioprop.metrics_file import MetricsFile
from bioprop.networks import LeNet


class Averaged(Backprop):
    """Averages its gradients itself."""

    def on_fit_start(self) -> None:
        """Leave out the look at the number of processes."""

    def _step_forward_weights(self, gradients: dict[str, Tensor]) -> None:
        averaged = {name: gradient / 2 for name, gradient in gradients.items()}
        for gradient in averaged.values():
            distributed.all_reduce(gradient)
        super()._step_forward_weights(averaged)


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
    generator = torch.Generator().manual_seed(int(os.environ.get("LOCAL_RANK", "0")))
    images, labels = torch.randn(40, 1, 16, 16, generator=generator), torch.randint(10, (40,), generator=generator)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
        use_distributed_sampler=False,
        max_epochs=2,
        logger=MetricsFile(folder.parent, name="", version=folder.name),
        callbacks=[RunCheckpoints(1), AlignmentToBackprop(8), Befall(what)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Averaged(LeNet((1, 16, 16), 10, channels=(3, 4), hidden=8)),
        ResidentLoader(images, labels, 8, shuffle=True),
        ResidentLoader(images, labels, 8),
        ckpt_path=folder / "checkpoints" / "last.ckpt" if goes_on else None,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], len(sys.argv) > 3)
