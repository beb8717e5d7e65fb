"""A comparison tests the checkpoint that was best on validation images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bioprop.experiments import worker


def test_the_test_images_are_read_with_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the last: that is the one a run goes on from."""
    given: list[str] = []

    def main(arguments: list[str], *_: Any) -> Any:
        given.extend(arguments)
        resident = {"test": SimpleNamespace(labels=torch.zeros(5))}
        trainer = SimpleNamespace(callback_metrics={"test/accuracy": torch.tensor(0.75)})
        return SimpleNamespace(trainer=trainer, datamodule=SimpleNamespace(resident=resident))

    monkeypatch.setattr(worker, "main", main)
    worker.test(SimpleNamespace(folder=tmp_path, arguments=("--model=LDRL",)))  # type: ignore[arg-type]
    assert given[0] == "test"
    assert f"--ckpt_path={tmp_path / 'checkpoints' / 'best.ckpt'}" in given
