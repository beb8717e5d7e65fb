"""Clipping holds for what the forward weights step along, whatever the algorithm, and for nothing else."""

from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn

from bioprop.cli import main
from tests.test_cli import TINY, in_empty_folder

__all__ = ["in_empty_folder"]  # the fixture


def vector(module: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for each in module.parameters()])


class Steps(Callback):
    """Keeps how far the forward weights moved in each batch, with a learning rate of 1, and the feedback weights."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen: list[torch.Tensor] = []
        self.before = vector(pl_module.network)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        now = vector(pl_module.network)
        self.seen.append(now - self.before)
        self.before = now


def steps(model: str, *words: str) -> Steps:
    sgd = [
        "--model.optimizer=SGD",
        "--model.optimizer.lr=1.0",
        "--model.optimizer.weight_decay=0",
        "--trainer.limit_train_batches=1",
    ]
    own = "--trainer.callbacks+=tests.callbacks.test_clipping.Steps"
    cli = main(
        [
            "fit",
            f"--model={model}",
            *TINY,
            *sgd,
            own,
            "--trainer.max_epochs=1",
            "--trainer.limit_train_batches=1",
            *words,
        ]
    )
    return next(each for each in cli.trainer.callbacks if isinstance(each, Steps))


@pytest.mark.parametrize("model", ["Backprop", "LDRL", "DTP"])
def test_the_forward_step_is_clipped_and_keeps_its_direction(model: str) -> None:
    free, clipped = steps(model).seen[0], steps(model, "--trainer.gradient_clip_val=0.01").seen[0]
    assert free.norm() > 0.02
    assert clipped.norm() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped, free * 0.01 / free.norm(), rtol=1e-3, atol=1e-6)


def test_by_value() -> None:
    words = ["--trainer.gradient_clip_val=0.001", "--trainer.gradient_clip_algorithm=value"]
    free, clipped = steps("Backprop").seen[0], steps("Backprop", *words).seen[0]
    torch.testing.assert_close(clipped, free.clamp(-0.001, 0.001), rtol=1e-3, atol=1e-6)
    assert (free.abs() > 0.001).any()
